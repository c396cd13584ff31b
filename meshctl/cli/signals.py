"""When a long-running command ends."""

from __future__ import annotations

import asyncio
import signal


def ended_by_signal() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT; a second one ends the process at once, as without a handler."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        ended.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    return ended
