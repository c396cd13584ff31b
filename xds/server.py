"""The ADS server: StreamAggregatedResources, state of the world, on grpc.aio. An `Actuator`.

What is sent to whom and when is `Subscription`'s business, what is published is `Cache`'s; this module moves bytes.
Requests and responses are raw bytes to gRPC (the responses are already encoded). All of it runs on one event loop, so
nothing is locked.

One bad peer never disturbs another: what is not a DiscoveryRequest ends that one stream with INVALID_ARGUMENT, and a
proxy that stops reading holds up only its own writer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog
from grpc import aio

from meshctl.errors import InputError, MeshctlError
from meshctl.model import DataPlaneStatus, Plan, Problem, ProxyStatus
from xds.cache import Cache
from xds.credentials import Security
from xds.subscription import Nack, Subscription
from xds.translate import Resources
from xds.wire import ProtocolError, parse_request

log = structlog.get_logger(__name__)

_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
_METHOD = f"/{_SERVICE}/StreamAggregatedResources"
STOP_GRACE_S = 0.2
"""For what is being written. Streams are ended by us: they never end by themselves."""

_STREAM_ERRORS = (aio.InternalError, aio.UsageError, aio.AbortError)
"""What gRPC raises when a response can't be written any more: the proxy is gone."""

_OPTIONS = (
    # Two servers on one port would each see half of the proxies.
    ("grpc.so_reuseport", 0),
    # A proxy that vanished without a FIN is noticed within 40 s, even with nothing to send.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Our bootstrap makes Envoy ping; gRPC's defaults would hang up on it ("too many pings").
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # 100,000 names of clusters; anything larger is no DiscoveryRequest.
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.max_send_message_length", -1),
)


class _Stream:
    """One connected proxy."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.subscription = Subscription()
        self.wake = asyncio.Event()
        self.reader: asyncio.Task[None] | None = None
        self.garbage = ""
        """Why what it sent was no request; "" while it was."""

    @property
    def name(self) -> str:
        return self.subscription.node.id or f"unnamed at {self.peer}"


class XdsServer:
    """Publishes plans to every connected proxy. Create with `start`; all methods belong to the loop that did."""

    def __init__(self, server: aio.Server, host: str) -> None:
        self.host = host
        self.port = 0
        self._server = server
        self._cache = Cache()
        self._streams: dict[int, _Stream] = {}
        self._news = asyncio.Event()

    @classmethod
    async def start(cls, host: str = "127.0.0.1", port: int = 0, *, security: Security | None = None) -> XdsServer:
        """Listens on `host`:`port`; 0 takes a free port (see `port`, `address`). Raises InputError when it can't.

        Without `security` it speaks plain text, and believes what it is told.
        """
        credentials = None if security is None else security.credentials()
        server = aio.server(options=_OPTIONS)
        self = cls(server, host)
        server.add_generic_rpc_handlers((_Handler(self._serve),))
        try:
            place = f"{host}:{port}"
            self.port = server.add_secure_port(place, credentials) if credentials else server.add_insecure_port(place)
        except RuntimeError as error:
            raise InputError(f"the xDS server can't listen on {host}:{port}: {error}; choose another --xds") from error
        await server.start()
        log.info("xds.listening", address=self.address)
        return self

    @property
    def address(self) -> str:
        """``host:port`` that proxies connect to."""
        return f"{self.host}:{self.port}"

    # -------------------------------------------------------------------------------------------------------- Actuator

    def apply(self, plan: Plan) -> int:
        """Publishes `plan`; how many resources changed. Raises MeshctlError, and then the last good one stays."""
        return self._published(lambda: self._cache.apply(plan))

    def publish(self, resources: Resources) -> int:
        """Publishes resources that were made elsewhere: `apply` without the translation."""
        return self._published(lambda: self._cache.put(resources.routes))

    def _published(self, publish: Callable[[], int]) -> int:
        first = self._cache.snapshot is None
        count = publish()
        if count or first:
            self._wake_all()
        return count

    def status(self) -> DataPlaneStatus:
        """What the proxies said of what was published. Proxies are ordered by node id."""
        snapshot = self._cache.snapshot
        proxies = [
            ProxyStatus(
                node=stream.name,
                admin=stream.subscription.node.admin,
                synced=snapshot is not None and stream.subscription.synced(snapshot),
                error=stream.subscription.error,
            )
            for stream in self._proxies()
        ]
        return DataPlaneStatus(
            proxies=tuple(sorted(proxies, key=lambda p: (p.node, p.admin))),
            version="" if snapshot is None else snapshot.version,
            quarantined=self._cache.quarantined,
        )

    async def stop(self) -> None:
        """Ends all streams, within a second. Proxies keep serving what they have."""
        for stream in self._streams.values():
            if stream.reader is not None:
                stream.reader.cancel()
        await self._server.stop(STOP_GRACE_S)

    # ---------------------------------------------------------------------------------------------------------- extras

    @property
    def gateways(self) -> int:
        """Connected proxies that take part in balancing."""
        return sum(1 for stream in self._proxies() if stream.subscription.gateway)

    def _proxies(self) -> list[_Stream]:
        return [stream for stream in self._streams.values() if stream.subscription.active]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What of the plan could not be published as asked: hosts claimed by two routes."""
        return () if self._cache.snapshot is None else self._cache.snapshot.problems

    async def wait_changed(self) -> None:
        """Returns at the next change of `status` (a proxy comes, goes, accepts or refuses). Any number may wait."""
        await self._news.wait()

    async def wait_synced(self, timeout_s: float, proxies: int = 1) -> None:
        """Returns when at least `proxies` are connected and all of them have what is published.

        Raises MeshctlError, naming those that do not, after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._synced(proxies):
                    await self.wait_changed()
        except TimeoutError as error:
            status = self.status()
            late = [f"{p.node} ({p.error or 'no answer yet'})" for p in status.proxies if not p.synced]
            raise MeshctlError(
                f"after {timeout_s} s, {len(status.proxies)} of {proxies} proxies are connected; not in sync: {late}"
            ) from error

    def _synced(self, proxies: int) -> bool:
        snapshot = self._cache.snapshot
        proxied = self._proxies()
        if snapshot is None or len(proxied) < proxies:
            return False
        return all(stream.subscription.synced(snapshot) for stream in proxied)

    # --------------------------------------------------------------------------------------------------------- streams

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """One stream, until the proxy or `stop` ends it."""
        stream = _Stream(context.peer())
        self._streams[id(stream)] = stream
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(stream, context))
                stream.reader = tasks.create_task(self._read(stream, requests))
                stream.reader.add_done_callback(lambda _: writer.cancel())
        except* _STREAM_ERRORS as errors:
            log.warning("xds.stream_failed", proxy=stream.name, error=str(errors.exceptions[0]))
        finally:
            del self._streams[id(stream)]
            self._tell()
        log.info("xds.disconnected", proxy=stream.name)
        if stream.garbage:
            log.warning("xds.bad_request", proxy=stream.name, error=stream.garbage)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, stream.garbage)

    async def _read(self, stream: _Stream, requests: AsyncIterator[bytes]) -> None:
        """Takes requests in until the proxy ends the stream, sends garbage, or `stop` cancels."""
        try:
            async for data in requests:
                self._receive(stream, data)
        except ProtocolError as error:
            stream.garbage = str(error)

    def _receive(self, stream: _Stream, data: bytes) -> None:
        nack = stream.subscription.receive(parse_request(data))
        if nack is not None:
            self._refused(stream, nack)
        snapshot = self._cache.snapshot
        # Here and not in the writer: between the two, a newer plan could come and this one's success be forgotten.
        if snapshot is not None and stream.subscription.synced(snapshot):
            self._cache.accept(snapshot)
        stream.wake.set()

    def _refused(self, stream: _Stream, nack: Nack) -> None:
        log.warning("xds.refused", proxy=stream.name, type=nack.type_url, version=nack.version, error=nack.error)
        # What a client that is no gateway of ours can't read says nothing about the gateways.
        if stream.subscription.gateway and self._cache.refuse(nack):
            self._wake_all()

    async def _write(self, stream: _Stream, context: Any) -> None:
        """Sends what is due, until cancelled. What changes while a response is being written is coalesced."""
        while True:
            await stream.wake.wait()
            stream.wake.clear()
            while (response := self._due(stream)) is not None:
                await context.write(response)
            self._tell()

    def _due(self, stream: _Stream) -> bytes | None:
        snapshot = self._cache.snapshot
        return None if snapshot is None else stream.subscription.respond(snapshot)

    def _wake_all(self) -> None:
        for stream in self._streams.values():
            stream.wake.set()
        self._tell()

    def _tell(self) -> None:
        """Wakes everyone in `wait_changed`, once."""
        self._news.set()
        self._news = asyncio.Event()


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type hints
    """Routes the one method we serve, with bytes in and out."""

    def __init__(self, serve: Callable[[AsyncIterator[bytes], Any], Any]) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(serve)

    def service(self, call: Any) -> Any:
        return self._handler if call.method == _METHOD else None
