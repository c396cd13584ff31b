"""A decision is a value: the same arguments give the same result, and a saved memory goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from meshctl.core.decide import Memory, decide
from meshctl.model import NO_SIGNALS, DesiredRoute, Guard, Policy, RouteId, RouteSignals, Signal, Snapshot
from tests.harness.core import ROUTE, Rounds, endpoint, healthy, measured, route, text, weights_of

Signals = Callable[[DesiredRoute, float], RouteSignals]


def slow(of: DesiredRoute, at_s: float) -> RouteSignals:
    return measured(of, at_s, slow={endpoint(0): 3.0, endpoint(4): 1.5})


def failing(of: DesiredRoute, at_s: float) -> RouteSignals:
    ill = dataclasses.replace(healthy(of.endpoints[0], at_s), failed_rps=Signal(400.0, at_s))
    return measured(of, at_s, changed={endpoint(0): ill})


def busier(of: DesiredRoute, at_s: float) -> RouteSignals:
    return measured(of, at_s, load_ratio=0.5 + 0.02 * (at_s - 20), foreign={endpoint(7): 0.4})


def restarted(rounds: Rounds, down_s: float = 0.0) -> Rounds:
    """As after a restart: the memory through JSON, on another clock."""
    saved = json.loads(json.dumps(rounds.memory.to_json(rounds.now_s)))
    start_s = 1000.25
    again = Rounds(rounds.route, start_s, rounds.gateways, Memory.from_json(saved, start_s - down_s))
    again.plan = rounds.plan
    return again


@pytest.mark.parametrize("signals", [slow, failing, busier])
def test_a_restart_after_any_step_goes_on_with_the_same_weights(signals: Signals) -> None:
    """Every round of a shift is interrupted; the one that went on and the one restarted stay equal to the integer."""
    rounds = Rounds(route(guard=Guard(max_step_ratio=0.05)))
    rounds.well(20, load_ratio=0.5)
    for _ in range(12):
        rounds.decide(signals(rounds.route, rounds.now_s + 1))
        assert rounds.plan is not None
        other, here = restarted(rounds), dataclasses.replace(rounds)
        blind = weights_of(other.decide(NO_SIGNALS, after_s=0.0))
        assert blind == weights_of(rounds.plan), "before the first signals arrive nothing moves"
        for _ in range(4):
            mine = here.decide(signals(here.route, here.now_s + 1))
            ahead = signals(here.route, here.now_s)
            shifted = _later(ahead, other.now_s + 1 - here.now_s)
            assert weights_of(other.decide(shifted)) == weights_of(mine)
    assert rounds.moves > 2


def _later(signals: RouteSignals, by_s: float) -> RouteSignals:
    """The same measurements on a clock that is `by_s` ahead."""

    def at(signal: Signal) -> Signal:
        return signal if signal.at_s is None else Signal(signal.value, signal.at_s + by_s)

    return RouteSignals(
        {name: at(s) for name, s in signals.arrivals_rps.items()},
        {
            e: dataclasses.replace(of, **{f.name: at(getattr(of, f.name)) for f in dataclasses.fields(of)})
            for e, of in signals.endpoints.items()
        },
    )


def test_an_hour_of_absence_moves_nothing_until_something_is_measured() -> None:
    """Estimates of long ago do not decay while nobody looks."""
    rounds = Rounds(route())
    rounds.well(20)
    for _ in range(3):
        rounds.decide(slow(rounds.route, rounds.now_s + 1))
    assert rounds.plan is not None
    other = restarted(rounds, down_s=3600)
    for _ in range(30):
        assert weights_of(other.decide(NO_SIGNALS)) == weights_of(rounds.plan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "format: 99"),
        ({"routes": []}, "routes: a mapping is needed"),
        ({"routes": {"a/b": {}}}, "routes.a/b: KeyError"),
        ({"routes": {"a/b": None}}, "routes.a/b: TypeError"),
    ],
)
def test_a_memory_that_nobody_wrote_is_refused_by_name(change: dict[str, object], said: str) -> None:
    """The message has the place and what is wrong."""
    with pytest.raises(ValueError, match=said):
        Memory.from_json(Memory().to_json(0.0) | change, 0.0)


_PRINT = """
from tests.harness.core import Rounds, route, measured, endpoint, text
from meshctl.model import Plan
rounds = Rounds(route())
rounds.well(8)
plan = rounds.well(8, slow={endpoint(0): 2.0}, foreign={endpoint(5): 0.4})
print(text(Plan({plan.route.spec.id: plan})), rounds.memory.to_json(rounds.now_s))
"""


def test_the_same_input_gives_the_same_bytes_in_every_process() -> None:
    """Whatever the seed of the hashes of strings: weights, reasons and memory."""
    outputs = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", _PRINT], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_arguments_stay_as_they_are() -> None:
    """Neither the memory nor the snapshot is written to: the same call again gives the same."""
    rounds = Rounds(route())
    rounds.well(5)
    snapshot = Snapshot({ROUTE: rounds.route}, {ROUTE: slow(rounds.route, 6.0)})
    saved = rounds.memory.to_json(5.0)
    first, second = decide(snapshot, rounds.memory, 6.0)[0], decide(snapshot, rounds.memory, 6.0)[0]
    assert text(first) == text(second)
    assert rounds.memory.to_json(5.0) == saved


def names(count: int) -> list[RouteId]:
    return [RouteId(f"ns/route-{i:04}") for i in range(count)]


def test_unchanged_routes_are_recognised_by_identity() -> None:
    """Settled routes with the same inputs keep the same RoutePlan objects, in the snapshot's order; one that changes
    changes alone; removed and added again it starts anew."""
    wanted = {name: route(1, name, policy=Policy.PROPORTIONAL) for name in names(200)}
    snapshot = Snapshot(wanted, {})
    plan, memory = decide(snapshot, Memory(), 0.0)
    for second in range(1, 20):
        before, (plan, memory) = plan, decide(snapshot, memory, float(second))
        if all(plan.routes[r] is before.routes[r] for r in wanted):
            break
    assert second < 18, "25 tables a round: 8 rounds"
    again, memory = decide(snapshot, memory, 100.0)
    assert list(again.routes) == list(wanted)
    assert all(again.routes[r] is plan.routes[r] for r in wanted)
    one = names(200)[100]
    changed = {**wanted, one: route(1, one, policy=Policy.ROUND_ROBIN)}
    after, memory = decide(Snapshot(changed, {}), memory, 200.0)
    assert [r for r in wanted if after.routes[r] is not plan.routes[r]] == [one]
    without = {r: w for r, w in changed.items() if r != one}
    plan, memory = decide(Snapshot(without, {}), memory, 201.0)
    assert one not in plan.routes
    assert one not in memory.routes
    plan, _ = decide(Snapshot(wanted, {}), memory, 202.0)
    assert plan.routes[one].weights == again.routes[one].weights


def test_routes_beyond_one_calls_solves_keep_their_tables_until_their_turn() -> None:
    """All change at once: none falls back to equal utilisation, each gets its new table, those that wait come first."""
    old = {name: route(1, name, policy=Policy.MEAN_OPTIMAL) for name in names(60)}
    memory = Memory()
    for second in range(15):
        plan, memory = decide(Snapshot(old, {}), memory, float(second))
    new = {name: route(1, name, policy=Policy.PROPORTIONAL) for name in names(60)}
    first, memory = decide(Snapshot(new, {}), memory, 20.0)
    moved = [r for r in new if first.routes[r].weights != plan.routes[r].weights]
    assert moved == names(60)[:25]
    second_plan, memory = decide(Snapshot(new, {}), memory, 21.0)
    assert [r for r in new if second_plan.routes[r].weights != first.routes[r].weights][-25:] == names(60)[25:50]
    for second in range(22, 60):
        last, memory = decide(Snapshot(new, {}), memory, float(second))
    assert len({json.dumps([list(row.values()) for row in p.weights.values()]) for p in last.routes.values()}) == 1
