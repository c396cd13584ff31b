"""The xDS server: aggregated and single-type discovery, state of the world and delta, on grpc.aio. An `Actuator`.

What is sent to whom and when is `Subscription`'s business, what is published is `Cache`'s; this module moves bytes.
Requests and responses are raw bytes to gRPC (the responses are already encoded). All of it runs on one event loop, so
nothing is locked.

Invariants
- One bad client never disturbs another: what is no request ends that one stream with INVALID_ARGUMENT, one that stops
  reading holds up only its own writer and is disconnected in the end, and `Limits` bound what any of them can take.
- An idle stream is one task that reads. A writer exists while there is something to write.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import grpc
import structlog
from grpc import aio

from meshctl.errors import InputError, MeshctlError
from meshctl.heap import give_back
from meshctl.model import DataPlaneStatus, Plan, Problem, ProxyStatus
from xds.cache import Cache
from xds.channel import Answer
from xds.credentials import Security
from xds.health import Health
from xds.identity import NotAllowedError
from xds.inspect import SHORT, StreamStatus
from xds.limits import Limits
from xds.metrics import XdsMetrics
from xds.services import DiscoveryHandler, options
from xds.snapshot import Snapshot
from xds.stream import Stream
from xds.translate import Resource, Resources
from xds.wire import Flavour, ProtocolError, TypeUrl, parse_delta_request, parse_request

log = structlog.get_logger(__name__)

STOP_GRACE_S = 0.2
"""For what is being written. Streams are ended by us: they never end by themselves."""
NEWS_S = 20e-6
"""For each stream: those who wait for a change are woken this often at most. A thousand acknowledgements are one piece
of news, since each costs 10 us a stream to look at; the one of a single proxy is told at once."""

SETTLED_S = 0.5
"""After the last stream of a burst is up to date, what the burst took of the heap is given back."""
PUSHED_S, MANY_STREAMS = 30.0, 100
"""What a change to so many streams took is given back after this long: half of 120 kB per stream, in milliseconds."""

_STREAM_ERRORS = (aio.InternalError, aio.UsageError, aio.AbortError)
"""What gRPC raises when a response can't be written any more: the proxy is gone."""


class XdsServer:
    """Publishes plans to every connected client. Create with `start`; all methods belong to the loop that did."""

    def __init__(self, server: aio.Server, host: str, security: Security | None, limits: Limits, metrics: XdsMetrics):
        self.host = host
        self.port = 0
        self._server = server
        self._security = security
        self._limits = limits
        self._metrics = metrics
        self._health = Health()
        self._cache = Cache()
        self._streams: dict[int, Stream] = {}
        self._peers: Counter[str] = Counter()
        self._starting: set[Stream] = set()
        self._queue: OrderedDict[Stream, None] = OrderedDict()
        """Streams that wait until others are up to date, in the order in which they came."""
        self._turn = 0
        self._stopping = False
        self._news = asyncio.Event()
        self._told_s = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._status: DataPlaneStatus | None = None
        metrics.observe(self._responses_due, lambda: len(self._queue))

    @classmethod
    async def start(
        cls,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        security: Security | None = None,
        limits: Limits | None = None,
        metrics: XdsMetrics | None = None,
    ) -> XdsServer:
        """Listens on `host`:`port`; 0 takes a free port (see `port`, `address`). Plain text without `security`. Raises
        InputError when it can't."""
        limits = limits or Limits()
        server = aio.server(options=options(limits))
        self = cls(server, host, security, limits, metrics or XdsMetrics())
        server.add_generic_rpc_handlers((DiscoveryHandler(self._serve, self._health),))
        address = f"{host}:{port}"
        credentials = None if security is None else security.credentials()
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InputError(f"the xDS server can't listen on {address}: {error}; choose another --xds") from error
        await server.start()
        log.info("xds.listening", address=self.address, tls=security is not None)
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
        if first:
            self._health.set(serving=True)
        if count or first:
            self._wake_all()
        return count

    def status(self) -> DataPlaneStatus:
        """What the clients said of what was published. They are ordered by node id."""
        if self._status is None:
            self._status = DataPlaneStatus(
                proxies=self._proxies(), version=self._cache.version, quarantined=self._cache.quarantined
            )
        return self._status

    def _proxies(self) -> tuple[ProxyStatus, ...]:
        """Of each client. One that uses a stream per type is in sync when all of these are."""
        found: dict[object, ProxyStatus] = {}
        for stream in self._clients():
            subscription = stream.subscription
            key = id(stream) if subscription.only is None else (stream.name, subscription.node.admin)
            other = found.get(key)
            found[key] = ProxyStatus(
                node=stream.name,
                admin=subscription.node.admin,
                synced=stream.synced and (other is None or other.synced),
                error=subscription.error or ("" if other is None else other.error),
                group=subscription.node.group,
                proxyless=subscription.node.flavour is Flavour.GRPC,
            )
        return tuple(sorted(found.values(), key=lambda p: (p.node, p.admin)))

    async def stop(self) -> None:
        """Ends all streams, within `Limits.drain_s` and a second. Clients keep what they have."""
        self._stopping = True
        self._health.set(serving=False)
        streams = list(self._streams.values())
        for stream in streams:
            if self._limits.drain_s:
                await asyncio.sleep(self._limits.drain_s / len(streams))
            stream.end()
        await self._server.stop(STOP_GRACE_S)
        for timer in (self._telling, self._settling):
            if timer is not None:
                timer.cancel()

    # ---------------------------------------------------------------------------------------------------------- extras

    def streams(self) -> tuple[StreamStatus, ...]:
        """What there is to know of each stream, by node id."""
        found = [stream.status(self._snapshot(stream)) for stream in self._clients()]
        return tuple(sorted(found, key=lambda s: (s.node, s.peer, s.service)))

    def config(self, node: str) -> Mapping[str, Sequence[Resource]] | None:
        """What the clients of a node acknowledged, by `SHORT` type; None when none of that name is connected."""
        streams = [stream for stream in self._clients() if stream.name == node]
        if not streams:
            return None
        held: dict[str, dict[str, Resource]] = {short: {} for short in SHORT.values()}
        for stream in streams:
            for channel in stream.subscription.channels:
                held[SHORT[channel.type_url]].update(channel.accepted)
        return {short: tuple(sorted(found.values(), key=lambda r: r.name)) for short, found in held.items()}

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What of the plan could not be published as asked: hosts claimed by two routes."""
        return self._cache.problems

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
        found = self.status().proxies
        return self._cache.snapshot is not None and len(found) >= proxies and all(p.synced for p in found)

    def _clients(self) -> list[Stream]:
        return [s for s in self._streams.values() if s.subscription.active and not s.ended]

    def _responses_due(self) -> int:
        return sum(1 for stream in list(self._streams.values()) if stream.writer is not None)

    # --------------------------------------------------------------------------------------------------------- streams

    async def _serve(self, only: TypeUrl | None, delta: bool, requests: AsyncIterator[bytes], context: Any) -> None:
        """One stream, until the client, an error or `stop` ends it."""
        stream = Stream(context, asyncio.current_task(), delta=delta, only=only)
        await self._admit(stream)
        try:
            code, why = await self._converse(stream, requests)
            self._tell()  # it is no client any more
            await stream.settle()
        finally:
            self._close(stream)
        if why:
            await context.abort(code, why)

    async def _converse(self, stream: Stream, requests: AsyncIterator[bytes]) -> tuple[grpc.StatusCode, str]:
        """Takes requests in until the stream is to end; with which status, and the words for one that is no OK."""
        try:
            async for data in requests:
                self._receive(stream, data)
                del data  # up to 100 kB that nobody reads any more, while the stream is idle
        except NotAllowedError as error:
            return self._rejected(stream, "identity", grpc.StatusCode.PERMISSION_DENIED, str(error))
        except ProtocolError as error:
            return self._rejected(stream, "protocol", grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if not stream.ended:
                raise  # by the client
            if stream.reason:
                return self._rejected(stream, "slow", grpc.StatusCode.RESOURCE_EXHAUSTED, stream.reason)
        return grpc.StatusCode.OK, ""

    def _rejected(self, stream: Stream, why: str, code: grpc.StatusCode, words: str) -> tuple[grpc.StatusCode, str]:
        log.warning("xds.rejected", proxy=stream.name, error=words)
        self._metrics.rejected(why)
        return code, words

    async def _admit(self, stream: Stream) -> None:
        """Registers a new stream. Raises AbortError when there are too many, or none any more."""
        limits, host = self._limits, stream.host
        if self._stopping:
            self._metrics.rejected("ending")
            await stream.context.abort(grpc.StatusCode.UNAVAILABLE, "this server ends; come again, to another replica")
        if len(self._streams) >= limits.streams:
            self._metrics.rejected("streams")
            text = f"{limits.streams} streams are open here; come again, to another replica if there is one"
            await stream.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if self._peers[host] >= limits.streams_per_peer:
            self._metrics.rejected("peer")
            text = f"{limits.streams_per_peer} streams of {host} are open; one client needs one"
            await stream.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._streams[id(stream)] = stream
        self._peers[host] += 1
        self._metrics.stream_opened(stream.protocol)
        stream.timer = asyncio.get_running_loop().call_later(limits.first_request_s, self._without_request, stream)

    def _without_request(self, stream: Stream) -> None:
        if not stream.subscription.active:
            stream.reason = f"no request within {self._limits.first_request_s} s"
            stream.end()

    def _close(self, stream: Stream) -> None:
        del self._streams[id(stream)]
        self._peers[stream.host] -= 1
        if not self._peers[stream.host]:
            del self._peers[stream.host]
        self._metrics.stream_closed(stream.protocol)
        stream.close()
        self._started(stream)
        self._tell()
        log.info("xds.disconnected", proxy=stream.name)

    def _receive(self, stream: Stream, data: bytes) -> None:
        """Takes one request in. Raises ProtocolError or NotAllowedError for what ends the stream."""
        subscription = stream.subscription
        request = parse_delta_request(data) if subscription.delta else parse_request(data, subscription.many_names)
        answer = subscription.receive(request)
        self._metrics.requested(request.type_url)
        if not stream.known and subscription.active:
            self._welcome(stream)
        if answer is not None:
            self._answered(stream, answer)
        self._look(stream)
        if not stream.synced:
            self._flush(stream)

    def _welcome(self, stream: Stream) -> None:
        """The stream has said who it is."""
        node = stream.subscription.node
        if self._security is not None:
            stream.identity = str(self._security.check(stream.context.auth_context(), node.group))
        stream.known = True
        stream.snapshot = self._snapshot(stream)
        log.info("xds.connected", proxy=stream.name, group=node.group, protocol=stream.protocol)
        self._queue[stream] = None
        self._start_next()

    def _answered(self, stream: Stream, answer: Answer) -> None:
        if answer.error is None:
            self._metrics.acknowledged(answer.type_url, stream.acknowledged(answer.type_url))
            return
        nack = stream.subscription.nack(answer)
        self._metrics.refused(answer.type_url)
        log.warning("xds.refused", proxy=stream.name, type=nack.type_url, version=nack.version, error=nack.error)
        if nack.contents and all(map(self._cache.proven, nack.contents)):
            stream.differs = True
        # What a client that is no gateway can't read says nothing about the gateways.
        if stream.subscription.gateway and not stream.differs and self._cache.refuse(nack):
            self._wake_all()

    def _look(self, stream: Stream) -> None:
        """Whether the stream is up to date now."""
        snapshot = stream.snapshot = self._snapshot(stream)
        synced = snapshot is not None and stream.subscription.synced(snapshot)
        # Here and not in the writer: between the two, a newer plan could come and this one's success be forgotten.
        if synced and snapshot is not None and stream.subscription.gateway:
            self._cache.accept(snapshot)
        stream.synced = synced
        stream.differs = stream.differs and not synced
        if synced:
            self._started(stream)
        self._tell()

    def _snapshot(self, stream: Stream) -> Snapshot | None:
        node = stream.subscription.node
        return self._cache.snapshot_of(node.group, node.flavour)

    # ------------------------------------------------------------------------------------------------------- admission

    def _start_next(self) -> None:
        """Lets waiting streams in while there is room."""
        while self._queue and len(self._starting) < self._limits.starting:
            stream, _ = self._queue.popitem(last=False)
            stream.snapshot = self._snapshot(stream)  # its own may be refused by now: news are told one by one
            self._starting.add(stream)
            stream.admitted = True
            stream.time_out(self._limits.starting_s, self._started)
            self._flush(stream)

    def _started(self, stream: Stream) -> None:
        """The stream is up to date, gone, or had its time. One that came back with all there is may be up to date
        before its turn, and then needs none: it would hold it up for the others until its time is over."""
        if stream in self._queue:
            del self._queue[stream]
            stream.admitted = True
        if stream in self._starting:
            self._starting.discard(stream)
            stream.cancel_timer()
            self._start_next()
            if not self._starting:
                self._settle(SETTLED_S)

    def _settle(self, after_s: float) -> None:
        """Has what was freed given back after this long, unless this is said again."""
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.get_running_loop().call_later(after_s, self._settled)

    def _settled(self) -> None:
        """Unless streams are being brought up to date: first requests and first responses are large."""
        self._settling = None
        if not self._starting:
            asyncio.get_running_loop().run_in_executor(None, give_back)

    # --------------------------------------------------------------------------------------------------------- writing

    def _wake_all(self) -> None:
        """Every stream that has other resources now; not always the same one first."""
        streams = list(self._streams.values())
        self._turn = (self._turn + len(streams) // 3 + 1) % max(1, len(streams))
        for stream in (*streams[self._turn :], *streams[: self._turn]):
            if stream.known and (snapshot := self._snapshot(stream)) is not stream.snapshot:
                stream.snapshot, stream.synced = snapshot, False
                if not self._flush(stream):
                    self._look(stream)
        if len(streams) >= MANY_STREAMS and self._settling is None:
            self._settle(PUSHED_S)
        self._tell()

    def _flush(self, stream: Stream) -> bool:
        """Writes what is due; whether anything is. What changes while a response is being written is coalesced."""
        if stream.writer is not None or not stream.admitted or (data := self._due(stream)) is None:
            return False
        stream.writer = asyncio.get_running_loop().create_task(self._write(stream, data))
        return True

    async def _write(self, stream: Stream, data: bytes | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data is not None:
                late = loop.call_later(self._limits.write_s, self._unread, stream)
                try:
                    await stream.context.write(data)
                finally:
                    late.cancel()
                data = self._due(stream)
        except _STREAM_ERRORS as error:
            log.warning("xds.stream_failed", proxy=stream.name, error=str(error))
            stream.end()
        except Exception:  # ours: nobody awaits this task, and a stream without a writer would be told nothing any more
            log.exception("xds.writer_failed", proxy=stream.name)
            stream.end()
        finally:
            stream.writer = None

    def _unread(self, stream: Stream) -> None:
        stream.reason = f"nothing was read for {self._limits.write_s} s"
        stream.end()

    def _due(self, stream: Stream) -> bytes | None:
        snapshot = stream.snapshot
        data = None if snapshot is None or stream.ended else stream.subscription.respond(snapshot)
        if data is not None:
            self._metrics.pushed(stream.written(), len(data))
        return data

    def _tell(self) -> None:
        """Wakes everyone in `wait_changed`, `NEWS_S` a stream after the last time at the earliest."""
        self._status = None
        if self._telling is None:
            loop = asyncio.get_running_loop()
            rest_s = NEWS_S * len(self._streams)
            self._telling = loop.call_later(max(0.0, self._told_s + rest_s - loop.time()), self._told)

    def _told(self) -> None:
        self._telling, self._told_s = None, asyncio.get_running_loop().time()
        self._news.set()
        self._news = asyncio.Event()
