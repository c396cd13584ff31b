"""Puts plans in force through Istio: writes VirtualServices, DestinationRules and ServiceEntries.

`apply` sets the target and returns; a task of its own makes the steps (`istio.steps`) from what is live to the target.
Invariants
- A write is done only by the leader, and asked about right before; a target is kept, so that a new leader goes on.
- What is live and what is wanted are the only state. Nothing is written where they are the same, a restart included.
- One route never holds up another: what cannot be written, is in dispute, or waits, waits alone.

istiod pushes once nothing has changed for 100 ms (10 s at most), so writes come in bursts with quiet between them:
a lone change is written at once, and a stream of changes cannot keep istiod from pushing.
Rejected: writing from `apply`. The loop would wait for the API server, and a slow one would delay decisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import structlog

from istio.analyze import ISTIO_KINDS, Known, Severity, check
from istio.confirm import Confirmation
from istio.disputes import FREE, Disputes, Judgement
from istio.gateways import absent
from istio.mirror import Mirror
from istio.names import OURS, VIRTUAL_SERVICE, key_of
from istio.ownership import managed, same
from istio.render import Rendered, render, weights_of
from istio.sending import Sender, Writes
from istio.steps import History, Live, Step, Written, next_step, observe
from meshctl.model import DataPlaneStatus, DesiredRoute, Plan, RouteId, RoutePlan, Weights
from meshctl.ports import Clock, KubeObject, ObjectKey, Objects

log = structlog.get_logger(__name__)

QUIET_S = 0.15
"""Between two bursts: istiod debounces 100 ms of quiet, and its watch may lag by some. Also more than the 100 ms that
any one object is left alone."""
LOOKS = 100
"""Routes looked at in one turn: what they cost delays the loop that decides."""
COALESCE_S = 0.02
"""Between two turns: changes of other people's objects come in swarms."""
TICK_S = 1.0
"""How often deadlines and leadership are looked at when nothing happens."""
RECHECK_S = 10.0
"""A finding may be about somebody else's object, which may have changed."""
ROUTE_KIND = "ModelRoute"


@dataclass(slots=True)
class _Route:
    """What is known of one route."""

    plan: RoutePlan | None = None
    wanted: Rendered | None = None
    """What the newest plan asks for; None: no objects."""
    target: Rendered | None = None
    """What is being put in force: `wanted`, or the last one without findings."""
    targeted: bool = False
    """There is a target; until then whatever is live stays."""
    history: History = ()
    awaits: tuple[Written, ...] = ()
    refusal: str = ""
    """What the API server said against an object of the target."""
    unanswered: str = ""
    """Why an object of the target is written later."""
    finding: str = ""
    recheck_s: float = 0.0
    waiting: str = ""
    conflict: str = ""

    def share(self, live: Live) -> None:
        """Hold what is in force once, not as it was rendered and as it is live: a thousand routes have 6000 objects."""
        if self.target is not None and self.target is self.wanted:
            self.target = self.wanted = self.target.sharing(live)

    @property
    def held(self) -> bool:
        """Time may change what is to be done."""
        return bool(
            self.conflict or self.finding or self.refusal or self.unanswered or (self.plan is None and self.history)
        )


class IstioWriter:
    """See the module."""

    def __init__(
        self,
        objects: Objects,
        confirmation: Confirmation,
        clock: Clock,
        *,
        routes: Callable[[], Mapping[RouteId, DesiredRoute]],
        leading: Callable[[], bool] = lambda: True,
        namespaces: tuple[str, ...] = (),
    ) -> None:
        """`routes`: those that exist, for `in_force`. `leading`: whether this replica may write, asked often.
        `namespaces`: those of which `objects` has everything (empty: all)."""
        self._objects, self._confirmation, self._clock = objects, confirmation, clock
        self._existing, self._leading, self._namespaces = routes, leading, namespaces
        self._mirror, self._disputes, self._known = Mirror(objects), Disputes(), Known()
        self._sender = Sender(objects, self._disputes, clock, leading)
        self._routes: dict[RouteId, _Route] = {}
        self._dirty: dict[RouteId, None] = {}
        """Routes to look at, in the order in which they came."""
        self._up_to_date = False
        """`_known` is what is live: once in a turn is enough, as it takes 5 ms for 6000 objects."""
        self._planned = self._led = False
        self._ticked_s = 0.0
        self._weights: dict[RouteId, tuple[DesiredRoute, Live, Weights | None]] = {}
        self._status = DataPlaneStatus()
        self._news = self._busy = False
        self._woken, self._changed = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------------------------------------- for its users

    def start(self) -> None:
        """Begin to write what `apply` sets, in the running event loop."""
        self._confirmation.start()
        activities = (self._turn, self._follow_objects, self._follow_confirmation)
        self._tasks = [asyncio.create_task(_forever(activity), name="istio writer") for activity in activities]

    def apply(self, plan: Plan) -> int:
        """Sets the target; for how many routes it is another one."""
        new = [(route, planned) for route, planned in plan.routes.items() if self._differs(route, planned)]
        gone = [r for r, state in self._routes.items() if state.plan is not None and r not in plan.routes]
        changed = sum(
            [self._take(route, planned) for route, planned in new] + [self._take(route, None) for route in gone]
        )
        if new or gone or not self._planned:
            self._planned = True
            self._woken.set()
            self._publish()  # what is new is not in force: nobody may read the status of before as if it were
        elif self._leading() != self._led:
            self._woken.set()  # a new leader writes at once what it has known for long
        return changed

    def status(self) -> DataPlaneStatus:
        return self._status

    def leading(self) -> bool:
        return self._leading()

    def in_force(self) -> Mapping[RouteId, Weights]:
        """The weights that the live objects stand for, of every route whose objects are all there."""
        self._refresh()
        found = {r: self._weights_of(r, desired) for r, desired in self._existing().items() if desired.spec.meshed}
        self._weights = {route: kept for route, kept in self._weights.items() if route in found}
        return {route: weights for route, weights in found.items() if weights is not None}

    def idle(self) -> bool:
        """Everything is in force, or waits for somebody else; nothing is being written."""
        return not self._woken.is_set() and not self._busy and not (self._dirty and self._ready())

    async def wait_changed(self) -> None:
        """Returns when `status` or `in_force` may say something else."""
        await self._changed.wait()

    async def stop(self) -> None:
        """What is live stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._confirmation.stop()

    # ------------------------------------------------------------------------------------------------- what is wanted

    def _differs(self, route: RouteId, planned: RoutePlan) -> bool:
        known = self._routes.get(route)
        return known is None or known.plan is not planned

    def _take(self, route: RouteId, planned: RoutePlan | None) -> bool:
        """Whether something else is wanted now."""
        state = self._routes.setdefault(route, _Route())
        before, first = state.wanted, state.plan is None
        state.plan = planned
        wanted = render(planned) if planned is not None and planned.route.spec.meshed else None
        if wanted == before and not first and planned is not None:
            return False
        state.wanted, state.finding, state.recheck_s = wanted, "", 0.0
        self._dirty[route] = None
        return wanted != before

    def _retarget(self, route: RouteId, state: _Route, live: Live, now_s: float) -> None:
        """`wanted` becomes the target, unless there is something wrong with it."""
        if state.plan is None and not self._released(route):
            state.waiting = f"waits for the ModelRoute {route} to be valid, or gone" if self._planned else ""
            return
        if (state.targeted and state.target is state.wanted) or now_s < state.recheck_s:
            return
        changed = [] if state.wanted is None else [v for v in _all(state.wanted) if not same(v, live.get(key_of(v)))]
        state.finding = self._finding(changed)
        state.recheck_s = now_s + RECHECK_S if state.finding else 0.0
        if not state.finding:
            state.target, state.targeted = state.wanted, True

    def _released(self, route: RouteId) -> bool:
        """A route that is in no plan has no ModelRoute either: one that can't be read for now keeps its objects."""
        namespace, _, name = route.partition("/")
        known = self._planned and not self._objects.missing(ROUTE_KIND)
        return known and self._objects.find(ObjectKey(ROUTE_KIND, namespace, name)) is None

    def _finding(self, changed: list[KubeObject]) -> str:
        """What would be wrong with `changed` once they are written; "" for nothing."""
        if not changed:
            return ""
        if not self._up_to_date:
            self._known.sync(value for kind in sorted(ISTIO_KINDS) for value in self._objects.every(kind).values())
            self._up_to_date = True
        complete = [kind for kind in sorted(ISTIO_KINDS) if not self._objects.missing(kind)]
        errors = [str(f) for f in check(changed, self._known, complete) if f.severity is Severity.ERROR]
        return f"{errors[0]}{f' (and {len(errors) - 1} more)' if errors[1:] else ''}" if errors else ""

    # ---------------------------------------------------------------------------------------------------- what is live

    def _refresh(self) -> None:
        confirmed = self._confirmation.confirmed()
        for route in sorted(self._mirror.refresh()):
            state = self._routes.setdefault(route, _Route())
            state.history = self._observed(route, state, self._mirror.live(route), confirmed)
            self._dirty[route] = None
            self._news = True

    def _observed(self, route: RouteId, state: _Route, live: Live, confirmed: Collection[Written]) -> History:
        namespace, _, name = route.partition("/")
        key = ObjectKey(VIRTUAL_SERVICE, namespace, name)
        return observe(state.history, key, live.get(key), confirmed)

    def _live(self, route: RouteId, state: _Route) -> Live:
        """The live objects, those that lost our label included."""
        live = self._mirror.live(route)
        keys = [key_of(v) for wanted in (state.wanted, state.target) if wanted is not None for v in _all(wanted)]
        strayed = {key: found for key in keys if key not in live and (found := self._objects.find(key)) is not None}
        return {**live, **{key: found for key, found in strayed.items() if managed(found)}} if strayed else live

    def _weights_of(self, route: RouteId, desired: DesiredRoute) -> Weights | None:
        live, kept = self._mirror.live(route), self._weights.get(route)
        if kept is None or kept[0] is not desired or kept[1] is not live:
            kept = (desired, live, weights_of(desired, live.values()) if live else None)
            self._weights[route] = kept
        return kept[2]

    # ------------------------------------------------------------------------------------------------- what is to do

    async def _turn(self) -> None:
        """Look at what changed, and write what is to be written."""
        back_off_s = self._sender.not_before_s - self._clock.now_s()
        pause_s = min(TICK_S, max(COALESCE_S, back_off_s)) if self._sender.trouble else TICK_S
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), pause_s)
        self._woken.clear()
        self._busy = True
        self._refresh()
        if writes := self._due():
            self._publish()
            await self._sender.burst(writes)
        self._publish()
        self._busy = False
        if writes:
            await asyncio.sleep(QUIET_S)
        if self._dirty and self._ready():
            self._woken.set()
        await asyncio.sleep(COALESCE_S)

    def _due(self) -> list[Writes]:
        now_s, led = self._clock.now_s(), self._leading()
        if led and not self._led:
            self._disputes.took_over()
            self._dirty |= dict.fromkeys(sorted(self._routes))
        self._led = led
        if not self._ready():
            return []
        confirmed = self._confirmation.confirmed()
        due = [route for route, state in self._routes.items() if any(w in confirmed for w in state.awaits)]
        if (at_s := asyncio.get_running_loop().time()) - self._ticked_s >= TICK_S:
            self._ticked_s = at_s
            due += [route for route, state in self._routes.items() if state.held]
        self._dirty |= dict.fromkeys(due)
        self._up_to_date = False
        looks = [(route, self._dirty.pop(route)) for route in list(self._dirty)[:LOOKS]]
        found = [self._looked(route, confirmed, now_s) for route, _ in looks if route in self._routes]
        self._confirmation.watch({w for state in self._routes.values() for w in state.awaits})
        return [writes for writes in found if writes is not None]

    def _ready(self) -> bool:
        return self._led and not self._missing() and self._clock.now_s() >= self._sender.not_before_s

    def _missing(self) -> str:
        """Why nothing can be written at all."""
        why = next((f"{kind}: {said}" for kind in OURS if (said := self._objects.missing(kind))), "")
        return f"Istio's objects are not known ({why}); are Istio's CRDs installed?" if why else ""

    def _looked(self, route: RouteId, confirmed: Collection[Written], now_s: float) -> Writes | None:
        """`_look`; a fault of this program in one route stays with that route."""
        state = self._routes[route]
        try:
            return self._look(route, state, confirmed, now_s)
        except Exception as error:
            log.exception("route can't be put in force", route=route)
            state.finding, state.recheck_s = f"a fault of meshctl: {error!r}", now_s + RECHECK_S
            return None

    def _look(self, route: RouteId, state: _Route, confirmed: Collection[Written], now_s: float) -> Writes | None:
        """The writes to do now for one route; and what there is to say of it."""
        live = self._live(route, state)
        if state.plan is None and not live:
            del self._routes[route]
            return None
        state.history = self._observed(route, state, live, confirmed)
        state.waiting, state.conflict, state.refusal, state.unanswered, state.awaits = "", "", "", "", ()
        self._retarget(route, state, live, now_s)
        if not state.targeted or (state.plan is None and state.waiting):
            return None
        judged = self._judged(route, state, live, now_s)
        state.conflict = next((judgement.conflict for judgement in judged.values() if judgement.conflict), "")
        step = next_step(state.target, live, state.history, confirmed, self._sender.same)
        if step.done:
            state.share(live)
            return None
        state.awaits, state.waiting = step.awaits, f"waits for {step.why}" if step.why else "being written"
        apply = tuple(self._admitted(state, step, judged))
        if not (apply or step.delete):
            return None
        self._dirty[route] = None  # what is left of the step, or is not done, is looked at again
        return Writes(apply, step.delete)

    def _judged(self, route: RouteId, state: _Route, live: Live, now_s: float) -> Mapping[ObjectKey, Judgement]:
        """Of every wanted object that is not live as it should be: whether it may be written."""
        judged = {}
        for value in () if state.target is None else _all(state.target):
            key = key_of(value)
            found = live.get(key)
            if found is not None and self._sender.same(value, found):
                self._disputes.agreed(value, found)
            else:
                judged[key] = self._disputes.judge(route, value, self._objects.find(key), now_s)
        return judged

    def _admitted(
        self, state: _Route, step: Step, judged: Mapping[ObjectKey, Judgement]
    ) -> Iterator[tuple[KubeObject, Judgement]]:
        """Of what the step would apply, that which nobody and nothing speaks against."""
        for value in step.apply:
            refusal, judgement = self._sender.refusal(value), judged.get(key_of(value), FREE)
            state.refusal = state.refusal or refusal
            later = self._sender.unanswered(value)
            state.unanswered = state.unanswered or later
            if not (refusal or later or judgement.conflict):
                yield value, judgement

    # ----------------------------------------------------------------------------------------------------- what to say

    def _publish(self) -> None:
        status = self._current_status()
        if self._news or status != self._status:
            self._status, self._news = status, False
            self._changed.set()
            self._changed = asyncio.Event()

    def _current_status(self) -> DataPlaneStatus:
        proxies = self._confirmation.proxies()
        if not self._leading():
            return DataPlaneStatus(proxies)
        missing = self._missing()
        quarantined, waiting, conflicts = {}, {}, {}
        for route, state in self._routes.items():
            words = state.finding or state.refusal
            if words:
                quarantined[route] = words
            if state.conflict:
                conflicts[route] = state.conflict
            if why := self._reason(route, state, missing):
                waiting[route] = why
        return DataPlaneStatus(proxies, "", *(MappingProxyType(m) for m in (quarantined, waiting, conflicts)))

    def _reason(self, route: RouteId, state: _Route, missing: str) -> str:
        """Why the newest state of a route is not in force yet; "" when it is, or when something else is said of it."""
        if state.conflict or state.finding or state.refusal:
            return ""
        if missing:
            return missing if state.wanted is not None else ""
        if not (state.waiting or route in self._dirty):
            served = state.target.virtual_service if state.target is not None else None
            return "" if served is None else absent(served, self._objects, self._namespaces)
        trouble = self._sender.trouble or state.unanswered or (self._confirmation.problem if state.awaits else "")
        return "; ".join(filter(None, (state.waiting or "being written", trouble)))

    # -------------------------------------------------------------------------------------------------- what wakes it

    async def _follow_objects(self) -> None:
        await self._objects.wait_changed()
        self._woken.set()

    async def _follow_confirmation(self) -> None:
        await self._confirmation.wait_changed()
        self._woken.set()


def _all(rendered: Rendered) -> Iterable[KubeObject]:
    return (*rendered.backends, rendered.virtual_service)


async def _forever(activity: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await activity()
        except Exception:  # a bug in one turn must not end all writing; it is logged with its traceback
            log.exception("istio writer")
            await asyncio.sleep(TICK_S)
