"""One endpoint of three goes bad under load: it is drained with the reason, the others serve, and it comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from meshctl.sim.faults import Faults
from tests.harness.served import GUARD, View, codes, endpoint, explain, served, weights
from tests.harness.tools import until

pytestmark = pytest.mark.envoy

HISTORY = 100
"""Requests; each server gets twenty a second, and what was seen of it is stale after three seconds."""
FAULTS = {
    "hangs while it looks idle": (Faults(hang=True), "DrainedHang"),
    "answers 500 at once": (Faults(error_ratio=1.0), "DrainedErrors"),
    "is gone": (Faults(crash=True), "DrainedErrors"),
}


DRAINED = {"DrainedErrors", "DrainedHang"}


def drained(name: str, why: str) -> Callable[[View], bool]:
    return lambda view: why in codes(view, name) and weights(view)[name] == 0


def on_trial(name: str) -> Callable[[View], bool]:
    return lambda view: "Probation" in codes(view, name)


def well(view: View) -> bool:
    """Everybody takes part, in equal parts, as equal GPUs do."""
    found = weights(view)
    return not any(codes(view, name) & {"Probation", *DRAINED} for name in found) and (
        min(found.values()) > 0.8 * max(found.values())
    )


def in_force(view: View) -> bool:
    """Every proxy has acknowledged it."""
    return bool(view["conditions"][0]["status"] == "True")


@pytest.mark.parametrize("name", FAULTS)
async def test_a_bad_endpoint_is_drained_and_the_others_answer(tmp_path: Path, name: str) -> None:
    """`meshctl explain` gives the reason and weights of 0; while it rests (here for long), no request fails."""
    faults, why = FAULTS[name]
    async with served(tmp_path, guard=GUARD | {"recoverAfter": "1h"}) as run, run.loaded():
        await run.measured()
        victim = run.servers[0]
        await run.fleet.set_faults(victim.name, faults)
        await run.explained(lambda view: drained(endpoint(victim), why)(view) and in_force(view))
        assert await run.statuses(100) == [200] * 100
        view = await explain(run.controller)
        assert drained(endpoint(victim), why)(view)
        assert all(not codes(view, endpoint(s)) & DRAINED for s in run.servers[1:])
        assert all(weights(view)[endpoint(s)] > 0 for s in run.servers[1:])
        await run.fleet.set_faults(victim.name, Faults())  # what hangs is answered, so that the load can end


@pytest.mark.parametrize("name", FAULTS)
async def test_a_bad_endpoint_comes_back_when_it_is_well(tmp_path: Path, name: str) -> None:
    """After a rest it is tried with a small weight, then trusted with its whole part."""
    faults, why = FAULTS[name]
    async with served(tmp_path) as run, run.loaded():
        await run.measured()
        victim = run.servers[0]
        await run.fleet.set_faults(victim.name, faults)
        await run.explained(drained(endpoint(victim), why))
        await run.fleet.set_faults(victim.name, Faults())
        trial = await run.explained(on_trial(endpoint(victim)))
        assert weights(trial)[endpoint(victim)] < min(weights(trial)[endpoint(s)] for s in run.servers[1:])
        await run.explained(lambda view: well(view) and in_force(view))
        assert await run.statuses(30) == [200] * 30


async def test_an_endpoint_that_flaps_is_kept_out(tmp_path: Path) -> None:
    """It is gone every other half second: drained, tried, drained again for longer; the others are left alone."""
    async with served(tmp_path) as run, run.loaded() as load:
        await run.measured()
        victim = run.servers[0]
        await run.fleet.set_faults(victim.name, Faults(flap_period_s=1.0))
        await run.explained(drained(endpoint(victim), "DrainedErrors"))
        await run.explained(on_trial(endpoint(victim)))
        view = await run.explained(drained(endpoint(victim), "DrainedErrors"))
        assert all(weights(view)[endpoint(s)] > 300 for s in run.servers[1:])
        await run.fleet.set_faults(victim.name, Faults())
        await run.explained(well)
        assert await run.statuses(30) == [200] * 30
        found = load.window(600.0)
        assert found.failed < 0.2 * found.requests, found.failures


async def test_counters_that_start_again_move_nothing(tmp_path: Path) -> None:
    """A restart that nobody noticed: no endpoint is drained or slowed, weights stay, nothing fails.

    Counters that are past their last values at the next look show no restart: they have come further here than they get
    while a look is fresh. (What is made of a restart soon after a start is in tests/unit/test_signals_scrape.py.)
    """
    async with served(tmp_path) as run, run.loaded() as load:

        async def all_have_history() -> bool:
            return all(run.fleet.server(s.name).gpu.counters.succeeded > HISTORY for s in run.servers)

        await run.measured()
        await until(all_have_history, f"each server has answered {HISTORY} requests")
        before = weights(await run.explained(well))
        for server in run.servers:
            await run.fleet.reset_counters(server.name)
        sent = load.window(600.0).requests
        while load.window(600.0).requests < sent + 200:  # some ten looks of the controller
            assert await run.statuses(5) == [200] * 5
            view = await run.explained()
            assert weights(view) == before
            assert not any(codes(view, name) & DRAINED for name in before)
        assert load.window(600.0).failed == 0
