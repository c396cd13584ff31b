"""When the agent's state is written: before a promise is given, and soon after anything else.

One write at a time, outside the event loop; one that has begun ends, also when whoever waits for it is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from deviceplugin.checkpoint import Checkpoint
from deviceplugin.node import Saved


class Saver:
    """Writes what `state` says, with the time of `now_s`, into the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, state: Callable[[float], Saved], now_s: Callable[[], float]) -> None:
        self._checkpoint, self._state, self._now_s = checkpoint, state, now_s
        self._writing = asyncio.Lock()
        self._saved: Saved | None = None

    @property
    def behind(self) -> bool:
        """The file says something else."""
        return self._state(self._now_s()) != self._saved

    @property
    def writes(self) -> bool:
        """Somebody is writing it."""
        return self._writing.locked()

    async def save(self, *, lasting: bool = True) -> None:
        """Returns when the state of now is in the file (`lasting`: see StateFile). Raises OSError.

        A kubelet that hangs up cancels its Allocate, but not a write that has begun.
        """
        write = asyncio.create_task(self._write(lasting), name="write state")
        write.add_done_callback(_seen)  # who waited for it may be gone; the next turn writes again, and tells
        await asyncio.shield(write)

    async def _write(self, lasting: bool) -> None:
        async with self._writing:
            now_s = self._now_s()
            state = self._state(now_s)
            await asyncio.to_thread(self._checkpoint.save, state, now_s, lasting=lasting)
            self._saved = state


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()
