"""Real programs under test: found by scripts/tools.sh, started in a process group of their own, ended by id."""

from __future__ import annotations

import asyncio
import atexit
import http.client
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import pytest

DEADLINE_S = 60.0
"""Generous: whoever reaches it has failed, on any machine."""
POLL_S = 0.05
T = TypeVar("T")

_SCRIPT = Path(__file__).parents[2] / "scripts" / "tools.sh"


def require(tool: str) -> Path:
    """Where `tool` is, as scripts/tools.sh says. Without it a test skips, but fails in CI, where it must be."""
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


def holds_by(holds: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """`until`, without an event loop."""
    deadline = time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(POLL_S)


def page(url: str, trusted: ssl.SSLContext | None = None) -> str | None:
    """What a GET of `url` is answered with 200, None for every other answer; https where the server is `trusted`."""
    try:
        with urllib.request.urlopen(url, timeout=5.0, context=trusted) as response:  # noqa: S310 (http(s) of our own)
            return response.read().decode() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None


async def completed(function: Callable[..., T], *arguments: object) -> T:
    """What a blocking `function` returns, run in a thread. A cancellation waits for its end: nothing is half done."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


class ToolProcess(ABC):
    """A child with its log in `directory`; started when it says that it is ready, by default with a 200 at `ready_url`.

    Subclasses give `command` for the ports that were chosen. A program that ends at once (its port was taken in the
    meantime) is started again with other ports; one that is started a second time keeps its ports, which others know.

    Bound to no event loop, so that one that a whole session shares serves tests with loops of their own: `start` and
    `stop` block, ``async with`` runs them in a thread. What still runs when the interpreter ends is stopped then.
    """

    name = "tool"
    port_count = 1
    deadline_s = DEADLINE_S
    """For its start."""
    _TRIES = 3

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / f"{self.name}.log"
        self.ports: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Of the program, for the ports that were chosen."""

    def environment(self) -> Mapping[str, str]:
        return os.environ

    @property
    def ready_url(self) -> str:
        """What answers 200 when it is ready; of no use to a subclass that has another `ready`."""
        return ""

    def ready(self) -> bool:
        """Whether it is, now."""
        return page(self.ready_url) is not None

    def start(self) -> Self:
        """Returns when it is ready."""
        self.directory.mkdir(parents=True, exist_ok=True)
        restarted = bool(self.ports)
        for _ in range(self._TRIES):
            if not restarted:
                self.ports = free_ports(self.port_count)
            self._spawn()
            try:
                if self._came_up():
                    return self
            except BaseException:
                self.stop(signal.SIGKILL)
                raise
        raise AssertionError(f"{self.name} ended while starting:\n{self._tail()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the whole group; SIGKILL follows where that is not enough. Harmless when it has ended."""
        process, self.process = self.process, None
        _running.discard(self)
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, number)
        os.killpg(process.pid, signal.SIGCONT)  # a frozen one takes no other signal
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    async def __aenter__(self) -> Self:
        try:
            return await completed(self.start)
        except asyncio.CancelledError:
            self.stop(signal.SIGKILL)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.end()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """`stop`, while the event loop goes on."""
        await completed(self.stop, number)

    def freeze(self) -> None:
        """Stop it in mid-air: it keeps its sockets and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.name} is not running"
        os.killpg(self.process.pid, number)

    def _spawn(self) -> None:
        command, environment = self.command(), self.environment()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        _running.add(self)

    def _came_up(self) -> bool:
        """True when it is ready, False when it ended instead."""
        process = self.process
        assert process is not None
        what = f"{self.name} is ready; its log: {self.log}"
        holds_by(lambda: process.poll() is not None or self.ready(), what, self.deadline_s)
        return process.poll() is None

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


_running: set[ToolProcess] = set()


@atexit.register
def _stop_what_runs() -> None:
    for tool in sorted(_running, key=lambda tool: tool.name):
        tool.stop()


class Processes(ABC):
    """Several of them as one: an async context manager over `up` and `down`, which block and need no event loop."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    @abstractmethod
    def up(self) -> Self:
        """Returns when everything is ready; what was begun is ended when something is not."""

    def down(self) -> None:
        """Ends everything. Harmless when it has ended."""
        self._stack.close()

    async def __aenter__(self) -> Self:
        try:
            return await completed(self.up)
        except asyncio.CancelledError:
            self.down()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await completed(self.down)

    def _start(self, process: ToolProcess) -> None:
        self._stack.callback(process.stop, signal.SIGKILL)  # nothing of it is needed any more
        process.start()
