"""`meshctl demo`, as a process: what it prints, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from tests.harness.envoy import require_envoy
from tests.harness.tools import require, until

pytestmark = pytest.mark.envoy
DEADLINE_S = 150.0
"""Generous: whoever reaches it has failed, on any machine."""


class Demo:
    """A running `meshctl demo`, its temporary files under a test's directory."""

    def __init__(self, process: asyncio.subprocess.Process, temporary: Path) -> None:
        self.process, self.temporary = process, temporary

    async def says(self, words: str) -> str:
        """The next line on stderr with `words`."""
        assert self.process.stderr is not None
        seen = []
        async with asyncio.timeout(DEADLINE_S):
            while line := (await self.process.stderr.readline()).decode():
                seen.append(line)
                if words in line:
                    return line
        raise AssertionError(f"never said {words!r}:\n{''.join(seen)}")

    def children(self) -> dict[int, str]:
        """Process id -> command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            except (OSError, IndexError):
                continue  # it ended while we looked
        return found

    async def gone(self, children: dict[int, str]) -> None:
        """Nothing stays: no child, no file."""

        async def all_gone() -> bool:
            return not any(map(_exists, children))

        await until(all_gone, f"all of these have ended: {children}")
        assert self.files() == []

    def files(self) -> list[Path]:
        return list(self.temporary.iterdir())


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@asynccontextmanager
async def demo(temporary: Path, options: str, **environment: str) -> AsyncIterator[Demo]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "meshctl", "demo", *options.split()),
        stdout=pipe,
        stderr=pipe,
        env={**os.environ, "TMPDIR": str(temporary), **environment},
        start_new_session=True,
    )
    running = Demo(process, temporary)
    try:
        yield running
    finally:
        if process.returncode is None:
            for pid in [process.pid, *running.children()]:
                os.killpg(pid, signal.SIGKILL)
        await process.wait()


@pytest.mark.alone
async def test_once_measures_the_same_requests_through_both(tmp_path: Path) -> None:
    """Standard output is one JSON document with both policies; nothing stays behind."""
    require_envoy()
    async with demo(tmp_path, "--once --json --load 0.3 --seconds 2 --seed 7") as running:
        await running.says("meshctl: waiting")
        children = running.children()
        assert len(children) == 4  # the fleet, the controller, two Envoys
        out, err = await asyncio.wait_for(running.process.communicate(), DEADLINE_S)
        assert running.process.returncode == 0, err.decode()
        await running.gone(children)
    found = orjson.loads(out)
    before, after = found["policies"]
    assert [before["name"], after["name"]] == ["istio-default", "meshctl"]
    assert before["requests"] == after["requests"] > 0
    assert (before["failed"], after["failed"]) == (0, 0)
    assert set(after["goodput_by_size"]) <= {"small", "medium", "large"}
    assert found["p99_ratio"] == pytest.approx(before["p99_ms"] / after["p99_ms"], abs=0.01)
    assert found["data_plane"].startswith("envoy ")
    assert (found["signals"], found["seed"]) == ("scrape", 7)


@pytest.mark.alone
@pytest.mark.prometheus
async def test_once_with_a_prometheus_of_its_own(tmp_path: Path) -> None:
    """The controller's signals come from it: without them the weights would never count as settled."""
    require_envoy()
    binary = require("prometheus")
    options = "--once --json --load 0.3 --seconds 1 --signals prometheus"
    async with demo(tmp_path, options, PROMETHEUS_BIN=str(binary)) as running:
        await running.says("meshctl: waiting")
        children = running.children()
        assert len(children) == 5
        out, err = await asyncio.wait_for(running.process.communicate(), DEADLINE_S)
        assert running.process.returncode == 0, err.decode()
        await running.gone(children)
    found = orjson.loads(out)
    assert found["signals"] == "prometheus"
    assert found["settled_s"] is not None


async def test_prometheus_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    """Exit 2, and what to set."""
    async with demo(tmp_path, "--once --signals prometheus", PROMETHEUS_BIN="/nowhere") as running:
        _, err = await asyncio.wait_for(running.process.communicate(), DEADLINE_S)
        assert (running.process.returncode, running.files()) == (2, [])
        assert err.decode().startswith("meshctl: no Prometheus here: set PROMETHEUS_BIN")


async def test_live_without_a_terminal_prints_lines_and_ends_cleanly(tmp_path: Path) -> None:
    """Each phase is a line; SIGTERM ends everything that was started."""
    require_envoy()
    async with demo(tmp_path, "--load 0.3 --seconds 1") as running:
        assert running.process.stdout is not None
        lines: list[str] = []
        async with asyncio.timeout(DEADLINE_S):
            while not any("twice as long" in line for line in lines):
                lines.append((await running.process.stdout.readline()).decode())
                assert lines[-1], "ended by itself"
        assert lines[0].startswith("round 1, all GPUs well: istio-default: p50 ")
        assert lines[1].startswith("round 1, all GPUs well: meshctl: p50 ")
        children = running.children()
        running.process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(running.process.communicate(), DEADLINE_S)
        assert running.process.returncode == 0, err.decode()
        await running.gone(children)


async def test_the_end_of_a_child_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    """A controller that is killed is named, with the end of its log; the others are ended."""
    require_envoy()
    async with demo(tmp_path, "--once --load 0.3 --seconds 100") as running:
        await running.says("istio-default: 100 s")
        children = running.children()
        (controller,) = [pid for pid, command in children.items() if " run " in command]
        os.kill(controller, signal.SIGKILL)
        line = await running.says("controller ended with status -9; its log: ")
        assert line.startswith("meshctl: ")
        await asyncio.wait_for(running.process.communicate(), DEADLINE_S)
        assert running.process.returncode == 1
        await running.gone(children)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--json", "--once"),
        ("--load 0", "--load"),
        ("--load nan", "--load"),
        ("--seconds -1", "--seconds"),
    ],
)
async def test_options_that_make_no_sense_start_nothing(tmp_path: Path, options: str, words: str) -> None:
    """Exit 2, and the message names the option."""
    async with demo(tmp_path, options) as running:
        _, err = await asyncio.wait_for(running.process.communicate(), DEADLINE_S)
        assert (running.process.returncode, words in err.decode()) == (2, True)
        assert running.files() == []
