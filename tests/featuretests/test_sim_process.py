"""The fleet in its own process, and the commands as they are typed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import orjson
import pytest

from meshctl.errors import InputError, MeshctlError
from meshctl.sim.faults import Faults
from meshctl.sim.fleet import FleetInfo, FleetProcess
from meshctl.sim.load import LoadConfig, run_load
from tests.harness import fleet as harness

SIM = (sys.executable, "-m", "meshctl", "sim")
END_S = 60.0


async def command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `meshctl sim ...`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*SIM, *arguments, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        out, err = await asyncio.wait_for(process.communicate(), END_S)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode or 0, out.decode(), err.decode()


async def test_a_fleet_in_a_process_serves_fails_on_command_and_ends() -> None:
    """Faults go to it over HTTP; afterwards neither the process nor its ports are there."""
    async with FleetProcess(harness.config()) as fleet:
        [server] = fleet.info.servers
        found = LoadConfig((server.url,), 50.0, ((1, 1.0),), 0.5)
        assert (await run_load(found)).failed == 0
        await fleet.set_faults(server.name, Faults(error_ratio=1.0))
        assert set((await run_load(found)).failures) == {"http_500"}
        await fleet.set_faults(server.name, Faults(crash=True))
        assert set((await run_load(found)).failures) == {"refused"}
        await fleet.set_faults(server.name, Faults())
        await fleet.reset_counters(server.name)
        assert (await run_load(found)).failed == 0
        with pytest.raises(InputError, match="nobody"):
            await fleet.set_faults("nobody", Faults())
        pid = fleet.pid

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert set((await run_load(found)).failures) == {"refused"}
    await fleet.stop()  # again is harmless


@pytest.mark.parametrize(
    "program",
    [
        pytest.param((sys.executable, "-c", "raise SystemExit(3)"), id="ends"),
        pytest.param(("/bin/echo",), id="says-nonsense"),
    ],
)
async def test_a_fleet_that_does_not_come_up_is_an_error(program: Sequence[str]) -> None:
    """Nothing is left running, and the error says what happened."""
    with pytest.raises(MeshctlError, match="fleet's process"):
        async with FleetProcess(harness.config(), program):
            pytest.fail("it started")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_prints_one_line_when_ready_and_ends_on_a_signal(tmp_path: Path, number: int) -> None:
    """`-o json`: one document on one line; exit code 0, nothing on stderr."""
    file = tmp_path / "fleet.yaml"
    file.write_text("model: m\nservers:\n- {gpu: V100, count: 2, service: {base: 1ms, perItem: 0s}}\n")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *SIM, "fleet", "--config", str(file), "-o", "json", stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        assert process.stdout is not None
        info = FleetInfo.from_json(await asyncio.wait_for(process.stdout.readline(), END_S))
        assert [server.name for server in info.servers] == ["v100-0", "v100-1"]
        async with aiohttp.ClientSession() as session, session.post(info.servers[1].url) as response:
            assert response.status == 200
        process.send_signal(number)
        out, err = await asyncio.wait_for(process.communicate(), END_S)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)

    assert (process.returncode, out, err) == (0, b"", b"")


async def test_load_prints_json_with_the_agreed_names() -> None:
    """What scripts read."""
    async with harness.running(harness.config()) as (_, [client]):
        arguments = ("--rate", "50", "--mix", "1:0.5,8:0.5", "--seconds", "1", "--seed", "3", "--model", harness.MODEL)
        code, out, err = await command("load", "--url", client.base, *arguments, "--json")

    result = orjson.loads(out)
    assert (code, err) == (0, "")
    for name in ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "goodput", "rate_rps", "send_lag_p99_ms"):
        assert isinstance(result[name], float)
    assert set(result["goodput_by_size"]) == {"1", "8"}
    assert (result["failed"], result["failures"], result["seed"]) == (0, {}, 3)


async def test_load_prints_a_table_for_people() -> None:
    """With the failures by kind."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(error_ratio=1.0))
        code, out, _ = await command(
            "load", "--url", client.base, "--rate", "50", "--seconds", "0.5", "--model", "resnet50"
        )

    assert code == 0
    assert "http_500" in out
    assert "goodput" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("load", "--url", "ftp://x", "--rate", "1"), "ftp://x", id="bad-url"),
        pytest.param(("load", "--url", "http://x", "--rate", "0"), "rate", id="no-rate"),
        pytest.param(("load", "--url", "http://x", "--rate", "1", "--mix", "1:2"), "sum to 1", id="bad-mix"),
        pytest.param(("load", "--url", "http://x", "--rate", "1", "--slo", "150"), "--slo", id="slo-without-unit"),
        pytest.param(("fleet", "--config", "nowhere.yaml"), "nowhere.yaml", id="no-file"),
        pytest.param(("fleet",), "--config", id="no-config"),
    ],
)
async def test_bad_input_ends_with_2_and_says_what(arguments: Sequence[str], said: str) -> None:
    """One message on stderr, no traceback."""
    code, out, err = await command(*arguments)

    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
