"""The loop as one of several replicas, and with several data planes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from meshctl.controller.actuators import Actuators, first_of
from meshctl.controller.loop import Loop
from meshctl.controller.state import State
from meshctl.model import DEFAULT_CLASS, DataPlaneStatus, Plan, ReasonCode, RouteId, Weights
from meshctl.ports import Desired
from tests.harness.controller import (
    DEADLINE_S,
    ManualClock,
    MemoryProxies,
    MemorySignals,
    MemorySource,
    desired_route,
    routes,
    started,
)


@dataclass
class MemoryReplicas:
    """Who leads, and what the mesh serves, as a test says."""

    lead: bool = True
    weights: Mapping[RouteId, Weights] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def leading(self) -> bool:
        return self.lead

    def in_force(self) -> Mapping[RouteId, Weights]:
        return self.weights

    async def wait_changed(self) -> None:
        await self.changed.wait()
        self.changed.clear()


async def test_a_follower_serves_what_is_in_force_and_leads_at_once_when_it_is_its_turn() -> None:
    """The change of the lead is answered by a reconcile of its own, long before the next tick; weights stay."""
    route = desired_route()
    one = {e.id: 1000 * (i == 0) for i, e in enumerate(route.endpoints)}
    live = dict.fromkeys((*(c.name for c in route.spec.sizes), DEFAULT_CLASS), one)
    replicas = MemoryReplicas(lead=False, weights={route.spec.id: live})
    proxies, states = MemoryProxies(), list[State]()
    loop = Loop(
        MemorySource(Desired(routes(route))),
        MemorySignals(),
        proxies,
        ManualClock(),
        tick_s=DEADLINE_S,
        dataplane_changed=replicas.wait_changed,
        replicas=replicas,
        reconciled=states.append,
    )

    def following(state: State) -> bool:
        plan = state.plan.routes.get(route.spec.id)
        return plan is not None and any(r.code is ReasonCode.FOLLOWING for r in plan.reasons)

    async with started(loop):
        state = await loop.wait_for(following, DEADLINE_S)
        assert state.plan.routes[route.spec.id].weights == live
        replicas.lead = True
        replicas.changed.set()
        state = await loop.wait_for(lambda s: not following(s), DEADLINE_S)
        assert state.plan.routes[route.spec.id].weights == live
    assert [s.reconciles for s in states] == list(range(1, len(states) + 1))


async def test_one_data_plane_that_fails_keeps_no_other_from_the_plan() -> None:
    """All get the plan; the failure is raised after them, with its own words."""
    good, other = MemoryProxies(), MemoryProxies()
    both = Actuators([good, MemoryProxies(error=ValueError("no room")), other])
    with pytest.raises(ExceptionGroup) as failed:
        both.apply(Plan({}))
    assert [str(e) for e in failed.value.exceptions] == ["no room"]
    assert good.plans == other.plans == [Plan({})]


def test_what_the_data_planes_say_is_put_together() -> None:
    """All proxies; of a route that two speak of, the first one's words."""

    a, b = RouteId("ns/a"), RouteId("ns/b")
    told = (DataPlaneStatus(waiting={a: "first"}), DataPlaneStatus(waiting={a: "second", b: "istiod"}))
    status = Actuators([MemoryProxies(current=of) for of in told]).status()
    assert status.waiting == {a: "first", b: "istiod"}


async def test_waiting_for_the_first_change_ends_the_other_waits() -> None:
    """Nothing is left behind, and an error is not swallowed."""
    cancelled = asyncio.Event()

    async def never() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        cancelled.set()

    async def fails() -> None:
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"):
        await first_of([never, fails])
    assert cancelled.is_set()
