"""`make cluster`: the whole product on one machine."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.processes import binary
from tests.harness.prometheus import PrometheusProcess
from tests.harness.tools import DEADLINE_S, require

pytestmark = pytest.mark.cluster


async def test_it_tells_where_things_are_and_ends_with_its_signal(tmp_path: Path) -> None:
    """Once it says so, the reference route is there for kubectl; after SIGTERM neither processes nor files are."""
    PrometheusProcess(tmp_path, {})  # skips where there is none
    require("istio")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.cluster", stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(2 * DEADLINE_S):
            said = (await process.stdout.readuntil(b"Ctrl-C ends it.")).decode()
        (kubeconfig,) = re.findall(r"export KUBECONFIG=(\S+)", said)
        command = (binary("kubectl"), "--kubeconfig", kubeconfig, "get", "modelroutes", "--output=name")
        kubectl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        routes, _ = await asyncio.wait_for(kubectl.communicate(), DEADLINE_S)
        process.send_signal(signal.SIGTERM)
        assert (await asyncio.wait_for(process.wait(), DEADLINE_S), routes) == (0, b"modelroute.meshctl.io/reference\n")
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), DEADLINE_S)
    directory = Path(kubeconfig).parent
    assert (directory.exists(), [command for command in commands() if str(directory) in command]) == (False, [])


def commands() -> list[str]:
    """Of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found.append(path.read_bytes().decode(errors="replace"))
    return found
