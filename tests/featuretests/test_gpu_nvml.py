"""The inventory over the real nvidia-ml-py, whose driver here is the tests' own: what it reads, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from deviceplugin.nvml import ERRORS, NvmlInventory
from deviceplugin.ports import GpuError, GpuLostError, GpuTimeoutError, Xid
from meshctl.sharing import Gpu
from tests.harness.nvml_stub import NvmlStub, v100
from tests.harness.tools import DEADLINE_S, until

ONE, TWO = v100(0), v100(1)
HANGS_S = 3.0
"""Deadline where a call is to hang: those that do not must end within it on a busy machine too."""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    """The driver of a node with two V100."""
    stub = NvmlStub(tmp_path / "nvml", [ONE, TWO])
    stub.load(monkeypatch)
    return stub


@pytest.fixture
async def inventory(stub: NvmlStub) -> AsyncIterator[NvmlInventory]:
    """Opened, and closed afterwards."""
    inventory = NvmlInventory(DEADLINE_S, event_wait_ms=50)
    yield inventory
    await inventory.close()


async def xid(inventory: NvmlInventory) -> Xid:
    async with asyncio.timeout(DEADLINE_S):
        return await inventory.next_xid()


async def test_the_gpus_are_described_as_the_driver_does(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """Product, memory, capability, device file and MIG, in the driver's order; also what an old card does not know."""
    old = Gpu("GPU-k40", "Tesla K40m", 11441 << 20, (3, 5), minor=None, index=1)
    mig = Gpu("GPU-a100", "NVIDIA A100-SXM4-40GB", 40 << 30, (8, 0), minor=7, index=2, mig=True)
    stub.gpus([ONE, old, mig])
    assert await inventory.gpus() == (ONE, old, mig)
    assert inventory.driver == "570.00.stub"


async def test_an_xid_is_told_with_its_gpu(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """Each once, in the driver's order."""
    await inventory.gpus()
    stub.xid(TWO.uuid, 79)
    stub.xid(ONE.uuid, 31)
    stub.xid(ONE.uuid, 31)
    assert [await xid(inventory) for _ in range(3)] == [Xid(79, TWO.uuid), Xid(31, ONE.uuid), Xid(31, ONE.uuid)]


async def test_xids_of_others_are_heard_while_a_gpu_is_lost_and_its_own_when_it_is_back(
    stub: NvmlStub, inventory: NvmlInventory
) -> None:
    """A lost GPU fails every wait for events in which it takes part."""
    await inventory.gpus()
    stub.lose(ONE.uuid)
    stub.xid(TWO.uuid, 48)
    assert await xid(inventory) == Xid(48, TWO.uuid)
    assert await inventory.gpus() == (TWO,)
    stub.heal(ONE.uuid)
    assert await inventory.gpus() == (ONE, TWO)

    async def heard() -> bool:
        stub.xid(ONE.uuid, 94)
        try:
            async with asyncio.timeout(0.2):
                return await inventory.next_xid() == Xid(94, ONE.uuid)
        except TimeoutError:
            return False

    await until(heard, "XIDs of the GPU that is back are heard again")


async def test_a_gpu_without_events_is_no_obstacle(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """Old cards report no XIDs; those of the others come, and it answers probes."""
    stub.fault(ONE.uuid, "no-events")
    await inventory.gpus()
    stub.xid(ONE.uuid, 48)
    stub.xid(TWO.uuid, 62)
    assert await xid(inventory) == Xid(62, TWO.uuid)
    await inventory.probe(ONE.uuid)


async def test_a_lost_gpu_is_left_out_and_its_probe_says_so(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """The other one stays as it is; the lost one comes back as what it was."""
    await inventory.gpus()
    stub.lose(ONE.uuid)
    with pytest.raises(GpuLostError, match=r"GPU-0000: nvmlDeviceGetMemoryInfo: GPU is lost"):
        await inventory.probe(ONE.uuid)
    await inventory.probe(TWO.uuid)
    assert await inventory.gpus() == (TWO,)
    with pytest.raises(GpuLostError, match="GPU-0000: probe: NVML does not show this GPU"):
        await inventory.probe(ONE.uuid)
    stub.heal(ONE.uuid)
    assert await inventory.gpus() == (ONE, TWO)
    await inventory.probe(ONE.uuid)


async def test_a_gpu_that_was_never_there_is_lost_too(inventory: NvmlInventory) -> None:
    """No call goes to a GPU of another name."""
    await inventory.gpus()
    with pytest.raises(GpuLostError, match="GPU-other"):
        await inventory.set_exclusive("GPU-other", exclusive=True)


@pytest.mark.parametrize("error", [999, 16])
async def test_a_gpu_that_fails_to_be_described_is_as_it_was_before(
    stub: NvmlStub, inventory: NvmlInventory, error: int
) -> None:
    """It is there, and its probes tell that it is ill; one that never answered is left out."""
    stub.fault(TWO.uuid, str(error))
    assert await inventory.gpus() == (ONE,)
    stub.heal(TWO.uuid)
    assert await inventory.gpus() == (ONE, TWO)
    stub.fault(TWO.uuid, str(error))
    assert await inventory.gpus() == (ONE, TWO)


async def test_unknown_memory_is_an_error_and_never_zero(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """Of such a GPU no share could be told; the others come."""
    stub.gpus([replace(ONE, memory_bytes=0), TWO])
    assert await inventory.gpus() == (TWO,)
    stub.gpus([ONE, TWO])
    stub.fault(ONE.uuid, "3@nvmlDeviceGetMemoryInfo")
    assert await inventory.gpus() == (TWO,)


async def test_a_gpu_that_hangs_stops_no_other(stub: NvmlStub) -> None:
    """Its calls end at the deadline, the next ones at once; when the driver returns it is well again."""
    inventory = NvmlInventory(HANGS_S, event_wait_ms=50)
    await inventory.gpus()
    stub.hang(ONE.uuid)
    with pytest.raises(GpuTimeoutError, match=r"GPU-0000: probe: no answer within 3 s"):
        await inventory.probe(ONE.uuid)
    with pytest.raises(GpuTimeoutError, match=r"GPU-0000: list processes: not tried, .* an earlier call: probe"):
        await inventory.processes(ONE.uuid)
    assert await inventory.gpus() == (ONE, TWO)
    await inventory.probe(TWO.uuid)
    stub.heal(ONE.uuid)

    async def answers() -> bool:
        try:
            await inventory.probe(ONE.uuid)
        except GpuTimeoutError:
            return False
        return True

    await until(answers, "the GPU answers again")
    await inventory.close()


async def test_calls_at_the_same_time_wait_for_each_other(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """One thread per GPU: none is refused for another that is on its way."""
    await inventory.gpus()
    stub.processes(ONE.uuid, [7])
    assert await asyncio.gather(*(inventory.processes(ONE.uuid) for _ in range(50))) == [(7,)] * 50


async def test_the_compute_mode_is_set_and_given_back(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """Of one GPU only; twice is harmless, also where it could not be set again."""
    await inventory.gpus()
    await inventory.set_exclusive(ONE.uuid, exclusive=True)
    assert (stub.compute_mode(ONE.uuid), stub.compute_mode(TWO.uuid)) == (pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS, 0)
    stub.fault(ONE.uuid, "4@nvmlDeviceSetComputeMode")
    await inventory.set_exclusive(ONE.uuid, exclusive=True)
    with pytest.raises(GpuError, match="nvmlDeviceSetComputeMode: Insufficient Permissions: run the agent as root"):
        await inventory.set_exclusive(ONE.uuid, exclusive=False)
    assert stub.compute_mode(ONE.uuid) == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS
    stub.heal(ONE.uuid)
    await inventory.set_exclusive(ONE.uuid, exclusive=False)
    assert stub.compute_mode(ONE.uuid) == pynvml.NVML_COMPUTEMODE_DEFAULT


@pytest.mark.parametrize("older", [False, True], ids=["driver 570", "driver before 510"])
async def test_processes_are_those_that_compute_and_clients_of_mps(
    stub: NvmlStub, inventory: NvmlInventory, older: bool
) -> None:
    """Each once, ascending; older drivers have the question under another name."""
    if older:
        stub.older()
    await inventory.gpus()
    assert await inventory.processes(ONE.uuid) == ()
    stub.processes(ONE.uuid, [300, 17], mps_clients=[41, 40, 17])
    assert await inventory.processes(ONE.uuid) == (17, 40, 41, 300)
    assert await inventory.processes(TWO.uuid) == ()


async def test_where_nobody_can_say_which_processes_compute_it_is_none(
    stub: NvmlStub, inventory: NvmlInventory
) -> None:
    """Not an empty list, which would mean that a daemon may be restarted."""
    await inventory.gpus()
    stub.fault(ONE.uuid, "3")
    assert await inventory.processes(ONE.uuid) is None
    stub.fault(ONE.uuid, "999")
    with pytest.raises(GpuError, match="GPU-0000: nvmlDeviceGetComputeRunningProcesses_v3: Unknown Error"):
        await inventory.processes(ONE.uuid)


async def test_a_driver_that_comes_later_is_found(stub: NvmlStub, inventory: NvmlInventory) -> None:
    """The next look opens it."""
    stub.refuse_init(9)
    with pytest.raises(GpuError, match=r"Driver Not Loaded: .* --inventory file:PATH"):
        await inventory.gpus()
    assert inventory.driver == ""
    stub.refuse_init(0)
    assert await inventory.gpus() == (ONE, TWO)


def test_without_the_library_it_says_what_to_install() -> None:
    """In a process of its own, since this one has the tests' library."""
    said = child(DEADLINE_S, {})
    if "gpus" in said:
        pytest.skip("this machine has an NVML")
    assert said["error"] == "GpuError"
    assert "libnvidia-ml.so.1 is not there: install NVIDIA's driver" in str(said["message"])


def test_a_process_ends_although_the_driver_hangs(stub: NvmlStub) -> None:
    """The thread that hangs is left behind. The library is found as any program finds it."""
    assert child(DEADLINE_S, stub.environment) == {"gpus": [ONE.uuid, TWO.uuid]}
    stub.hang(ONE.uuid)
    assert child(HANGS_S, stub.environment) == {"gpus": [TWO.uuid]}


def test_every_error_of_the_table_is_one_of_nvml() -> None:
    """A name that nvidia-ml-py does not have would never match."""
    assert [name for name in ERRORS if not hasattr(pynvml, name)] == []


PROGRAM = """
import asyncio, json, sys
from deviceplugin.nvml import NvmlInventory
from deviceplugin.ports import GpuError

async def main():
    inventory = NvmlInventory(float(sys.argv[1]), event_wait_ms=50)
    try:
        print(json.dumps({"gpus": [gpu.uuid for gpu in await inventory.gpus()]}))
    except GpuError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    await inventory.close()

asyncio.run(main())
"""


def child(deadline_s: float, environment: Mapping[str, str]) -> dict[str, object]:
    """What a process that opens the inventory prints of it, after its log."""
    command = [sys.executable, "-c", PROGRAM, str(deadline_s)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found
