"""The controller's own Prometheus metrics.

What happens is counted by the loop (`Metrics`); what is true now is read from one State at scrape time (`_Collector`),
so that the series of a route that is gone are gone too. Labels are routes, size classes, endpoints and fixed words:
nothing that a client of the data plane chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from meshctl.controller.conditions import newest
from meshctl.controller.state import State

if TYPE_CHECKING:
    from meshctl.controller.gpuclaims import GpuTotals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of what the loop did."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_s = Histogram(
            "meshctl_reconcile_duration_seconds",
            "From the snapshot to the data plane, checkpoint included.",
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
        )
        self.decisions = Counter("meshctl_decisions", "Decisions by outcome.", ["outcome"], registry=self.registry)
        self.writes = Counter("meshctl_writes", "Data plane resources written.", registry=self.registry)
        self.checkpoints = Counter("meshctl_checkpoints", "State files written.", registry=self.registry)
        self.overruns = Counter(
            "meshctl_tick_overruns", "Ticks that found the signals still being read.", registry=self.registry
        )
        self.failures = Counter(
            "meshctl_failures", "What the controller could not do, by activity.", ["activity"], registry=self.registry
        )
        for outcome in ("ok", "crashed", "rejected"):
            self.decisions.labels(outcome)  # zeros from the start: rate() needs them

    def observe(self, state: Callable[[], State]) -> None:
        """Export what `state()` says at each scrape."""
        self.registry.register(_Collector(state))

    def observe_gpus(self, totals: Callable[[], GpuTotals]) -> None:
        """Export what `totals()` says at each scrape."""
        self.registry.register(_GpuCollector(totals))

    def exposition(self) -> bytes:
        """The text format (`CONTENT_TYPE`). Slow with many routes: call it outside the event loop."""
        return generate_latest(self.registry)


class _Collector(Collector):
    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        """Nothing known in advance; this also keeps registration from collecting."""
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        yield from _controller_metrics(state)
        yield from _route_metrics(state)
        yield _weights(state)
        yield _signal_ages(state)


class _GpuCollector(Collector):
    def __init__(self, totals: Callable[[], GpuTotals]) -> None:
        self._totals = totals

    def describe(self) -> list[Metric]:
        """Nothing known in advance; this also keeps registration from collecting."""
        return []

    def collect(self) -> Iterator[Metric]:
        totals = self._totals()
        slots = GaugeMetricFamily("meshctl_gpu_slots", "Slots of GPUs, by state.", labels=["resource", "state"])
        gpus = GaugeMetricFamily("meshctl_gpus", "GPUs, by the status of their condition Healthy.", labels=["healthy"])
        policies = GaugeMetricFamily(
            "meshctl_gpu_policies", "GPUSharingPolicies, by condition.", labels=["condition", "status"]
        )
        for family, found in ((slots, totals.slots), (policies, totals.policies)):
            for pair, number in sorted(found.items()):
                family.add_metric(list(pair), number)
        for healthy, number in sorted(totals.gpus.items()):
            gpus.add_metric([healthy], number)
        yield from (slots, gpus, policies)


def _controller_metrics(state: State) -> Iterator[Metric]:
    problems = GaugeMetricFamily("meshctl_problems", "Problems reported now, by source.", labels=["source"])
    for source, found in state.problems().items():
        problems.add_metric([source], len(found))
    yield problems
    yield GaugeMetricFamily("meshctl_leading", "1 when this replica writes to the cluster.", value=state.leading)
    proxies = state.dataplane.proxies
    yield GaugeMetricFamily("meshctl_proxies_connected", "Proxies connected.", value=len(proxies))
    synced = sum(proxy.synced for proxy in proxies)
    yield GaugeMetricFamily("meshctl_proxies_synced", "Proxies that acknowledged everything.", value=synced)
    quarantined = len(state.dataplane.quarantined)
    yield GaugeMetricFamily("meshctl_routes_quarantined", "Routes whose newest state was refused.", value=quarantined)
    waiting, conflicts = len(state.dataplane.waiting), len(state.dataplane.conflicts)
    yield GaugeMetricFamily("meshctl_routes_waiting", "Routes not yet in force as decided.", value=waiting)
    yield GaugeMetricFamily("meshctl_routes_conflicting", "Routes that somebody else changed.", value=conflicts)


def _route_metrics(state: State) -> Iterator[Metric]:
    load = GaugeMetricFamily("meshctl_load_rps", "Load the weights were solved for.", labels=["route"])
    feasible = GaugeMetricFamily("meshctl_feasible", "1 when every size class meets its SLO.", labels=["route"])
    drained = GaugeMetricFamily("meshctl_drained_endpoints", "Endpoints without traffic.", labels=["route"])
    attainment = GaugeMetricFamily(
        "meshctl_attainment_ratio", "Expected share answered within the SLO.", labels=["route", "size"]
    )
    for route_id, plan in sorted(state.plan.routes.items()):
        load.add_metric([route_id], plan.load_rps)
        feasible.add_metric([route_id], plan.feasible)
        drained.add_metric([route_id], len(plan.drained))
        for size, value in sorted(plan.attainment.items()):
            attainment.add_metric([route_id, size], value)
    yield from (load, feasible, drained, attainment)


def _weights(state: State) -> Metric:
    family = GaugeMetricFamily("meshctl_weight", "Weight in force, of 1000.", labels=["route", "size", "endpoint"])
    for route_id, plan in sorted(state.plan.routes.items()):
        for size, table in sorted(plan.weights.items()):
            for endpoint, weight in sorted(table.items()):
                family.add_metric([route_id, size, endpoint], weight)
    return family


def _signal_ages(state: State) -> Metric:
    """Age of each endpoint's newest signal; an endpoint never measured has no series (unknown is not 0)."""
    family = GaugeMetricFamily(
        "meshctl_signal_age_seconds", "Age of the newest signal of an endpoint.", labels=["route", "endpoint"]
    )
    for route_id in sorted(state.plan.routes):
        signals = state.observed.routes.get(route_id)
        for endpoint, measured in sorted(signals.endpoints.items()) if signals else ():
            at_s = newest(measured).at_s
            if at_s is not None:
                family.add_metric([route_id, endpoint], max(0.0, state.now_s - at_s))
    return family
