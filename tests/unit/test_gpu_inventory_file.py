"""GPUs from a file: what it may say, where a fault is told, and what a change does to GPUs that are in use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from deviceplugin.inventory import LONGEST_UUID, FileInventory, open_inventory, read_gpus
from deviceplugin.nvml import NvmlInventory
from deviceplugin.ports import GpuLostError
from meshctl.api.document import ManifestError
from meshctl.errors import InputError
from meshctl.sharing import LONGEST_DEVICE_ID, Gpu, Slot

GOOD = '{uuid: GPU-0001, product: Tesla-V100, memory: 16Gi, computeCapability: "7.0", minor: 0}'
V100 = Gpu("GPU-0001", "Tesla-V100", 16 << 30, (7, 0), minor=0, index=0)


def faults(tmp_path: Path, text: str) -> list[str]:
    """What is wrong with the text, without the file's name."""
    path = tmp_path / "gpus.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as found:
        read_gpus(path)
    return [line.removeprefix(f"{path}:") for line in str(found.value).splitlines()]


@pytest.mark.parametrize(
    "text",
    [
        f"[{GOOD}]",
        f"- {GOOD}",
        '[{"uuid": "GPU-0001", "product": "Tesla-V100", "memory": "16Gi", "computeCapability": "7.0", "minor": 0}]',
    ],
    ids=["flow", "yaml", "json"],
)
def test_yaml_and_json_say_the_same(tmp_path: Path, text: str) -> None:
    """The format of the agent's documentation."""
    path = tmp_path / "gpus"
    path.write_text(text)
    assert read_gpus(path) == (V100,)


@pytest.mark.parametrize(
    ("memory", "expected_bytes"),
    [("11441Mi", 11441 << 20), ("1.5Gi", 3 << 29), ("16G", 16 * 10**9), ("17179869184", 1 << 34)],
)
def test_memory_is_a_quantity_of_kubernetes(tmp_path: Path, memory: str, expected_bytes: int) -> None:
    """Binary, decimal, with a fraction, or plain bytes."""
    path = tmp_path / "gpus"
    path.write_text(f"[{GOOD.replace('16Gi', repr(memory))}]")
    assert read_gpus(path)[0].memory_bytes == expected_bytes


def test_there_may_be_no_gpus_and_the_order_is_the_index(tmp_path: Path) -> None:
    """MIG and a GPU without a device file can be told too."""
    path = tmp_path / "gpus"
    path.write_text("[]")
    assert read_gpus(path) == ()
    path.write_text(f'- {GOOD}\n- {{uuid: b, product: A100, memory: 40Gi, computeCapability: "8.0", mig: true}}')
    assert read_gpus(path) == (V100, Gpu("b", "A100", 40 << 30, (8, 0), None, 1, mig=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["1:1: must be"]),
        ("uuid: GPU-1", ["1:1: must be"]),
        ("[]\n---\n[]", ["1:1: must be"]),
        ("- 3", ["1:3: [0]: must be a mapping"]),
        (f"- {GOOD.replace('GPU-0001', 'GPU_1')}", ["1:4: [0].uuid: 'GPU_1' does not match"]),
        (f"- {GOOD.replace('GPU-0001', 'G' * (LONGEST_UUID + 1))}", ["1:4: [0].uuid: "]),
        (f"- {GOOD.replace('16Gi', '16Gb')}", ["1:41: [0].memory: '16Gb' is not a GPU's memory"]),
        (f"- {GOOD.replace('16Gi', '-16Gi')}", ["1:41: [0].memory: '-16Gi' is not a GPU's memory"]),
        (f"- {GOOD.replace('16Gi', '0')}", ["1:41: [0].memory: must be a valid string, not 0"]),
        (f"- {GOOD.replace('16Gi', repr('1e1000000'))}", ["1:41: [0].memory: "]),
        (f"- {GOOD.replace('16Gi', repr('0Gi'))}", ["1:41: [0].memory: '0Gi' is not a GPU's memory"]),
        (f"- {GOOD.replace('minor: 0', 'minor: -1')}", ["[0].minor: must be greater than or equal to 0"]),
        (f"- {GOOD.replace('minor', 'minro')}", ["[0].minro: is not a field here; did you mean minor?"]),
        (
            f"- {GOOD}\n- {GOOD.replace('GPU', 'gpu')}",
            ["2:4: [1].uuid: 'gpu-0001' is that", "[1].minor: 0 is that of [0] too"],
        ),
        ("- {uuid: a}", ["[0].computeCapability: is req", "[0].memory: is req", "[0].product: is req"]),
    ],
)
def test_each_fault_is_told_with_its_place(tmp_path: Path, text: str, expected: list[str]) -> None:
    """All of them at once, in the order of the text."""
    found = faults(tmp_path, text)
    assert [want for fault, want in zip(found, expected, strict=True) if want not in fault] == []


def test_the_longest_uuid_makes_device_ids_that_fit(tmp_path: Path) -> None:
    """``UUID::99`` may be a label's value."""
    path = tmp_path / "gpus"
    path.write_text(f"[{GOOD.replace('GPU-0001', 'G' * LONGEST_UUID)}]")
    (gpu,) = read_gpus(path)
    assert len(str(Slot(gpu.uuid, 99))) == LONGEST_DEVICE_ID


@pytest.mark.parametrize("spec", ["", "file:", "nvidia", "/etc/gpus.yaml", "NVML"])
def test_an_unknown_inventory_is_the_callers_fault(spec: str) -> None:
    """It says what can be written."""
    with pytest.raises(InputError, match="write nvml, or file:PATH"):
        open_inventory(spec)


def test_the_two_inventories_are_opened_by_name() -> None:
    """Neither reads anything yet."""
    assert isinstance(open_inventory("nvml"), NvmlInventory)
    assert isinstance(open_inventory("file:/nowhere"), FileInventory)


async def test_a_file_that_cannot_be_read_is_an_input_error_at_first(tmp_path: Path) -> None:
    """Nothing is known yet that could be kept; a look after it was mended finds the GPUs."""
    path = tmp_path / "gpus"
    inventory = open_inventory(f"file:{path}")
    with pytest.raises(InputError, match="cannot be read"):
        await inventory.gpus()
    path.write_text("[{}]")
    with pytest.raises(InputError, match=r"uuid: is required"):
        await inventory.gpus()
    path.write_text(f"[{GOOD}]")
    assert await inventory.gpus() == (V100,)
    assert inventory.driver == ""


async def test_a_gpu_that_is_taken_out_is_lost_and_comes_back(tmp_path: Path) -> None:
    """The probe sees it at once; the other GPU stays what it was."""
    path = tmp_path / "gpus"
    both = f"- {GOOD}\n- {GOOD.replace('0001', '0002').replace('minor: 0', 'minor: 1')}"
    path.write_text(both)
    inventory = open_inventory(f"file:{path}")
    before = await inventory.gpus()
    await inventory.probe("GPU-0002")
    path.write_text(f"- {GOOD}")
    with pytest.raises(GpuLostError, match=r"GPU-0002: it is not in .*gpus any more"):
        await inventory.probe("GPU-0002")
    await inventory.probe("GPU-0001")
    assert await inventory.gpus() == (V100,)
    path.write_text(both)
    await inventory.probe("GPU-0002")
    assert await inventory.gpus() == before


@pytest.mark.parametrize("change", ["[{}]", ": :", None])
async def test_a_change_that_cannot_be_used_takes_no_gpu_away(tmp_path: Path, change: str | None) -> None:
    """It is told once, not at every look."""
    path = tmp_path / "gpus"
    path.write_text(f"[{GOOD}]")
    inventory = open_inventory(f"file:{path}")
    await inventory.gpus()
    if change is None:
        path.unlink()
    else:
        path.write_text(change)
    with capture_logs() as logs:
        for _ in range(3):
            assert await inventory.gpus() == (V100,)
            await inventory.probe("GPU-0001")
    assert [(log["event"], str(path) in log["error"]) for log in logs] == [
        ("the inventory file cannot be used; the GPUs stay as they are", True)
    ]


async def test_what_a_file_cannot_do_is_harmless(tmp_path: Path) -> None:
    """No XIDs come, nobody says which processes compute, and there is no compute mode."""
    path = tmp_path / "gpus"
    path.write_text(f"[{GOOD}]")
    inventory = open_inventory(f"file:{path}")
    await inventory.set_exclusive("GPU-0001", exclusive=True)
    assert await inventory.processes("GPU-0001") is None
    waits = asyncio.ensure_future(inventory.next_xid())
    await inventory.gpus()
    assert not waits.done()
    waits.cancel()
    await inventory.close()
