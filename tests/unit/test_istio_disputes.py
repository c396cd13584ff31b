"""When a write is refused for somebody else's sake, how soon it is tried again."""

from __future__ import annotations

from istio.disputes import BACK_OFF_S, FREE, Disputes
from istio.render import render
from meshctl.model import RouteId
from tests.harness.istio_plans import meshed

ROUTE = RouteId("team/resnet")


def test_a_conflict_that_only_the_api_server_sees_is_tried_again_with_growing_back_off() -> None:
    """Each refusal begins a longer one; the time in between is not full of writes."""
    wanted = render(meshed(ROUTE, {"192.0.2.1:8000": 1000})).virtual_service
    managed = [{"manager": "meshctl", "operation": "Apply", "fieldsV1": {"f:spec": {}}}]
    live = {**wanted, "metadata": {**wanted["metadata"], "managedFields": managed}, "spec": {"http": []}}
    disputes, now_s, waits = Disputes(), 100.0, []
    for _ in range(3):
        assert disputes.judge(ROUTE, wanted, live, now_s) == FREE
        disputes.lost(wanted, "somebody owns it", now_s)
        began_s = now_s
        while disputes.judge(ROUTE, wanted, live, now_s).conflict:
            now_s += 1.0
        waits.append(now_s - began_s)
    assert waits == [BACK_OFF_S, 2 * BACK_OFF_S, 4 * BACK_OFF_S]
