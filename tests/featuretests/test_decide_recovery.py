"""What a drained endpoint is believed to be when it is tried again."""

from __future__ import annotations

import dataclasses

from meshctl.model import ReasonCode, RouteSignals, Signal
from tests.harness.core import Rounds, endpoint, healthy, measured, reasons, route, work_of

V100 = endpoint(0)


def test_the_time_a_request_hung_is_no_service_time() -> None:
    """When a hang ends, its requests end with minutes of 'service'. Believed, the endpoint would be 40 times too slow
    for any weight on probation, and would come back by decay only."""
    rounds = Rounds(route())
    rounds.well(30)
    e = rounds.route.endpoints[0]

    def hung(at_s: float) -> RouteSignals:
        stuck = dataclasses.replace(healthy(e, at_s), completed_rps=Signal(0.0, at_s), pending=Signal(9.0, at_s))
        return measured(rounds.route, at_s, changed={V100: stuck})

    def silent(at_s: float) -> RouteSignals:
        nothing = Signal.no_traffic(at_s)
        idle = dataclasses.replace(
            healthy(e, at_s), service_s=nothing, batch=nothing, queue_s=nothing, busy_ratio=nothing,
            gpu_utilization_ratio=Signal(0.0, at_s), completed_rps=Signal(0.0, at_s), pending=Signal(0.0, at_s),
        )  # fmt: skip
        return measured(rounds.route, at_s, changed={V100: idle})

    assert rounds.run(8, hung).drained == {V100}
    rounds.decide(measured(rounds.route, rounds.now_s + 1, slow={V100: 43.0}))
    for _ in range(30):
        plan = rounds.decide(silent(rounds.now_s + 1))
        if reasons(plan, ReasonCode.PROBATION, V100):
            break
    assert reasons(plan, ReasonCode.PROBATION, V100)
    plan = rounds.decide(silent(rounds.now_s + 1))
    assert work_of(plan, V100) > 0
