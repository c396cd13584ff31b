"""The objects that are looked at, each read once, found by what they name. Pure.

A `Subject` is one object with what is wrong with it alone. `Known` finds subjects by key, or by a `Term`: what one
object says and another asks for ("a DestinationRule for this host"). `View` lays some objects over known ones, as if
they were written already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from istio.analyze import destinationrule, gateway, serviceentry, values, virtualservice
from istio.analyze.finding import Finding
from istio.analyze.hosts import CLUSTER_DOMAIN, full_name
from istio.analyze.shape import Reader
from istio.analyze.shapes import SHAPES
from istio.names import DESTINATION_RULE, GATEWAY, SERVICE_ENTRY, VIRTUAL_SERVICE
from meshctl.ports import KubeObject, ObjectKey

Term = tuple[str, ...]
DEFAULT_NAMESPACE = "default"
"""Of an object that names none, as kubectl has it."""
SERVICE = "Service"
POD = "Pod"
WILDCARDS: Term = ("wildcards",)
"""DestinationRules for hosts that begin with ``*``, but not with ``*.``."""

_OWN_BUSINESS = ("endpoints", "trafficPolicy")
"""Fields that no other object asks for; 10,000 endpoints need not be held twice."""
_GROUP = "networking.istio.io"
_JUDGES: Mapping[str, Callable[..., None]] = {
    VIRTUAL_SERVICE: virtualservice.judge,
    DESTINATION_RULE: destinationrule.judge,
    SERVICE_ENTRY: serviceentry.judge,
    GATEWAY: gateway.judge,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """One object, read."""

    key: ObjectKey
    spec: Mapping[str, Any]
    """Known fields with values of the right types only, less those of `_OWN_BUSINESS`."""
    created: str
    """creationTimestamp (these sort as text); "" when it is not written yet."""
    terms: frozenset[Term]
    own: tuple[Finding, ...]
    """What is wrong with it alone."""
    source: KubeObject

    @property
    def age(self) -> tuple[bool, str, str, str]:
        """Sorts the oldest first, as istiod does; what is not written yet comes last."""
        return (not self.created, self.created, self.key.namespace, self.key.name)


def read(value: Any, *, judged: bool) -> Subject | None:
    """None for what is not an object of a kind that matters here. `judged`: `own` is wanted."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    api = value.get("apiVersion") if kind is not None else None
    metadata = value.get("metadata") if kind is not None else None
    if not isinstance(kind, str) or not isinstance(api, str) or not isinstance(metadata, Mapping):
        return None
    name, namespace = _text(metadata, "name"), _text(metadata, "namespace") or DEFAULT_NAMESPACE
    key, created = ObjectKey(kind, namespace, name), _text(metadata, "creationTimestamp")
    if kind in SHAPES and api.partition("/")[0] == _GROUP:
        return _istio(key, value, created, judged=judged)
    if kind == SERVICE and api == "v1":
        return Subject(key, _service(value), created, frozenset({("entry", service_host(key))}), (), value)
    if kind == POD and api == "v1":
        return Subject(key, {"labels": dict(_mapping(metadata, "labels"))}, created, frozenset(), (), value)
    return None


def service_host(key: ObjectKey) -> str:
    return f"{key.name}.{key.namespace}.svc.{CLUSTER_DOMAIN}"


def gateway_key(name: str, namespace: str) -> ObjectKey:
    """The Gateway that a VirtualService of `namespace` means."""
    if "/" in name:
        owner, _, name = name.partition("/")
        return ObjectKey(GATEWAY, owner, name)
    if "." in name:  # the old form: name.namespace.svc.cluster.local
        name, owner = name.split(".")[:2]
        return ObjectKey(GATEWAY, owner, name)
    return ObjectKey(GATEWAY, namespace, name)


def delegate_key(delegate: Mapping[str, Any], namespace: str) -> ObjectKey:
    return ObjectKey(VIRTUAL_SERVICE, delegate.get("namespace") or namespace, delegate.get("name", ""))


class Known:
    """Objects by key and by term. Objects that did not change (the very same mapping) are not read again.

    `judged`: what is wrong with each alone is wanted, too; without it, only what other objects ask for is read.
    """

    def __init__(self, objects: Iterable[KubeObject] = (), *, judged: bool = False) -> None:
        self._judged = judged
        self._subjects: dict[ObjectKey, Subject] = {}
        self._by_term: dict[Term, dict[ObjectKey, Subject]] = {}
        self._by_source: dict[int, Subject] = {}
        self.sync(objects)

    def sync(self, objects: Iterable[KubeObject]) -> None:
        """Know exactly `objects` from now on. One that is there twice is taken from its first."""
        subjects: dict[ObjectKey, Subject] = {}
        for value in objects:
            subject = self._by_source.get(id(value)) or read(value, judged=self._judged)
            if subject is not None:
                subjects.setdefault(subject.key, subject)
        for key in self._subjects.keys() - subjects.keys():
            self._drop(key)
        for key, subject in subjects.items():
            if self._subjects.get(key) is not subject:
                self._drop(key)
                self._put(subject)
        self._by_source = {id(subject.source): subject for subject in subjects.values()}

    def find(self, key: ObjectKey) -> Subject | None:
        return self._subjects.get(key)

    def having(self, term: Term) -> Mapping[ObjectKey, Subject]:
        return self._by_term.get(term, {})

    def subjects(self) -> Iterable[Subject]:
        return self._subjects.values()

    def every(self, kind: str) -> Iterator[Subject]:
        return (subject for key, subject in self._subjects.items() if key.kind == kind)

    def _put(self, subject: Subject) -> None:
        self._subjects[subject.key] = subject
        for term in subject.terms:
            self._by_term.setdefault(term, {})[subject.key] = subject

    def _drop(self, key: ObjectKey) -> None:
        subject = self._subjects.pop(key, None)
        for term in subject.terms if subject else ():
            held = self._by_term[term]
            del held[key]
            if not held:
                del self._by_term[term]


@dataclass(slots=True)
class View:
    """`over` in front of `base`."""

    base: Known
    over: Known = field(default_factory=Known)

    def find(self, key: ObjectKey) -> Subject | None:
        return self.over.find(key) or self.base.find(key)

    def having(self, term: Term) -> list[Subject]:
        """Ordered by key."""
        mine = self.over.having(term)
        other = [subject for key, subject in self.base.having(term).items() if self.over.find(key) is None]
        return sorted([*mine.values(), *other], key=lambda subject: subject.key)

    def age(self, subject: Subject) -> tuple[bool, str, str, str]:
        """A new version of a live object is as old as that."""
        live = self.base.find(subject.key)
        return subject.age if subject.created or live is None else live.age


def _istio(key: ObjectKey, value: KubeObject, created: str, *, judged: bool) -> Subject:
    reader, spec = Reader(key), value.get("spec") or {}
    if not judged and isinstance(spec, Mapping):
        spec = {name: field for name, field in spec.items() if name not in _OWN_BUSINESS}
    spec = reader.read(spec, SHAPES[key.kind], ("spec",))
    own = _judged(key, spec, reader) if judged else ()
    for name in _OWN_BUSINESS:
        spec.pop(name, None)
    return Subject(key, spec, created, frozenset(_terms(key, spec)), own, value)


def _judged(key: ObjectKey, spec: Mapping[str, Any], reader: Reader) -> tuple[Finding, ...]:
    if not key.name:
        reader.report("MissingField", ("metadata", "name"), "the object has no name")
    elif key.kind == GATEWAY and values.label(key.name):
        reader.report(
            "InvalidName", ("metadata", "name"), f"`{key.name[:80]}` is not a DNS label, as a Gateway's name is"
        )
    if reader.typed:
        _JUDGES[key.kind](spec, reader.report)
    return tuple(sorted(reader.findings, key=lambda finding: finding.order))


def _terms(key: ObjectKey, spec: Mapping[str, Any]) -> Iterator[Term]:
    match key.kind:
        case "VirtualService":
            for name in virtualservice.gateways_of(spec):
                target = name if name == virtualservice.MESH else str(gateway_key(name, key.namespace))
                for host in spec.get("hosts", []):
                    yield ("claim", target, full_name(host, key.namespace))
            for rule in spec.get("http", []):
                if "delegate" in rule:
                    yield ("delegate", str(delegate_key(rule["delegate"], key.namespace)))
        case "DestinationRule":
            host = full_name(spec.get("host", ""), key.namespace)
            yield ("rule", host)
            if host.startswith("*") and not host.startswith("*.") and host != "*":
                yield WILDCARDS
        case "ServiceEntry":
            for host in spec.get("hosts", []):
                yield ("entry", host)


def _service(value: KubeObject) -> Mapping[str, Any]:
    ports = _mapping(value, "spec").get("ports")
    numbers = [port.get("port") for port in ports if isinstance(port, Mapping)] if isinstance(ports, list) else []
    return {"ports": [{"number": number} for number in numbers if isinstance(number, int)]}


def _mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""
