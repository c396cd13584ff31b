"""A restart moves no weight, wherever in a shift the controller was killed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from meshctl.controller.checkpoint import Checkpoint
from meshctl.controller.loop import Loop
from meshctl.model import EndpointId, EndpointSignals, Plan, RouteId, RouteSignals, ServiceProfile, Signal
from meshctl.ports import Desired, Observed
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

Weights = dict[RouteId, dict[str, dict[EndpointId, int]]]


def weights(plan: Plan) -> Weights:
    return {r: {size: dict(table) for size, table in p.weights.items()} for r, p in plan.routes.items()}


class RecordingProxies(MemoryProxies):
    """Keeps, for each plan that moved a weight, the state file as a kill right after the publish would leave it."""

    def __init__(self, state: Path) -> None:
        super().__init__()
        self.state = state
        self.steps: list[tuple[Plan, bytes]] = []

    def apply(self, plan: Plan) -> int:
        moved = not self.steps or weights(plan) != weights(self.steps[-1][0])
        if moved:
            self.steps.append((plan, self.state.read_bytes()))
        return super().apply(plan)


def _measured(clock: ManualClock, service_s: tuple[float, ...]) -> Observed:
    """Endpoints that serve batches of 1 in `service_s`, 20 requests/s each, at this moment."""
    route, now_s = desired_route(endpoints=len(service_s)), clock.now_s()
    endpoints = {
        endpoint.id: EndpointSignals(
            busy_ratio=Signal(0.2, now_s),
            service_s=Signal(time_s, now_s),
            batch=Signal(1.0, now_s),
            queue_s=Signal(0.0, now_s),
            pending=Signal(0.0, now_s),
            completed_rps=Signal(20.0, now_s),
            failed_rps=Signal(0.0, now_s),
        )
        for endpoint, time_s in zip(route.endpoints, service_s, strict=True)
    }
    arrivals = {"small": Signal(60.0, now_s), "large": Signal(15.0, now_s), "default": Signal(0.0, now_s)}
    return Observed({route.spec.id: RouteSignals(arrivals, endpoints)})


@pytest.mark.parametrize("down_s", [0.0, 3600.0], ids=["at once", "after an hour"])
async def test_a_kill_after_any_step_of_a_shift_moves_no_weight(tmp_path: Path, down_s: float) -> None:
    """Each step of a shift is resumed from exactly what was in force, until signals arrive."""
    path = tmp_path / "state.json"
    clock, proxies = ManualClock(), RecordingProxies(path)
    route = desired_route(endpoints=4, expected_load_rps=75.0)
    source, signals = MemorySource(Desired(routes(route))), MemorySignals()
    loop = Loop(source, signals, proxies, clock, tick_s=0.05, checkpoint=Checkpoint(path))
    async with started(loop):
        for second in range(40):  # after 10 s, the first endpoint takes three times as long
            clock.time_s += 1.0
            signals.current = _measured(clock, (0.006 if second < 10 else 0.018, 0.012, 0.006, 0.012))
            seen = signals.current
            await loop.wait_for(lambda state, seen=seen: state.observed is seen, DEADLINE_S)  # type: ignore[misc]
        source.put(
            routes(dataclasses.replace(route, profiles={**route.profiles, "T4": ServiceProfile.affine(0.1, 0.01)}))
        )
        for _ in range(20):
            clock.time_s += 1.0
            goal = loop.state().reconciles + 1
            await loop.wait_for(lambda state, goal=goal: state.reconciles >= goal, DEADLINE_S)  # type: ignore[misc]
    assert len(proxies.steps) >= 3, "the shift must have several steps for this test to mean anything"
    for index, (in_force, state) in enumerate(proxies.steps):
        path.write_bytes(state)
        desired = Desired({route_id: plan.route for route_id, plan in in_force.routes.items()})
        after = MemoryProxies()
        unmeasured = MemorySignals()
        second_run = Loop(
            MemorySource(desired),
            unmeasured,
            after,
            ManualClock(7.0),
            tick_s=0.05,
            checkpoint=Checkpoint(path, wall_s=lambda: time.time() + down_s),
        )
        async with started(second_run):
            await rounds(second_run, 5)
            assert all(weights(plan) == weights(in_force) for plan in after.plans), f"restarted after step {index}"
