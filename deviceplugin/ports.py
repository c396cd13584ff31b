"""What the agent's parts need of each other. The edges implement these; nothing pure knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from meshctl.errors import MeshctlError
from meshctl.model import Problem
from meshctl.ports import KubeObject
from meshctl.sharing import Gpu, MpsStatus, Owner, Slot

if TYPE_CHECKING:
    from deviceplugin.policies import Policy


@dataclass(frozen=True, slots=True)
class Device:
    """One slot, as the kubelet is told of it."""

    id: str
    healthy: bool


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of the host's in the container."""

    host_path: str
    container_path: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device file of the host's in the container."""

    host_path: str
    container_path: str
    permissions: str = "rw"


@dataclass(frozen=True, slots=True)
class ContainerResponse:
    """What the kubelet adds to a container that got slots."""

    envs: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    devices: tuple[DeviceNode, ...] = ()
    annotations: dict[str, str] = field(default_factory=dict)
    cdi_devices: tuple[str, ...] = ()


class Backend(Protocol):
    """What decides, behind the kubelet's device plugin API; `server` speaks the protocol in front of it.

    Each method may raise `allocate.RefusedSlotsError`: the caller's fault, told to the kubelet in its words.
    """

    def devices(self, resource: str) -> Sequence[Device]:
        """All slots of one resource, the same order every time."""
        ...

    async def wait_changed(self, resource: str, seen: Sequence[Device]) -> Sequence[Device]:
        """The slots, as soon as they differ from `seen`."""
        ...

    async def preferred(self, resource: str, available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
        """Of one container: `size` IDs of `available`, `must` among them. Changes nothing."""
        ...

    async def allocate(self, resource: str, containers: Sequence[Sequence[str]]) -> list[ContainerResponse]:
        """IDs of each container, all or none of them. Remembered on the disk before it returns."""
        ...

    async def pre_start(self, resource: str, ids: Sequence[str]) -> None:
        """Returns when a container with these slots may start (its MPS daemon answers); raises when it may not yet."""
        ...


@dataclass(frozen=True, slots=True)
class Xid:
    """A critical error of the driver's."""

    code: int
    uuid: str | None
    """None: it is not known of which GPU."""


class GpuError(MeshctlError):
    """NVML could not do it; the message names the GPU, the call and NVML's own words."""


class GpuLostError(GpuError):
    """The GPU fell off the bus, or is gone."""


class GpuTimeoutError(GpuError):
    """NVML did not answer in time; a driver may hang for ever."""


class Inventory(Protocol):
    """The physical GPUs of this node. No call blocks the event loop; each ends within its deadline, with `GpuError`."""

    @property
    def driver(self) -> str:
        """Version; "" when unknown."""
        ...

    async def gpus(self) -> tuple[Gpu, ...]:
        """As they are now, in order of index. A GPU that fell off the bus may be missing."""
        ...

    async def probe(self, uuid: str) -> None:
        """Returns when the GPU answers; raises GpuError when it does not."""
        ...

    async def next_xid(self) -> Xid:
        """Waits for the next one; for ever where there are no events."""
        ...

    async def set_exclusive(self, uuid: str, exclusive: bool) -> None:
        """Compute mode EXCLUSIVE_PROCESS, or DEFAULT. Harmless when it is so already."""
        ...

    async def processes(self, uuid: str) -> tuple[int, ...] | None:
        """IDs of the processes that compute on the GPU, MPS servers too; None where nobody can say."""
        ...

    async def close(self) -> None: ...


class Mps(Protocol):
    """The MPS control daemons of this node, one per GPU; supervised from `want` to `unwant`."""

    def status(self, uuid: str) -> MpsStatus: ...

    def want(self, gpu: Gpu) -> None:
        """The GPU is to have a daemon: adopted when one runs, started when not. Returns at once; see `status`."""
        ...

    async def unwant(self, uuid: str) -> None:
        """Quits the daemon and gives the GPU its compute mode back. Only for a GPU without clients."""
        ...

    async def ready(self, uuid: str, deadline_s: float) -> None:
        """Returns when the daemon answers; raises MeshctlError with the reason when it does not."""
        ...

    async def clients(self, uuid: str) -> tuple[int, ...] | None:
        """IDs of the client processes; None when it does not say."""
        ...

    def pipe_directory(self, uuid: str) -> str: ...

    def left(self) -> tuple[str, ...]:
        """UUIDs of GPUs whose daemon an earlier agent left, and nobody wants now."""
        ...

    async def wait_changed(self) -> None:
        """Returns at the next change of any status."""
        ...

    async def stop(self) -> None:
        """Stops supervising; daemons run on, for the containers that are connected to them."""
        ...


class World(Protocol):
    """What the agent knows of its cluster, or of its policy file."""

    @property
    def node_labels(self) -> Mapping[str, str] | None:
        """None: not known yet."""
        ...

    @property
    def node_uid(self) -> str: ...
    def policies(self) -> Sequence[Policy] | None:
        """None: not known yet; nothing is deleted then."""
        ...

    def pods(self) -> Sequence[KubeObject] | None:
        """Pods of this node; empty without a cluster. None: not known yet."""
        ...

    async def fresh_pods(self, deadline_s: float) -> Sequence[KubeObject]:
        """The same, asked anew. Raises UnavailableError."""
        ...

    def problems(self) -> tuple[Problem, ...]: ...
    async def wait_changed(self) -> None: ...


class Holdings(Protocol):
    """The kubelet's word on who holds what."""

    async def held(self, resources: frozenset[str]) -> Mapping[Slot, Owner]:
        """Raises UnavailableError when it cannot say."""
        ...
