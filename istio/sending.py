"""Sends writes to the API server: in bursts, and each failure ends where it belongs.

Somebody else's fields go to the disputes, what is refused is remembered with its content and not sent again, and while
the server does not answer nothing is sent for a while. Nothing is lost: what was not written is still to be written.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial

import structlog

from istio.disputes import Disputes, Judgement
from istio.names import key_of
from istio.ownership import others_fields, same, version_of
from meshctl.errors import FieldConflictError, RefusedError, UnavailableError
from meshctl.ports import Clock, KubeObject, ObjectKey, Objects

log = structlog.get_logger(__name__)

BURST_S = 1.0
"""A burst ends after so long even if there is more to write."""
CONCURRENCY = 8
"""Writes at once. Those of one step may come in any order (tests/property/test_istio_steps.py)."""
RETRY_S, RETRY_MAX_S = 0.2, 10.0
"""Back-off while the API server does not answer, before jitter."""
REFUSED_S = 60.0
"""What was refused is tried again when it changes, or after so long: a missing permission may have been given."""
AWAY = 8
"""Writes in a row without an answer, after which it is the API server that is away. Fewer may be about their objects (a
webhook that hangs for one namespace), and hold up those only."""


@dataclass(frozen=True, slots=True)
class Writes:
    """What to do now, all at once."""

    apply: tuple[tuple[KubeObject, Judgement], ...]
    delete: tuple[KubeObject, ...]


class Sender:
    """See the module. `leading` is asked before every write."""

    def __init__(self, objects: Objects, disputes: Disputes, clock: Clock, leading: Callable[[], bool]) -> None:
        self.trouble = ""
        """Why the API server can't be written to now; "" when it can."""
        self.not_before_s = 0.0
        """Until then nothing is to be sent."""
        self._objects, self._disputes, self._clock, self._leading = objects, disputes, clock, leading
        self._failures = 0
        """Writes without an answer since the last one with an answer."""
        self._unanswered: dict[ObjectKey, tuple[int, str, float]] = {}
        """What was not answered: how often, why, and when it is to be tried again."""
        self._refused: dict[ObjectKey, tuple[KubeObject, str, float]] = {}
        """What was refused, the server's words, and when it may be tried again."""
        self._mutated: dict[ObjectKey, tuple[KubeObject, str]] = {}
        """What was written, and the version it became, where the API server made something else of it."""

    def same(self, wanted: KubeObject, live: KubeObject | None) -> bool:
        """`live` is what `wanted` becomes when it is written."""
        if live is None or same(wanted, live):
            return live is not None
        mutated = self._mutated.get(key_of(wanted)) == (wanted, version_of(live))
        return mutated and not others_fields(wanted, live)

    def refusal(self, value: KubeObject) -> str:
        """Why it is of no use to write `value`: the API server's words; "" when it may be."""
        refused, words, until_s = self._refused.get(key_of(value), (None, "", 0.0))
        return words if refused == value and self._clock.now_s() < until_s else ""

    def unanswered(self, value: KubeObject) -> str:
        """Why `value` is to be written later; "" when it may be now."""
        _, words, until_s = self._unanswered.get(key_of(value), (0, "", 0.0))
        return words if self._clock.now_s() < until_s else ""

    async def burst(self, writes: Iterable[Writes]) -> None:
        """All of `writes`, or what can be done of them in `BURST_S` while the server answers."""
        limit, loop = asyncio.Semaphore(CONCURRENCY), asyncio.get_running_loop()
        end_s = loop.time() + BURST_S

        async def one(value: KubeObject, write: Callable[[], Awaitable[None]]) -> None:
            async with limit:
                if loop.time() < end_s and self._clock.now_s() >= self.not_before_s and self._leading():
                    await self._attempt(value, write)

        tasks = []
        for due in writes:
            tasks += [one(value, partial(self._apply, value, judgement)) for value, judgement in due.apply]
            tasks += [one(value, partial(self._delete, value)) for value in due.delete]
        await asyncio.gather(*tasks)

    async def _attempt(self, value: KubeObject, write: Callable[[], Awaitable[None]]) -> None:
        """One write, and what its failure means."""
        key, now_s = key_of(value), self._clock.now_s()
        try:
            await write()
        except FieldConflictError as error:
            self._disputes.lost(value, str(error), now_s)
            log.warning("conflict", object=str(key), error=str(error))
        except RefusedError as error:
            self._refused[key] = (value, str(error), now_s + REFUSED_S)
            log.warning("refused", object=str(key), error=str(error))
        except UnavailableError as error:
            self._disputes.unsure(key)
            self._put_off(key, str(error))
        else:
            self._failures, self.trouble = 0, ""
            self._refused.pop(key, None)
            self._unanswered.pop(key, None)

    async def _apply(self, value: KubeObject, judgement: Judgement) -> None:
        live = self._objects.find(key_of(value))
        pin = {"resourceVersion": version_of(live)} if judgement.pinned else {}
        result = await self._objects.apply({**value, "metadata": {**value["metadata"], **pin}}, force=judgement.force)
        self._disputes.agreed(value, result)
        if same(value, result):
            self._mutated.pop(key_of(value), None)
        else:
            self._mutated[key_of(value)] = (value, version_of(result))

    async def _delete(self, value: KubeObject) -> None:
        self._disputes.gone(key_of(value))
        await self._objects.delete(key_of(value), str(value["metadata"]["uid"]))
        self._mutated.pop(key_of(value), None)

    def _put_off(self, key: ObjectKey, error: str) -> None:
        now_s = self._clock.now_s()
        times = self._unanswered.get(key, (0, "", 0.0))[0] + 1
        self._unanswered[key] = times, error, now_s + _pause_s(times)
        self._failures += 1
        if self._failures >= AWAY:
            self.not_before_s, self.trouble = now_s + _pause_s(self._failures), error


def _pause_s(failures: int) -> float:
    pause_s = min(RETRY_MAX_S, RETRY_S * 2.0 ** min(failures, 10))
    return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, so that replicas do not come back at once
