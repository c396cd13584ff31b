"""The one control loop: desired and observed state -> Snapshot -> decide -> checkpoint -> apply.

It reconciles when the source changes, when the number of proxies changes, and on every tick; what changes within
`COALESCE_S` of a reconcile is answered by one more. Signals are polled beside it, and the newest observation is used: a
signal source that hangs delays nothing, its signals only age.

Invariants: one reconcile at a time, so one writer of the data plane; a plan is checked (`invariants`), then saved, then
published; whatever fails, the last published plan stays in force, is counted and shown as a failure, and is tried again
on the next tick. Nothing is written when nothing changed.

`decide` runs in a thread, always: with 1000 routes it takes tens of milliseconds, in which ADS streams and the admin
API must be answered. Rejected: deciding in the event loop while there are few routes (two paths to test, for 0.1 ms),
and a process pool (a snapshot of 1000 routes costs more to pickle than to decide). Rejected too: pushing every signal
into a reconcile of its own, where a burst of events starves the data plane.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

import structlog

from meshctl.controller.checkpoint import Checkpoint, Saved
from meshctl.controller.gateways import GatewayCount
from meshctl.controller.invariants import safe_plan
from meshctl.controller.lastgood import with_last_good
from meshctl.controller.metrics import Metrics
from meshctl.controller.state import State
from meshctl.core.decide import Memory, decide
from meshctl.model import Plan, Problem, Snapshot
from meshctl.ports import Actuator, Clock, Desired, Observed, Replicas, SignalSource, Source

log = structlog.get_logger(__name__)

COALESCE_S = 0.05
"""The first change is answered at once; an editor's or a `kubectl apply`'s further files within this time together."""
POLL_DEADLINE_RATIO = 0.8
"""Of the tick: the rest is for the decision, so that a slow poll still makes its own tick."""
LOGGED_PROBLEMS = 10
"""Per reconcile: when a whole fleet is unreachable, ten lines say it as well as 10,000; the status has all."""
STOP_S = 2.0
"""How long each part may take to stop; an orchestrator kills after 30 s, a person after fewer."""

Decider = Callable[[Snapshot, Memory, float], tuple[Plan, Memory]]


class Loop:
    """Runs between `start` and `stop`; owns its source, signals and actuator from then on."""

    def __init__(
        self,
        source: Source,
        signals: SignalSource,
        actuator: Actuator,
        clock: Clock,
        *,
        tick_s: float = 1.0,
        checkpoint: Checkpoint | None = None,
        metrics: Metrics | None = None,
        dataplane_changed: Callable[[], Awaitable[None]] | None = None,
        replicas: Replicas | None = None,
        reconciled: Callable[[State], None] | None = None,
        decider: Decider = decide,
    ) -> None:
        """`dataplane_changed` returns at the next change of the actuator's status, or of who leads; without it, ticks
        look at them. `reconciled` is told of each reconcile's outcome and must not block. Without `replicas` this one
        leads, and nothing is read back from the data plane."""
        self._source = source
        self._signals = signals
        self._actuator = actuator
        self._clock = clock
        self._tick_s = tick_s
        self._checkpoint = checkpoint
        self._dataplane_changed = dataplane_changed
        self._replicas = replicas
        self._reconciled = reconciled
        self._decider = decider
        self.metrics = metrics or Metrics()
        self.metrics.observe(self.state)

        self._started_s = clock.now_s()
        self._gateways = GatewayCount()
        self._memory = Memory()
        self._retained = Saved().routes
        self._desired = Desired({})
        self._observed = Observed({})
        self._plan = Plan({})
        self._saved: tuple[Plan, int] | None = None
        self._published = False
        self._led = False
        self._reconciles = 0
        self._failures: dict[str, Problem] = {}
        self._reported: dict[tuple[str, str], Problem] = {}
        self._poll: asyncio.Task[Observed] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._busy = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._turned = asyncio.Event()

    # ------------------------------------------------------------------------------------------------- for its users

    async def start(self) -> None:
        """Take up where the last run stopped. Raises InputError when the source or the state file can't be used."""
        if self._checkpoint is not None:
            saved = await asyncio.to_thread(self._checkpoint.load, self._clock.now_s())
            if saved is not None:
                self._memory, self._retained = saved.memory, saved.routes
                self._gateways = GatewayCount().observe(saved.gateways, self._clock.now_s())
                log.info("state restored", file=str(self._checkpoint.path), routes=len(saved.routes))
        await self._source.start()
        self._take_desired()
        self._dirty.set()
        activities = {"reconcile": self._reconcile_next, "source": self._watch_source, "signals": self._tick}
        if (changed := self._dataplane_changed) is not None:
            activities["dataplane"] = lambda: self._watch_dataplane(changed)
        self._tasks = [asyncio.create_task(self._forever(*item), name=item[0]) for item in activities.items()]

    async def stop(self) -> None:
        """End within a few `STOP_S`. The data plane keeps what it has; the state file gets the newest memory."""
        idle = await self._end_tasks()
        if idle and self._published:
            await self._save(force=True)
        for name, end in (("source", self._source), ("signals", self._signals), ("actuator", self._actuator)):
            with self._guarded(f"stop {name}"):
                async with asyncio.timeout(STOP_S):
                    await end.stop()
        log.info("stopped", routes=len(self._plan.routes))

    def state(self) -> State:
        """What is known now."""
        return State(
            now_s=self._clock.now_s(),
            started_s=self._started_s,
            plan=self._plan,
            published=self._published,
            desired=self._desired,
            observed=self._observed,
            dataplane=self._actuator.status(),
            gateways=self._gateways.count,
            failures=tuple(self._failures[name] for name in sorted(self._failures)),
            leading=self._replicas is None or self._replicas.leading(),
            reconciles=self._reconciles,
        )

    async def wait_for(self, holds: Callable[[State], bool], timeout_s: float) -> State:
        """The first state (after a reconcile, or a word of a proxy) of which `holds`. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not holds(state := self.state()):
                await self._turned.wait()
        return state

    # ----------------------------------------------------------------------------------------------------- reconcile

    async def _reconcile_next(self) -> None:
        await self._dirty.wait()
        self._dirty.clear()
        async with self._busy:
            with self.metrics.reconcile_s.time():
                await self._reconcile()
        self._report_changes()
        self._reconciles += 1
        if self._reconciled is not None:
            with self._guarded("report"):
                self._reconciled(self.state())
        self._turn()
        await asyncio.sleep(COALESCE_S)

    async def _reconcile(self) -> None:
        now_s = self._clock.now_s()
        self._take_desired()
        self._gateways = self._observed_gateways()
        snapshot = self._snapshot()
        outcome = "crashed"
        with self._guarded("decide"):
            decided, self._memory = await asyncio.to_thread(self._decider, snapshot, self._memory, now_s)
            outcome = "ok"
        if outcome == "ok":
            plan, broken = safe_plan(decided, self._plan)
            outcome = "rejected" if broken else "ok"
            self._set_failures("invariant", broken)
            await self._put_in_force(plan)
        self.metrics.decisions.labels(outcome).inc()

    def _snapshot(self) -> Snapshot:
        routes, signals, gateways = self._desired.routes, self._observed.routes, self._gateways.count
        if self._replicas is None:
            return Snapshot(routes, signals, gateways)
        self._led = self._replicas.leading()
        return Snapshot(routes, signals, gateways, self._replicas.in_force(), self._led)

    async def _put_in_force(self, plan: Plan) -> None:
        """Save, then publish. A state file that can't be written does not keep traffic from moving."""
        before = self._plan
        await self._save(plan)
        with self._guarded("apply"):
            writes = self._actuator.apply(plan)
            self._plan, self._published = plan, True
            self.metrics.writes.inc(writes)
            if writes:
                changed = sorted(r for r, p in plan.routes.items() if before.routes.get(r) is not p)
                removed = sorted(before.routes.keys() - plan.routes.keys())
                log.info("published", writes=writes, routes=len(changed), first=changed[:5], removed=removed[:5])

    async def _save(self, plan: Plan | None = None, *, force: bool = False) -> None:
        plan = self._plan if plan is None else plan
        if self._checkpoint is None or "invariant" in self._failures:
            return
        if not force and self._saved is not None and not self._worth_saving(plan, *self._saved):
            return
        routes = {route_id: route_plan.route for route_id, route_plan in plan.routes.items()}
        saved = Saved(self._memory, routes, self._gateways.count)
        with self._guarded("checkpoint"):
            await asyncio.to_thread(self._checkpoint.save, saved, self._clock.now_s())
            self._saved = plan, saved.gateways
            self.metrics.checkpoints.inc()

    def _worth_saving(self, plan: Plan, saved: Plan, gateways: int) -> bool:
        """Something that a restart would otherwise move; smoothed signals alone are not worth a write per tick."""
        if gateways != self._gateways.count or plan.routes.keys() != saved.routes.keys():
            return True
        pairs = ((new, saved.routes[route_id]) for route_id, new in plan.routes.items())
        return any(
            new is not old and (new.route is not old.route or new.weights != old.weights or new.drained != old.drained)
            for new, old in pairs
        )

    def _take_desired(self) -> None:
        self._desired = with_last_good(self._source.desired(), self._retained)
        self._retained = {r: saved for r, saved in self._retained.items() if self._desired.routes.get(r) is saved}

    # ------------------------------------------------------------------------------------------------ what wakes it

    async def _watch_source(self) -> None:
        await self._source.wait_changed()
        self._dirty.set()

    async def _watch_dataplane(self, changed: Callable[[], Awaitable[None]]) -> None:
        """A proxy came, went or answered, or the lead changed; only a new number or a new role changes the decision."""
        await changed()
        promoted = self._replicas is not None and self._replicas.leading() != self._led
        if promoted or self._observed_gateways().count != self._gateways.count:
            self._dirty.set()
        self._turn()

    def _observed_gateways(self) -> GatewayCount:
        return self._gateways.observe(len(self._actuator.status().proxies), self._clock.now_s())

    async def _tick(self) -> None:
        """One tick: a poll, or the rest of one that is late; then a reconcile, whatever came of it."""
        clock = asyncio.get_running_loop().time
        end_s = clock() + self._tick_s
        if self._poll is None:
            proxies = tuple(sorted(p.admin for p in self._actuator.status().proxies if p.admin))
            poll = self._signals.poll(self._desired.routes, proxies, self._tick_s * POLL_DEADLINE_RATIO)
            self._poll = asyncio.create_task(poll, name="poll")
        else:
            self.metrics.overruns.inc()
        done, _ = await asyncio.wait({self._poll}, timeout=self._tick_s)
        self._dirty.set()
        if done:
            poll_task, self._poll = self._poll, None
            self._observed = poll_task.result()
            await asyncio.sleep(max(0.0, end_s - clock()))

    # ------------------------------------------------------------------------------------------------------ failures

    async def _forever(self, activity: str, step: Callable[[], Awaitable[None]]) -> None:
        """A step that fails is reported and tried again a tick later: no bug ends the loop."""
        while True:
            with self._guarded(activity):
                await step()
                continue
            await asyncio.sleep(self._tick_s)

    @contextlib.contextmanager
    def _guarded(self, activity: str) -> Iterator[None]:
        """The one place where a failure of a part, of whatever kind, becomes something to report."""
        try:
            yield
        except Exception as error:  # whatever it is: the last good plan must stay in force
            self.metrics.failures.labels(activity).inc()
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            problem = Problem(activity, f"{activity} failed: {text}; the last good state stays in force")
            if self._failures.get(activity) != problem:
                log.exception("failed", activity=activity)
            self._failures[activity] = problem
        else:
            self._failures.pop(activity, None)

    def _set_failures(self, kind: str, problems: tuple[Problem, ...]) -> None:
        """Replace the failure of `kind`: one entry, which says how many there are."""
        self._failures.pop(kind, None)
        if problems:
            more = f" (and {len(problems) - 1} more routes)" if len(problems) > 1 else ""
            self._failures[kind] = Problem(problems[0].where, problems[0].message + more, problems[0].route)

    def _report_changes(self) -> None:
        """Log each problem when it comes and when it goes.

        A problem whose words change stays the same one: some carry times and counts, and would be news on every tick.
        """
        found = self.state().problems()
        now = {(p.where, p.route or ""): p for problems in found.values() for p in problems}
        come, gone = sorted(now.keys() - self._reported.keys()), sorted(self._reported.keys() - now.keys())
        for key in come[:LOGGED_PROBLEMS]:
            log.warning("problem", where=now[key].where, message=now[key].message, of=len(come))
        for key in gone[:LOGGED_PROBLEMS]:
            log.info("problem is gone", where=self._reported[key].where, of=len(gone))
        self._reported = now

    def _turn(self) -> None:
        self._turned.set()
        self._turned = asyncio.Event()

    async def _end_tasks(self) -> bool:
        """Whether no reconcile is left half done: what was decided is then saved and published, or nothing of it is."""
        idle = False
        with contextlib.suppress(TimeoutError):  # a decision that hangs must not keep the process from ending
            async with asyncio.timeout(STOP_S):
                idle = await self._busy.acquire()
        tasks: list[asyncio.Task[object]] = [*self._tasks, *([self._poll] if self._poll else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)
        return idle
