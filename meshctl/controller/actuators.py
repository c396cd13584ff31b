"""Several data planes behind one Actuator: our own xDS server, and Istio.

Invariant: every part is given every plan; one that fails keeps no other from it, and is reported after them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from meshctl.model import DataPlaneStatus, Plan
from meshctl.ports import Actuator


class Actuators:
    """All of `parts`, in their order."""

    def __init__(self, parts: Sequence[Actuator]) -> None:
        self._parts = tuple(parts)

    def apply(self, plan: Plan) -> int:
        """Raises ExceptionGroup when some part failed; the others have applied the plan."""
        written, failed = 0, []
        for part in self._parts:
            try:
                written += part.apply(plan)
            except Exception as error:  # noqa: BLE001 (raised below, once every part has had the plan)
                failed.append(error)
        if failed:
            raise ExceptionGroup("some data planes did not take the plan", failed)
        return written

    def status(self) -> DataPlaneStatus:
        """All proxies and all that is wrong. A route that is told of by two parts has the first one's words."""
        told = [part.status() for part in self._parts]
        return DataPlaneStatus(
            proxies=tuple(proxy for status in told for proxy in status.proxies),
            version=" ".join(status.version for status in told if status.version),
            quarantined={r: text for status in reversed(told) for r, text in status.quarantined.items()},
            waiting={r: text for status in reversed(told) for r, text in status.waiting.items()},
            conflicts={r: text for status in reversed(told) for r, text in status.conflicts.items()},
        )

    async def stop(self) -> None:
        results = await asyncio.gather(*(part.stop() for part in self._parts), return_exceptions=True)
        failed = [result for result in results if isinstance(result, Exception)]
        if failed:
            raise ExceptionGroup("some data planes did not stop", failed)


async def first_of(waits: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Returns when the first of `waits` does; the others are cancelled, so none of them may lose what it saw."""
    tasks = [asyncio.ensure_future(wait()) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
