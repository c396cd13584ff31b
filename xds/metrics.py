"""The xDS server's Prometheus metrics, on the controller's registry.

Every one of 1000 streams comes by here four times per change, so the labelled children are looked up once: a change
costs 3 ms in all (7 ms with a lookup by label each time). Labels are types, protocols and fixed words; nothing that a
client chooses.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from xds.inspect import SHORT
from xds.wire import TypeUrl

PROTOCOLS = ("sotw", "delta")
REJECTIONS = ("streams", "peer", "protocol", "identity", "slow", "ending")
"""Why the server ends a stream: there are too many, or too many of one address; what it said is no request; who it says
it is it may not be; it said or read nothing for too long; it came while the server ends."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class XdsMetrics:
    """The server calls the methods; `registry` exports what they counted."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Without a `registry`, as in a test, on one of its own."""
        self.registry = registry = CollectorRegistry() if registry is None else registry
        requests = Counter("meshctl_xds_requests", "Requests of clients.", ["type"], registry=registry)
        pushes = Counter("meshctl_xds_pushes", "Responses written.", ["type"], registry=registry)
        sent = Counter("meshctl_xds_sent_bytes", "Size of the responses written.", ["type"], registry=registry)
        nacks = Counter("meshctl_xds_nacks", "Responses that a client refused.", ["type"], registry=registry)
        acks = Histogram(
            "meshctl_xds_ack_seconds",
            "From a response written to its acknowledgement taken in.",
            ["type"],
            registry=registry,
            buckets=BUCKETS_S,
        )
        streams = Gauge("meshctl_xds_streams", "Streams open.", ["protocol"], registry=registry)
        rejected = Counter(
            "meshctl_xds_rejected_streams", "Streams that the server ended, by why.", ["reason"], registry=registry
        )
        # All from the start, as zeros: rate() needs them.
        self._requests: dict[str, Counter] = {kind: requests.labels(SHORT[kind]) for kind in TypeUrl}
        self._pushes = {kind: pushes.labels(SHORT[kind]) for kind in TypeUrl}
        self._sent = {kind: sent.labels(SHORT[kind]) for kind in TypeUrl}
        self._nacks = {kind: nacks.labels(SHORT[kind]) for kind in TypeUrl}
        self._acks = {kind: acks.labels(SHORT[kind]) for kind in TypeUrl}
        self._rejections = {reason: rejected.labels(reason) for reason in REJECTIONS}
        self._streams = {protocol: streams.labels(protocol) for protocol in PROTOCOLS}

    def observe(self, due: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Export the queues at each scrape, in the scraper's thread: responses `due` that are not written yet, and
        streams `waiting` to be admitted. Once."""
        responses = Gauge("meshctl_xds_responses_due", "Streams with a response to be written.", registry=self.registry)
        streams = Gauge("meshctl_xds_streams_waiting", "Streams that wait to be admitted.", registry=self.registry)
        responses.set_function(due)
        streams.set_function(waiting)

    def stream_opened(self, protocol: str) -> None:
        """``sotw`` or ``delta``."""
        self._streams[protocol].inc()

    def stream_closed(self, protocol: str) -> None:
        self._streams[protocol].dec()

    def requested(self, kind: str) -> None:
        """`kind` as the client says it; what is no type of ours is not counted: it would be a label."""
        if kind in self._requests:
            self._requests[kind].inc()

    def pushed(self, kind: TypeUrl, size_bytes: int) -> None:
        self._pushes[kind].inc()
        self._sent[kind].inc(size_bytes)

    def acknowledged(self, kind: TypeUrl, seconds: float) -> None:
        self._acks[kind].observe(seconds)

    def refused(self, kind: TypeUrl) -> None:
        self._nacks[kind].inc()

    def rejected(self, reason: str) -> None:
        """`reason` is one of `REJECTIONS`."""
        self._rejections[reason].inc()
