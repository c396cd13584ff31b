"""What the xDS server computes, without gRPC: changes encoded, plans published, requests read."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest

from bench.adsdialogue import Proxy, value_of
from bench.adsplans import PUSHED, addresses, many_routes, one_weight, reweighted, weighted, with_host, with_route
from bench.report import Figure, Report, at_least, at_most, quantiles
from meshctl.model import Plan, RouteId, RoutePlan
from xds import assignments, proxyless, translate
from xds.cache import Cache
from xds.wire import TypeUrl, names_of, parse_request
from xds.wire import field as encoded

EVERY_MS, ONE_MS = 30.0, 1.0
SNAPSHOT_MS, ROUTE_MS = 300.0, 2.0
FIRST_US, ACK_US = 1000.0, 50.0
ENDPOINTS_OF_A_ROUTE = 10


@dataclass(slots=True)
class Times:
    """In seconds, of each turn."""

    wall: list[float]
    cpu: list[float]

    def ms(self) -> list[float]:
        return [1e3 * s for s in self.wall]

    def cpu_note(self, note: str) -> str:
        """The CPU's median is less at the mercy of a busy machine."""
        return f"CPU median {1e3 * float(np.median(self.cpu)):.3g} ms; {note}"


@contextmanager
def _timed(times: Times) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    times.cpu.append(time.process_time() - cpu)
    times.wall.append(time.perf_counter() - wall)


def bench_endpoints(report: Report, endpoints: int, repeats: int) -> None:
    """One load assignment of many endpoints; the same bytes from the generated classes, in the same run."""
    members = sorted(addresses(endpoints))  # as the decision has them, in order of id
    first = weighted(PUSHED, members, 0, sizes=())
    every, every_bytes = _pushes(first, reweighted, repeats, delta=False)
    one, one_bytes = _pushes(first, lambda route, _: one_weight(route), repeats, delta=True)
    note = f"{endpoints} endpoints in one class; {{}} kB"
    report.add(
        *quantiles(
            "every weight changed: new EDS bytes",
            every.ms(),
            "ms",
            {0.5: at_most(EVERY_MS), 0.99: None},
            every.cpu_note(note.format(every_bytes // 1000)),
        ),
        *quantiles(
            "one weight changed: delta",
            one.ms(),
            "ms",
            {0.5: at_most(ONE_MS), 0.99: None},
            one.cpu_note(note.format(one_bytes // 1000)),
        ),
    )
    peer = _generated(first)
    ratio = float(np.median(peer.wall) / np.median(every.wall))
    report.add(Figure("generated classes' encoding / ours", ratio, "x", at_least(10), "of the same load assignment"))


def _pushes(
    first: RoutePlan, changed: Callable[[RoutePlan, int], RoutePlan], repeats: int, *, delta: bool
) -> tuple[Times, int]:
    """From the plan to the response; and how large that is."""
    cache, proxy, route, times, size = Cache(), Proxy(delta=delta), first, Times([], []), 0
    cache.apply(_only(first))
    proxy.settle(cache)
    for step in range(1, repeats + 1):
        route = changed(route, step)
        plan = _only(route)
        gc.collect()
        with _timed(times):
            cache.apply(plan)
            data = proxy.due(cache)
        assert data is not None  # noqa: S101 (the weights changed)
        size = len(data)
        proxy.accept(data)
        assert proxy.due(cache) is None  # noqa: S101
    return times, size


def _only(route: RoutePlan) -> Plan:
    return Plan({route.route.spec.id: route})


def _generated(route: RoutePlan) -> Times:
    """Encoding the same message."""
    cache, times = Cache(), Times([], [])
    cache.apply(_only(route))
    snapshot = cache.snapshot
    assert snapshot is not None  # noqa: S101 (just published)
    (resource,) = snapshot.assignments.values()
    message = ClusterLoadAssignment.parse(value_of(value_of(resource.packed, 2), 2))
    with _timed(times):
        bytes(message)
    return times


def bench_routes(report: Report, routes: int, repeats: int) -> None:
    """A plan of many routes, from nothing; then one route of it."""
    plan = many_routes(routes, ENDPOINTS_OF_A_ROUTE)
    cold, cache = Times([], []), Cache()
    for _ in range(max(3, repeats // 5)):
        cache = Cache()
        forget()
        gc.collect()
        with _timed(cold):
            cache.apply(plan)
    what = f"{routes} routes x 4 clusters, {ENDPOINTS_OF_A_ROUTE} endpoints each"
    limit = {0.5: at_most(SNAPSHOT_MS), 1.0: None}
    report.add(*quantiles("full snapshot from nothing", cold.ms(), "ms", limit, cold.cpu_note(what)))
    proxy, whole = Proxy(delta=False), Times([], [])
    with _timed(whole):
        sent = proxy.settle(cache)
    note = f"{sum(map(len, sent)) / 1e6:.1f} MB in {len(sent)} responses, its own side included"
    report.add(Figure("the first proxy's dialogue after it", whole.ms()[0], "ms", note=note))
    for name, change in (("weights", reweighted), ("one more host", _hosted)):
        for delta in (False, True):
            times = _changes(plan, cache, change, repeats, delta=delta)
            title = f"one route changed ({name}), {'delta' if delta else 'state of the world'}"
            limit = {0.5: at_most(ROUTE_MS), 0.99: None}
            report.add(*quantiles(title, times.ms(), "ms", limit, times.cpu_note("from the plan to the response")))


def _hosted(route: RoutePlan, step: int) -> RoutePlan:
    return with_host(route, f"more-{step}.example")


def _changes(
    plan: Plan, cache: Cache, change: Callable[[RoutePlan, int], RoutePlan], repeats: int, *, delta: bool
) -> Times:
    cache.apply(plan)
    proxy, times = Proxy(delta=delta), Times([], [])
    proxy.settle(cache)
    for step in range(1, repeats + 1):
        new = with_route(plan, change(plan.routes[RouteId(PUSHED)], step))
        gc.collect()
        with _timed(times):
            cache.apply(new)
            data = proxy.due(cache)
        assert data is not None  # noqa: S101 (the route changed)
        proxy.accept(data)
        proxy.settle(cache)
    return times


def forget() -> None:
    """Empties what the translation remembers: encoded parts that many resources have in common."""
    for module in (translate, assignments, proxyless):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def bench_requests(report: Report, first: bytes, ack: bytes, routes: int, repeats: int) -> None:
    """What a real Envoy sent, read by us and by the generated classes."""
    names = [f"bench/r{number:04}/{size}" for number in range(routes) for size in ("small", "medium", "large", "other")]
    many = encoded(1, b"0" * 32) + b"".join(encoded(3, name.encode()) for name in names)
    many += encoded(4, TypeUrl.ENDPOINT.encode()) + encoded(5, b"17")
    known = names_of(names)
    for name, data, limit_us in (
        ("a real Envoy's first request", first, FIRST_US),
        ("a real Envoy's ACK", ack, ACK_US),
        (f"an ACK of {len(names)} load assignments", many, None),
    ):
        ours = _repeated(lambda data=data: parse_request(data, known), repeats)  # type: ignore[misc]
        peer = _repeated(lambda data=data: DiscoveryRequest.parse(data), max(3, repeats // 20))  # type: ignore[misc]
        target = None if limit_us is None else at_most(limit_us)
        report.add(*quantiles(f"{name}, parsed", ours, "us", {0.5: target, 0.99: target}, f"{len(data)} bytes"))
        ratio = float(np.median(peer) / np.median(ours))
        report.add(Figure(f"{name}: generated classes / ours", ratio, "x", at_least(1)))


def _repeated(call: Callable[[], object], repeats: int) -> Sequence[float]:
    """How long each took, in us."""
    found = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - began_s))
    return found
