"""What is inconsistent is never published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshctl.model import RouteId
from tests.harness.envoy import plan, route_plan
from xds.cache import REFUSED_KEPT, Cache
from xds.snapshot import Group, InconsistentError, Snapshot
from xds.subscription import Nack
from xds.translate import RouteResources, translate_route
from xds.wire import Flavour, Node, TypeUrl

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
ONE = translate_route(route_plan("n/one", {A: 600, B: 400}, hosts=("one",)))
TWO = translate_route(route_plan("n/two", {A: 1000}, hosts=("two",)))


def build(routes: list[RouteResources]) -> Snapshot:
    """What Envoys are served of `routes`."""
    return Group.empty(Flavour.ENVOY).updated(routes).snapshot


def test_versions_name_content_not_order_or_time() -> None:
    """The same resources have the same versions, whatever was published in between."""
    assert build([ONE, TWO]).version == build([TWO, ONE]).version
    assert build([ONE]).version != build([ONE, TWO]).version
    assert build([ONE, TWO]).clusters.version == build([TWO, ONE]).clusters.version


def test_a_virtual_host_without_its_cluster() -> None:
    """Envoy would accept the route and answer 503."""
    with pytest.raises(InconsistentError, match=r"names clusters that do not exist: \['n/one/small'\]"):
        build([replace(ONE, clusters=dict(list(ONE.clusters.items())[1:]), assignments=ONE.assignments)])


def test_a_cluster_without_its_endpoints() -> None:
    """It would never warm."""
    with pytest.raises(InconsistentError, match=r"without load assignment, or the reverse: \['n/one/small'\]"):
        build([replace(ONE, assignments=dict(list(ONE.assignments.items())[1:]))])


def test_two_routes_with_one_cluster() -> None:
    """Names are unique over all routes."""
    with pytest.raises(InconsistentError, match="claimed by n/one and by n/zzz"):
        build([ONE, replace(ONE, route=RouteId("n/zzz"))])


def test_weights_that_envoy_refuses() -> None:
    """Zero, and a sum beyond 32 bits."""
    for weights in ((0,), (2**31, 2**31)):
        spoiled = replace(next(iter(ONE.assignments.values())), weights=weights)
        with pytest.raises(InconsistentError, match="weights Envoy refuses"):
            build([replace(ONE, assignments={**ONE.assignments, spoiled.name: spoiled})])


def test_what_changed_is_counted_by_resource() -> None:
    """A weight in one table is one load assignment; a host is the one RouteConfiguration."""
    before = build([ONE, TWO])
    assert before.changed(Snapshot()) == 17
    assert build([TWO, ONE]).changed(before) == 0
    other = translate_route(route_plan("n/two", {A: 999, B: 1}, hosts=("two",)))
    assert build([ONE, other]).changed(before) == 4
    moved = translate_route(route_plan("n/two", {A: 1000}, hosts=("three",)))
    assert build([ONE, moved]).changed(before) == 1
    assert build([ONE]).changed(before) == 9


def test_a_plan_that_cannot_be_published_leaves_the_last_one() -> None:
    """The cache raises, and serves what it served."""
    cache = Cache()
    good = plan(route_plan("n/r", {A: 1000}))
    assert cache.apply(good) == 9
    before = cache.snapshot
    with pytest.raises(InconsistentError):
        cache.put({RouteId("n/r"): replace(ONE, assignments={})})
    assert cache.snapshot is before
    assert cache.apply(good) == 0
    assert cache.apply(plan(route_plan("n/r", {A: 1000}))) == 0
    assert cache.apply(plan()) == 9


def test_what_a_route_remembers_of_refusals_is_bounded() -> None:
    """A proxy that refuses each new plan for ever takes no more and more memory; the newest are remembered, and the
    route stays at what was accepted."""
    cache = Cache()
    cache.apply(plan(route_plan("n/r", {A: 1000})))
    accepted = cache.snapshot
    assert accepted is not None
    cache.accept(accepted)
    for weight in range(1, REFUSED_KEPT + 10):
        wanted = plan(route_plan("n/r", {A: weight, B: 1000 - weight}))
        cache.apply(wanted)
        snapshot = cache.snapshot
        assert snapshot is not None
        (suspect,) = (r for r in snapshot.assignments.values() if r.name == "n/r/small")
        assert cache.refuse(Nack(Node("gw"), TypeUrl.ENDPOINT, "v", "no", [suspect]))
        assert cache.snapshot is not None
        assert cache.snapshot.version == accepted.version
        assert cache.quarantined == {"n/r": "gw: no"}
        assert cache.apply(wanted) == 0
    assert cache.apply(plan(route_plan("n/r", {A: 1, B: 999}))) == 4, "so long ago that it is tried again"
