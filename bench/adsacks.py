"""When the xDS server of this process took a request in: the far end of the way from a decision to a proxy and back."""

from __future__ import annotations

import asyncio
import time
from typing import Self

from bench.lines import ANSWER_S
from meshctl.errors import MeshctlError
from xds.channel import Answer
from xds.subscription import Subscription
from xds.wire import DeltaRequest, Request


class Acks:
    """Of the requests since the last push."""

    def __init__(self) -> None:
        self.pushed_s = 0.0
        self.taken_ms: list[float] = []
        self._expected = 0
        self._all = asyncio.Event()

    @classmethod
    def installed(cls) -> Self:
        """Told by every subscription of this process, at 0.2 us a request."""
        self = cls()
        receive = Subscription.receive

        def told(subscription: Subscription, request: Request | DeltaRequest) -> Answer | None:
            found = receive(subscription, request)
            self.took()
            return found

        Subscription.receive = told  # type: ignore[method-assign,assignment]  # nothing else tells of each one
        return self

    def expect(self, count: int) -> None:
        """From now on, this many."""
        self.taken_ms, self._expected = [], count
        self._all.clear()
        self.pushed_s = time.perf_counter()

    def took(self) -> None:
        """One more."""
        self.taken_ms.append(1e3 * (time.perf_counter() - self.pushed_s))
        if len(self.taken_ms) == self._expected:
            self._all.set()

    async def wait(self) -> list[float]:
        """How long after `expect` each came, in ms. Raises MeshctlError when not all of them do."""
        try:
            await asyncio.wait_for(self._all.wait(), ANSWER_S / 2)
        except TimeoutError as late:
            came = len(self.taken_ms)
            raise MeshctlError(f"{came} of {self._expected} streams acknowledged in {ANSWER_S / 2:g} s") from late
        return self.taken_ms
