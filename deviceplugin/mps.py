"""The MPS control daemons of this node: one per GPU, started, watched, and started again.

Invariants: a daemon is never ended or started under live clients, but by `unwant`, whose caller says that there are
none; EXCLUSIVE_PROCESS is set before a daemon starts, and DEFAULT comes back after it has ended; two GPUs share no
directory. A daemon is no child of ours (`-d` leaves our session): it outlives the agent, and the next one takes it as
it is when it answers on the GPU's pipe directory.

A daemon has failed when its process ends (noticed at once, by its pidfd), when it misses `Pace.patience` answers in a
row, or when it does not start. The GPU is then FAILED with the reason in words. One that answers again is taken back;
else it is started again once nobody computes on the GPU: the processes that the inventory sees but for MPS's own, or
where it sees none, the slots that the ledger shows as held. Starts follow each other ever more slowly.

Rejected: one daemon for all GPUs (it leaks GPUs into each other, and faults with all of them); `-f` as a child of ours
(it would end with the agent's container, and every client with it); the default limits of the daemon (see
`containers`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from deviceplugin.mpscontrol import Held, MpsControl, MpsError
from deviceplugin.ports import GpuError, GpuLostError, Inventory
from meshctl.errors import InputError, MeshctlError
from meshctl.sharing import Gpu, MpsPhase, MpsStatus

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, and how long."""

    probe_s: float = 5.0
    """Between two questions to a daemon that runs; also between two looks whether a failed one's clients are gone."""
    answer_s: float = 5.0
    """An answer takes at most."""
    patience: int = 2
    """Answers missed in a row that make a daemon a failed one."""
    start_s: float = 20.0
    quit_s: float = 10.0
    grace_s: float = 5.0
    """What does not end by `quit` is killed so long after it was acknowledged."""
    first_wait_s: float = 1.0
    """After a failure; doubles with each start, up to `longest_wait_s`."""
    longest_wait_s: float = 30.0
    steady_s: float = 60.0
    """A daemon that ran for so long failed for another reason than the last one."""

    def wait_s(self, starts: int) -> float:
        """Before the next start, after so many that did not last."""
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** min(starts, 16)))


class MpsDaemons:
    """`ports.Mps`, by real daemons. One task of its own supervises each; `status` is what it last saw."""

    def __init__(
        self,
        control: Path,
        root: Path,
        inventory: Inventory,
        *,
        busy: Callable[[str], bool],
        pace: Pace = Pace(),
        cgroup: Path | None = None,
        multi_user: bool = True,
    ) -> None:
        """`control` is nvidia-cuda-mps-control; `root` holds a directory per GPU; `busy` says whether the ledger shows
        a holder of a GPU's slots; daemons are moved to `cgroup`, so that they outlive the agent's container."""
        self._control = control
        self._root = root.absolute()
        self._inventory = inventory
        self._busy = busy
        self._pace = pace
        self._cgroup = cgroup
        self._multi_user = multi_user
        self._daemons: dict[str, _Daemon] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Event()

    def status(self, uuid: str) -> MpsStatus:
        daemon = self._daemons.get(uuid)
        return daemon.status if daemon else MpsStatus()

    def want(self, gpu: Gpu) -> None:
        """Harmless when it is wanted already. Raises InputError for a UUID that can't name a directory."""
        if gpu.uuid in self._daemons:
            return
        daemon = _Daemon(
            control=self._of(gpu.uuid),
            inventory=self._inventory,
            busy=self._busy,
            pace=self._pace,
            cgroup=self._cgroup,
            turn=self._turn(gpu.uuid),
            changed=self._changed.set,
        )
        self._daemons[gpu.uuid] = daemon
        daemon.begin()
        self._changed.set()

    async def unwant(self, uuid: str) -> None:
        """Also for a daemon that an earlier agent left. Raises MpsError when a process of it stays, and GpuError when
        the compute mode could not be given back; call again then."""
        daemon = self._daemons.pop(uuid, None)
        if daemon:
            daemon.cancel()
        async with self._turn(uuid):  # nothing is awaited before: who wants it again meanwhile has its turn after us
            if daemon:
                await daemon.end()
            control = self._of(uuid)
            await control.quit(self._pace.quit_s)
            await control.clear(self._pace.quit_s, grace_s=self._pace.grace_s)
            with contextlib.suppress(GpuLostError):  # it comes back by a reset or not at all; either forgets the mode
                await self._inventory.set_exclusive(uuid, False)
            await asyncio.to_thread(control.remove)
        self._changed.set()

    async def ready(self, uuid: str, deadline_s: float) -> None:
        daemon = self._daemons.get(uuid)
        if daemon is None:
            raise MpsError(f"GPU {uuid} has no MPS daemon, and none is wanted")
        try:
            async with asyncio.timeout(deadline_s):
                await daemon.runs.wait()
                await daemon.control.servers(deadline_s)
        except TimeoutError as late:
            seen = daemon.status
            raise MpsError(
                f"GPU {uuid}: its MPS daemon is not ready after {deadline_s:g} s: {seen.phase}. {seen.message}"
            ) from late

    async def clients(self, uuid: str) -> tuple[int, ...] | None:
        try:
            return await self._of(uuid).clients(self._pace.answer_s)
        except MpsError:
            return None  # `status` says why

    def pipe_directory(self, uuid: str) -> str:
        return str(self._of(uuid).pipe)

    def left(self) -> tuple[str, ...]:
        """UUIDs of GPUs that have a directory here, and no daemon that is wanted: left by an earlier agent.

        Raises InputError when the root is no directory that can be read.
        """
        try:
            names = sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise InputError(f"--mps-root: {self._root} is no directory to work in: {error.strerror}") from error
        return tuple(name for name in names if name not in self._daemons)

    async def wait_changed(self) -> None:
        """Returns when any status changed since it last returned; for one waiter."""
        await self._changed.wait()
        self._changed.clear()

    async def stop(self) -> None:
        for daemon in self._daemons.values():
            await daemon.end()

    def _of(self, uuid: str) -> MpsControl:
        if uuid in {"", ".", ".."} or "/" in uuid:
            raise InputError(f"{uuid!r} is no UUID of a GPU: it can't name a directory below {self._root}")
        daemon = self._daemons.get(uuid)
        return daemon.control if daemon else MpsControl(self._control, self._root / uuid, uuid, self._multi_user)

    def _turn(self, uuid: str) -> asyncio.Lock:
        """Whoever starts or ends this GPU's daemon waits for it."""
        return self._turns.setdefault(uuid, asyncio.Lock())


@dataclass(kw_only=True, eq=False)
class _Daemon:
    """One GPU's, from `want` to `unwant` or the agent's end."""

    control: MpsControl
    inventory: Inventory
    busy: Callable[[str], bool]
    pace: Pace
    cgroup: Path | None
    turn: asyncio.Lock
    changed: Callable[[], None]

    def __post_init__(self) -> None:
        self.status = MpsStatus(MpsPhase.STARTING)
        self.runs = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._starts = 0
        """In a row, that did not last."""
        self._ran = False

    @property
    def uuid(self) -> str:
        return self.control.uuid

    def begin(self) -> None:
        self._task = asyncio.create_task(self._supervised(), name=f"MPS of {self.uuid}")

    def cancel(self) -> None:
        if self._task:
            self._task.cancel()

    async def end(self) -> None:
        self.cancel()
        if self._task:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()  # it ends by nothing else than a bug

    async def _supervised(self) -> None:
        why = ""
        while True:
            wait_s = self.pace.probe_s
            try:
                held = await self._up(why)
                with held or contextlib.nullcontext():
                    await self._watched(held)
            except _InUseError as error:
                self._failed(str(error))
            except (MeshctlError, OSError) as error:
                why = str(error)
                self._failed(why)
                wait_s = self.pace.wait_s(self._starts)
            except Exception as error:  # nobody else watches this GPU's daemon
                log.exception("supervision failed, trying again", gpu=self.uuid)
                self._failed(f"GPU {self.uuid}: {error!r}")
                wait_s = self.pace.longest_wait_s
            await asyncio.sleep(wait_s)

    async def _up(self, why: str) -> Held | None:
        """A daemon that answers, adopted or started; its process, where it is to be seen. `why`: the last failure."""
        async with self.turn:
            if await self._answers():
                await self.inventory.set_exclusive(self.uuid, True)
                return await self._taken(self.status.restarts)
            await self._free(why)
            await self.control.clear(self.pace.quit_s)
            await self.inventory.set_exclusive(self.uuid, True)
            self._starts += 1
            await self.control.start(self.pace.start_s)
            await self.control.servers(self.pace.answer_s)
            return await self._taken(self.status.restarts + self._ran)

    async def _answers(self) -> bool:
        try:
            await self.control.servers(self.pace.answer_s)
        except MpsError:
            return False
        return True

    async def _free(self, why: str) -> None:
        """Raises _InUseError while somebody computes on the GPU."""
        processes = await self._computing()
        if processes or (processes is None and self.busy(self.uuid)):
            names = ", ".join(map(str, processes or ()))
            whom = f"the processes on GPU {self.uuid}: {names}" if names else "the containers that hold its slots"
            raise _InUseError(f"{_sentence(why)}The next daemon waits for {whom}. Delete their pods")

    async def _computing(self) -> tuple[int, ...] | None:
        """Processes on the GPU that are not MPS's own; None where nobody can say."""
        try:
            processes = await self.inventory.processes(self.uuid)
        except GpuError:
            return None  # the GPU's own health tells of it
        if not processes:
            return processes
        own = {found.pid for found in await self.control.find()}
        return tuple(pid for pid in processes if pid not in own)

    async def _taken(self, restarts: int) -> Held | None:
        held = await self.control.daemon()
        message = self._moved(held)
        self._ran = True
        self._say(MpsStatus(MpsPhase.RUNNING, held.pid if held else None, None, restarts, message))
        return held

    def _moved(self, held: Held | None) -> str:
        """Into a cgroup of its own, before it has a server: whoever ends the agent's container would end it too."""
        if self.cgroup is None or held is None:
            return ""
        try:
            self.cgroup.mkdir(parents=True, exist_ok=True)
            (self.cgroup / "cgroup.procs").write_text(f"{held.pid}\n")
        except OSError as error:
            return f"It ends with the agent's container: it can't be moved to {self.cgroup}: {error.strerror}"
        return ""

    async def _watched(self, held: Held | None) -> None:
        """Raises MpsError when the daemon has died, or answers no more."""
        missed, began_s = 0, time.monotonic()
        while True:
            try:
                clients = await self.control.clients(self.pace.answer_s)
            except MpsError as error:
                missed += 1
                if missed >= self.pace.patience and not (held and await held.ended(0)):
                    raise MpsError(f"{error}, {missed} times in a row") from error
            else:
                missed = 0
                self._say(replace(self.status, clients=len(clients)))
                await asyncio.to_thread(self.control.shorten_log)
            if time.monotonic() - began_s >= self.pace.steady_s:
                self._starts = 0
            if held is None:
                await asyncio.sleep(self.pace.probe_s)
            elif await held.ended(self.pace.probe_s):
                raise MpsError(
                    f"GPU {self.uuid}: its MPS control daemon (process {held.pid}) died{self.control.last_words()}"
                )

    def _failed(self, message: str) -> None:
        self._say(MpsStatus(MpsPhase.FAILED, None, None, self.status.restarts, message))

    def _say(self, status: MpsStatus) -> None:
        if status == self.status:
            return
        self.status = status
        if status.phase is MpsPhase.RUNNING:
            self.runs.set()
        else:
            self.runs.clear()
        self.changed()


class _InUseError(MpsError):
    """A failed daemon is left alone: somebody computes on its GPU."""


def _sentence(words: str) -> str:
    return f"{words.rstrip('.')}. " if words else ""
