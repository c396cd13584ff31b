"""What the parts of the extender need of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from meshctl.core.packing.vocabulary import Decision, Demand, Placement
from meshctl.errors import MeshctlError
from meshctl.ports import KubeObject, ObjectKey


class PodId(NamedTuple):
    """A pod of one life: a later one of the same name has another UID."""

    namespace: str
    name: str
    uid: str


class BindError(MeshctlError):
    """The pod is not bound. The message is for the pod's Event: what, why, and what happens next."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A place that is held for a pod from before its binding is written until the pod is seen there."""

    pod: PodId
    demand: Demand
    placement: Placement


class Victims(NamedTuple):
    """Pods of one node that go so that another fits."""

    uids: tuple[str, ...]
    pdb_violations: int


class Ledger(Protocol):
    """Who has what on which GPU, kept from the objects that are watched and from reservations. No I/O, no clock.

    A pod counts from its reservation, or from when it is seen on a node, until it is Succeeded, Failed or gone; one
    that is being deleted counts until it is gone. What the agent says of a GPU (holders, used) counts for more than
    what the pod's annotation says. `decide` changes nothing.
    """

    def take(self, key: ObjectKey, value: KubeObject | None) -> None:
        """An object as it is now (None: it is gone): Node, Pod, GPU, ModelRoute, ModelProfile, Service."""

    def decide(self, pod: Mapping[str, Any], names: Sequence[str] | None) -> Decision:
        """The best of the nodes `names` (None: all) for a pod as the scheduler sent it. Raises InputError for a pod
        that can't be read (no UID, slots that are no number ...)."""

    def reserve(self, pod: PodId, node: str) -> Reserved:
        """Check again, choose GPUs of `node` and hold them. Raises BindError when the pod does not fit there now, is
        not known, has another UID, is being deleted or is bound. Twice for one pod is an error, too."""

    def release(self, uid: str) -> None:
        """What was reserved for the pod is free, as far as the pod is not seen on a node."""

    def bound_to(self, pod: PodId) -> str:
        """The node that the pod is seen on; "" for none."""

    def version(self, pod: PodId) -> str:
        """The newest resourceVersion of the pod that was seen; "" when none was."""

    def waits_for(self, pod: PodId, node: str) -> str:
        """Whom a binding to `node` must wait for, in words; "" for nobody. Two pods of two tenants that ask for equally
        many slots, on a node with isolated GPUs, must not be before the kubelet at the same time: an Allocate does not
        say for which of them it is (docs/decisions/0006)."""

    def preempt(self, pod: Mapping[str, Any], victims: Mapping[str, Victims]) -> Mapping[str, Victims]:
        """Of the nodes on which the scheduler would evict `victims`: those where the pod then really fits on physical
        GPUs, each with the victims that this takes (more of lower priority than the pod, where needed)."""

    def awaited(self, pod: Mapping[str, Any]) -> str:
        """The node that the pod is nominated to, while less important pods there are ending; "" otherwise."""


class Binder(Protocol):
    """Writes bindings."""

    async def bind(self, pod: PodId, node: str) -> None:
        """The pod is bound, with its GPUs as annotation, in one write. Raises BindError when it is not."""

    async def pace(self) -> None:
        """Returns when the next pod may be given a place (see `pace`), or after a while."""

    def placed(self, uid: str) -> None:
        """The pod was given a place; its binding will follow."""

    @property
    def unready(self) -> str:
        """Why nothing may be bound here now (the Lease is another replica's); "" when it may."""
