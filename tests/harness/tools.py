"""Real programs under test: found by scripts/tools.sh, started in a process group of their own, ended by id."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import pytest

DEADLINE_S = 60.0
"""Generous: whoever reaches it has failed, on any machine."""
POLL_S = 0.05

_SCRIPT = Path(__file__).parents[2] / "scripts" / "tools.sh"


def require(tool: str) -> Path:
    """Where `tool` (prometheus, triton) is. Without it a test skips, but fails in CI, where it must be."""
    found = subprocess.run([_SCRIPT, "where", tool], capture_output=True, text=True, timeout=DEADLINE_S)
    if found.returncode == 0:
        return Path(found.stdout.strip())
    reason = f"no {tool} here: `scripts/tools.sh {tool}` installs it. {found.stderr.strip()}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_ports(count: int) -> list[int]:
    """Distinct ports that were free a moment ago, for programs that do not say which port they got."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


async def until(holds: Callable[[], Awaitable[bool]], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Ask again and again until `holds`; AssertionError naming `what` after the deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            while not await holds():  # noqa: ASYNC110 (another process changes it: there is no event to wait for)
                await asyncio.sleep(POLL_S)
    except TimeoutError as late:
        raise AssertionError(f"not within {deadline_s:g} s: {what}") from late


async def answers(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether a GET of `url` is answered 200."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5.0)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


class ToolProcess:
    """A child with its log in `directory`; an async context manager that enters when `ready_url` answers 200.

    Subclasses give `command` for the ports that were chosen. A program that ends at once (its port was taken in the
    meantime) is started again with other ports.
    """

    name = "tool"
    port_count = 1
    _TRIES = 3

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / f"{self.name}.log"
        self.ports: list[int] = []
        self.process: asyncio.subprocess.Process | None = None

    def command(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return os.environ

    @property
    def ready_url(self) -> str:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        for _ in range(self._TRIES):
            self.ports = free_ports(self.port_count)
            await self._spawn()
            try:
                if await self._came_up():
                    return self
            except BaseException:
                await self.end(signal.SIGKILL)
                raise
        raise AssertionError(f"{self.name} ended while starting:\n{self.log.read_text(errors='replace')[-4000:]}")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the whole group; SIGKILL follows where that is not enough. Harmless when it has ended."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.returncode is None:
            os.killpg(process.pid, number)
            try:
                await asyncio.wait_for(process.wait(), 10.0)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    def freeze(self) -> None:
        """Stop it in mid-air: it keeps its sockets and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.name} is not running"
        os.killpg(self.process.pid, number)

    async def _spawn(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,
            )

    async def _came_up(self) -> bool:
        """True when it answers, False when it ended instead."""
        process = self.process
        assert process is not None
        async with aiohttp.ClientSession() as session:

            async def settled() -> bool:
                return process.returncode is not None or await answers(session, self.ready_url)

            await until(settled, f"{self.name} answers at {self.ready_url}; its log: {self.log}")
        return process.returncode is None
