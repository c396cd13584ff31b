"""Desired state from a directory: `ports.Source` over `manifests.read_directory`.

The kernel's notifications only say *when* to look; what is in force is always decided from a look at the whole
directory. So a lost notification, a file system without any (NFS), and a directory that is swapped as a whole cost at
most `POLL_S`, never correctness. Rejected: acting on single events, whose order differs between editors and systems.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from watchfiles import awatch

from meshctl.adapters.manifests import Contents, read_directory
from meshctl.api.document import Fault, Place
from meshctl.errors import InputError
from meshctl.ports import Desired

POLL_S = 1.0
"""The directory is looked at at least this often; unchanged, 1000 files take 20 ms of a slow core."""
QUIET_MS = 100
"""A look waits for this long without changes, so that a checkout or a copy is seen whole ..."""
BUSY_MS = 1_000
"""... but not longer than this."""
STOP_S = 5.0


class FileSource:
    """Watches `directory`. `desired` is the last good state of every object, and what is wrong with newer text."""

    def __init__(self, directory: Path) -> None:
        self._root = directory
        self._contents = Contents()
        self._desired = Desired({})
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._blind: tuple[Fault, ...] = ()

    async def start(self) -> None:
        """Returns when the directory has been read once. Raises InputError when there is none."""
        await self._look()
        if self._contents.identity is None:
            raise InputError(f"{self._root}: is not a directory that can be read; name one that holds manifests")
        self._changed.clear()  # who starts a source reads `desired` before waiting
        self._task = asyncio.create_task(self._watch(), name=f"watch {self._root}")
        self._task.add_done_callback(lambda _: self._changed.set())

    def desired(self) -> Desired:
        return self._desired

    async def wait_changed(self) -> None:
        """Returns when `desired` may differ from what it was at the last return. Raises what ended the watch, if so."""
        await self._changed.wait()
        self._changed.clear()
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def stop(self) -> None:
        self._stopping.set()
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=STOP_S)
        for task in late:  # a file system that hangs
            task.cancel()

    async def _look(self) -> None:
        self._contents = await asyncio.to_thread(read_directory, self._root, self._contents)
        faults = (*self._blind, *self._contents.faults)
        desired = Desired(self._contents.routes, tuple(fault.problem() for fault in faults))
        if desired == self._desired:
            return
        self._desired = desired
        self._changed.set()

    async def _watch(self) -> None:
        while not self._stopping.is_set():
            watched = self._contents.identity
            try:
                async for _ in awatch(
                    self._root,
                    debounce=BUSY_MS,
                    step=QUIET_MS,
                    rust_timeout=int(POLL_S * 1000),
                    yield_on_timeout=True,
                    stop_event=self._stopping,
                    ignore_permission_denied=True,
                ):
                    self._blind = ()
                    await self._look()
                    if self._contents.identity != watched:  # another directory has this name now, or none
                        break
            except (OSError, RuntimeError) as error:  # gone, or out of inotify watches: look without being told
                self._blind = self._blindness(error)
                await self._pause()
                await self._look()

    def _blindness(self, error: Exception) -> tuple[Fault, ...]:
        if isinstance(error, FileNotFoundError):
            return ()  # the look itself reports a directory that is gone
        return (
            Fault(Place(str(self._root)), "", f"cannot be watched ({error}); it is read every {POLL_S:g} s instead"),
        )

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), POLL_S)
        except TimeoutError:
            return
