"""Writes status and Events on ModelRoutes and ModelProfiles, so that `kubectl describe` tells what holds and why.

What a status says and when it is worth a write is decided in `statuses`, what is worth an Event in `notices`; here is
only the edge: which objects, when, how many at once, and what happens when the API server does not answer. Invariants:
only the leader writes; the loop is never held up (`update` keeps the newest State, older ones are dropped); a status is
compared with the live one, so that neither a restart nor a fail-over writes anything.

For the first moments after a start the controller knows less than it did before: no metrics, no acknowledgements. An
object whose present version has a status already is left alone then.

Rejected: a task and a timer per object (a thousand wake-ups where one pass does); a read before each write (the watched
copy is there); waiting for writes in the loop (an API server that is slow would then hold traffic up).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, TypeVar

import structlog

from meshctl.controller.conditions import INVALID_INPUT, Condition, conditions, unusable
from meshctl.controller.notices import of_plans, of_statuses
from meshctl.controller.state import State
from meshctl.controller.statuses import (
    Worth,
    as_confirmed_before,
    awaits_confirmation,
    profile_status,
    route_status,
    unusable_status,
    worth_writing,
)
from meshctl.errors import MeshctlError, UnavailableError
from meshctl.model import Problem, RouteId, RoutePlan
from meshctl.ports import Clock, KubeObject, ObjectKey, Objects, ObjectStatus
from meshctl.told import Budget, Notice, StatusObject, dated

log = structlog.get_logger(__name__)

ROUTE, PROFILE = "ModelRoute", "ModelProfile"
SETTLE_S = 10.0
"""How long after the start a present status is left alone: signals are stale after 10 s by default."""
PATIENCE_S = 5.0
"""A confirmation that takes longer is told as Pending; Envoys take 0.1 s, a mesh that can't be asked is given 2 s."""
NUMBERS_S = 10.0
"""Least time between two writes of one status of which only numbers or words differ."""
GAP_S = 0.5
"""Least time between any two writes of one status: a condition that flutters is no load on the API server."""
REFUSED_S = 30.0
"""How long an object is left alone whose status the API server refused."""
PAUSE_S = 2.0
"""How long nothing is sent after the API server did not answer."""
PASS_S = 0.25
"""Least time between two looks at all objects: 40 ms for a thousand, and the loop may reconcile 50 times a second."""
DEADLINE_S = 10.0
"""Of one request, whatever the client below does."""
CONCURRENCY = 8
UNSENT = 1000
"""Events that wait for an API server that does not answer; more are dropped, the oldest first."""
_CHUNK = 25
"""Objects looked at between two turns of the event loop: about 1 ms."""
_AWAY, _REFUSED, _BUG = "away", "refused", "bug"
_ABOUT_PROFILE = re.compile(rf"{PROFILE} [^/\s]+/[^:\s]+")


@dataclass(frozen=True, slots=True)
class _Write:
    """A status that differs from the live one by what is worth a write."""

    key: ObjectKey
    live: KubeObject
    old: StatusObject
    new: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Said:
    """All that a status is made of: the same makes the same status."""

    live: KubeObject
    plan: RoutePlan | None
    found: tuple[Condition | Problem, ...] | None

    def same(self, other: _Said | None) -> bool:
        """Compared by identity where that is enough: a thousand of these are looked at each second."""
        if other is None or self.live is not other.live or self.plan is not other.plan:
            return False
        return self.found == other.found


@dataclass(frozen=True, slots=True)
class _Unsent:
    key: ObjectKey
    uid: str
    notice: Notice


_Item = TypeVar("_Item")


class _Answer(Enum):
    TAKEN = "taken"
    REFUSED = "refused"
    NONE = "no answer"


@dataclass(slots=True)
class _Known:
    """What is remembered of one object; all that matters is in the object itself."""

    uid: str
    plan: RoutePlan | None = None
    """The last one seen."""
    written_s: float = -math.inf
    refused_s: float = -math.inf
    pending_s: float | None = None
    """Since when a confirmation is awaited."""
    seen: str = ""
    """The resourceVersion over which `status` was written: while the watched copy shows it, the copy is behind."""
    status: StatusObject = field(default_factory=dict)
    quiet: _Said | None = None
    """What was found to be worth no write."""
    budget: Budget = field(default_factory=Budget)


class StatusWriter:
    """``writer.update(state)`` after each reconcile; `start` and `stop` as a part of the controller."""

    def __init__(
        self,
        objects: Objects,
        api: ObjectStatus,
        leading: Callable[[], bool],
        clock: Clock,
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        settle_s: float = SETTLE_S,
    ) -> None:
        self._objects, self._api, self._leading, self._clock, self._wall = objects, api, leading, clock, wall
        self._settle_s = settle_s
        self._state: State | None = None
        self._changed = asyncio.Event()
        self._known: dict[ObjectKey, _Known] = {}
        self._unsent: deque[_Unsent] = deque(maxlen=UNSENT)
        self._failures: dict[str, Problem] = {}
        self._paused_until_s = -math.inf
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="status")

    async def stop(self) -> None:
        """At once: a status that is not written now is written by whoever leads next."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    def update(self, state: State) -> None:
        """Take in what the loop knows now. Never blocks, never fails."""
        self._state = state
        self._changed.set()

    def problems(self) -> tuple[Problem, ...]:
        """What could not be written, one Problem per kind of failure."""
        return tuple(self._failures[name] for name in sorted(self._failures))

    async def write(self, state: State) -> None:
        """Write what `state` makes worth writing, once. What the API server did not take is in `problems`."""
        if not state.published:
            return
        leading = self._leading()
        due = await self._due(state, leading)
        if not leading:
            self._unsent.clear()
            self._failures.clear()
        elif self._clock.now_s() >= self._paused_until_s:
            self._forget_failures()
            await self._each(due, self._write)
            unsent = [item for item in self._unsent if item.key in self._known]
            self._unsent.clear()
            self._unsent.extend(await self._each(unsent, self._post))

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._state is None:
                continue
            pause_s = PASS_S
            try:
                await self.write(self._state)
            except Exception as error:  # whatever it is: the next State must find us here
                log.exception("failed", activity="status")
                self._failures[_BUG] = Problem("status", f"writing status failed: {type(error).__name__}: {error}")
                pause_s = PAUSE_S
            await asyncio.sleep(pause_s)

    # -------------------------------------------------------------------------------------------------- what is due

    async def _due(self, state: State, leading: bool) -> list[_Write]:
        """Every status worth a write now; the event loop gets its turn every few objects."""
        problems = _by_object(state.desired.problems)
        present = {key: live for kind in (ROUTE, PROFILE) for key, live in self._objects.every(kind).items()}
        self._known = {key: known for key, known in self._known.items() if key in present}
        due: list[_Write] = []
        for number, (key, live) in enumerate(present.items()):
            if number % _CHUNK == _CHUNK - 1:
                await asyncio.sleep(0)
            if live["metadata"].get("deletionTimestamp"):
                continue
            known = self._remembered(key, str(live["metadata"]["uid"]))
            plan = _plan_of(state, key, known.uid)
            if leading and known.plan is not None and plan is not None:
                self._tell(key, known, of_plans(known.plan, plan))
            known.plan = plan or known.plan
            said = _Said(live, plan, _found(state, plan, problems.get(str(key), ()), key))
            if leading and said.found is not None and not said.same(known.quiet):
                due += self._worth(state, key, known, said)
        return due

    def _remembered(self, key: ObjectKey, uid: str) -> _Known:
        known = self._known.get(key)
        if known is None or known.uid != uid:
            known = self._known[key] = _Known(uid)
        return known

    def _worth(self, state: State, key: ObjectKey, known: _Known, said: _Said) -> Iterator[_Write]:
        """The write of what is `said`, when it is time for it."""
        live, new = said.live, _status(said)
        behind = known.seen == live["metadata"].get("resourceVersion")
        if not behind:
            known.status = {}  # the copy has it: a thousand need not be held twice
        old: StatusObject = known.status if behind else live.get("status") or {}
        told = old.get("observedGeneration") == new["observedGeneration"]
        if told and state.now_s - state.started_s < self._settle_s:
            return
        now_s = self._clock.now_s()
        if awaits_confirmation(old, new):
            known.pending_s = now_s if known.pending_s is None else known.pending_s
            if now_s - known.pending_s < PATIENCE_S:
                new = as_confirmed_before(old, new)
        else:
            known.pending_s = None
        worth = worth_writing(old, new)
        wait_s = GAP_S if worth is Worth.NOW else NUMBERS_S
        if worth is Worth.NOTHING:
            known.quiet = said if known.pending_s is None else None
        elif now_s - known.written_s >= wait_s and now_s - known.refused_s >= REFUSED_S:
            yield _Write(key, live, old, new)

    # ------------------------------------------------------------------------------------------------------- sending

    async def _each(self, items: Sequence[_Item], send: Callable[[_Item], Awaitable[bool]]) -> list[_Item]:
        """`send` all, `CONCURRENCY` at once, until the API server is away; those that it has not answered."""
        queue: deque[_Item] = deque(items)
        unanswered: list[_Item] = []

        async def worker() -> None:
            while queue and self._leading() and self._clock.now_s() >= self._paused_until_s:
                item = queue.popleft()
                if not await send(item):
                    unanswered.append(item)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(CONCURRENCY, len(queue))):
                group.create_task(worker())
        return [*unanswered, *queue]

    async def _write(self, write: _Write) -> bool:
        known, metadata = self._known[write.key], write.live["metadata"]
        status = dated(write.new, write.old, self._wall().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        wanted = {
            "apiVersion": write.live["apiVersion"],
            "kind": write.key.kind,
            "metadata": {"namespace": write.key.namespace, "name": write.key.name, "uid": known.uid},
            "status": status,
        }
        answer = await self._answer(write.key, self._api.apply_status(wanted))
        if answer is _Answer.TAKEN:
            known.written_s, known.seen, known.status = self._clock.now_s(), metadata.get("resourceVersion", ""), status
            self._tell(write.key, known, of_statuses(write.old, status))
        if answer is _Answer.REFUSED:
            known.refused_s = self._clock.now_s()
        return answer is not _Answer.NONE

    async def _post(self, item: _Unsent) -> bool:
        notice = item.notice
        about = (item.key, item.uid, notice.type, notice.reason, notice.message, notice.action)
        return await self._answer(item.key, self._api.post_event(*about)) is not _Answer.NONE

    async def _answer(self, key: ObjectKey, request: Awaitable[object]) -> _Answer:
        """What the API server said. What is not well is in `problems`; after no answer, nothing is sent for a while."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                await request
        except (UnavailableError, TimeoutError) as away:
            self._paused_until_s = self._clock.now_s() + PAUSE_S
            self._failures[_AWAY] = Problem(
                f"status of {key}", f"status and Events wait: {away or 'no answer in time'}"
            )
            return _Answer.NONE
        except MeshctlError as refused:
            self._failures[_REFUSED] = Problem(f"status of {key}", f"status or Event is not written: {refused}")
            return _Answer.REFUSED
        return _Answer.TAKEN

    def _forget_failures(self) -> None:
        """Before each attempt; a refusal is told until it is tried again."""
        refused = any(self._clock.now_s() - known.refused_s < REFUSED_S for known in self._known.values())
        self._failures = {name: p for name, p in self._failures.items() if name == _REFUSED and refused}

    def _tell(self, key: ObjectKey, known: _Known, notices: Iterable[Notice]) -> None:
        now_s = self._clock.now_s()
        self._unsent.extend(_Unsent(key, known.uid, n) for n in notices if known.budget.allows(n, now_s))


# ------------------------------------------------------------------------------------------------- one object's status


def _by_object(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """By ``Kind namespace/name``; a ModelProfile's say in their message (or place) whose they are."""
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.route is not None:
            found.setdefault(f"{ROUTE} {problem.route}", []).append(problem)
            continue
        for text in (problem.where, problem.message):
            if match := _ABOUT_PROFILE.match(text):
                found.setdefault(match[0], []).append(problem)
                break
    return found


def _plan_of(state: State, key: ObjectKey, uid: str) -> RoutePlan | None:
    """The plan made for this very object."""
    plan = state.plan.routes.get(RouteId(f"{key.namespace}/{key.name}")) if key.kind == ROUTE else None
    origin = plan.route.spec.origin if plan is not None else None
    return plan if origin is not None and origin.uid == uid else None


def _found(
    state: State, plan: RoutePlan | None, problems: Sequence[Problem], key: ObjectKey
) -> tuple[Condition | Problem, ...] | None:
    """What holds of the object; None while nothing is known of it. `problems` are the object's own."""
    if key.kind == PROFILE:
        return tuple(problems)
    if plan is None:
        return unusable(problems) if problems else None
    signals = state.observed.routes.get(plan.route.spec.id)
    return conditions(plan, signals, state.dataplane, problems, state.now_s)


def _status(said: _Said) -> dict[str, Any]:
    """What the object's status should be."""
    found = said.found or ()
    told, problems = [c for c in found if isinstance(c, Condition)], [p for p in found if isinstance(p, Problem)]
    generation = int(said.live["metadata"].get("generation", 0))
    if said.live["kind"] == PROFILE:
        return profile_status(problems, generation)
    origin = said.plan.route.spec.origin if said.plan is not None else None
    if said.plan is None or origin is None:
        return unusable_status(told, generation)
    # a newer version that is invalid has been seen too: its faults are in the conditions
    invalid = any(condition.reason == INVALID_INPUT for condition in told)
    return route_status(said.plan, told, generation if invalid else origin.generation)
