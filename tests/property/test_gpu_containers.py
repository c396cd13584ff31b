"""What the containers of one GPU get together never passes what it has."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deviceplugin.containers import memory_limit_mib, thread_percentage
from meshctl.sharing import Gpu, Sharing

MIB = 1 << 20


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """(slots of the GPU, processes of a container, slots of each container): at most 60 processes, as MPS has it."""
    replicas = draw(st.integers(1, 60))
    clients = draw(st.integers(1, 60 // replicas))
    sizes, left = [], replicas
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    return replicas, clients, sizes


@given(splits(), st.integers(1, 16))
def test_threads_never_pass_the_gpu(split: tuple[int, int, list[int]], times: int) -> None:
    """All processes together have at most 100 % times the oversubscription, each 1..100 %; one with all has 100 %."""
    replicas, clients, sizes = split
    sharing = Sharing("p", replicas=replicas, clients_per_container=clients, oversubscription_ratio=float(times))
    shares = [thread_percentage(sharing, size) for size in sizes]
    assert all(1 <= share <= 100 for share in shares)
    assert clients * sum(shares) <= 100 * times
    assert thread_percentage(replace(sharing, clients_per_container=1), replicas) == 100


@given(splits(), st.integers(1, 300 * 1024), st.integers(0, MIB - 1))
def test_memory_never_passes_the_gpu(split: tuple[int, int, list[int]], mib: int, more: int) -> None:
    """Whatever its size, the limits add up to at most the GPU's memory, and lose less than 1 MiB a process."""
    replicas, clients, sizes = split
    gpu = Gpu("GPU-1", "X", (mib + 60) * MIB + more, (7, 0))
    sharing = Sharing("p", replicas=replicas, clients_per_container=clients)
    limits = [memory_limit_mib(gpu, sharing, size) or 0 for size in sizes]
    assert clients * sum(limits) * MIB <= gpu.memory_bytes
    assert clients * (sum(limits) + len(sizes)) * MIB >= gpu.memory_bytes
