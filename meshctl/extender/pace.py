"""When the next pod may be given a place: as fast as pods are bound, not faster. It never waits for long.

kube-scheduler looks for the next pod's place as soon as the last one has its, and binds in the background:

- Of a thousand pods that wait, hundreds would be under way, and the deadlines of their writes would pass. So while some
  are being written, the next Filter waits. Few are enough: a write takes milliseconds, and the scheduler keeps no more
  than two connections to an extender that it does not use (each other costs both a TLS handshake).
- A Filter changes nothing: until the Bind of the pod before it is here, its place looks free, and the best place of two
  pods is often the same GPU, the fullest that has room. Then the second Bind finds no room, and its pod is scheduled
  again, seconds later. So the next Filter waits a moment for that Bind, too.

Rejected: to hold a place from the Filter on (what autoscalers and preemption ask is never followed by a Bind); to wait
for a Bind longer than a moment (volumes may be bound before the pod is).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Of one event loop."""

    def __init__(self, *, writes: int, longest_s: float, moment_s: float) -> None:
        """No more than `writes` at once, unless that takes longer than `longest_s`; `moment_s` for a Bind to come."""
        self._writes, self._longest_s, self._moment_s = writes, longest_s, moment_s
        self._writing = 0
        self._placed = ""
        """UID of the last pod that was given a place, until that is taken."""
        self._until_s = 0.0
        """By the event loop's clock: how long it is waited for."""
        self._changed = asyncio.Event()

    def placed(self, uid: str) -> None:
        """The scheduler is told of a place for the pod."""
        self._placed = uid
        self._until_s = asyncio.get_running_loop().time() + self._moment_s

    def taken(self, uid: str) -> None:
        """The pod's place is held, or it gets none."""
        if uid == self._placed:
            self._placed = ""
            self._changed.set()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A binding is being written meanwhile, or it is being found out what became of it."""
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1
            self._changed.set()

    async def next(self) -> None:
        """Returns when the next pod may be given a place."""
        try:
            async with asyncio.timeout(self._longest_s):
                while self._writing >= self._writes:
                    await self._change()
            if self._placed:
                async with asyncio.timeout_at(self._until_s):
                    while self._placed:
                        await self._change()
        except TimeoutError:
            return

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
