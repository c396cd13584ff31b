"""What of a fleet can still be used, in numbers: before a change of it and after. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Ask, Demand, Device, Node

_EXACT = 1e-9
"""Below this a difference of GPUs is one of arithmetic."""

Rooms = Sequence[tuple[Device, int]]
"""GPUs that take somebody new, and their free slots."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What can still be used of some nodes, as `measure` counts it."""

    free_slots: int
    """Of GPUs that take somebody new."""
    usable_slots: int
    """With a demand: those that pods with its CPU and memory could have, in asks as large as its largest. Without: the
    free slots, less the share of stranded GPUs."""
    largest_ask: int
    """Slots of the largest ask that one GPU has room for."""
    whole_gpus: int
    """GPUs of which nobody has a slot, as far as their node has CPU for them."""
    stranded_gpus: float
    """Free GPUs that nobody can use for want of CPU, going by what pods ask for on the mean."""


def measure(fleet: Fleet, demand: Demand | None = None, nodes: Iterable[str] | None = None) -> Measure:
    """Of all nodes, or of `nodes`; with a `demand` only of GPUs that are shared as what it asks for."""
    stranded = fleet.stranded()
    names = sorted(fleet.nodes if nodes is None else fleet.nodes.keys() & {*nodes})
    resource = largest(demand).resource if demand else None
    rooms = {name: rooms_of(fleet, fleet.nodes[name], resource) for name in names}
    return Measure(
        free_slots=sum(_slots(rooms[name]) for name in names),
        usable_slots=sum(
            _slots_for(demand, fleet, fleet.nodes[name], rooms[name])
            if demand
            else _slots_but(stranded[name], rooms[name])
            for name in names
        ),
        largest_ask=max((free for name in names for _, free in rooms[name]), default=0),
        whole_gpus=sum(whole(rooms[name], stranded[name]) for name in names),
        stranded_gpus=round(sum(stranded[name] for name in names), 6),
    )


def largest(demand: Demand) -> Ask:
    """Its largest ask; one of no slots when it has none."""
    return max(demand.asks, key=lambda ask: ask.slots, default=Ask("", 0))


def rooms_of(fleet: Fleet, node: Node, resource: str | None = None) -> Rooms:
    """Of one node; `resource`: what they are shared as (None: whatever)."""
    return [
        (device, fleet.free(device.uuid))
        for device in node.devices
        if device.slots and not device.closed and resource in (None, device.resource)
    ]


def whole(rooms: Rooms, stranded_gpus: float) -> int:
    """GPUs of one node that are wholly free, but for those that lack CPU."""
    idle = sum(free == device.slots for device, free in rooms)
    return min(idle, max(0, int(_gpus(rooms) - stranded_gpus + _EXACT)))


def _gpus(rooms: Rooms) -> float:
    return sum(free / device.slots for device, free in rooms)


def _slots(rooms: Rooms) -> int:
    return sum(free for _, free in rooms)


def _slots_but(stranded_gpus: float, rooms: Rooms) -> int:
    gpus = _gpus(rooms)
    return int(_slots(rooms) * max(0.0, 1.0 - stranded_gpus / gpus) + _EXACT) if gpus else 0


def _slots_for(demand: Demand, fleet: Fleet, node: Node, rooms: Rooms) -> int:
    size = largest(demand).slots
    charges = [fleet.charges[key] for key in fleet.charged(node.name)]
    pods = sum(free // size for device, free in rooms if _will_do(demand, device, fleet)) if size else 0
    if demand.cpu_milli:
        pods = min(pods, (node.cpu_milli - sum(charge.cpu_milli for charge in charges)) // demand.cpu_milli)
    if demand.memory_mib:
        pods = min(pods, (node.memory_mib - sum(charge.memory_mib for charge in charges)) // demand.memory_mib)
    return max(pods, 0) * size


def _will_do(demand: Demand, device: Device, fleet: Fleet) -> bool:
    tenants = fleet.tenants(device.uuid) if device.isolated else frozenset[str]()
    wanted = demand.products is None or device.product in demand.products
    return wanted and device.product not in demand.unfit and tenants <= {demand.namespace}
