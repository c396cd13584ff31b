"""Who has what on which GPU: objects and reservations in, decisions out. No I/O, no clock. See `ports.Ledger`.

`books` know what is charged, `models` which products are too slow, the fleet decides; here is what a pod is told, and
who must wait for whom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.preempt import Evictable, victims
from meshctl.core.packing.vocabulary import Ask, Charge, Decision, Demand, Placement, Policy, Refusal
from meshctl.errors import InputError
from meshctl.extender import models
from meshctl.extender.books import Books, uid_of
from meshctl.extender.pods import (
    admitted,
    deleted,
    demand_of,
    ended,
    identity,
    labels_of,
    needs_of,
    node_of,
    nominated_node,
    priority_of,
)
from meshctl.extender.ports import BindError, PodId, Reserved, Victims
from meshctl.ports import KubeObject, ObjectKey


class Ledger:
    """Implements `ports.Ledger`."""

    def __init__(self, policy: Policy = Policy.STRANDING, *, seed: int = 0) -> None:
        self._books = Books(Fleet(policy, seed=seed))
        self._models = models.Models()

    @property
    def fleet(self) -> Fleet:
        """To read from."""
        return self._books.fleet

    @property
    def reserved(self) -> Mapping[str, Reserved]:
        """By UID; live."""
        return MappingProxyType(self._books.reserved)

    def slots(self) -> Mapping[str, int]:
        """State (used, reserved, free, closed) -> virtual GPUs of the cluster."""
        return self._books.slots()

    def take(self, key: ObjectKey, value: KubeObject | None) -> None:
        if key.kind in models.KINDS:
            self._models.take(key, value)
        else:
            self._books.take(key, value)

    def warm_up(self) -> None:
        """Once everything was told: what takes seconds for 20,000 pods and 40,000 GPUs is done now, not in the first
        decision."""
        self._books.learn()
        self.fleet.stranded()
        self.slots()

    def asks(self, pod: Mapping[str, Any]) -> bool:
        """Whether it asks for slots. Raises InputError for a pod that can't be read."""
        return bool(needs_of(pod, self._books.resources).asks)

    def decide(self, pod: Mapping[str, Any], names: Sequence[str] | None) -> Decision:
        """Of a pod that has a reservation on one of `names`, that: its binding is under way, or its outcome not known
        yet. Of one that asks for no GPU neither a place nor a refusal: any node will do."""
        uid, demand = identity(pod).uid, self._demand(pod)
        self._books.learn()
        if not demand.asks:
            return Decision(None, "it asks for no GPU")
        reserved = self._books.reserved.get(uid)
        if reserved is not None and (names is None or reserved.placement.node in names):
            return Decision(reserved.placement, "its binding to this node is under way")
        if not self._books.nominated:
            return self._books.fleet.choose(demand, names)
        with self._kept_free(uid, priority_of(pod)):
            found = self._books.fleet.choose(demand, names)
            return replace(found, refused=dict(found.refused))

    @contextmanager
    def _kept_free(self, uid: str, priority: int) -> Iterator[None]:
        """Meanwhile pods that the scheduler has evicted others for have their place, as far as it is free already: what
        is no more important must not take it (the scheduler itself sees to this for a node's sums). Of two that are
        equally important the first by name has it, or each would wait for the other."""
        pods = [self._books.pods[key] for key in sorted(self._books.nominated)]
        keys = []
        try:
            for pod in sorted(pods, key=priority_of, reverse=True):
                other = uid_of(pod)
                if other == uid or priority_of(pod) < priority:
                    break
                if other not in self._books.reserved and (charge := self._awaited(pod)) is not None:
                    keys.append(f"nominated {other}")
                    self._books.fleet.charge(keys[-1], charge)
            yield
        finally:
            for key in keys:
                self._books.fleet.release(key)

    def _awaited(self, pod: KubeObject) -> Charge | None:
        """What a pod that was nominated to a node is to have of it, now or when those have ended that are about to;
        None: nothing there would do."""
        demand, node, fleet = self._readable(pod), nominated_node(pod), self._books.fleet
        if demand is None:
            return None
        found = fleet.fit(demand, node)
        if not isinstance(found, Placement) and (ending := {uid: fleet.charges[uid] for uid in self._ending(node)}):
            try:
                for uid in ending:
                    fleet.release(uid)
                found = fleet.fit(demand, node)
            finally:
                for uid, charge in ending.items():
                    fleet.charge(uid, charge)
        return found.charge(demand) if isinstance(found, Placement) else None

    def _ending(self, node: str) -> list[str]:
        """UIDs of the pods there that were deleted, and have not ended yet."""
        books = self._books
        return [
            uid for uid in sorted(books.seen_on(node)) if uid in books.keys and deleted(books.pods[books.keys[uid]])
        ]

    def reserve(self, pod: PodId, node: str) -> Reserved:
        seen, where = self._books.pods.get(_key(pod)), f"pod {pod.namespace}/{pod.name}"
        if problem := self._obstacle(pod, seen):
            raise BindError(f"{where}: {problem}")
        assert seen is not None  # noqa: S101 (for mypy: `_obstacle` says so)
        try:
            demand = self._demand(seen)
        except InputError as error:
            raise BindError(str(error)) from error
        placement: Placement | Refusal = Placement(node)
        if demand.asks or node not in self.fleet.nodes:  # else the scheduler alone knows, and Filter let it pass, too
            with self._kept_free(pod.uid, priority_of(seen)):
                placement = self.fleet.fit(demand, node)
        if isinstance(placement, Refusal):
            raise BindError(f"{where} does not fit on {node} any more: {placement.message}; it is scheduled again")
        found = Reserved(pod, demand, placement)
        self._books.reserve(found)
        return found

    def _obstacle(self, pod: PodId, seen: KubeObject | None) -> str:
        """Why nothing is reserved for the pod; "" when it may be."""
        if seen is None:
            return "not seen yet, or gone; it is scheduled again if it is there"
        if uid_of(seen) != pod.uid:
            return f"the pod of this name has UID {uid_of(seen)} now, not {pod.uid}"
        if deleted(seen):
            return "it is being deleted"
        if ended(seen):
            return f"it has ended: {seen['status']['phase']}"
        if there := node_of(seen):
            return f"it is bound to {there} already"
        if pod.uid in self._books.reserved:
            return f"its binding to {self._books.reserved[pod.uid].placement.node} is under way"
        return ""

    def release(self, uid: str) -> None:
        self._books.release(uid)

    def bound_to(self, pod: PodId) -> str:
        return node_of(seen) if (seen := self._find(pod)) is not None else ""

    def version(self, pod: PodId) -> str:
        return str(seen["metadata"].get("resourceVersion", "")) if (seen := self._find(pod)) is not None else ""

    def waits_for(self, pod: PodId, node: str) -> str:
        found = self._books.fleet.nodes.get(node)
        seen = self._find(pod)
        if found is None or seen is None:
            return ""
        isolated = {device.resource for device in found.devices if device.isolated}
        mine = _sizes(self._books.needs(seen).asks) if isolated else _NO_SIZES
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
        before = list(self._books.reserved)
        before = before[: before.index(uid)] if uid in self._books.reserved else before
        there = self._books.fleet.charged(node)
        for other in (*sorted(self._books.seen_on(node)), *(one for one in before if one in there)):
            key = self._books.keys.get(other)
            if key is not None and other != uid and not admitted(self._books.pods[key]):
                yield key, self._books.needs(self._books.pods[key])

    def preempt(self, pod: Mapping[str, Any], chosen: Mapping[str, Victims]) -> Mapping[str, Victims]:
        demand, priority = self._demand(pod), priority_of(pod)
        if not demand.asks:
            return chosen
        found = {}
        there = {node: [self._evictable(uid) for uid in sorted(self._books.seen_on(node))] for node in sorted(chosen)}
        with self._kept_free(identity(pod).uid, priority):  # nor are two pods to have the place that one eviction makes
            for node, pods in there.items():
                uids = victims(self._books.fleet, demand, node, priority, chosen[node].uids, pods)
                if uids is not None:
                    found[node] = Victims(uids, chosen[node].pdb_violations)
        return found

    def awaited(self, pod: Mapping[str, Any]) -> str:
        """The node that the pod is nominated to, while pods there are ending that are less important; "" otherwise."""
        node, priority = nominated_node(pod), priority_of(pod)
        pods = (self._books.pods[self._books.keys[uid]] for uid in self._ending(node))
        return node if any(priority_of(one) < priority for one in pods) else ""

    def _evictable(self, uid: str) -> Evictable:
        pod = self._books.pods[self._books.keys[uid]]
        return Evictable(uid, priority_of(pod), str((pod.get("status") or {}).get("startTime") or ""))

    def _demand(self, pod: Mapping[str, Any]) -> Demand:
        """Raises InputError for a pod that can't be read."""
        unfit = self._models.unfit(identity(pod).namespace, labels_of(pod))
        return demand_of(pod, self._books.resources, unfit)

    def _readable(self, pod: KubeObject) -> Demand | None:
        """None for a pod that can't be read."""
        try:
            return self._demand(pod)
        except InputError:
            return None

    def _find(self, pod: PodId) -> KubeObject | None:
        """The pod, unless it is another one by now."""
        seen = self._books.pods.get(_key(pod))
        return seen if seen is not None and uid_of(seen) == pod.uid else None


_NO_SIZES: frozenset[tuple[str, int]] = frozenset()


def _sizes(asks: Iterable[Ask]) -> frozenset[tuple[str, int]]:
    """What an Allocate tells of each container: resource and slots."""
    return frozenset((ask.resource, ask.slots) for ask in asks)


def _key(pod: PodId) -> ObjectKey:
    return ObjectKey("Pod", pod.namespace, pod.name)
