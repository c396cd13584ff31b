"""The vocabulary of GPU sharing: physical GPUs, slots (virtual GPUs), who holds them, how they are shared. Data only.

The node agent, the operator, `meshctl gpu` and the placement of pods all speak it. Everything is frozen; units stand in
the names; unknown is ``None``, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

RESOURCE = "hpe.com/gpus"
"""The extended resource that one virtual GPU is one of, unless a policy says another."""
REPLICAS = 10
"""Virtual GPUs of one physical GPU, unless a policy says another number."""
DEFAULT_IGNORED_XIDS = frozenset({13, 31, 43, 45, 68, 109})
"""XIDs that an application causes, not the GPU (NVIDIA's own device plugin ignores the same)."""
LONGEST_DEVICE_ID = 63
"""Characters that a kubelet's device ID may have here, so that it may be a label's value too."""
SEPARATOR = "::"


class Slot(NamedTuple):
    """One virtual GPU; its text is the kubelet's device ID. The only place that knows ``UUID::number``."""

    uuid: str
    number: int
    """0 .. replicas - 1."""

    def __str__(self) -> str:
        return f"{self.uuid}{SEPARATOR}{self.number}"

    @classmethod
    @lru_cache(maxsize=8192)
    def parse(cls, text: str) -> Slot:
        """Remembered: a kubelet lists the same few hundred again and again.

        Raises ValueError for what is no device ID of ours; ``GPU-1::01`` and ``GPU-1::+1`` are none either."""
        uuid, found, number = text.rpartition(SEPARATOR)
        if not (found and uuid and number.isascii() and number.isdecimal() and str(int(number)) == number):
            raise ValueError(f"{text!r} is not UUID{SEPARATOR}SLOT")
        return cls(uuid, int(number))


class Mode(StrEnum):
    """How the containers on one GPU share it."""

    MPS = "MPS"
    """In space: a share of its threads and memory each. Needs compute capability 7.0."""
    TIME_SLICING = "TimeSlicing"
    """In time: each has the whole GPU for a while; no limit on memory."""
    EXCLUSIVE = "Exclusive"
    """Not at all: one container has it."""


class Isolation(StrEnum):
    """Who may be on one GPU at the same time."""

    NONE = "None"
    TENANT = "Tenant"
    """One namespace."""


class Packing(StrEnum):
    """Which GPU of the node, when nobody chose one."""

    PACKED = "Packed"
    """The fullest that has room."""
    SPREAD = "Spread"
    """The emptiest."""


class OnChange(StrEnum):
    """What happens to a GPU with pods when its policy changes."""

    WAIT = "Wait"
    """It goes on as before, new pods included, until it is empty for a moment."""
    DRAIN = "Drain"
    """Free slots are withdrawn at once, so that it becomes empty; pods are never touched."""


class Injection(StrEnum):
    """How the GPU gets into the container."""

    RUNTIME = "Runtime"
    """NVIDIA's container runtime reads NVIDIA_VISIBLE_DEVICES."""
    CDI = "CDI"
    """The container runtime injects the CDI device ``nvidia.com/gpu=UUID``."""
    DEVICE_NODES = "DeviceNodes"
    """The kubelet passes /dev/nvidia*; the image has the driver's libraries, or mounts them."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU, as NVML (or an inventory file) describes it."""

    uuid: str
    product: str
    """As NVML writes it: ``Tesla V100-SXM2-16GB``."""
    memory_bytes: int
    compute_capability: tuple[int, int]
    """(7, 0): major and minor."""
    minor: int | None = None
    """Of /dev/nvidia<minor>."""
    index: int = 0
    """NVML's; changes when GPUs come and go."""
    mig: bool = False
    """MIG is on: NVIDIA's own plugin shares it, we leave it alone."""


@dataclass(frozen=True, slots=True)
class HealthRules:
    """What makes a GPU unhealthy, and healthy again."""

    ignored_xids: frozenset[int] = frozenset()
    """Besides `DEFAULT_IGNORED_XIDS`."""
    critical_xids: frozenset[int] = frozenset()
    """Win over both."""
    recover_after_s: float = 60.0
    """Probes must have succeeded for this long, with no further XID."""

    def ignores(self, xid: int) -> bool:
        return xid not in self.critical_xids and xid in DEFAULT_IGNORED_XIDS | self.ignored_xids


@dataclass(frozen=True, slots=True)
class Sharing:
    """How one GPU is shared: what a policy comes to for it."""

    policy: str
    """Name of the GPUSharingPolicy."""
    generation: int = 0
    """Its metadata.generation."""
    resource: str = RESOURCE
    mode: Mode = Mode.MPS
    """What the GPU can: TimeSlicing where the policy says MPS and the GPU is older."""
    replicas: int = REPLICAS
    """Slots; 1 when Exclusive."""
    isolation: Isolation = Isolation.NONE
    packing: Packing = Packing.PACKED
    several_gpus: bool = False
    """One container may have slots of several GPUs. Never with MPS: a process has one MPS server."""
    on_change: OnChange = OnChange.WAIT
    injection: Injection = Injection.RUNTIME
    oversubscription_ratio: float = 1.0
    """The threads of all slots together, in whole GPUs; at least 1."""
    memory_limit: bool = True
    """MPS: each container's device memory is limited to its share."""
    clients_per_container: int = 1
    """MPS: processes on the GPU that a container may have; they divide its share, since MPS limits processes."""
    health: HealthRules = field(default_factory=HealthRules)


class Owner(NamedTuple):
    """A container that holds slots."""

    namespace: str
    pod: str
    container: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}[{self.container}]"


@dataclass(frozen=True, slots=True)
class Health:
    """Whether new containers may be given a GPU."""

    healthy: bool = True
    reason: str = "Healthy"
    """CamelCase: Healthy, Xid, ProbeFailed, ProbeTimeout, Lost, MpsFailed, Recovering."""
    message: str = ""
    """In words, for people: which XID, what NVML said, since when."""


class MpsPhase(StrEnum):
    """Of one GPU's MPS control daemon."""

    OFF = "Off"
    """Not wanted, not there."""
    STARTING = "Starting"
    RUNNING = "Running"
    FAILED = "Failed"
    """It died or hangs; it is started again when no process of a container is left on the GPU."""


@dataclass(frozen=True, slots=True)
class MpsStatus:
    """What is known of one GPU's MPS control daemon."""

    phase: MpsPhase = MpsPhase.OFF
    pid: int | None = None
    clients: int | None = None
    """Processes connected; None when it did not say."""
    restarts: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the scheduler gave one container: `slots` slots of each GPU in `gpus`, read from its pod's annotation."""

    owner: Owner
    gpus: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """UUID -> number of slots; empty: nobody chose."""
    resource: str = RESOURCE
    asked: int = 0
    """Slots that the container's limits ask for."""
    order: tuple[str, str, str] = ("", "", "")
    """Kubelets admit pods in this order: (creation time, namespace, name)."""
    init: bool = False
    """An init container that ends before the next one starts. pod-resources never shows it, but its slots are its pod's
    until the pod ends: the kubelet gives them to the pod's next containers, and what they leave to nobody."""
    admitted: bool = False
    """The kubelet has acknowledged the pod: what its containers were to get, they have."""
    peak: int = 0
    """Slots that the pod may come to have of the same GPU: an init container's stay with those that follow it."""
