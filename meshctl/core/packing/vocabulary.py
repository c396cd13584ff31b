"""The words of placement: nodes with physical GPUs, what a pod demands, where it is placed, why not. Data only.

CPU is in millicores, memory in MiB, GPUs in slots (virtual GPUs) of one physical GPU. How much of a GPU a slot is
depends on the GPU: one of `Device.slots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from meshctl.sharing import RESOURCE

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Policy(StrEnum):
    """How one of the places that fit is chosen."""

    STRANDING = "stranding"
    """The least GPU that nobody can use any more, for want of CPU or in pieces that nobody asks for. The default."""
    FGD = "fgd"
    """Fragmentation gradient descent (USENIX ATC '23)."""
    BESTFIT = "bestfit"
    """The least of CPU and GPU left on the node."""
    PACKING = "packing"
    """Used GPUs before idle ones, used nodes before idle ones."""
    DOTPROD = "dotprod"
    """The node whose free resources are least like the demand (as the peers' experiment has it)."""
    SPREAD = "spread"
    """The emptiest."""
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Device:
    """One physical GPU that is shared as slots."""

    uuid: str
    slots: int
    """In all; 1: whole or not at all."""
    product: str = ""
    """As GPU discovery writes it: ``Tesla-V100-SXM2-16GB``; "" is unknown."""
    resource: str = RESOURCE
    """Extended resource that its slots are offered as."""
    isolated: bool = False
    """Pods of one namespace at a time."""
    several: bool = False
    """A container may have slots of this GPU and of others."""
    closed: str = ""
    """Why nobody new may come, in words (``unhealthy: Xid 79``); "" when it is open."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node as its pods find it empty."""

    name: str
    cpu_milli: int
    """Allocatable."""
    memory_mib: int
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """What one container asks for: so many slots of one GPU (of several where all of them allow it)."""

    container: str
    slots: int
    """At least 1."""
    resource: str = RESOURCE
    init: bool = False
    """An init container that ends before the next one starts. The kubelet gives its slots to the containers that follow
    it, so its demand is a peak on the same GPUs, not a sum."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one pod demands."""

    cpu_milli: int = 0
    memory_mib: int = 0
    asks: tuple[Ask, ...] = ()
    """In the kubelet's order (init containers first); none: the pod asks for no GPU."""
    products: frozenset[str] | None = None
    """GPUs that will do; None: any."""
    unfit: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Product -> why it will not do, in words: a ModelProfile shows that it is too slow."""
    namespace: str = ""
    """Tenant."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one pod takes of one node, from its binding until it is gone."""

    node: str
    cpu_milli: int = 0
    memory_mib: int = 0
    gpus: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """UUID -> slots, those of init containers as a peak."""
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a pod goes."""

    node: str
    gpus: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    """Container -> UUID -> slots; containers that ask for none are not named."""

    def charge(self, demand: Demand) -> Charge:
        """What the pod takes there: of each GPU the most that is held at any time. A sidecar that has started holds its
        slots while later init containers run."""
        steady: dict[str, int] = {}
        most: dict[str, int] = {}
        init = {ask.container for ask in demand.asks if ask.init}
        for container in dict.fromkeys((*(ask.container for ask in demand.asks), *self.gpus)):
            for uuid, slots in self.gpus.get(container, {}).items():
                now = steady.get(uuid, 0) + slots
                most[uuid] = max(most.get(uuid, 0), now)
                if container not in init:
                    steady[uuid] = now
        return Charge(self.node, demand.cpu_milli, demand.memory_mib, dict(sorted(most.items())), demand.namespace)


class Reason(StrEnum):
    """Why a node is refused."""

    UNKNOWN_NODE = "UnknownNode"
    """Nothing is known of it (yet)."""
    NO_GPU = "NoGpu"
    """None of its GPUs is shared as the resource that is asked for."""
    PRODUCT = "WrongProduct"
    """It has other GPUs than those that will do."""
    TOO_SLOW = "TooSlow"
    """The ModelProfile says that its GPUs can't serve the model within its SLO."""
    TOO_SMALL = "TooSmall"
    """No GPU of it has so many slots, even empty."""
    CLOSED = "Closed"
    """The GPUs that would do take nobody new: unhealthy, or about to be shared otherwise."""
    TENANT = "OtherTenant"
    """The GPUs with room have pods of another namespace, and are for one at a time."""
    NO_ROOM = "NoRoom"
    """No single GPU has so many slots free, though all of them together may have."""
    CPU = "Cpu"
    MEMORY = "Memory"
    WORSE = "Worse"
    """The pod would fit; another node is better."""

    @property
    def resolvable(self) -> bool:
        """Whether the node may come to fit when pods of it are evicted."""
        return self in (Reason.TENANT, Reason.NO_ROOM, Reason.CPU, Reason.MEMORY)


class Refusal(NamedTuple):
    """Why one node was not chosen."""

    reason: Reason
    message: str
    """In words, with numbers, for `kubectl describe pod`; without the node's name, so that equal ones add up there."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one pod."""

    placement: Placement | None
    """None: no node fits."""
    why: str
    """In words: why the node was chosen, or how many nodes were refused for what."""
    refused: Mapping[str, Refusal] = field(default_factory=lambda: MappingProxyType({}))
    """Node -> why not, of all nodes that were asked about but the chosen one. Made when it is read."""
