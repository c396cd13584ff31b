"""Load assignments built on those before them are those built from nothing, and what envoy-data-plane encodes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from envoy_data_plane.envoy.config.core.v3 import Address, SocketAddress
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.config.endpoint.v3 import Endpoint as ProxyEndpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.model import DEFAULT_CLASS, DesiredRoute, Endpoint, EndpointId, LoadBalancer, RouteId, RoutePlan, RouteSpec
from tests.harness.envoy import SIZES
from xds.assignments import CHUNK
from xds.translate import RouteResources, translate_route
from xds.wire import TypeUrl, packed

SPEC = RouteSpec(RouteId("n/r"), ("*",), "m", 0.15, 0.99, ("x-batch-size",), SIZES[:1])
FLEET = tuple(
    Endpoint(EndpointId(f"10.0.{i // 200}.{i % 200}:80"), f"10.0.{i // 200}.{i % 200}", 80 + i * 200, "V100", "")
    for i in range(2 * CHUNK + 40)
)
counts = st.sampled_from([0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, len(FLEET)])
weights = st.sampled_from([0, 1, 2, 127, 128, 1000, 2**20])


@dataclass(frozen=True)
class Step:
    """Some endpoints get other weights, or come or go."""

    changed: dict[int, int]
    flipped: frozenset[int] = field(default_factory=frozenset)


positions = st.integers(0, len(FLEET) - 1)
steps = st.builds(
    Step,
    st.dictionaries(positions, weights, max_size=5),
    st.one_of(st.just(frozenset[int]()), st.frozensets(positions, max_size=3)),
)


@dataclass(frozen=True)
class Fleet:
    """The state that steps lead to."""

    endpoints: tuple[Endpoint, ...]
    table: dict[EndpointId, int]

    def after(self, step: Step) -> Fleet:
        endpoints = self.endpoints
        for i in step.flipped & frozenset(range(len(endpoints))):
            flipped = replace(endpoints[i], ready=not endpoints[i].ready)
            endpoints = (*endpoints[:i], flipped, *endpoints[i + 1 :])
        changed = {endpoints[i].id: weight for i, weight in step.changed.items() if i < len(endpoints)}
        return Fleet(endpoints, {**self.table, **changed})

    @property
    def plan(self) -> RoutePlan:
        """The default class keeps equal weights."""
        tables = {SIZES[0].name: self.table, DEFAULT_CLASS: dict.fromkeys(self.table, 1)}
        route = DesiredRoute(SPEC, self.endpoints, {})
        return RoutePlan(route, tables, LoadBalancer(), {}, {}, 0.0, True, frozenset(), ())

    def encoded(self) -> bytes:
        """The size class's load assignment, by the generated classes."""
        ready = [(e, self.table[e.id]) for e in self.endpoints if e.ready]
        used = [(e, weight) for e, weight in ready if weight] or [(e, 1) for e, _ in ready]
        members = [
            LbEndpoint(
                endpoint=ProxyEndpoint(
                    address=Address(socket_address=SocketAddress(address=e.address, port_value=e.port))
                ),
                load_balancing_weight=weight,
            )
            for e, weight in used
        ]
        localities = [LocalityLbEndpoints(lb_endpoints=members)] if members else []
        return bytes(ClusterLoadAssignment(cluster_name="n/r/small", endpoints=localities))


@given(counts, weights, st.lists(steps, min_size=1, max_size=6))
@settings(max_examples=30)
def test_history_saves_work_and_changes_nothing(count: int, weight: int, history: list[Step]) -> None:
    """After each step the resources are those of a translation from nothing, digests included; the last message is the
    one that envoy-data-plane encodes."""
    fleet = Fleet(FLEET[:count], dict.fromkeys((e.id for e in FLEET[:count]), weight))
    before: RouteResources | None = None
    for step in [Step({}), *history]:
        fleet = fleet.after(step)
        made = translate_route(fleet.plan, before)
        assert made == translate_route(fleet.plan)
        if before is not None:
            for name, resource in made.assignments.items():
                same = resource.packed == before.assignments[name].packed
                assert same == (resource.digest == before.assignments[name].digest)
                assert same == (resource is before.assignments[name])
        before = made
    assert before is not None
    assert before.assignments["n/r/small"].packed == packed(TypeUrl.ENDPOINT, fleet.encoded())


def test_endpoints_without_a_weight_change_no_digest() -> None:
    """The digest is of the bytes: what is not among them, even between two chunks, does not count."""
    used = Fleet(FLEET[1:], {e.id: 3 for e in FLEET[1:]})
    with_idle = Fleet(FLEET, {FLEET[0].id: 0, **used.table})
    one, other = (translate_route(fleet.plan).assignments["n/r/small"] for fleet in (used, with_idle))
    assert one == other
