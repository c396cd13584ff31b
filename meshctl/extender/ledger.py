"""Who has what on which GPU: objects and reservations in, decisions out. No I/O, no clock. See `ports.Ledger`.

Every object that changes costs its own: a pod its charge, a GPU the charges of the pods that it names, a node's GPUs
(a policy changed, a GPU came or went) those of the node's pods.

Invariant: what is charged follows from the objects as they are now and from the reservations, in whatever order they
came; so after a restart it is the same again, but for reservations, whose bindings were written by then or never are
(docs/decisions/0008). A pod is charged once: its reservation ends when it is seen on a node. The words of the agent
and of the annotation are weighed in `claims`.

Rejected: to look at all objects for each decision (17 ms for 5000 pods, as peers do); to believe one's own memory over
the objects (it is wrong after a restart, and when two replicas change places).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.preempt import Evictable, victims
from meshctl.core.packing.vocabulary import Ask, Charge, Decision, Demand, Node, Policy, Refusal
from meshctl.errors import InputError
from meshctl.extender import models
from meshctl.extender.claims import Whose, charge_of, held_by, unknown_slots
from meshctl.extender.gpus import Card, Holding, card_of
from meshctl.extender.pods import (
    admitted,
    demand_of,
    ended,
    identity,
    labels_of,
    needs_of,
    node_of,
    priority_of,
    quantity,
)
from meshctl.extender.ports import BindError, PodId, Reserved, Victims
from meshctl.ports import KubeObject, ObjectKey
from meshctl.sharing import RESOURCE

_MIB = 1 << 20
_NONE: frozenset[str] = frozenset()


class Ledger:
    """Implements `ports.Ledger`."""

    def __init__(self, policy: Policy = Policy.STRANDING, *, seed: int = 0) -> None:
        self._fleet = Fleet(policy, seed=seed)
        self._models = models.Models()
        self._pods: dict[ObjectKey, KubeObject] = {}
        self._uids: dict[str, ObjectKey] = {}
        self._reserved: dict[str, Reserved] = {}
        """By UID, the oldest first; none of a pod that was seen on a node."""
        self._arrived: list[ObjectKey] = []
        """Pods that are new since the last decision."""
        self._capacity: dict[str, tuple[int, int]] = {}
        """Node -> allocatable millicores and MiB."""
        self._cards: dict[str, Card] = {}
        """By name of the GPU object: its UUID in small letters."""
        self._on: dict[str, set[str]] = {}
        """Node -> its GPU objects."""
        self._naming: dict[ObjectKey, frozenset[str]] = {}
        """Pod -> the GPU objects that name it as a holder."""
        self._resources = Counter((RESOURCE,))
        """Resource -> how many GPUs are shared as it, and one more for that which always counts."""
        self._slots: Counter[str] = Counter()
        """State -> slots, but for those of `_moved`."""
        self._counted: dict[str, Counter[str]] = {}
        """What each GPU object counts for in it."""
        self._moved: set[str] = set()
        """GPU objects of which slots may have changed hands since they were counted."""

    # ------------------------------------------------------------------------------------------------------- objects

    def take(self, key: ObjectKey, value: KubeObject | None) -> None:
        match key.kind:
            case "Pod":
                self._take_pod(key, value)
            case "GPU":
                self._take_gpu(key.name, None if value is None else card_of(value))
            case "Node":
                self._take_node(key.name, value)
            case kind if kind in models.KINDS:
                self._models.take(key, value)

    def _take_pod(self, key: ObjectKey, value: KubeObject | None) -> None:
        before, after = _uid(self._pods.pop(key, None)), _uid(value)
        cards = _NONE
        if before and before != after:
            self._uids.pop(before, None)
            cards = self._end(before)
        if value is not None:
            self._pods[key] = value
            self._uids[after] = key
            if before != after:
                self._arrived.append(key)
        self._settle(pods={key}, cards=cards)

    def _learn(self) -> None:
        """The policy learns from what arrived since the last decision; not before one, since the fleet would lay itself
        out anew for each of 20,000 pods while the first nodes are told of."""
        for key in self._arrived:
            if (pod := self._pods.get(key)) is not None and (needs := self._needs(pod)).asks:
                self._fleet.observe(needs)
        self._arrived.clear()

    def _take_node(self, name: str, value: KubeObject | None) -> None:
        if value is None:
            self._capacity.pop(name, None)
        else:
            allocatable = (value.get("status") or {}).get("allocatable") or {}
            cpu, memory = (quantity(allocatable.get(what, 0), f"node {name}") for what in ("cpu", "memory"))
            self._capacity[name] = int(cpu * 1000), int(memory / _MIB)
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
            self._on[before.node].discard(name)
            self._fleet.hold(before.uuid, 0)
        if now is not None:
            self._on.setdefault(now.node, set()).add(name)
        for card, step in ((before, -1), (now, 1)):
            if card is not None and card.device is not None:
                self._resources[card.device.resource] += step
        self._resources = +self._resources

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
            pods |= {self._uids[uid] for uid in self._seen_on(node)}
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
            self._fleet.put(Node(name, *self._capacity[name], devices))
        else:
            self._fleet.drop(name)

    def _charge(self, key: ObjectKey) -> frozenset[str]:
        """The pod is charged with what it has. The GPU objects that this may concern."""
        cards = self._naming.get(key, _NONE)
        if (pod := self._pods.get(key)) is None:
            return cards
        uid, node = _uid(pod), node_of(pod)
        if ended(pod):
            return cards | self._end(uid)
        if not node:
            return cards
        self._reserved.pop(uid, None)
        before, now = self._fleet.charges.get(uid), self._claim(pod, node, cards)
        if before == now:
            return cards
        self._fleet.charge(uid, now)
        return cards | _names(before) | _names(now)

    def _claim(self, pod: KubeObject, node: str, naming: Iterable[str]) -> Charge:
        there = (self._cards[card] for card in self._on.get(node, ()))
        devices = {card.uuid: card.device for card in there if card.device is not None}
        needs = self._needs(pod, {device.resource for device in devices.values()})
        cards = [card for name in sorted(naming) if (card := self._cards[name]).node == node]
        return charge_of(pod, needs, node, devices, held_by(pod, needs.asks, cards) if admitted(pod) else {})

    def _hold(self, name: str) -> None:
        """What nobody known has of the GPU is not free."""
        card = self._cards.get(name)
        if card is None:
            return
        slots = 0
        if card.used:
            charges = self._fleet.charges
            planned = sum(charges[uid].gpus.get(card.uuid, 0) for uid in self._seen_on(card.node))
            slots = unknown_slots(card, lambda holding: self._whose(card, holding), planned)
        self._fleet.hold(card.uuid, slots)

    def _whose(self, card: Card, holding: Holding) -> Whose:
        pod = self._pods.get(holding.pod)
        if pod is None:
            return Whose.NOBODY
        if ended(pod):
            return Whose.ENDED
        charge = self._fleet.charges.get(_uid(pod)) if node_of(pod) == card.node else None
        mine = charge is not None and card.uuid in charge.gpus
        return Whose.CHARGED if mine else Whose.NOBODY

    def _end(self, uid: str) -> frozenset[str]:
        """The pod has nothing any more. The GPU objects that this may concern."""
        self._reserved.pop(uid, None)
        before = self._fleet.charges.get(uid)
        self._fleet.release(uid)
        return _names(before)

    def _seen_on(self, node: str) -> Iterator[str]:
        """UIDs of the pods that are seen there, and have not ended."""
        return (uid for uid in self._fleet.charged(node) if uid not in self._reserved)

    def _needs(self, pod: KubeObject, resources: Collection[str] | None = None) -> Demand:
        """Of a pod that the API server has, and has validated; of one that can't be read all the same, nothing."""
        try:
            return needs_of(pod, self._resources if resources is None else resources)
        except InputError:
            return Demand(namespace=str(pod["metadata"].get("namespace", "")))

    # ------------------------------------------------------------------------------------------------------ decisions

    def asks(self, pod: Mapping[str, Any]) -> bool:
        """Whether it asks for slots. Raises InputError for a pod that can't be read."""
        return bool(needs_of(pod, self._resources).asks)

    def decide(self, pod: Mapping[str, Any], names: Sequence[str] | None) -> Decision:
        """Of a pod that has a reservation on one of `names`, that: its binding is under way, or its outcome not known
        yet."""
        reserved = self._reserved.get(identity(pod).uid)
        demand = self._demand(pod)
        self._learn()
        if reserved is not None and (names is None or reserved.placement.node in names):
            return Decision(reserved.placement, "its binding to this node is under way")
        return self._fleet.choose(demand, names)

    def reserve(self, pod: PodId, node: str) -> Reserved:
        seen, where = self._pods.get(_key(pod)), f"pod {pod.namespace}/{pod.name}"
        if problem := self._obstacle(pod, seen):
            raise BindError(f"{where}: {problem}")
        assert seen is not None  # noqa: S101 (for mypy: `_obstacle` says so)
        try:
            demand = self._demand(seen)
        except InputError as error:
            raise BindError(str(error)) from error
        placement = self._fleet.fit(demand, node)
        if isinstance(placement, Refusal):
            raise BindError(f"{where} does not fit on {node} any more: {placement.message}; it is scheduled again")
        found = Reserved(pod, demand, placement)
        self._reserved[pod.uid] = found
        charge = placement.charge(demand)
        self._fleet.charge(pod.uid, charge)
        self._moved |= _names(charge)
        return found

    def _obstacle(self, pod: PodId, seen: KubeObject | None) -> str:
        """Why nothing is reserved for the pod; "" when it may be."""
        if seen is None:
            return "not seen yet, or gone; it is scheduled again if it is there"
        if _uid(seen) != pod.uid:
            return f"the pod of this name has UID {_uid(seen)} now, not {pod.uid}"
        if "deletionTimestamp" in seen["metadata"]:
            return "it is being deleted"
        if ended(seen):
            return f"it has ended: {seen['status']['phase']}"
        if there := node_of(seen):
            return f"it is bound to {there} already"
        if pod.uid in self._reserved:
            return f"its binding to {self._reserved[pod.uid].placement.node} is under way"
        return ""

    def release(self, uid: str) -> None:
        if uid in self._reserved:
            self._moved |= self._end(uid)

    def bound_to(self, pod: PodId) -> str:
        return node_of(seen) if (seen := self._find(pod)) is not None else ""

    def version(self, pod: PodId) -> str:
        return str(seen["metadata"].get("resourceVersion", "")) if (seen := self._find(pod)) is not None else ""

    def waits_for(self, pod: PodId, node: str) -> str:
        found = self._fleet.nodes.get(node)
        seen = self._find(pod)
        if found is None or seen is None:
            return ""
        isolated = {device.resource for device in found.devices if device.isolated}
        mine = _sizes(self._needs(seen).asks) if isolated else _NO_SIZES
        mine = frozenset(size for size in mine if size[0] in isolated)
        if not mine:
            return ""
        for other, its in self._starting(pod.uid, node):
            same = sorted(_sizes(its.asks) & mine)
            if other.namespace != pod.namespace and same:
                resource, slots = same[0]
                return (
                    f"pod {other.namespace}/{other.name} of another namespace, which asks for {slots} of {resource},"
                    f" too, is starting on {node}"
                )
        return ""

    def _starting(self, uid: str, node: str) -> Iterator[tuple[ObjectKey, Demand]]:
        """Who is, or may come, before the kubelet of `node`; of reservations those that are older than the pod's."""
        before = list(self._reserved)
        before = before[: before.index(uid)] if uid in self._reserved else before
        there = self._fleet.charged(node)
        for other in (*sorted(self._seen_on(node)), *(one for one in before if one in there)):
            key = self._uids.get(other)
            if key is not None and other != uid and not admitted(self._pods[key]):
                yield key, self._needs(self._pods[key])

    def preempt(self, pod: Mapping[str, Any], chosen: Mapping[str, Victims]) -> Mapping[str, Victims]:
        demand, priority = self._demand(pod), priority_of(pod)
        found = {}
        for node in sorted(chosen):
            pods = [self._evictable(uid) for uid in sorted(self._seen_on(node))]
            uids = victims(self._fleet, demand, node, priority, chosen[node].uids, pods)
            if uids is not None:
                found[node] = Victims(uids, chosen[node].pdb_violations)
        return found

    def _evictable(self, uid: str) -> Evictable:
        pod = self._pods[self._uids[uid]]
        return Evictable(uid, priority_of(pod), str((pod.get("status") or {}).get("startTime") or ""))

    def _demand(self, pod: Mapping[str, Any]) -> Demand:
        """Raises InputError for a pod that can't be read."""
        unfit = self._models.unfit(identity(pod).namespace, labels_of(pod))
        return demand_of(pod, self._resources, unfit)

    def _find(self, pod: PodId) -> KubeObject | None:
        """The pod, unless it is another one by now."""
        seen = self._pods.get(_key(pod))
        return seen if seen is not None and _uid(seen) == pod.uid else None

    # -------------------------------------------------------------------------------------------------------- figures

    @property
    def fleet(self) -> Fleet:
        """To read from."""
        return self._fleet

    @property
    def reserved(self) -> Mapping[str, Reserved]:
        """By UID; live."""
        return MappingProxyType(self._reserved)

    def slots(self) -> Mapping[str, int]:
        """State (used, reserved, free, closed) -> virtual GPUs of the cluster. Costs what changed since it was last
        asked for."""
        for name in self._moved:
            self._slots.subtract(self._counted.pop(name, {}))
            if found := self._count(name):
                self._counted[name] = found
                self._slots.update(found)
        self._moved = set()
        reserved = sum(sum(self._fleet.charges[uid].gpus.values()) for uid in self._reserved)
        used = self._slots["used"] - reserved
        return {"used": used, "reserved": reserved, "free": self._slots["free"], "closed": self._slots["closed"]}

    def _count(self, name: str) -> Counter[str]:
        card = self._cards.get(name)
        if card is None or card.device is None or card.node not in self._fleet.nodes:
            return Counter()
        free = self._fleet.free(card.uuid)
        rest = "closed" if card.device.closed else "free"
        return Counter({"used": card.device.slots - free, rest: free})


_NO_SIZES: frozenset[tuple[str, int]] = frozenset()


def _sizes(asks: Iterable[Ask]) -> frozenset[tuple[str, int]]:
    """What an Allocate tells of each container: resource and slots."""
    return frozenset((ask.resource, ask.slots) for ask in asks)


def _uid(pod: KubeObject | None) -> str:
    return "" if pod is None else str(pod["metadata"]["uid"])


def _key(pod: PodId) -> ObjectKey:
    return ObjectKey("Pod", pod.namespace, pod.name)


def _named(card: Card | None) -> frozenset[ObjectKey]:
    """Pods that the GPU names as holders."""
    return frozenset() if card is None else frozenset(holding.pod for holding in card.holdings)


def _names(charge: Charge | None) -> frozenset[str]:
    """GPU objects of the GPUs that are charged."""
    return _NONE if charge is None else frozenset(uuid.lower() for uuid in charge.gpus)
