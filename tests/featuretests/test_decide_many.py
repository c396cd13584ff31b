"""Many routes at once: who gets a turn at the solver, and that waiting for it costs nothing."""

from __future__ import annotations

from meshctl.core.decide import Memory, decide
from meshctl.model import RouteId, Snapshot
from tests.harness.core import route


def test_a_route_that_only_waits_for_the_solver_is_not_looked_at_again() -> None:
    """Of 60 new routes 25 are solved in each call; the others keep the very memory and plan that they have."""
    names = [RouteId(f"demo/r{number:02}") for number in range(60)]
    snapshot = Snapshot({name: route(1, name=name) for name in names}, {})
    _, before = decide(snapshot, Memory(), 1000.0)
    for now_s, waiting in ((1001.0, 10), (1002.0, 0)):
        plan, after = decide(snapshot, before, now_s)
        kept = [name for name in names if after.routes[name].waits]
        assert len(kept) == waiting
        assert all(after.routes[name] is before.routes[name] for name in kept)
        assert plan.routes.keys() == snapshot.routes.keys()
        before = after
    settled = decide(snapshot, before, 1060.0)[1]
    assert not any(memory.waits for memory in settled.routes.values())
