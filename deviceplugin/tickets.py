"""What the pods of the node ask for, and what the scheduler gave them. Pure.

An Allocate does not say which container it is for. It can only be one that asks for as many slots, that the kubelet
has not acknowledged and that holds nothing yet: the candidates. The kubelet admits pods one at a time, the oldest first
where several come at once, and a pod's containers in order; so the order says who it is most likely, never who it is.

Invariant: whoever asks is among the candidates, as long as what is known of the pods is not behind the kubelet.
Rejected: to leave out those who seem to have got theirs. Where that is wrong, a container gets another namespace's GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from deviceplugin.ledger import Ledger
from meshctl.api.allocation import ALLOCATION, read_allocation
from meshctl.ports import KubeObject
from meshctl.sharing import Owner, Ticket

LONGEST_PLAN = 1 << 14
"""Characters: 100 containers with two GPUs each take 12,000. A pod may have 256 KiB of annotations, and where admission
does not see to who writes this one, anybody may: what is kept of those of 110 pods must stay small."""
TERMINAL = ("Succeeded", "Failed")
"""Phases of a pod that holds nothing any more, and never will."""


@dataclass(frozen=True, slots=True)
class Tickets:
    """What one pod's containers ask for."""

    tickets: tuple[Ticket, ...] = ()
    """One for each container and resource, in the order in which the kubelet allocates."""
    problems: tuple[str, ...] = ()
    """Why containers have no planned GPU though the pod has the annotation, in words."""


@dataclass(frozen=True, slots=True)
class _Asking:
    """A container's limits of our resources."""

    name: str
    asked: Mapping[str, int]
    init: bool


def tickets_of(pod: KubeObject, resources: Collection[str]) -> Tickets:
    """Of a pod of this node: metadata, spec, and status with phase and startTime. None of one that has ended.

    A container whose plan can't be read, or is for another number of slots than it asks for, has no planned GPU.
    """
    status = pod.get("status") or {}
    if status.get("phase") in TERMINAL:
        return Tickets()
    problems: list[str] = []
    asking = [found for found in _containers(pod["spec"], frozenset(resources), problems) if found.asked]
    plans = _plans(pod, asking, problems)
    metadata = pod["metadata"]
    namespace, name = str(metadata.get("namespace", "")), str(metadata["name"])
    tickets = tuple(
        Ticket(
            Owner(namespace, name, found.name),
            plans.get(found.name, MappingProxyType({})),
            resource,
            asked,
            (str(metadata.get("creationTimestamp", "")), namespace, name),
            init=found.init,
            admitted=bool(status.get("startTime")),
            peak=max(later.asked.get(resource, 0) for later in asking[place:]) if found.init else asked,
        )
        for place, found in enumerate(asking)
        for resource, asked in sorted(found.asked.items())
    )
    return Tickets(tickets, tuple(f"pod {namespace}/{name}: {problem}" for problem in problems))


def candidates(tickets: Iterable[Ticket], resource: str, asked: int, ledger: Ledger) -> tuple[Ticket, ...]:
    """Who may be asking for `asked` slots of `resource` now; the most likely first.

    `tickets` are those of all pods, each pod's in the order of `tickets_of`.
    """
    holding = frozenset(ledger.held.values())
    likely = frozenset(promise.likely for promise in ledger.pending.values())
    found = [
        ticket
        for ticket in tickets
        if ticket.resource == resource and ticket.asked == asked and not ticket.admitted and ticket.owner not in holding
    ]
    return tuple(sorted(found, key=lambda ticket: (ticket.owner in likely, ticket.order)))


def hidden(tickets: Iterable[Ticket]) -> frozenset[Owner]:
    """Init containers: their pods hold their slots, and no listing says so (see `Ledger.observed`)."""
    return frozenset(ticket.owner for ticket in tickets if ticket.init)


def _containers(spec: Mapping[str, Any], resources: frozenset[str], problems: list[str]) -> Iterator[_Asking]:
    for container in spec.get("initContainers") or ():
        yield _asking(container, resources, problems, init=container.get("restartPolicy") != "Always")
    for container in spec.get("containers") or ():
        yield _asking(container, resources, problems, init=False)


def _asking(container: Mapping[str, Any], resources: frozenset[str], problems: list[str], *, init: bool) -> _Asking:
    limits = (container.get("resources") or {}).get("limits") or {}
    asked = {}
    for resource in sorted(limits.keys() & resources):
        text = str(limits[resource])
        if not (text.isascii() and text.isdecimal()):
            problems.append(f"container {container['name']} asks for {text!r} {resource}, which is no whole number")
        elif int(text):
            asked[resource] = int(text)
    return _Asking(str(container["name"]), asked, init)


def _plans(pod: KubeObject, asking: list[_Asking], problems: list[str]) -> dict[str, Mapping[str, int]]:
    """Container -> UUID -> slots, of the containers whose plan holds."""
    text = (pod["metadata"].get("annotations") or {}).get(ALLOCATION)
    if text is None:
        return {}
    if len(text) > LONGEST_PLAN:
        problems.append(f"{ALLOCATION}: {len(text)} characters are no plan (at most {LONGEST_PLAN})")
        return {}
    try:
        planned = dict(_read(text))
    except ValueError as error:
        problems.append(str(error))
        return {}
    strange = sorted(planned.keys() - {found.name for found in asking})
    problems.extend(f"{ALLOCATION}: container {name} asks for no slot of this node" for name in strange)
    for found in asking:
        if problem := _misfit(found, planned.get(found.name)):
            planned.pop(found.name, None)
            problems.append(f"{ALLOCATION}: {problem}")
    return {found.name: MappingProxyType(dict(planned[found.name])) for found in asking if found.name in planned}


@lru_cache(maxsize=1024)
def _read(text: str) -> Mapping[str, Mapping[str, int]]:
    """Each Allocate reads the annotations of all pods of the node, and they rarely change: parsing is half the time."""
    allocation = read_allocation({ALLOCATION: text})
    return MappingProxyType({} if allocation is None else allocation.by_container())


def _misfit(found: _Asking, plan: Mapping[str, int] | None) -> str:
    """Why a container's plan can't be followed; "" when it can."""
    if plan is None:
        return f"container {found.name} is not in it"
    if len(found.asked) > 1:
        return (
            f"container {found.name} asks for {' and '.join(found.asked)}: the plan does not say which GPU is for which"
        )
    ((resource, asked),) = found.asked.items()
    given = sum(plan.values())
    return "" if given == asked else f"container {found.name} asks for {asked} {resource} and is given {given}"
