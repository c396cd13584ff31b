"""What is wrong between objects: who names what is not there, and who claims what another has. Pure.

Absence is only reported for kinds that are known in full. Of two objects that claim the same, the younger is reported:
istiod prefers the older.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from istio.analyze import gateway, matches, virtualservice
from istio.analyze.finding import FieldPath, Finding, found
from istio.analyze.hosts import covers, full_name, overlap, patterns_of
from istio.analyze.known import POD, SERVICE, WILDCARDS, Subject, View, delegate_key, gateway_key
from istio.names import DESTINATION_RULE, DOMAIN, GATEWAY, SERVICE_ENTRY, VIRTUAL_SERVICE

Found = Iterator[Finding]


def judge(subject: Subject, view: View, complete: Collection[str]) -> Found:
    """`complete`: the kinds of which `view` has every object."""
    match subject.key.kind:
        case "VirtualService":
            yield from _references(subject, view, complete)
            yield from _gateways(subject, view, complete)
            yield from _delegates(subject, view, complete)
            yield from _delegated(subject, view, complete)
            yield from _claims(subject, view)
        case "DestinationRule":
            yield from _rules(subject, view)
        case "ServiceEntry":
            yield from _entries(subject, view)
        case "Gateway":
            yield from _pods(subject, view, complete)


def _references(subject: Subject, view: View, complete: Collection[str]) -> Found:
    """Destinations: the host, its port, its subset."""
    asked: dict[str, tuple[list[Subject], set[str] | None]] = {}
    for path, destination in virtualservice.destinations(subject.spec):
        host = full_name(destination.get("host", ""), subject.key.namespace)
        if not host:
            continue
        if host not in asked:
            asked[host] = (_behind(host, view), _subsets(host, view))
        behind, subsets = asked[host]
        subset = destination.get("subset", "")
        if subset and DESTINATION_RULE in complete and subset not in (subsets or ()):
            why = f"no DestinationRule for `{host}` is there" if subsets is None else f"`{host}` has no such subset"
            yield found("UndefinedSubset", subject.key, (*path, "subset"), f"the subset `{subset}`: {why}")
        services = SERVICE in complete or host.endswith(f".{DOMAIN}")
        if not behind and services and SERVICE_ENTRY in complete:
            yield found("UnknownDestination", subject.key, (*path, "host"), f"nothing has the host `{host}`")
        if behind:
            yield from _port(subject, host, behind, destination, path)


def _behind(host: str, view: View) -> list[Subject]:
    """Services and ServiceEntries with the host."""
    return [entry for pattern in patterns_of(host) for entry in view.having(("entry", pattern))]


def _subsets(host: str, view: View) -> set[str] | None:
    """The subsets of all DestinationRules for the host; None where there is none. istiod takes one DestinationRule,
    which one depends on who asks, so that a subset of any of them is not called undefined."""
    rules = [rule for pattern in patterns_of(host) for rule in view.having(("rule", pattern))]
    rules += [rule for rule in view.having(WILDCARDS) if covers(rule.spec["host"], host)]
    if not rules:
        return None
    return {subset.get("name", "") for rule in rules for subset in rule.spec.get("subsets", [])}


def _port(subject: Subject, host: str, behind: list[Subject], destination: Mapping[str, Any], path: FieldPath) -> Found:
    numbers = sorted({port["number"] for entry in behind for port in entry.spec.get("ports", []) if "number" in port})
    wanted = destination.get("port", {}).get("number")
    listed = ", ".join(map(str, numbers))
    if wanted is not None and numbers and wanted not in numbers:
        yield found("DestinationPort", subject.key, (*path, "port"), f"`{host}` has no port {wanted}, but {listed}")
    if wanted is None and len(numbers) > 1:
        yield found("DestinationPort", subject.key, (*path, "port"), f"`{host}` has the ports {listed}")


def _gateways(subject: Subject, view: View, complete: Collection[str]) -> Found:
    if GATEWAY not in complete:
        return
    for index, name in enumerate(subject.spec.get("gateways", [])):
        if name == virtualservice.MESH:
            continue
        path: FieldPath = ("spec", "gateways", index)
        target = view.find(gateway_key(name, subject.key.namespace))
        if target is None:
            yield found("UnknownGateway", subject.key, path, f"there is no gateway `{name}`")
            continue
        served = tuple(gateway.served(target.spec, target.key.namespace, subject.key.namespace))
        for host in subject.spec.get("hosts", []):
            if not any(overlap(pattern, host) for pattern in served):
                yield found("GatewayHost", subject.key, path, f"the gateway `{name}` does not serve `{host}`")


def _delegates(subject: Subject, view: View, complete: Collection[str]) -> Found:
    """A root looks at the delegates that it names."""
    for index, rule in enumerate(subject.spec.get("http", [])):
        if "delegate" not in rule:
            continue
        key = delegate_key(rule["delegate"], subject.key.namespace)
        path: FieldPath = ("spec", "http", index, "delegate")
        target = view.find(key)
        if target is None:
            if VIRTUAL_SERVICE in complete:
                yield found("UnknownDelegate", subject.key, path, f"there is no {key}")
        elif target.spec.get("hosts"):
            hosts = ", ".join(target.spec["hosts"])
            yield found("DelegateWithHosts", subject.key, path, f"{key} has the hosts {hosts}")


def _delegated(subject: Subject, view: View, complete: Collection[str]) -> Found:
    """A delegate looks at the roots that name it."""
    if subject.spec.get("hosts"):
        return
    roots = [root for root in view.having(("delegate", str(subject.key))) if root.key != subject.key]
    if not roots and VIRTUAL_SERVICE in complete:
        yield found(
            "DelegateNotUsed", subject.key, ("spec", "hosts"), "there are no hosts, and no delegate of this name"
        )
    for root in roots:
        for rule in root.spec.get("http", []):
            if "delegate" in rule and delegate_key(rule["delegate"], root.key.namespace) == subject.key:
                yield from _merge(subject, root, rule.get("match", []))


def _merge(subject: Subject, root: Subject, wide: list[Mapping[str, Any]]) -> Found:
    """Each match of the delegate must fit one of the root's rule (none there: all fit)."""
    for index, rule in enumerate(subject.spec.get("http", [])):
        for number, narrow in enumerate(rule.get("match", [])):
            if wide and all(matches.contradicts(match, narrow) for match in wide):
                path: FieldPath = ("spec", "http", index, "match", number)
                yield found("DelegateMatch", subject.key, path, f"it contradicts the match of the root {root.key}")


def _claims(subject: Subject, view: View) -> Found:
    """Other VirtualServices that are older and have the same host on the same gateway."""
    for kind, target, host in sorted(term for term in subject.terms if term[0] == "claim"):
        for other in _older(subject, view, (kind, target, host)):
            path: FieldPath = ("spec", "hosts")
            where = "the mesh" if target == virtualservice.MESH else target
            both = all(map(_catches_all, (subject, other)))
            code = "HostClaimedTwice" if target == virtualservice.MESH or both else "HostShared"
            yield found(code, subject.key, path, f"{other.key} has `{host}` in {where} too")


def _catches_all(subject: Subject) -> bool:
    rules = subject.spec.get("http", [])
    return any(matches.is_catch_all(match) for rule in rules for match in rule.get("match") or [{}])


def _rules(subject: Subject, view: View) -> Found:
    if "workloadSelector" in subject.spec:
        return
    for other in _older(subject, view, ("rule", full_name(subject.spec.get("host", ""), subject.key.namespace))):
        if other.key.namespace == subject.key.namespace and "workloadSelector" not in other.spec:
            yield found("DestinationRuleTwice", subject.key, ("spec", "host"), f"{other.key} is for this host too")


def _entries(subject: Subject, view: View) -> Found:
    for index, host in enumerate(subject.spec.get("hosts", [])):
        for other in _older(subject, view, ("entry", host)):
            yield found("EntryHostTwice", subject.key, ("spec", "hosts", index), f"{other.key} has `{host}` too")


def _pods(subject: Subject, view: View, complete: Collection[str]) -> Found:
    wanted = subject.spec.get("selector", {})
    if wanted and POD in complete:
        pods = (*view.over.every(POD), *view.base.every(POD))
        if not any(wanted.items() <= pod.spec["labels"].items() for pod in pods):
            labels = ", ".join(f"{key}={value}" for key, value in sorted(wanted.items()))
            yield found("GatewayWithoutPods", subject.key, ("spec", "selector"), f"no pod has {labels}")


def _older(subject: Subject, view: View, term: tuple[str, ...]) -> Iterator[Subject]:
    """Others with the same term that came first and can be seen from the same namespaces."""
    mine = _visible(subject)
    for other in view.having(term):
        theirs = _visible(other)
        shared = mine is None or theirs is None or bool(mine & theirs)
        if other.key != subject.key and shared and view.age(other) < view.age(subject):
            yield other


def _visible(subject: Subject) -> frozenset[str] | None:
    """The namespaces that the object is exported to; None for all."""
    named = subject.spec.get("exportTo") or ("*",)
    if "*" in named:
        return None
    return frozenset(subject.key.namespace if name == "." else name for name in named)
