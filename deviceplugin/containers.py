"""What the kubelet adds to a container that got slots. Pure.

Invariants: a container sees the GPUs of its slots and no other; what the containers of one GPU get of its threads and
of its memory never adds up to more than there is, unless the policy oversubscribes.

MPS limits processes, not containers: a container of several processes has its share divided by
`Sharing.clients_per_container`. Inside the container there is one GPU, so that its index is 0, for CUDA as for the
limit of memory; CUDA_VISIBLE_DEVICES is therefore not set. Nor is NVIDIA_DRIVER_CAPABILITIES: the runtime's default,
compute and utility, is what CUDA needs, and ours would override what the image asks for.

Rejected: limits by the control daemon (set_default_active_thread_percentage): they are the same for each of its
clients, hold from the next server on, and one container may have more slots than another. A client's own environment
can only tighten them, so that the daemon's stay at 100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from deviceplugin.allocate import Reason, RefusedSlotsError
from deviceplugin.ports import ContainerResponse, DeviceNode, Mount
from meshctl.sharing import Gpu, Injection, Mode, Sharing, Slot

if TYPE_CHECKING:
    from deviceplugin.allocate import Shared

MPS_CAPABILITY = (7, 0)
"""Compute capability from which MPS limits threads and memory, and isolates address spaces."""
PIPE_DIRECTORY = "/mps/pipe"
"""Of the GPU's MPS daemon, in the container."""
SHM_DIRECTORY = "/dev/shm"  # noqa: S108 (where MPS clients and their server meet, by CUDA's rule)
SLOTS_ENV = "MESHCTL_GPU_SLOTS"
SLOTS_ANNOTATION = "meshctl.io/gpu-slots"
CDI_KIND = "nvidia.com/gpu"
NO_DEVICES = "void"
"""NVIDIA's container runtime then adds nothing: CUDA images ask for "all" by themselves."""
CONTROL_DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")

_CLIENTS_BEFORE_VOLTA = 16
_CLIENTS = 48
_CLIENTS_SINCE = (590, 60)
"""CUDA 13.1, whose driver is R590, raised 48 to 60 (NVIDIA's MPS guide, "Client-Server Connection Limits")."""
_MIB = 1 << 20


def client_cap(gpu: Gpu, driver: str) -> int:
    """Processes that one MPS server of this GPU serves at a time; an unknown `driver` ("") is taken for an old one."""
    if gpu.compute_capability < MPS_CAPABILITY:
        return _CLIENTS_BEFORE_VOLTA
    major = driver.partition(".")[0]
    since, clients = _CLIENTS_SINCE
    return clients if major.isascii() and major.isdecimal() and int(major) >= since else _CLIENTS


def thread_percentage(sharing: Sharing, slots: int) -> int:
    """Of the GPU's threads, 1..100, that each process of a container with `slots` slots of it may use; rounded down."""
    share = _share(sharing, slots) * Fraction(str(sharing.oversubscription_ratio))
    return min(100, max(1, int(100 * share)))


def memory_limit_mib(gpu: Gpu, sharing: Sharing, slots: int) -> int | None:
    """Device memory that each process of a container with `slots` slots may use; None: as much as there is."""
    if not sharing.memory_limit:
        return None
    return max(1, int(gpu.memory_bytes * _share(sharing, slots) / _MIB))


def response(slots: Sequence[Slot], gpus: Mapping[str, Shared], mps_pipe: Callable[[str], str]) -> ContainerResponse:
    """Of one container with these `slots`, of `gpus` by UUID; `mps_pipe` gives the host's pipe directory of a UUID.

    Raises RefusedSlotsError when the container can't be given them: a GPU without a known /dev/nvidia<minor> where
    device nodes are to be injected, or two GPUs of which one is shared by MPS. LookupError: a slot of no GPU of ours.
    """
    held = sorted(slots)
    shared = [gpus[uuid] for uuid in dict.fromkeys(slot.uuid for slot in held)]
    shared.sort(key=lambda one: (one.gpu.index, one.gpu.uuid))
    ids = ",".join(map(str, held))
    envs = {SLOTS_ENV: ids}
    mounts: tuple[Mount, ...] = ()
    if any(one.sharing.mode is Mode.MPS for one in shared):
        limits, mounts = _mps(shared, len(held), mps_pipe)
        envs |= limits
    visible, devices, cdi_devices = _injected(shared)
    return ContainerResponse(
        envs=envs | {"NVIDIA_VISIBLE_DEVICES": visible},
        mounts=mounts,
        devices=devices,
        annotations={SLOTS_ANNOTATION: ids},
        cdi_devices=cdi_devices,
    )


def _share(sharing: Sharing, slots: int) -> Fraction:
    """Of the whole GPU, for each process of a container with `slots` slots."""
    return Fraction(slots, sharing.replicas * sharing.clients_per_container)


def _mps(
    shared: Sequence[Shared], slots: int, mps_pipe: Callable[[str], str]
) -> tuple[dict[str, str], tuple[Mount, ...]]:
    """What makes a process of the container a client of its GPU's MPS server, within its share."""
    if len(shared) > 1:
        names = ", ".join(one.gpu.uuid for one in shared)
        raise RefusedSlotsError(
            Reason.SEVERAL_GPUS, f"slots of {names} for one container: a process has one MPS server, that of one GPU"
        )
    (one,) = shared
    envs = {
        "CUDA_MPS_PIPE_DIRECTORY": PIPE_DIRECTORY,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(thread_percentage(one.sharing, slots)),
    }
    limit_mib = memory_limit_mib(one.gpu, one.sharing, slots)
    if limit_mib is not None:
        envs["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={limit_mib}M"
    return envs, (Mount(mps_pipe(one.gpu.uuid), PIPE_DIRECTORY), Mount(SHM_DIRECTORY, SHM_DIRECTORY))


def _injected(shared: Sequence[Shared]) -> tuple[str, tuple[DeviceNode, ...], tuple[str, ...]]:
    """(NVIDIA_VISIBLE_DEVICES, device nodes, CDI devices); GPUs of one resource whose policies differ get the first's.

    Where the runtime is not to act, it is told so: else "all" of a CUDA image would show it every GPU of the node.
    """
    injection = shared[0].sharing.injection if shared else Injection.RUNTIME
    match injection:
        case Injection.RUNTIME:
            return ",".join(one.gpu.uuid for one in shared) or NO_DEVICES, (), ()
        case Injection.CDI:
            return NO_DEVICES, (), tuple(f"{CDI_KIND}={one.gpu.uuid}" for one in shared)
        case Injection.DEVICE_NODES:
            paths = [*(_node(one.gpu) for one in shared), *CONTROL_DEVICES]
            return NO_DEVICES, tuple(DeviceNode(path, path) for path in paths), ()


def _node(gpu: Gpu) -> str:
    if gpu.minor is None:
        raise RefusedSlotsError(
            Reason.NOT_READY,
            f"GPU {gpu.uuid}: its /dev/nvidia<minor> is not known; say `minor` in the inventory file, or let the"
            " policy inject by Runtime or CDI",
        )
    return f"/dev/nvidia{gpu.minor}"
