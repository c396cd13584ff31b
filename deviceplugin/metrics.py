"""The agent's metrics, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deviceplugin.node import Node
from deviceplugin.objects import slots
from meshctl.sharing import MpsPhase

_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Counters that the agent moves, and gauges read from it at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Histogram(
            "meshctl_agent_kubelet_call_seconds",
            "Time to answer a call of the kubelet's (Allocate among them).",
            ["method", "outcome"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.allocations = Counter(
            "meshctl_agent_allocations",
            "Containers that asked for slots.",
            ["resource", "outcome"],
            registry=self.registry,
        )
        self.xids = Counter(
            "meshctl_agent_xids", "XID errors of the driver.", ["gpu", "xid", "ignored"], registry=self.registry
        )
        self.failures = Counter(
            "meshctl_agent_failures", "What the agent could not do, by activity.", ["activity"], registry=self.registry
        )

    def observe(self, node: Node, now_s: Callable[[], float]) -> None:
        """Export what `node` says at each scrape."""
        self.registry.register(_Collector(node, now_s))

    def called(self, method: str, seconds: float, outcome: str) -> None:
        self.calls.labels(method, outcome).observe(seconds)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


class _Collector(Collector):
    def __init__(self, node: Node, now_s: Callable[[], float]) -> None:
        self._node, self._now_s = node, now_s

    def describe(self) -> list[Metric]:
        """Nothing known in advance; this also keeps registration from collecting."""
        return []

    def collect(self) -> Iterator[Metric]:
        now_s = self._now_s()
        yield self._slots(now_s)
        healthy = GaugeMetricFamily("meshctl_agent_gpu_healthy", "1 when containers may be given it.", labels=["gpu"])
        up = GaugeMetricFamily("meshctl_agent_mps_up", "1 when the GPU's MPS daemon answers.", labels=["gpu"])
        clients = GaugeMetricFamily("meshctl_agent_mps_clients", "Processes on the MPS server.", labels=["gpu"])
        restarts = CounterMetricFamily("meshctl_agent_mps_restarts", "Starts after a failure.", labels=["gpu"])
        for uuid, card in sorted(self._node.cards.items()):
            healthy.add_metric([uuid], card.health(now_s).healthy)
            if card.by_mps:
                up.add_metric([uuid], card.mps.phase is MpsPhase.RUNNING)
                restarts.add_metric([uuid], card.mps.restarts)
                if card.mps.clients is not None:  # unknown is not 0
                    clients.add_metric([uuid], card.mps.clients)
        yield from (healthy, up, clients, restarts)

    def _slots(self, now_s: float) -> Metric:
        family = GaugeMetricFamily(
            "meshctl_agent_slots", "Slots by state: used, free, unavailable.", labels=["gpu", "resource", "state"]
        )
        for uuid, card in sorted(self._node.cards.items()):
            if card.sharing is not None:
                for state, count in slots(self._node.seen(uuid, now_s, ""), self._node.ledger).items():
                    if state != "total":
                        family.add_metric([uuid, card.sharing.resource, state], count)
        return family
