"""Random histories of one GPU: XIDs, probes, MPS daemons that come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from deviceplugin.health import GpuHealth
from deviceplugin.ports import GpuError, GpuLostError, GpuTimeoutError
from meshctl.sharing import HealthRules, MpsPhase, MpsStatus

ERRORS = [None, GpuError("no"), GpuLostError("gone"), GpuTimeoutError("late")]


class Event(NamedTuple):
    """One thing that happens `after_s` seconds after the one before."""

    after_s: float
    what: int | MpsPhase | GpuError | None
    """An XID, a phase of MPS, a probe's error, or a good probe."""


xids = st.integers(1, 150)
phases = st.sampled_from(MpsPhase)
codes = st.frozensets(xids, max_size=10)
rules = st.builds(HealthRules, codes, codes, st.sampled_from([1.0, 30.0, 60.0]))
gaps = st.integers(0, 40).map(float)  # whole seconds, so that sums of them are exact
histories = st.lists(st.builds(Event, gaps, st.one_of(xids, phases, st.sampled_from(ERRORS), st.none())), max_size=30)


def happened(health: GpuHealth, event: Event, now_s: float, rules: HealthRules) -> GpuHealth:
    match event.what:
        case MpsPhase() as phase:
            return health.mps(MpsStatus(phase), now_s)
        case int() as code:
            return health.xid(code, now_s, rules)
        case error:
            return health.probed(error, now_s)


def history(events: Sequence[Event], rules: HealthRules) -> tuple[GpuHealth, float]:
    """The GPU after all of it, and the time then."""
    health, now_s = GpuHealth(), 0.0
    for event in events:
        now_s += event.after_s
        health = happened(health, event, now_s, rules)
    return health, now_s


@given(histories, xids, histories, rules)
def test_never_healthy_within_the_wait_after_a_critical_xid(
    before: list[Event], code: int, after: list[Event], rules: HealthRules
) -> None:
    """Whatever happened before, and whatever probes and daemons do afterwards."""
    health, struck_s = history(before, rules)
    health = health.xid(code, struck_s, rules)
    now_s = struck_s
    for event in after:
        if not rules.ignores(code):
            last_moment_s = min(now_s + event.after_s, struck_s + rules.recover_after_s * 0.999)
            assert not health.health(last_moment_s, rules).healthy
        now_s += event.after_s
        if now_s - struck_s >= rules.recover_after_s:
            break
        health = happened(health, event, now_s, rules)


@given(histories, rules)
def test_good_probes_heal_everything_but_mps(events: list[Event], rules: HealthRules) -> None:
    """No history leaves a GPU ill for ever: a good probe, the wait, and a daemon that runs."""
    health, now_s = history(events, rules)
    healed = health.probed(None, now_s).mps(MpsStatus(MpsPhase.RUNNING), now_s)
    assert healed.health(now_s + rules.recover_after_s, rules).healthy


@given(histories, rules)
def test_ignored_xids_change_nothing(events: list[Event], rules: HealthRules) -> None:
    """The same history without them ends the same."""
    kept, passed_s = [], 0.0
    for event in events:
        passed_s += event.after_s
        if not (isinstance(event.what, int) and rules.ignores(event.what)):
            kept.append(Event(passed_s, event.what))
            passed_s = 0.0
    assert history(events, rules)[0] == history(kept, rules)[0]


@given(histories, st.permutations(range(4)), st.lists(xids, min_size=4, max_size=4), rules)
def test_xids_of_one_moment_may_come_in_any_order(
    events: list[Event], order: list[int], burst: list[int], rules: HealthRules
) -> None:
    """A fault often reports several; the driver's order decides nothing."""
    health, now_s = history(events, rules)
    one, other = health, health
    for number in range(4):
        one = one.xid(burst[number], now_s, rules)
        other = other.xid(burst[order[number]], now_s, rules)
    assert one == other


@given(histories, phases, st.sampled_from(ERRORS), xids, rules)
def test_mps_and_the_rest_do_not_touch_each_other(
    events: list[Event], phase: MpsPhase, error: GpuError | None, code: int, rules: HealthRules
) -> None:
    """An MPS phase commutes with a probe and with an XID."""
    health, now_s = history(events, rules)
    status = MpsStatus(phase)
    assert health.mps(status, now_s).probed(error, now_s) == health.probed(error, now_s).mps(status, now_s)
    assert health.mps(status, now_s).xid(code, now_s, rules) == health.xid(code, now_s, rules).mps(status, now_s)


@given(histories, histories, rules)
def test_a_restart_never_heals(before: list[Event], after: list[Event], rules: HealthRules) -> None:
    """What was saved and read is at most as healthy as what ran on, MPS aside."""
    health, now_s = history([event for event in before if not isinstance(event.what, MpsPhase)], rules)
    if health.health(now_s, rules).healthy:
        return
    restarted = health.shifted(5000.0)
    for event in after:
        now_s += event.after_s
        if isinstance(event.what, MpsPhase):
            continue
        health, restarted = (happened(one, event, now_s, rules) for one in (health, restarted))
        assert health.health(now_s, rules).healthy or not restarted.health(now_s, rules).healthy
