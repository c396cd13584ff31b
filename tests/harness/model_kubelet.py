"""What a kubelet does with devices, in memory: accounts for each ID, and asks the plugin as the real one does.

It keeps of the kubelet's device manager (pkg/kubelet/cm/devicemanager): pods are admitted one at a time, a pod's
containers in order, init containers first; the slots of an init container that ends are given to the pod's later
containers before anything else; GetPreferredAllocation is asked only for what is missing then, and is advice; a refused
Allocate is the end of the pod; a pod's slots are free again when it has ended, all at once. pod-resources shows neither
UIDs nor init containers that end. It leaves out topology hints, and that is all.

An admission is a generator: it yields the calls and is sent the answers, so that it can be played against the pure
parts (`answered`) and, over whatever connection, against a whole agent (`answered_later`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from meshctl.api.allocation import ALLOCATION, Allocation
from meshctl.errors import MeshctlError
from meshctl.sharing import RESOURCE, Owner, Slot


class Kind(StrEnum):
    """Of a container."""

    INIT = "init"
    """Ends before the next one starts."""
    SIDECAR = "sidecar"
    """An init container that stays."""
    APP = "app"


class Container(NamedTuple):
    """What one container asks for, and what the scheduler planned for it."""

    name: str
    asks: int
    kind: Kind = Kind.APP
    plan: tuple[tuple[str, int], ...] = ()
    """(UUID, slots)."""
    resource: str = RESOURCE


@dataclass(frozen=True)
class Pod:
    """A pod that was bound to the node."""

    namespace: str
    name: str
    containers: tuple[Container, ...]
    """In the order in which the kubelet allocates: init containers and sidecars first."""
    created: str = "2026-01-01T00:00:00Z"

    def owner(self, container: Container) -> Owner:
        return Owner(self.namespace, self.name, container.name)

    def object(self, *, phase: str = "Pending", started: bool = False) -> dict[str, Any]:
        """As the API server has it."""
        plans = [{"name": one.name, "gpus": dict(one.plan)} for one in self.containers if one.plan]
        notes = {ALLOCATION: Allocation.model_validate({"containers": plans}).text()} if plans else {}
        return {
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "uid": f"{self.namespace}-{self.name}",
                "creationTimestamp": self.created,
                "annotations": notes,
            },
            "spec": {
                "initContainers": [_spec(one) for one in self.containers if one.kind is not Kind.APP],
                "containers": [_spec(one) for one in self.containers if one.kind is Kind.APP],
            },
            "status": {"phase": phase} | ({"startTime": self.created} if started else {}),
        }


def _spec(one: Container) -> dict[str, Any]:
    limits = {one.resource: str(one.asks)} if one.asks else {}
    always = {"restartPolicy": "Always"} if one.kind is Kind.SIDECAR else {}
    return {"name": one.name, "resources": {"limits": limits}, **always}


class ShortError(MeshctlError):
    """The kubelet itself has too few free healthy devices."""


class Preferred(NamedTuple):
    """GetPreferredAllocation of one container; the answer is IDs."""

    resource: str
    available: list[str]
    must: list[str]
    size: int


class Allocate(NamedTuple):
    """Allocate of one container; there is nothing to answer."""

    resource: str
    ids: list[str]


Call = Preferred | Allocate
Admission = Generator[Call, list[str], str]
"""Returns "", or why the pod was refused."""


@dataclass
class ModelKubelet:
    """One node's kubelet. `pick` chooses where the real one takes what a map yields first."""

    pick: Callable[[list[str], int], list[str]] = lambda ids, count: ids[:count]
    healthy: dict[str, frozenset[str]] = field(default_factory=dict)
    """Resource -> IDs, as the plugin last listed them."""
    pods: dict[Pod, dict[Container, frozenset[str]]] = field(default_factory=dict)
    """What each container of each pod that is admitted, or being admitted, was given."""

    @property
    def used(self) -> frozenset[str]:
        return frozenset(one for given in self.pods.values() for ids in given.values() for one in ids)

    def listing(self) -> dict[Slot, Owner]:
        """pod-resources."""
        return {
            Slot.parse(one): pod.owner(container)
            for pod, given in self.pods.items()
            for container, ids in given.items()
            if container.kind is not Kind.INIT
            for one in ids
        }

    def users(self, uuid: str) -> frozenset[Pod]:
        """Pods that have slots of the GPU."""
        return frozenset(
            pod
            for pod, given in self.pods.items()
            if any(Slot.parse(one).uuid == uuid for ids in given.values() for one in ids)
        )

    def ended(self, pod: Pod) -> None:
        del self.pods[pod]

    def admit(self, pod: Pod) -> Admission:
        """A pod that is refused has nothing afterwards. One whose admission was broken off (a kubelet that was killed)
        and is admitted anew keeps what its containers were given."""
        given = self.pods.setdefault(pod, {})
        reusable: dict[str, frozenset[str]] = defaultdict(frozenset)
        for container in pod.containers:
            try:
                ids = given.get(container)
                if ids is None:
                    ids = given[container] = yield from self._given(container, reusable)
            except MeshctlError as refused:
                del self.pods[pod]
                return str(refused)
            mine = reusable[container.resource]
            reusable[container.resource] = mine | ids if container.kind is Kind.INIT else mine - ids
        return ""

    def _given(
        self, container: Container, reusable: Mapping[str, frozenset[str]]
    ) -> Generator[Call, list[str], frozenset[str]]:
        if not container.asks:
            return frozenset()
        ids = yield from self._chosen(container, reusable)
        yield Allocate(container.resource, sorted(ids))
        twice = ids & (self.used - reusable[container.resource])
        assert not twice, f"given twice: {sorted(twice)}"
        return ids

    def _chosen(
        self, container: Container, reusable: Mapping[str, frozenset[str]]
    ) -> Generator[Call, list[str], frozenset[str]]:
        chosen = self.pick(sorted(reusable[container.resource]), container.asks)
        missing = container.asks - len(chosen)
        if not missing:
            return frozenset(chosen)
        free = self.healthy.get(container.resource, frozenset()) - self.used
        if len(free) < missing:
            raise ShortError(f"requested {missing} {container.resource}, available {len(free)}")
        advice = yield Preferred(container.resource, sorted(free.union(chosen)), sorted(chosen), container.asks)
        chosen += sorted(free.intersection(advice) - set(chosen))[:missing]
        chosen += self.pick(sorted(free - set(chosen)), container.asks - len(chosen))
        return frozenset(chosen)


def answered(admission: Admission, plugin: Callable[[Call], list[str]]) -> str:
    """Plays an admission; what `plugin` raises (MeshctlError) refuses the pod. "", or why it was refused."""
    try:
        call = next(admission)
        while True:
            try:
                answer = plugin(call)
            except MeshctlError as refused:
                call = admission.throw(refused)
            else:
                call = admission.send(answer)
    except StopIteration as end:
        return str(end.value)


async def answered_later(admission: Admission, plugin: Callable[[Call], Awaitable[list[str]]]) -> str:
    """Likewise, with a plugin that is asked over a connection."""
    try:
        call = next(admission)
        while True:
            try:
                answer = await plugin(call)
            except MeshctlError as refused:
                call = admission.throw(refused)
            else:
                call = admission.send(answer)
    except StopIteration as end:
        return str(end.value)
