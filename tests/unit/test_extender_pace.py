"""When the next pod may be given a place."""

from __future__ import annotations

import asyncio

from meshctl.extender.pace import Pace
from tests.harness.tools import DEADLINE_S


async def turn() -> None:
    """Whatever can go on without waiting has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_nobody_waits_while_few_are_written() -> None:
    """Nor after them."""
    pace = Pace(writes=2, longest_s=DEADLINE_S, moment_s=DEADLINE_S)
    with pace.writing():
        await pace.next()


async def test_while_many_are_written_the_next_waits_for_the_end_of_one() -> None:
    """All that wait go on then: one scheduler asks one after the other."""
    pace = Pace(writes=1, longest_s=DEADLINE_S, moment_s=DEADLINE_S)
    with pace.writing():
        waiting = [asyncio.create_task(pace.next()) for _ in range(2)]
        await turn()
        assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)


async def test_the_next_waits_until_the_last_place_is_taken() -> None:
    """Not for the places before it, which may have been asked for without intent."""
    pace = Pace(writes=1, longest_s=DEADLINE_S, moment_s=DEADLINE_S)
    pace.placed("a")
    pace.placed("b")
    waiting = asyncio.create_task(pace.next())
    pace.taken("a")
    await turn()
    assert not waiting.done()
    pace.taken("b")
    await waiting
    await pace.next()


async def test_it_never_waits_for_long() -> None:
    """For a binding that nobody answers, and for one that never comes, the first time and the next."""
    pace = Pace(writes=1, longest_s=0.01, moment_s=0.01)
    pace.placed("a")
    await pace.next()
    await pace.next()
    with pace.writing():
        await pace.next()
