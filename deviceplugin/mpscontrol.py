"""nvidia-cuda-mps-control of one GPU: its command line, its questions on stdin, and the processes that it leaves.

What it does, as seen on releases 535 and 595: `-d` returns when the daemon listens, and has then left our session and
our process group. Without an option it is a front end that sends the lines of its stdin to the daemon of
CUDA_MPS_PIPE_DIRECTORY and prints the answers; it exits with 0 even when the command was unknown, and with 1 when there
is no daemon. The daemon has one front end at a time, and refuses a second one: questions are asked one by one, and
again when refused. `quit` leaves the sockets. 535 writes no pid file, so that the daemon and its servers are found by
what is in /proc: their program, and the pipe directory in their environment. That needs the host's process IDs
(hostPID), as do the IDs of clients, which the daemon tells.

A process that is not our child is held by a pidfd: a number that came to mean another process is never signalled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from meshctl.errors import MeshctlError

SERVER_PROGRAM = "nvidia-cuda-mps-server"
LONGEST_SOCKET_PATH = 107
"""Bytes of a unix socket's path; the daemon can't listen below a longer directory, and does not say why."""

_REFUSED = "Cannot send command to MPS control daemon process"
_PROC = Path("/proc")
_TAIL_BYTES = 4096
_LONGEST_LOG_BYTES = 1 << 20
_CHATTER = ("Accepting connection", "NEW UI", "UI closed", "Cmd:get_", "Starting control daemon", "To connect CUDA")
"""Lines of control.log that every start and each of our questions leaves: they explain no failure."""
_AGAIN_S = 0.05
_HELP_S = 20.0
"""The program only prints it: whoever reaches this has no program there."""


class MpsError(MeshctlError):
    """A control daemon does not start, does not answer, or has died. The message says which and what it said."""


class _RefusedError(MpsError):
    """It has another front end just now."""


@dataclass(frozen=True, slots=True)
class Found:
    """A process of a GPU's MPS, in /proc."""

    pid: int
    server: bool
    """An MPS server; else the control daemon."""
    started: int
    """Clock ticks since boot: with the pid it names the process for good."""


class Held:
    """A process held by a pidfd, whosever child it is. Use as a context manager."""

    def __init__(self, found: Found) -> None:
        """Raises ProcessLookupError when it has ended."""
        self.pid = found.pid
        self._fd = os.pidfd_open(found.pid)
        if _started(found.pid) != found.started:
            os.close(self._fd)
            raise ProcessLookupError(f"process {found.pid} is another one now")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def kill(self) -> None:
        """Harmless when it has ended."""
        if not self._over():
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    async def ended(self, within_s: float) -> bool:
        """Whether it ends within so many seconds; one waiter at a time."""
        if self._over():
            return True
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._fd, over.set)
        try:
            async with asyncio.timeout(within_s):
                await over.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._fd)
        return True

    def _over(self) -> bool:
        """A pidfd is readable from the moment of its process's end, reaped or not."""
        return bool(select.select([self._fd], [], [], 0)[0])


@dataclass(frozen=True, slots=True)
class MpsControl:
    """The control daemon of one GPU, running or not."""

    binary: Path
    directory: Path
    """Of this GPU alone: pipe/ and log/ are below."""
    uuid: str
    multi_user: bool = True
    """Where the program can (and we are root), processes of every user share one server; else users wait in turn."""
    _talk: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)

    @property
    def pipe(self) -> Path:
        return self.directory / "pipe"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    async def ask(self, command: str, deadline_s: float) -> list[str]:
        """The lines of the answer; raises MpsError when there is none within the deadline."""
        try:
            async with asyncio.timeout(deadline_s), self._talk:
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception_type(_RefusedError),
                    stop=stop_after_delay(deadline_s),
                    wait=wait_fixed(_AGAIN_S),
                    reraise=True,
                ):
                    with attempt:
                        return await self._asked(command)
        except TimeoutError as late:
            raise MpsError(
                f"GPU {self.uuid}: the MPS control daemon did not answer {command!r} within {deadline_s:g} s"
            ) from late
        raise AssertionError("a retry ends with an answer or an error")

    async def servers(self, deadline_s: float) -> tuple[int, ...]:
        """IDs of the daemon's server processes: none before the first client came."""
        return _ids(await self.ask("get_server_list", deadline_s))

    async def clients(self, deadline_s: float) -> tuple[int, ...]:
        """IDs of the processes that are connected, of all servers; a server that ends meanwhile has none."""
        found: set[int] = set()
        for server in await self.servers(deadline_s):
            found.update(_ids(await self.ask(f"get_client_list {server}", deadline_s)))
        return tuple(sorted(found))

    async def start(self, deadline_s: float) -> None:
        """Returns when the daemon listens; raises MpsError with its own last words when it does not."""
        words = await asyncio.to_thread(self._prepared)
        options = ["-multiuser-server"] if await self._has_multi_user() else []
        process = await self._spawned(*options, "-d", output=words)
        try:
            async with asyncio.timeout(deadline_s):
                status = await process.wait()
        except TimeoutError as late:
            raise MpsError(
                f"GPU {self.uuid}: {self.binary} did not start within {deadline_s:g} s{self.last_words()}"
            ) from late
        finally:
            await _reaped(process)
        if status:
            said = words.read_text(errors="replace").strip()
            raise MpsError(
                f"GPU {self.uuid}: {self.binary} ended with {status} instead of starting: "
                f"{said or 'it said nothing; is libcuda.so.1 where it looks?'}{self.last_words()}"
            )

    async def quit(self, deadline_s: float) -> None:
        """Asks the daemon to end, and to end its servers. Says nothing when there is none, or when it won't: see
        `find` for what is left of it."""
        try:
            await self.ask(f"quit -t {max(1, int(deadline_s / 2))}", deadline_s)
        except MpsError:
            return  # no daemon, a server that had to be forced, or one that hangs: who asked looks at the processes

    async def find(self) -> tuple[Found, ...]:
        """The daemon's process and those of its servers, ended ones not; the daemon first."""
        return await asyncio.to_thread(_processes, self.binary.name, self.pipe)

    async def daemon(self) -> Held | None:
        """The running daemon's process; None when it is not to be seen (without the host's process IDs)."""
        for found in await self.find():
            if not found.server:
                try:
                    return Held(found)
                except ProcessLookupError:
                    return None
        return None

    async def clear(self, deadline_s: float, grace_s: float = 0.0) -> None:
        """Ends by force what is left of the daemon and its servers after `grace_s`; raises MpsError when one stays."""
        for found in await self.find():
            try:
                held = Held(found)
            except ProcessLookupError:
                continue
            with held:
                if not await held.ended(grace_s):
                    held.kill()
                if not await held.ended(deadline_s):
                    raise MpsError(f"GPU {self.uuid}: process {held.pid} of its MPS does not end, not even by SIGKILL")

    def remove(self) -> None:
        """The directories; harmless when they are gone."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def last_words(self) -> str:
        """The end of control.log, without what our questions leave there; "" when it says nothing."""
        try:
            with (self.log / "control.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        told = [line for line in lines if line.strip() and not any(word in line for word in _CHATTER)]
        return "; control.log: " + " | ".join(told[-3:]) if told else ""

    def shorten_log(self) -> None:
        """Empties logs that have grown: each question leaves some lines, and /run is memory. The daemon appends."""
        for name in ("control.log", "server.log"):
            file = self.log / name
            with contextlib.suppress(OSError):  # a long log is no fault of the daemon's
                if file.stat().st_size > _LONGEST_LOG_BYTES:
                    os.truncate(file, 0)

    def _prepared(self) -> Path:
        """The directories, and an empty file for what the start says. MPS servers and clients have users of their own:
        they must reach the pipe directory and write to it, but not remove each other's files."""
        longest = len(os.fsencode(self.pipe / "control_privileged"))
        if longest > LONGEST_SOCKET_PATH:
            raise MpsError(
                f"GPU {self.uuid}: the path of its MPS socket has {longest} bytes, over {LONGEST_SOCKET_PATH}:"
                f" use a shorter --mps-root than {self.directory.parent}"
            )
        try:
            for directory, mode in ((self.directory, 0o755), (self.pipe, 0o1777), (self.log, 0o755)):
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(mode)
            words = self.log / "start.log"
            words.write_bytes(b"")
        except OSError as error:
            raise MpsError(f"GPU {self.uuid}: cannot make {error.filename}: {error.strerror}") from error
        return words

    async def _has_multi_user(self) -> bool:
        if not self.multi_user or os.geteuid() != 0:
            return False
        process = await self._spawned("-h")
        try:
            async with asyncio.timeout(_HELP_S):
                said, _ = await process.communicate()
        except TimeoutError as late:
            raise MpsError(f"GPU {self.uuid}: {self.binary} -h says nothing within {_HELP_S:g} s") from late
        finally:
            await _reaped(process)
        return b"multiuser-server" in said

    async def _asked(self, command: str) -> list[str]:
        process = await self._spawned()
        try:
            said, _ = await process.communicate(f"{command}\n".encode())
        finally:
            await _reaped(process)
        lines = said.decode(errors="replace").splitlines()
        if process.returncode:
            kind = _RefusedError if any(_REFUSED in line for line in lines) else MpsError
            words = " ".join(lines).strip() or f"the MPS front end ended with {process.returncode}"
            raise kind(f"GPU {self.uuid}: {words}")
        return lines

    async def _spawned(self, *options: str, output: Path | None = None) -> asyncio.subprocess.Process:
        """A front end that talks to us, or with `output` one that starts the daemon (which would keep our pipes)."""
        pipe = asyncio.subprocess.PIPE
        stdin = pipe if not options else asyncio.subprocess.DEVNULL
        try:
            if output is None:
                return await asyncio.create_subprocess_exec(
                    self.binary, *options, stdin=stdin, stdout=pipe, stderr=asyncio.subprocess.STDOUT, env=self._env()
                )
            with output.open("wb") as file:
                return await asyncio.create_subprocess_exec(
                    self.binary, *options, stdin=stdin, stdout=file, stderr=file, env=self._env()
                )
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise MpsError(
                    f"GPU {self.uuid}: --mps-control {self.binary} not found: it comes with NVIDIA's driver"
                    " (package nvidia-compute-utils or nvidia-cuda-mps)"
                ) from error
            raise MpsError(f"GPU {self.uuid}: cannot run --mps-control {self.binary}: {error.strerror}") from error

    def _env(self) -> Mapping[str, str]:
        """Ours, but for what would limit every client, or name other directories."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_MPS_")}
        return inherited | {
            "CUDA_VISIBLE_DEVICES": self.uuid,
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log),
        }


def _ids(lines: Sequence[str]) -> tuple[int, ...]:
    """Process IDs, one a line; other words ("Server 5 not found") are none."""
    return tuple(int(line) for line in lines if line.strip().isdecimal())


async def _reaped(process: asyncio.subprocess.Process) -> None:
    """Ends a front end that was given up; harmless when it has ended."""
    if process.returncode is None:
        process.kill()
        await process.wait()


def _processes(program: str, pipe: Path) -> tuple[Found, ...]:
    """Reads /proc; blocks. What a container calls itself there is its own affair: its processes have another namespace
    of process IDs, and are none of ours (one that was taken for the daemon would be moved out of its cgroup)."""
    ours = (_PROC / "self/ns/pid").readlink()
    marker = b"CUDA_MPS_PIPE_DIRECTORY=" + os.fsencode(pipe)
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
            role = _role(program, words)
            if role is None or marker not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if (entry / "ns/pid").readlink() != ours:
                continue
        except OSError:  # it ended, or it is another user's: not one that we started
            continue
        started = _started(int(entry.name))
        if started is not None:
            found.append(Found(int(entry.name), role == SERVER_PROGRAM, started))
    return tuple(sorted(found, key=lambda one: (one.server, one.pid)))


def _role(program: str, words: Sequence[bytes]) -> str | None:
    """`program` for a control daemon, `SERVER_PROGRAM` for a server, None for all else: front ends have no options."""
    for at, word in enumerate(words[:2]):  # a script's first word is its interpreter
        name = os.fsdecode(word).rpartition("/")[2]
        if name == SERVER_PROGRAM:
            return SERVER_PROGRAM
        if name == program:
            return program if {b"-d", b"-f"} & set(words[at + 1 :]) else None
    return None


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None when there is no such process. The program's name may hold spaces and ")"."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    return int(stat.rpartition(b")")[2].split()[19])
