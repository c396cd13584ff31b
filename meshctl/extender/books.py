"""The books: what every pod takes, charged to the fleet as objects come, change and go; and what is reserved. Pure.

Every object that changes costs its own: a pod its charge, a GPU the charges of the pods that it names, a node's GPUs
(a policy changed, a GPU came or went) those of the node's pods. The words of the agent and of the annotation are
weighed in `claims`.

Invariant: what is charged follows from the objects as they are now and from the reservations, in whatever order they
came; so after a restart it is the same again, but for reservations, whose bindings were written by then or never are
(docs/decisions/0008). A pod is charged once: its reservation ends when it is seen on a node, ends, or goes.

Rejected: to look at all objects for each decision (17 ms for 5000 pods, as peers do); to believe one's own memory over
the objects (it is wrong after a restart, and when two replicas change places).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Charge, Demand, Node
from meshctl.errors import InputError
from meshctl.extender.claims import Whose, charge_of, held_by, unknown_slots
from meshctl.extender.gpus import Card, Holding, card_of
from meshctl.extender.pods import MOST, admitted, deleted, ended, needs_of, node_of, nominated_node, quantity
from meshctl.extender.ports import Reserved
from meshctl.ports import KubeObject, ObjectKey
from meshctl.sharing import RESOURCE

_MIB = 1 << 20
_NONE: frozenset[str] = frozenset()


class Books:
    """Fills `fleet`. What is public is for reading."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pods: dict[ObjectKey, KubeObject] = {}
        self.keys: dict[str, ObjectKey] = {}
        """By UID."""
        self.reserved: dict[str, Reserved] = {}
        """By UID, the oldest first; none of a pod that was seen on a node."""
        self.nominated: set[ObjectKey] = set()
        """Pods on no node yet, for which the scheduler has evicted others from one."""
        self.resources = Counter((RESOURCE,))
        """Resource -> how many GPUs are shared as it, and one more for that which always counts."""
        self._arrived: dict[ObjectKey, None] = {}
        """Pods that are new since the last decision, and still there: a replica that does not lead decides nothing."""
        self._largest: tuple[int, ...] = (0, 0, 0)
        """The most millicores, MiB and slots that a node ever had."""
        self._capacity: dict[str, tuple[int, int]] = {}
        """Node -> allocatable millicores and MiB."""
        self._cards: dict[str, Card] = {}
        """By name of the GPU object: its UUID in small letters."""
        self._on: dict[str, set[str]] = {}
        """Node -> its GPU objects."""
        self._naming: dict[ObjectKey, frozenset[str]] = {}
        """Pod -> the GPU objects that name it as a holder."""
        self._slots: Counter[str] = Counter()
        """State -> slots, but for those of `_moved`."""
        self._counted: dict[str, Counter[str]] = {}
        """What each GPU object counts for in it."""
        self._moved: set[str] = set()
        """GPU objects of which slots may have changed hands since they were counted."""

    # ------------------------------------------------------------------------------------------------------- objects

    def take(self, key: ObjectKey, value: KubeObject | None) -> None:
        """A Pod, a GPU or a Node as it is now; None: it is gone."""
        match key.kind:
            case "Pod":
                self._take_pod(key, value)
            case "GPU":
                self._take_gpu(key.name, None if value is None else card_of(value))
            case "Node":
                self._take_node(key.name, value)

    def _take_pod(self, key: ObjectKey, value: KubeObject | None) -> None:
        before, after = uid_of(self.pods.pop(key, None)), uid_of(value)
        cards = _NONE
        if before and before != after:
            self.keys.pop(before, None)
            cards = self._end(before)
        self.nominated.discard(key)
        if value is None:
            self._arrived.pop(key, None)
        else:
            self.pods[key] = value
            self.keys[after] = key
            if _waits(value) and nominated_node(value):
                self.nominated.add(key)
            if before != after:
                self._arrived[key] = None
        self._settle(pods={key}, cards=cards)

    def learn(self) -> None:
        """The policy learns from what arrived since the last decision; not before one, since the fleet would lay itself
        out anew for each of 20,000 pods while the first nodes are told of."""
        for key in self._arrived:
            needs = self.needs(self.pods[key])
            if needs.asks and self._ever_fits(needs):
                self.fleet.observe(needs)
        self._arrived.clear()

    def _ever_fits(self, needs: Demand) -> bool:
        """A node may hold it: one pod that asks for 10^18 GPUs would be all that the policy knows of."""
        wanted = (needs.cpu_milli, needs.memory_mib, sum(ask.slots for ask in needs.asks))
        return all(want <= most for want, most in zip(wanted, self._largest, strict=True))

    def _take_node(self, name: str, value: KubeObject | None) -> None:
        if value is None:
            self._capacity.pop(name, None)
        else:
            allocatable = (value.get("status") or {}).get("allocatable") or {}
            cpu, memory = (quantity(allocatable.get(what, 0), f"node {name}") for what in ("cpu", "memory"))
            self._capacity[name] = min(int(cpu * 1000), MOST), min(int(memory / _MIB), MOST)
        self._settle(nodes={name})

    def _take_gpu(self, name: str, now: Card | None) -> None:
        before = self._cards.pop(name, None)
        if now is not None:
            self._cards[name] = now
        named = {pod for card in (before, now) for pod in _named(card)}
        for pod in named:
            self._name(pod, name, named=pod in _named(now))
        nodes: set[str] = set()
        if before is None or now is None or (before.node, before.device) != (now.node, now.device):
            nodes = {card.node for card in (before, now) if card is not None}
            self._move(name, before, now)
        self._settle(nodes=nodes, pods=named, cards={name})

    def _move(self, name: str, before: Card | None, now: Card | None) -> None:
        """The GPU is shared otherwise, or is elsewhere."""
        if before is not None:
            on = self._on.pop(before.node) - {name}
            if on:
                self._on[before.node] = on
            self.fleet.hold(before.uuid, 0)
        if now is not None:
            self._on.setdefault(now.node, set()).add(name)
        for card, step in ((before, -1), (now, 1)):
            if card is not None and card.device is not None:
                self.resources[card.device.resource] += step
        self.resources = +self.resources

    def _name(self, pod: ObjectKey, card: str, *, named: bool) -> None:
        cards = self._naming.pop(pod, _NONE) - {card}
        if named or cards:
            self._naming[pod] = cards | {card} if named else cards

    # ---------------------------------------------------------------------------------------------- what follows of it

    def _settle(self, nodes: Iterable[str] = (), pods: Iterable[ObjectKey] = (), cards: Iterable[str] = ()) -> None:
        """These changed: so may the pods of these nodes, and what nobody known has on the GPUs of all of them."""
        cards = set(cards)
        pods = set(pods)
        for node in sorted(nodes):
            self._put(node)
            cards |= self._on.get(node, _NONE)
            pods |= {self.keys[uid] for uid in self.seen_on(node)}
        for pod in sorted(pods):
            cards |= self._charge(pod)
        for card in sorted(cards):
            self._hold(card)
        self._moved |= cards

    def _put(self, name: str) -> None:
        """The fleet has the node as it is; one of which there is no Node object is not there."""
        if name in self._capacity:
            cards = (self._cards[card] for card in sorted(self._on.get(name, ())))
            devices = tuple(card.device for card in cards if card.device is not None)
            cpu_milli, memory_mib = self._capacity[name]
            self.fleet.put(Node(name, cpu_milli, memory_mib, devices))
            mine = (cpu_milli, memory_mib, sum(device.slots for device in devices))
            self._largest = tuple(map(max, self._largest, mine))
        else:
            self.fleet.drop(name)

    def _charge(self, key: ObjectKey) -> frozenset[str]:
        """The pod is charged with what it has. The GPU objects that this may concern."""
        cards = self._naming.get(key, _NONE)
        if (pod := self.pods.get(key)) is None:
            return cards
        uid, node = uid_of(pod), node_of(pod)
        if ended(pod):
            return cards | self._end(uid)
        if not node:
            return cards
        self.reserved.pop(uid, None)
        before, now = self.fleet.charges.get(uid), self._claim(pod, node, cards)
        if before == now:
            return cards
        self.fleet.charge(uid, now)
        return cards | _names(before) | _names(now)

    def _claim(self, pod: KubeObject, node: str, naming: Iterable[str]) -> Charge:
        there = (self._cards[card] for card in self._on.get(node, ()))
        devices = {card.uuid: card.device for card in there if card.device is not None}
        needs = self.needs(pod, {device.resource for device in devices.values()})
        cards = [card for name in sorted(naming) if (card := self._cards[name]).node == node]
        return charge_of(pod, needs, node, devices, held_by(pod, needs.asks, cards) if admitted(pod) else {})

    def _hold(self, name: str) -> None:
        """What nobody known has of the GPU is not free."""
        card = self._cards.get(name)
        if card is None:
            return
        slots = 0
        if card.used:
            charges = self.fleet.charges
            planned = sum(charges[uid].gpus.get(card.uuid, 0) for uid in self.seen_on(card.node))
            slots = unknown_slots(card, lambda holding: self._whose(card, holding), planned)
        self.fleet.hold(card.uuid, slots)

    def _whose(self, card: Card, holding: Holding) -> Whose:
        pod = self.pods.get(holding.pod)
        if pod is None or node_of(pod) != card.node:
            return Whose.NOBODY
        if ended(pod):
            return Whose.ENDED
        charge = self.fleet.charges.get(uid_of(pod))
        mine = charge is not None and card.uuid in charge.gpus
        return Whose.CHARGED if mine else Whose.NOBODY

    def reserve(self, reserved: Reserved) -> None:
        """The pod is charged with what it is to get."""
        charge = reserved.placement.charge(reserved.demand)
        self.reserved[reserved.pod.uid] = reserved
        self.fleet.charge(reserved.pod.uid, charge)
        self._moved |= _names(charge)

    def release(self, uid: str) -> None:
        """What was reserved for the pod is free; of one that was seen on a node, nothing happens."""
        if uid in self.reserved:
            self._moved |= self._end(uid)

    def _end(self, uid: str) -> frozenset[str]:
        """The pod has nothing any more. The GPU objects that this may concern."""
        self.reserved.pop(uid, None)
        before = self.fleet.charges.get(uid)
        self.fleet.release(uid)
        return _names(before)

    def seen_on(self, node: str) -> Iterator[str]:
        """UIDs of the pods that are seen there, and have not ended."""
        return (uid for uid in self.fleet.charged(node) if uid not in self.reserved)

    def needs(self, pod: KubeObject, resources: Collection[str] | None = None) -> Demand:
        """Of a pod that the API server has, and has validated; of one that can't be read all the same, nothing."""
        try:
            return needs_of(pod, self.resources if resources is None else resources)
        except InputError:
            return Demand(namespace=str(pod["metadata"].get("namespace", "")))

    # -------------------------------------------------------------------------------------------------------- figures

    def slots(self) -> Mapping[str, int]:
        """State (used, reserved, free, closed) -> virtual GPUs of the cluster. Costs what changed since it was last
        asked for."""
        for name in self._moved:
            self._slots.subtract(self._counted.pop(name, {}))
            if found := self._count(name):
                self._counted[name] = found
                self._slots.update(found)
        self._moved = set()
        reserved = sum(sum(self.fleet.charges[uid].gpus.values()) for uid in self.reserved)
        used = self._slots["used"] - reserved
        return {"used": used, "reserved": reserved, "free": self._slots["free"], "closed": self._slots["closed"]}

    def _count(self, name: str) -> Counter[str]:
        card = self._cards.get(name)
        if card is None or card.device is None or card.node not in self.fleet.nodes:
            return Counter()
        free = self.fleet.free(card.uuid)
        rest = "closed" if card.device.closed else "free"
        return Counter({"used": card.device.slots - free, rest: free})


def uid_of(pod: KubeObject | None) -> str:
    return "" if pod is None else str(pod["metadata"]["uid"])


def _waits(pod: KubeObject) -> bool:
    """It may come to have a node."""
    return not (node_of(pod) or ended(pod) or deleted(pod))


def _named(card: Card | None) -> frozenset[ObjectKey]:
    """Pods that the GPU names as holders."""
    return frozenset() if card is None else frozenset(holding.pod for holding in card.holdings)


def _names(charge: Charge | None) -> frozenset[str]:
    """GPU objects of the GPUs that are charged."""
    return _NONE if charge is None else frozenset(uuid.lower() for uuid in charge.gpus)
