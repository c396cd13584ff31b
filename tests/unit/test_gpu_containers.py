"""What a container that got slots finds in its environment, its mounts and its devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deviceplugin.allocate import Reason, RefusedSlotsError, Shared
from deviceplugin.containers import client_cap, memory_limit_mib, response, thread_percentage
from deviceplugin.ports import DeviceNode, Mount
from meshctl.sharing import Gpu, Injection, Mode, Sharing, Slot

V100 = Gpu("GPU-b", "Tesla V100-SXM2-16GB", 16 << 30, (7, 0), minor=3, index=1)
OTHER = replace(V100, uuid="GPU-a", minor=5, index=2)
SHARING = Sharing("p")
TIMES = replace(SHARING, mode=Mode.TIME_SLICING, several_gpus=True)


def pipe(uuid: str) -> str:
    return f"/run/meshctl/mps/{uuid}/pipe"


def shared(gpu: Gpu = V100, sharing: Sharing = SHARING) -> dict[str, Shared]:
    return {gpu.uuid: Shared(gpu, sharing, True, "")}


def test_mps_by_the_runtime() -> None:
    """3 of 10 slots: 30 % of the threads, 3/10 of the memory, the daemon's directory and /dev/shm; the GPU is 0."""
    slots = [Slot("GPU-b", 9), Slot("GPU-b", 2), Slot("GPU-b", 10)]
    given = response(slots, shared(), pipe)
    assert given.envs == {
        "MESHCTL_GPU_SLOTS": "GPU-b::2,GPU-b::9,GPU-b::10",
        "NVIDIA_VISIBLE_DEVICES": "GPU-b",
        "CUDA_MPS_PIPE_DIRECTORY": "/mps/pipe",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=4915M",
    }
    assert given.mounts == (Mount("/run/meshctl/mps/GPU-b/pipe", "/mps/pipe"), Mount("/dev/shm", "/dev/shm"))  # noqa: S108
    assert given.annotations == {"meshctl.io/gpu-slots": "GPU-b::2,GPU-b::9,GPU-b::10"}
    assert given.devices == () == given.cdi_devices


def test_memory_without_a_limit() -> None:
    """A policy may leave the memory to whoever comes first; the threads stay limited."""
    given = response([Slot("GPU-b", 0)], shared(sharing=replace(SHARING, memory_limit=False)), pipe)
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" not in given.envs
    assert given.envs["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "10"


@pytest.mark.parametrize("mode", [Mode.TIME_SLICING, Mode.EXCLUSIVE])
def test_nothing_of_mps_without_mps(mode: Mode) -> None:
    """In time, or alone: the GPU, and no limits or mounts."""
    given = response([Slot("GPU-b", 0)], shared(sharing=replace(SHARING, mode=mode)), pipe)
    assert given.envs == {"MESHCTL_GPU_SLOTS": "GPU-b::0", "NVIDIA_VISIBLE_DEVICES": "GPU-b"}
    assert given.mounts == ()


def test_several_gpus_in_the_drivers_order() -> None:
    """Where a policy allows several GPUs, they are named by index; the slots by their IDs."""
    given = response([Slot("GPU-a", 0), Slot("GPU-b", 0)], shared(sharing=TIMES) | shared(OTHER, TIMES), pipe)
    assert given.envs["NVIDIA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert given.envs["MESHCTL_GPU_SLOTS"] == "GPU-a::0,GPU-b::0"


def test_several_gpus_never_with_mps() -> None:
    """A process has one MPS server: two GPUs are refused even if one of them is shared in time."""
    with pytest.raises(RefusedSlotsError, match="GPU-b, GPU-a") as refused:
        response([Slot("GPU-a", 0), Slot("GPU-b", 0)], shared() | shared(OTHER, TIMES), pipe)
    assert refused.value.reason is Reason.SEVERAL_GPUS


def test_cdi_names_the_devices() -> None:
    """The container runtime injects by name; NVIDIA's own is told to add nothing to it."""
    given = response([Slot("GPU-b", 0)], shared(sharing=replace(SHARING, injection=Injection.CDI)), pipe)
    assert given.cdi_devices == ("nvidia.com/gpu=GPU-b",)
    assert given.envs["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert given.devices == ()
    assert given.envs["CUDA_MPS_PIPE_DIRECTORY"] == "/mps/pipe"


def test_device_nodes() -> None:
    """Its own node and those that every CUDA program opens; a CUDA image's NVIDIA_VISIBLE_DEVICES=all has no effect."""
    given = response([Slot("GPU-b", 0)], shared(sharing=replace(SHARING, injection=Injection.DEVICE_NODES)), pipe)
    paths = ["/dev/nvidia3", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]
    assert given.devices == tuple(DeviceNode(path, path) for path in paths)
    assert given.envs["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_device_nodes_need_the_minor() -> None:
    """Without the number of /dev/nvidia<minor> there is nothing to inject: said, with what to do."""
    unknown = shared(replace(V100, minor=None), replace(SHARING, injection=Injection.DEVICE_NODES))
    with pytest.raises(RefusedSlotsError, match="`minor` in the inventory file") as refused:
        response([Slot("GPU-b", 0)], unknown, pipe)
    assert refused.value.reason is Reason.NOT_READY


@pytest.mark.parametrize(
    ("slots", "replicas", "clients", "oversubscription", "percentage"),
    [
        (1, 10, 1, 1.0, 10),
        (7, 10, 1, 1.0, 70),
        (1, 3, 1, 1.0, 33),
        (3, 3, 1, 1.0, 100),
        (5, 10, 2, 1.0, 25),
        (1, 10, 1, 1.1, 11),
        (10, 10, 1, 2.0, 100),
        (1, 100, 16, 1.0, 1),
    ],
)
def test_thread_percentage(slots: int, replicas: int, clients: int, oversubscription: float, percentage: int) -> None:
    """Rounded down, of each process; 1.1 is eleven tenths, not a bit more; never 0, never above 100."""
    sharing = replace(
        SHARING, replicas=replicas, clients_per_container=clients, oversubscription_ratio=oversubscription
    )
    assert thread_percentage(sharing, slots) == percentage


def test_memory_is_shared_in_whole_mib() -> None:
    """16 GiB by 10 slots is 1638.4 MiB; two processes of one slot have half of that each."""
    assert memory_limit_mib(V100, SHARING, 1) == 1638
    assert memory_limit_mib(V100, replace(SHARING, clients_per_container=2), 1) == 819
    assert memory_limit_mib(V100, SHARING, 10) == 16384
    assert memory_limit_mib(V100, replace(SHARING, memory_limit=False), 1) is None


@pytest.mark.parametrize(
    ("capability", "driver", "clients"),
    [
        ((6, 0), "595.1", 16),
        ((7, 0), "535.261.03", 48),
        ((9, 0), "580.178.04", 48),
        ((7, 0), "590.48.01", 60),
        ((9, 0), "595", 60),
        ((9, 0), "", 48),
        ((9, 0), "R590", 48),
    ],
)
def test_clients_of_one_server(capability: tuple[int, int], driver: str, clients: int) -> None:
    """16 before Volta, 48 since, 60 from driver 590 on; a driver of unknown version is taken for an old one."""
    assert client_cap(replace(V100, compute_capability=capability), driver) == clients
