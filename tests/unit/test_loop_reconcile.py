"""The loop against ports in memory: when it reconciles, what it writes, and what a failure costs."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from meshctl.controller.checkpoint import Checkpoint
from meshctl.controller.loop import Loop
from meshctl.core.decide import Memory, decide
from meshctl.model import EndpointId, Plan, Problem, RouteId, Snapshot
from meshctl.ports import Desired
from tests.harness.controller import (
    DEADLINE_S,
    ManualClock,
    MemoryProxies,
    MemorySignals,
    MemorySource,
    desired_route,
    rounds,
    routes,
    started,
)

TICK_S = 0.05


class World:
    """A loop and the outside that a test moves."""

    def __init__(self, checkpoint: Checkpoint | None = None, tick_s: float = TICK_S) -> None:
        self.route = desired_route()
        self.source = MemorySource(Desired(routes(self.route)))
        self.signals = MemorySignals()
        self.proxies = MemoryProxies()
        self.clock = ManualClock()
        self.crash: Exception | None = None
        self.spoil: RouteId | None = None
        self.snapshots: list[Snapshot] = []
        self.loop = Loop(
            self.source,
            self.signals,
            self.proxies,
            self.clock,
            tick_s=tick_s,
            checkpoint=checkpoint,
            dataplane_changed=self.proxies.wait_changed,
            decider=self.decide,
        )

    def decide(self, snapshot: Snapshot, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
        """The real decision; `crash` and `spoil` make it the buggy one that the loop must survive."""
        self.snapshots.append(snapshot)
        if self.crash is not None:
            raise self.crash
        plan, memory = decide(snapshot, memory, now_s)
        if self.spoil is None:
            return plan, memory
        spoilt = dataclasses.replace(plan.routes[self.spoil], load_rps=math.nan)
        return Plan({**plan.routes, self.spoil: spoilt}), memory

    def counted(self, name: str, **labels: str) -> float:
        value = self.loop.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value


async def test_unchanged_input_writes_nothing_after_the_first_plan() -> None:
    """Ticks without news publish nothing, and the RoutePlan in force stays the same object."""
    world = World()
    async with started(world.loop):
        first = world.loop.state().plan.routes[world.route.spec.id]
        await rounds(world.loop, 5)
        assert world.proxies.writes == 1
        assert world.loop.state().plan.routes[world.route.spec.id] is first


async def test_a_changed_manifest_is_in_force_while_signals_hang() -> None:
    """A metrics server that never answers does not keep a manifest from taking effect, nor stop the ticks."""
    world = World()
    world.signals.answers.clear()
    async with started(world.loop):
        world.source.put(routes(world.route, desired_route("demo/bert")))
        await world.loop.wait_for(lambda state: len(state.plan.routes) == 2, DEADLINE_S)
        await rounds(world.loop, 3)
        assert world.signals.polls == 1, "a second poll was started while the first still hangs"
        assert world.counted("meshctl_tick_overruns_total") >= 1


async def test_a_manifest_change_does_not_wait_for_the_tick() -> None:
    """With an hour between ticks a changed manifest still takes effect."""
    world = World(tick_s=3600.0)
    async with started(world.loop):
        world.source.put(routes(world.route, desired_route("demo/bert")))
        await world.loop.wait_for(lambda state: len(state.plan.routes) == 2, DEADLINE_S)


async def test_a_removed_route_leaves_the_plan() -> None:
    """What is not desired any more is not published any more."""
    world = World()
    async with started(world.loop):
        world.source.put({})
        await world.loop.wait_for(lambda state: not state.plan.routes, DEADLINE_S)
        assert not world.proxies.plans[-1].routes


async def test_a_crash_of_decide_keeps_the_last_plan_and_heals() -> None:
    """A bug in a decision is counted and shown; the last plan stays until the next good decision."""
    world = World()
    async with started(world.loop):
        before = world.loop.state().plan
        world.crash = ZeroDivisionError("rate of nothing")
        state = await world.loop.wait_for(lambda state: bool(state.failures), DEADLINE_S)
        assert state.failures[0].where == "decide"
        assert "ZeroDivisionError: rate of nothing" in state.failures[0].message
        assert state.plan is before
        assert state.published
        assert world.proxies.writes == 1
        world.crash = None
        await world.loop.wait_for(lambda state: not state.failures, DEADLINE_S)
        assert world.counted("meshctl_decisions_total", outcome="crashed") >= 1


async def test_a_decision_that_breaks_an_invariant_costs_only_its_route() -> None:
    """The spoilt route keeps what was published of it, another route's change goes through."""
    world = World()
    other = desired_route("demo/bert")
    async with started(world.loop):
        good = world.loop.state().plan.routes[world.route.spec.id]
        world.spoil = world.route.spec.id
        world.source.put(routes(world.route, other))
        state = await world.loop.wait_for(lambda state: len(state.plan.routes) == 2, DEADLINE_S)
        assert state.plan.routes[world.route.spec.id] is good
        assert "load_rps is nan" in state.failures[0].message
        assert world.counted("meshctl_decisions_total", outcome="rejected") >= 1


async def test_a_failed_poll_is_reported_and_the_last_observation_stays() -> None:
    """Signals that fail show as a failure, and go as soon as a poll succeeds."""
    world = World()
    async with started(world.loop):
        world.signals.error = RuntimeError("no route to metrics")
        state = await world.loop.wait_for(lambda state: bool(state.failures), DEADLINE_S)
        assert "no route to metrics" in state.failures[0].message
        world.signals.error = None
        await world.loop.wait_for(lambda state: not state.failures, DEADLINE_S)


async def test_a_failed_apply_is_tried_again() -> None:
    """A plan that could not be published is not taken for one in force."""
    world = World()
    world.proxies.error = OSError("broken pipe")
    async with started(world.loop):
        assert not world.loop.state().published
        assert not world.loop.state().plan.routes
        world.proxies.error = None
        state = await world.loop.wait_for(lambda state: state.published, DEADLINE_S)
        assert state.plan.routes.keys() == {world.route.spec.id}


async def test_a_proxy_that_connects_is_counted_at_once_and_one_that_leaves_only_later() -> None:
    """Gateways grow at once; a loss counts after it has lasted, so that a reconnect moves no weight."""
    world = World(tick_s=3600.0)
    async with started(world.loop):
        world.proxies.connect(3)
        await world.loop.wait_for(lambda state: state.gateways == 3, DEADLINE_S)
        world.proxies.connect(1)
        world.source.put(routes(world.route))
        await rounds(world.loop, 1)
        assert world.snapshots[-1].gateways == 3
        world.clock.time_s += 60
        world.proxies.connect(1)
        await world.loop.wait_for(lambda state: state.gateways == 1, DEADLINE_S)


async def test_problems_of_all_sources_are_shown() -> None:
    """Manifests, signals and proxies each report; none of them stops the loop."""
    world = World()
    async with started(world.loop):
        world.source.put(routes(world.route), Problem("a.yaml:3:1", "unknown field"))
        state = await world.loop.wait_for(lambda state: bool(state.desired.problems), DEADLINE_S)
        assert [p.where for p in state.problems()["manifests"]] == ["a.yaml:3:1"]
        assert not state.failures


async def test_the_loop_stops_its_parts_even_when_a_poll_hangs() -> None:
    """Stopping is bounded and complete: source, signals and actuator are all stopped."""
    world = World()
    world.signals.answers.clear()
    async with started(world.loop):
        pass
    assert (world.source.stopped, world.signals.stopped, world.proxies.stopped) == (True, True, True)


async def test_a_state_file_that_cannot_be_written_does_not_stop_traffic(tmp_path: Path) -> None:
    """The plan is published all the same, the failure is shown, and it is tried again until it works."""
    path = tmp_path / "state.json"
    in_the_way = tmp_path / f".state.json.{os.getpid()}.tmp"
    in_the_way.mkdir()
    world = World(Checkpoint(path))
    async with started(world.loop):
        state = world.loop.state()
        assert state.published
        assert [failure.where for failure in state.failures] == ["checkpoint"]
        assert not path.exists()
        in_the_way.rmdir()
        await world.loop.wait_for(lambda state: not state.failures, DEADLINE_S)
        assert path.exists()


async def test_a_restart_takes_up_the_last_memory_and_the_number_of_proxies(tmp_path: Path) -> None:
    """The first decision after a restart counts the proxies of before, although none has reconnected yet."""
    first = World(Checkpoint(tmp_path / "state.json"))
    first.proxies.connect(4)
    async with started(first.loop):
        await first.loop.wait_for(lambda state: state.gateways == 4, DEADLINE_S)
        before = first.loop.state().plan
    second = World(Checkpoint(tmp_path / "state.json"))
    async with started(second.loop):
        assert second.snapshots[0].gateways == 4
        assert _weights(second.loop.state().plan) == _weights(before)


async def test_a_restart_keeps_a_route_whose_manifest_is_broken_until_it_is_mended(tmp_path: Path) -> None:
    """A typo and a restart together are no outage; a route whose manifest is gone, with no problem, is dropped."""
    first = World(Checkpoint(tmp_path / "state.json"))
    async with started(first.loop):
        before = first.loop.state().plan
    second = World(Checkpoint(tmp_path / "state.json"))
    second.source.put({}, Problem("route.yaml:7:3", "is not YAML"))
    async with started(second.loop):
        state = second.loop.state()
        assert _weights(state.plan) == _weights(before)
        assert any("route.yaml:7:3" in p.message for p in state.desired.problems if p.route == first.route.spec.id)
        second.source.put({})
        await second.loop.wait_for(lambda state: not state.plan.routes, DEADLINE_S)


async def test_an_unchanged_plan_is_saved_once(tmp_path: Path) -> None:
    """Ticks do not rewrite the state file; a changed plan does, before it is published."""
    world = World(Checkpoint(tmp_path / "state.json"))
    async with started(world.loop):
        await rounds(world.loop, 5)
        assert world.counted("meshctl_checkpoints_total") == 1
        world.source.put(routes(world.route, desired_route("demo/bert")))
        await world.loop.wait_for(lambda state: len(state.plan.routes) == 2, DEADLINE_S)
        assert world.counted("meshctl_checkpoints_total") == 2


def _weights(plan: Plan) -> dict[RouteId, dict[str, dict[EndpointId, int]]]:
    return {r: {size: dict(table) for size, table in p.weights.items()} for r, p in plan.routes.items()}
