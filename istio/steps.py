"""Which write comes next: make before break, as a pure function.

Invariants, after every step and whichever of its writes were done:
- A VirtualService is written only when every host and subset that it newly names is live and confirmed, i.e. known to
  every gateway.
- Nothing is deleted, and no subset taken out, while a VirtualService that may still be in force names it: the live one,
  or an older one as long as no later one is confirmed.
- Where the live objects are the wanted ones there is no step.

So: backends first (ServiceEntries, DestinationRules; those in transition keep what is still named), then the
VirtualService, and what it no longer names last. A change that names nothing new (weights) waits for nothing. The state
is what is live: a step that was done in part, or by another replica, is simply no longer due.

What may be in force is remembered as the line of VirtualServices since the last one that is confirmed. After a start
nothing is known of what came before the live one, and until it is confirmed everything live counts as named.
Rejected: a phase per route kept in status. It would be one more thing that can be out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from istio.names import DESTINATION_RULE, OURS, SERVICE_ENTRY, VIRTUAL_SERVICE, key_of
from istio.ownership import same, version_of
from istio.render import Rendered
from istio.tables import Ref
from meshctl.ports import KubeObject, ObjectKey


@dataclass(frozen=True, slots=True, order=True)
class Written:
    """A version of an object that every gateway should come to know."""

    key: ObjectKey
    version: str
    """resourceVersion, or a later one; "": deleted."""
    clusters: tuple[str, ...] = ()
    """What a gateway has when it knows it: Envoy's clusters, by istiod's names."""


@dataclass(frozen=True, slots=True)
class Refs:
    """What a VirtualService, or several of them, send requests to."""

    named: frozenset[Ref] = frozenset()
    used: frozenset[Ref] = frozenset()
    """Those with a weight above 0."""


@dataclass(frozen=True, slots=True)
class Past:
    """The VirtualServices from one version on that name the same."""

    since: Written
    refs: Refs
    confirmed: bool = False
    """Every gateway knows `since`, or something later."""


History = tuple[Past, ...]
"""Oldest first; the last one is live."""
Live = Mapping[ObjectKey, KubeObject]
"""The live objects of one route, ours only."""
Item = Mapping[str, Any]
"""A subset, or an endpoint."""
Same = Callable[[KubeObject, KubeObject | None], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """Writes that may be done now, in any order; or what has to be confirmed first. Nothing at all: it is done."""

    apply: tuple[KubeObject, ...] = ()
    delete: tuple[KubeObject, ...] = ()
    awaits: tuple[Written, ...] = ()
    """All that has to be confirmed, what is already included; when nothing is to be written."""
    why: str = ""
    """What it waits for, for people."""

    @property
    def done(self) -> bool:
        return not (self.apply or self.delete or self.awaits)


# ------------------------------------------------------------------------------------------------- what is in force


def refs_of(virtual_service: KubeObject | None) -> Refs:
    """The hosts and subsets that a VirtualService names; none when there is none."""
    found = [] if virtual_service is None else list(_destinations(virtual_service))
    return Refs(frozenset(ref for ref, _ in found), frozenset(ref for ref, weight in found if weight != 0))


def observe(history: History, key: ObjectKey, live: KubeObject | None, confirmed: Collection[Written]) -> History:
    """`history` with the live VirtualService at its end, and without what a confirmed one has replaced."""
    refs = refs_of(live)
    last = history[-1] if history else None
    if last is None or last.refs != refs or (last.since.version == "") != (live is None):
        history = (*history, Past(Written(key, version_of(live)), refs))
    history = tuple(replace(p, confirmed=True) if p.since in confirmed else p for p in history)
    return history[max((i for i, past in enumerate(history) if past.confirmed), default=0) :]


def in_force(history: History) -> Refs | None:
    """All that some gateway may still be told to send requests to; None: not known, it may be anything."""
    if not history or not history[0].confirmed:
        return None
    past = [past.refs for past in history]
    return Refs(frozenset().union(*(r.named for r in past)), frozenset().union(*(r.used for r in past)))


def _destinations(virtual_service: KubeObject) -> Iterator[tuple[Ref, int | None]]:
    for rule in (virtual_service.get("spec") or {}).get("http") or ():
        for route in rule.get("route") or ():
            destination = route.get("destination") or {}
            ref = Ref(str(destination.get("host", "")), str(destination.get("subset", "")))
            yield ref, route.get("weight") if len(rule["route"]) > 1 else None


# --------------------------------------------------------------------------------------------------------- next step


def next_step(
    wanted: Rendered | None, live: Live, history: History, confirmed: Collection[Written], same: Same = same
) -> Step:
    """The next step from `live` to `wanted` (None: away with it). `history` must be observed (`observe`)."""
    known = in_force(history)
    if wanted is None:
        return _removal(live, history, known)
    backends = tuple(_widened(value, live, known) for value in wanted.backends)
    if changed := tuple(value for value in backends if not same(value, live.get(key_of(value)))):
        return Step(apply=changed)
    route = wanted.virtual_service
    if not same(route, old := live.get(key_of(route))):
        refs, before = refs_of(route), refs_of(old)
        new = (refs.named - before.named) | (refs.used - before.used)
        needed = tuple(sorted({written_of(v, _backends(live)) for v in _backends(live) if _concern(v, new)}))
        if unknown := [written.key for written in needed if written not in confirmed]:
            return Step(awaits=needed, why=f"the gateways to know {_listed(unknown)}")
        return Step(apply=(route,))
    return _pruning(wanted, backends, live, history, known)


def _removal(live: Live, history: History, known: Refs | None) -> Step:
    routes = tuple(value for key, value in sorted(live.items()) if key.kind == VIRTUAL_SERVICE)
    if routes:
        return Step(delete=routes)
    return _deletion(_backends(live), history, known)


def _pruning(
    wanted: Rendered, backends: tuple[KubeObject, ...], live: Live, history: History, known: Refs | None
) -> Step:
    kept = {key_of(value) for value in backends}
    step = _deletion([value for value in _backends(live) if key_of(value) not in kept], history, known)
    if step.done and any(now is not later for now, later in zip(backends, wanted.backends, strict=True)):
        return Step(awaits=_open(history), why="the gateways to forget subsets that are no longer used")
    return step


def _deletion(obsolete: list[KubeObject], history: History, known: Refs | None) -> Step:
    free = [] if known is None else [v for v in obsolete if not _concern(v, known.named)]
    if free:
        return Step(delete=tuple(sorted(free, key=_breaking_order)))
    if not obsolete:
        return Step()
    return Step(awaits=_open(history), why=f"the gateways to stop using {_listed(key_of(v) for v in obsolete)}")


def _open(history: History) -> tuple[Written, ...]:
    return tuple(past.since for past in history)


def _breaking_order(value: KubeObject) -> tuple[int, ObjectKey]:
    return -OURS.index(value["kind"]), key_of(value)


def _backends(live: Live) -> list[KubeObject]:
    return [value for key, value in sorted(live.items()) if key.kind != VIRTUAL_SERVICE]


def _listed(keys: Iterable[ObjectKey]) -> str:
    first, *rest = [str(key) for key in keys]
    return f"{first} and {len(rest)} more" if rest else first


# ------------------------------------------------------------------------------------------------ hosts and subsets


def _concern(value: KubeObject, refs: Iterable[Ref]) -> bool:
    return any(_concerns(value, ref) for ref in refs)


def _concerns(value: KubeObject, ref: Ref) -> bool:
    """`value` makes, or makes up, the cluster that `ref` stands for."""
    if value["kind"] == SERVICE_ENTRY:
        return ref.host in value["spec"]["hosts"]
    host = str(value["spec"]["host"])
    return ref.host == host or (host.startswith("*.") and ref.host.endswith(host[1:]))


def written_of(value: KubeObject, backends: Iterable[KubeObject]) -> Written:
    """What to look for at the gateways to know that they have `value`; `backends` are the live ones."""
    return Written(key_of(value), version_of(value), tuple(sorted(_clusters(value, backends))))


def _clusters(value: KubeObject, backends: Iterable[KubeObject]) -> Iterator[str]:
    if value["kind"] == SERVICE_ENTRY:
        hosts, subsets = value["spec"]["hosts"], [""]
    else:
        hosts, subsets = [value["spec"]["host"]], [s["name"] for s in value["spec"].get("subsets") or ()]
    for entry in backends:
        for host in hosts if entry["kind"] == SERVICE_ENTRY else ():
            ports = (entry["spec"].get("ports") or ()) if host in entry["spec"]["hosts"] else ()
            yield from (f"outbound|{port['number']}|{subset}|{host}" for port in ports for subset in subsets)


def _widened(value: KubeObject, live: Live, known: Refs | None) -> KubeObject:
    """`value`, and what of its live version is still named: `value` itself when that is nothing more."""
    old = live.get(key_of(value))
    if old is None:
        return value
    if value["kind"] == DESTINATION_RULE:
        return _with(value, old, "subsets", _still_named_subsets(value, old, known))
    return _with(value, old, "endpoints", _still_used_endpoints(value, old, live, known))


def _with(value: KubeObject, old: KubeObject, field: str, kept: list[Item]) -> KubeObject:
    """`value` with `kept` in its list `field`; what `old` has too stands in the order it has there."""
    if not kept:
        return value
    items = {_identity(item): item for item in (*(value["spec"].get(field) or ()), *kept)}
    before = [items.pop(_identity(item)) for item in old["spec"].get(field) or () if _identity(item) in items]
    return {**value, "spec": {**value["spec"], field: [*before, *items.values()]}}


def _identity(item: Item) -> tuple[object, ...]:
    """A subset is what its name says, an endpoint its address and ports."""
    return (item.get("name"), item.get("address"), *sorted((item.get("ports") or {}).items()))


def _still_named_subsets(value: KubeObject, old: KubeObject, known: Refs | None) -> list[Item]:
    host = str(value["spec"]["host"])
    if old["spec"].get("host") != host:
        return []
    wanted = {subset["name"] for subset in value["spec"].get("subsets") or ()}
    return [
        subset
        for subset in old["spec"].get("subsets") or ()
        if subset["name"] not in wanted and (known is None or Ref(host, subset["name"]) in known.named)
    ]


def _still_used_endpoints(value: KubeObject, old: KubeObject, live: Live, known: Refs | None) -> list[Item]:
    """Endpoints of subsets that still get requests and of which no wanted endpoint is: without them requests fail."""
    endpoints = value["spec"].get("endpoints") or ()
    wanted = {_identity(endpoint) for endpoint in endpoints}
    kept: list[Item] = []
    for subset in _subsets_of(value["spec"]["hosts"], live, known):
        if any(_selected(subset, endpoint) for endpoint in endpoints):
            continue
        kept += [
            endpoint
            for endpoint in old["spec"].get("endpoints") or ()
            if _selected(subset, endpoint) and endpoint not in kept and _identity(endpoint) not in wanted
        ]
    return kept


def _subsets_of(hosts: Collection[str], live: Live, known: Refs | None) -> Iterator[Item]:
    for key, rule in sorted(live.items()):
        if key.kind != DESTINATION_RULE or rule["spec"].get("host") not in hosts:
            continue
        for subset in rule["spec"].get("subsets") or ():
            if known is None or Ref(str(rule["spec"]["host"]), subset["name"]) in known.used:
                yield subset


def _selected(subset: Item, endpoint: Item) -> bool:
    labels = endpoint.get("labels") or {}
    return all(labels.get(name) == value for name, value in (subset.get("labels") or {}).items())
