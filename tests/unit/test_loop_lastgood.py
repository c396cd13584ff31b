"""What a restart keeps of the run before, while some input can't be read."""

from __future__ import annotations

import dataclasses

import pytest

from meshctl.controller.lastgood import with_last_good
from meshctl.model import DesiredRoute, Problem, RouteId
from meshctl.ports import Desired
from tests.harness.controller import desired_route, routes

SAVED = desired_route()
ID = SAVED.spec.id
UNREADABLE = Problem("a.yaml:1:1", "is not YAML")
ITS_OWN = Problem("a.yaml:1:1", "unknown field", ID)
ANOTHERS = Problem("b.yaml:1:1", "unknown field", RouteId("demo/other"))
WITHOUT_PROFILE = dataclasses.replace(SAVED, profiles={"V100": SAVED.profiles["V100"]})
CHANGED = dataclasses.replace(WITHOUT_PROFILE, endpoints=SAVED.endpoints[:1])


@pytest.mark.parametrize(
    ("now", "problem", "kept"),
    [
        pytest.param(None, UNREADABLE, True, id="missing, a file can't be read"),
        pytest.param(None, ITS_OWN, True, id="missing, its own manifest is wrong"),
        pytest.param(None, ANOTHERS, False, id="missing, only another route is wrong"),
        pytest.param(None, None, False, id="missing, all is well: it was deleted"),
        pytest.param(WITHOUT_PROFILE, UNREADABLE, True, id="a profile is missing, a file can't be read"),
        pytest.param(WITHOUT_PROFILE, None, False, id="a profile is missing, all is well"),
        pytest.param(CHANGED, UNREADABLE, False, id="changed by its manifest"),
        pytest.param(SAVED, UNREADABLE, False, id="as it was"),
    ],
)
def test_a_route_is_kept_only_while_a_problem_may_hide_it(
    now: DesiredRoute | None, problem: Problem | None, kept: bool
) -> None:
    """A kept route is the saved object itself and is reported; otherwise nothing changes at all."""
    desired = Desired(routes(now) if now else {}, (problem,) if problem else ())
    result = with_last_good(desired, {ID: SAVED})
    if kept:
        assert result.routes[ID] is SAVED
        assert result.problems[-1].route == ID
        assert "a.yaml:1:1" in result.problems[-1].message
    else:
        assert result is desired
