"""The extender's metrics, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meshctl.core.packing.vocabulary import Reason

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is read at each scrape."""

    slots: Mapping[str, int] = field(default_factory=dict)
    """State (used, free, closed ...) -> virtual GPUs of the cluster."""
    stranded_gpus: float = 0.0
    """That nobody can use, for want of CPU beside them."""
    reservations: int = 0
    """Pods whose binding is not seen yet."""
    bindings: Mapping[str, int] = field(default_factory=dict)
    """Outcome -> how many so far."""
    bindings_under_way: int = 0
    """Neither done nor certain not to be."""
    binds: bool = False
    """This replica, at the moment."""


class Metrics:
    """Counters that requests move, and gauges read at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "meshctl_extender_requests",
            "Requests of the scheduler's, by what came of them.",
            ["verb", "outcome"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "meshctl_extender_request_seconds",
            "Time to read and answer a request.",
            ["verb"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.refusals = Counter(
            "meshctl_extender_refusals",
            "Looks at a pod that found no node, by each reason that some node was refused for.",
            ["reason"],
            registry=self.registry,
        )

    def observe(self, read: Callable[[], Figures]) -> None:
        """Export what `read` says at each scrape."""
        self.registry.register(_Collector(read))

    def answered(self, verb: str, seconds: float, outcome: str) -> None:
        self.requests.labels(verb, outcome).inc()
        self.seconds.labels(verb).observe(seconds)

    def refused(self, reasons: set[Reason]) -> None:
        """A pod found no node."""
        for reason in reasons:
            self.refusals.labels(reason.value).inc()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _Collector(Collector):
    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """Nothing known in advance; this also keeps registration from collecting."""
        return []

    def collect(self) -> Iterator[Metric]:
        figures = self._read()
        slots = GaugeMetricFamily("meshctl_extender_slots", "Virtual GPUs by state.", labels=["state"])
        for state, count in sorted(figures.slots.items()):
            slots.add_metric([state], count)
        yield slots
        yield GaugeMetricFamily(
            "meshctl_extender_stranded_gpus",
            "Physical GPUs' worth that nobody can use for want of CPU.",
            figures.stranded_gpus,
        )
        yield GaugeMetricFamily(
            "meshctl_extender_reservations", "Pods whose binding is not seen yet.", figures.reservations
        )
        yield GaugeMetricFamily(
            "meshctl_extender_bindings_under_way",
            "Bindings that are neither done nor certain not to be.",
            figures.bindings_under_way,
        )
        yield GaugeMetricFamily("meshctl_extender_binds", "1 while this replica binds pods.", figures.binds)
        bindings = CounterMetricFamily(
            "meshctl_extender_bindings",
            "Bindings by what became of them; besides, tries that met a conflict or whose answer was lost.",
            labels=["outcome"],
        )
        for outcome, count in sorted(figures.bindings.items()):
            bindings.add_metric([outcome], count)
        yield bindings
