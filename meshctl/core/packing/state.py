"""Who has what: nodes, their GPUs, and the charges on them; as objects by name, and as arrays for the policies.

The objects are the truth: sums of charges in whole numbers, so that any order of charges and releases comes to the
same. A row of the arrays is made anew from them before it is read (`settle`) when its node has changed; its `stamp`
tells those who keep something derived. Rows stand in the order of node names: the first of equals is the least name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshctl.core.packing.scoring import Bools, Ints, Table
from meshctl.core.packing.vocabulary import Charge, Device, Node
from meshctl.sharing import REPLICAS

NOBODY, SOMEBODY = -1, -2
"""Tenant of an isolated GPU: free for anybody; taken by several namespaces, or by who knows whom."""
_SPARE_KINDS = 64
"""Beyond two for each node, kinds that may be of no node any more: why a GPU is closed may be told ever anew."""


class _Card:
    """What is taken of one GPU, whether it is known or not."""

    __slots__ = ("held", "hosts", "tenants", "used")

    def __init__(self) -> None:
        self.used = 0
        self.held = 0
        self.tenants: dict[str, int] = {}
        """Namespace -> its charges."""
        self.hosts: tuple[str, ...] = ()
        """Nodes that say they have it: one, or for a moment two when it was moved."""

    @property
    def idle(self) -> bool:
        return not (self.used or self.held or self.tenants or self.hosts)


class _Host:
    """What is taken of one node, whether it is known or not."""

    __slots__ = ("cards", "cpu_milli", "devices", "keys", "memory_mib")

    def __init__(self) -> None:
        self.cpu_milli = 0
        self.memory_mib = 0
        self.keys: set[str] = set()
        self.devices: tuple[Device, ...] = ()
        """By UUID: the columns."""
        self.cards: tuple[_Card, ...] = ()


class State(Table):
    """The fleet's memory. `settle` before reading arrays."""

    __slots__ = (
        "_cards",
        "_dirty",
        "_hosts",
        "_kinds",
        "_mean_slots",
        "_moved",
        "_resources",
        "_tenants",
        "charges",
        "closed",
        "division",
        "isolation",
        "kind",
        "kinds",
        "layout",
        "nodes",
        "resource",
        "row",
        "seq",
        "several",
        "stamp",
        "tenant",
        "uniform",
    )

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.nodes: dict[str, Node] = {}
        self.charges: dict[str, Charge] = {}
        self.row: dict[str, int] = {}
        self.resource: Ints = np.zeros((0, 1), np.int64, "F")
        """(N, D) code; -1: no GPU."""
        self.several: Bools = np.zeros((0, 1), np.bool_, "F")
        self.closed: Bools = np.zeros((0, 1), np.bool_, "F")
        self.tenant: Ints = np.zeros((0, 1), np.int64, "F")
        """(N, D) code of the namespace that has the isolated GPU, or NOBODY, SOMEBODY; NOBODY where not isolated."""
        self.kind: Ints = np.zeros(0, np.int64)
        """(N,) index of `kinds`."""
        self.kinds: list[tuple[Device, ...]] = []
        """GPUs of nodes without their UUIDs, in an order of their own: what makes a node unfit though it is empty."""
        self.stamp: Ints = np.zeros(0, np.int64)
        """(N,) `seq` of the row's last change."""
        self.seq = 0
        self.layout = 0
        """Another number when rows are other nodes'."""
        self.uniform = True
        """All GPUs are shared as one resource, and always were."""
        self.isolation = False
        """Some GPU is isolated, or was once."""
        self.division = False
        """Some GPU allows a container to have slots of others, too; or did once."""
        self._hosts: dict[str, _Host] = {}
        self._cards: dict[str, _Card] = {}
        self._dirty: set[str] = set()
        """Nodes whose charges changed."""
        self._moved: set[str] = set()
        """Nodes that came, went, or have other GPUs."""
        self._resources: dict[str, int] = {}
        self._mean_slots: dict[str, float] = {}
        self._tenants: dict[str, int] = {}
        self._kinds: dict[tuple[Device, ...], int] = {}

    # ------------------------------------------------------------------------------------------------- what happens

    def put(self, node: Node) -> None:
        if self.nodes.get(node.name) == node:
            return
        self.nodes[node.name] = node
        self._install(node.name, node.devices)

    def drop(self, name: str) -> None:
        if self.nodes.pop(name, None) is not None:
            self._install(name, ())
            self._forget(name)

    def charge(self, key: str, charge: Charge) -> None:
        if key in self.charges:
            self.release(key)
        self.charges[key] = charge
        host = self._host(charge.node)
        host.keys.add(key)
        self._take(host, charge, 1)

    def release(self, key: str) -> None:
        if (charge := self.charges.pop(key, None)) is None:
            return
        host = self._hosts[charge.node]
        host.keys.discard(key)
        self._take(host, charge, -1)
        self._forget(charge.node)

    def hold(self, uuid: str, slots: int) -> None:
        card = self._card(uuid)
        card.held = max(slots, 0)
        self._touched(uuid, card)

    # -------------------------------------------------------------------------------------------------- what is so

    def used_slots(self, uuid: str) -> int:
        card = self._cards.get(uuid)
        return card.used + card.held if card else 0

    def free(self, uuid: str) -> int:
        card = self._cards.get(uuid)
        if card is None or not card.hosts:
            return 0
        device = next(device for device in self._hosts[min(card.hosts)].devices if device.uuid == uuid)
        return max(device.slots - card.used - card.held, 0)

    def tenants(self, uuid: str) -> frozenset[str]:
        card = self._cards.get(uuid)
        return frozenset(card.tenants) if card else frozenset()

    def charged(self, node: str) -> frozenset[str]:
        host = self._hosts.get(node)
        return frozenset(host.keys) if host else frozenset()

    def devices(self, row: int) -> tuple[Device, ...]:
        """The GPUs of a row, a column each."""
        return self._hosts[self.names[row]].devices

    def resource_code(self, resource: str) -> int:
        """-2 for one that no GPU was ever shared as."""
        return self._resources.get(resource, -2)

    def mean_slots(self, resource: str) -> float:
        """Slots of a GPU that is shared as this, on the mean; `REPLICAS` when there is none."""
        if (mean := self._mean_slots.get(resource)) is None:
            slots = self.slots[self.resource == self.resource_code(resource)]
            mean = self._mean_slots[resource] = float(slots.mean()) if slots.size else float(REPLICAS)
        return mean

    def tenant_code(self, namespace: str) -> int:
        """-3 for one that never had an isolated GPU."""
        return self._tenants.get(namespace, -3)

    # -------------------------------------------------------------------------------------------------- its objects

    def _host(self, name: str) -> _Host:
        if (host := self._hosts.get(name)) is None:
            host = self._hosts[name] = _Host()
        return host

    def _card(self, uuid: str) -> _Card:
        if (card := self._cards.get(uuid)) is None:
            card = self._cards[uuid] = _Card()
        return card

    def _install(self, name: str, devices: Iterable[Device]) -> None:
        """The node has these GPUs now."""
        host = self._host(name)
        for device, card in zip(host.devices, host.cards, strict=True):
            card.hosts = tuple(other for other in card.hosts if other != name)
            self._touched(device.uuid, card)
        unique = {device.uuid: device for device in devices}
        host.devices = tuple(unique[uuid] for uuid in sorted(unique))
        host.cards = tuple(self._card(device.uuid) for device in host.devices)
        for card in host.cards:
            card.hosts = (*card.hosts, name)
        self._moved.add(name)

    def _take(self, host: _Host, charge: Charge, sign: int) -> None:
        host.cpu_milli += sign * charge.cpu_milli
        host.memory_mib += sign * charge.memory_mib
        self._dirty.add(charge.node)
        for uuid, slots in charge.gpus.items():
            if slots <= 0:
                continue
            card = self._card(uuid)
            card.used += sign * slots
            left = card.tenants.get(charge.namespace, 0) + sign
            if left:
                card.tenants[charge.namespace] = left
            else:
                del card.tenants[charge.namespace]
            self._touched(uuid, card)

    def _touched(self, uuid: str, card: _Card) -> None:
        self._dirty.update(card.hosts)
        if card.idle:
            del self._cards[uuid]

    def _forget(self, name: str) -> None:
        if name not in self.nodes and not self._hosts[name].keys:
            del self._hosts[name]

    # --------------------------------------------------------------------------------------------------- its arrays

    def settle(self) -> None:
        """The arrays are as the objects."""
        if not (self._dirty or self._moved):
            return
        self.seq += 1
        if self._moved:
            self._lay_out()
            for name in sorted(self._moved):
                if (row := self.row.get(name)) is not None:
                    self._write(row, self.nodes[name], self._hosts[name].devices)
            self._dirty |= self._moved
            self._moved = set()
            self._mean_slots.clear()
            self.uniform = len(self._resources) == 1
        for name in self._dirty:
            if (row := self.row.get(name)) is not None:
                self._refresh(row, self._hosts[name])
        self._dirty = set()

    def _lay_out(self) -> None:
        """A row for each node, and columns enough. Rows whose nodes stay are copied."""
        width = max((len(self._hosts[name].devices) for name in self._moved if name in self.nodes), default=0)
        wide = max(width, self.room.shape[1], 1)
        crowded = len(self.kinds) > 2 * len(self.nodes) + _SPARE_KINDS
        if wide == self.room.shape[1] and self.row.keys() == self.nodes.keys() and not crowded:
            return
        names = [name.encode().decode() for name in sorted(self.nodes)]  # side by side: 5000 looked up in half the time
        old = np.fromiter((self.row.get(name, -1) for name in names), np.intp, len(names))
        for field in _ARRAYS:
            setattr(self, field, _rearranged(getattr(self, field), old, wide))
        self.resource[self.slots == 0] = -1
        if crowded:
            self._kinds, self.kinds = {}, []
            self._moved = set(names)
        self.layout += 1
        self.names = names
        self.row = {name: row for row, name in enumerate(names)}

    def _write(self, row: int, node: Node, devices: tuple[Device, ...]) -> None:
        """What no charge changes."""
        self.cpu_total[row] = node.cpu_milli
        self.memory_total[row] = node.memory_mib
        for field in ("slots", "product", "several", "closed"):
            getattr(self, field)[row] = 0
        self.resource[row] = -1
        for column, device in enumerate(devices):
            self.slots[row, column] = device.slots
            self.product[row, column] = self._product(device.product)
            if device.slots > 0:
                self.resource[row, column] = self._resources.setdefault(device.resource, len(self._resources))
            self.several[row, column] = device.several
            self.closed[row, column] = bool(device.closed)
        self.kind[row] = self._kind(devices)
        self.isolation |= any(device.isolated for device in devices)
        self.division |= any(device.several for device in devices)

    def _refresh(self, row: int, host: _Host) -> None:
        """What charges change."""
        self.stamp[row] = self.seq
        self.cpu_free[row] = int(self.cpu_total[row]) - host.cpu_milli
        self.memory_free[row] = int(self.memory_total[row]) - host.memory_mib
        self.room[row] = 0
        self.tenant[row] = NOBODY
        free = 0.0
        for column, (device, card) in enumerate(zip(host.devices, host.cards, strict=True)):
            room = device.slots - card.used - card.held
            if room > 0 and not device.closed:
                self.room[row, column] = room
                free += room / device.slots
            if device.isolated:
                self.tenant[row, column] = self._tenant(card)
        self.gpus_free[row] = free

    def _tenant(self, card: _Card) -> int:
        if card.held or len(card.tenants) > 1:
            return SOMEBODY
        return self._tenants.setdefault(next(iter(card.tenants)), len(self._tenants)) if card.tenants else NOBODY

    def _product(self, product: str) -> int:
        if product not in self.products:
            self.products.append(product)
        return self.products.index(product)

    def _kind(self, devices: tuple[Device, ...]) -> int:
        kind = tuple(sorted(map(_anonymous, devices), key=_traits))
        code = self._kinds.setdefault(kind, len(self._kinds))
        if code == len(self.kinds):
            self.kinds.append(kind)
        return code


_ARRAYS = (
    "cpu_free",
    "cpu_total",
    "memory_free",
    "memory_total",
    "slots",
    "room",
    "gpus_free",
    "product",
    "resource",
    "several",
    "closed",
    "tenant",
    "kind",
    "stamp",
)


def _rearranged(array: NDArray[Any], old: NDArray[np.intp], width: int) -> NDArray[Any]:
    """Row i is what row `old[i]` was, zeros where that is -1; (N, D) are `width` wide."""
    fresh = np.zeros((len(old), width)[: array.ndim], array.dtype, "F")
    stays = old >= 0
    if array.ndim == 1:
        fresh[stays] = array[old[stays]]
    else:
        fresh[stays, : array.shape[1]] = array[old[stays]]
    return fresh


def _anonymous(device: Device) -> Device:
    return replace(device, uuid="")


def _traits(device: Device) -> tuple[Any, ...]:
    return (device.resource, device.product, device.slots, device.several, device.isolated, device.closed)
