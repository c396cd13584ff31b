"""Clients that no one would write, and servers that end without a word, over real gRPC.

A bad client hurts itself only: another one is in sync with every change that is made meanwhile.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryResponse, DiscoveryResponse
from grpc import aio

from meshctl.model import RouteId
from tests.featuretests.test_xds_dialogue import CDS, EDS, LDS, ONE, RDS, connect, names, one, two, weights
from tests.harness import manifests
from tests.harness.ads_client import DEADLINE_S, AdsStream, DeltaStream, ads_stream, delta_stream, node_of, open_call
from tests.harness.controller import api, run_with
from tests.harness.envoy import plan, xds_server
from xds.limits import Limits
from xds.metrics import XdsMetrics
from xds.server import XdsServer
from xds.snapshot import InconsistentError
from xds.translate import translate
from xds.wire import TypeUrl


@dataclass
class Served:
    """A server, and a client of it that does everything right."""

    server: XdsServer
    good: AdsStream
    metrics: XdsMetrics

    async def takes_changes(self) -> None:
        """Each of some weights comes at once, and is in force at the good client."""
        for a in (900, 800, 700, 600, 500):
            await self.takes(a)

    async def takes(self, a: int) -> None:
        """A weight."""
        self.server.apply(plan(one(a, 1000 - a)))
        response = await self.good.read()
        assert (response.type_url, names(response)) == (EDS, ONE)
        assert weights(response) == [[a, 1000 - a]] * 4
        await self.good.ack(response, ONE)
        await self.until(lambda: any(p.node == "good" and p.synced for p in self.server.status().proxies))

    async def until(self, holds: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not holds():
                    await self.server.wait_changed()
        except TimeoutError as late:
            raise AssertionError(f"never: {self.server.streams()}") from late

    @property
    def streams(self) -> int:
        """Those that the server keeps, whether they are clients yet or still."""
        samples = (s for metric in self.metrics.registry.collect() for s in metric.samples)
        return int(sum(s.value for s in samples if s.name == "meshctl_xds_streams"))

    def rejected(self, reason: str) -> float:
        labels = {"reason": reason}
        return self.metrics.registry.get_sample_value("meshctl_xds_rejected_streams_total", labels) or 0.0


@asynccontextmanager
async def serving(limits: Limits | None = None) -> AsyncIterator[Served]:
    """At the end all others have left, and the server keeps nothing of them."""
    metrics = XdsMetrics()
    async with xds_server(limits=limits, metrics=metrics) as server, ads_stream(server.address, "good") as good:
        served = Served(server, good, metrics)
        server.apply(plan(one()))
        await connect(good, ONE)
        await server.wait_synced(DEADLINE_S)
        yield served
        await served.until(lambda: served.streams == 1)
        await served.takes_changes()
        assert [stream.node for stream in server.streams()] == ["good"]


@asynccontextmanager
async def meanwhile(work: Any) -> AsyncIterator[None]:
    """`work` goes on while the block runs."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def refuse(stream: AdsStream) -> None:
    """Everything, for as long as the stream is open."""
    wanted: dict[str, list[str]] = {CDS: [], EDS: ONE, RDS: ["meshctl"]}
    for kind, asked in wanted.items():
        await stream.ask(kind, asked)
    while True:
        response = await stream.read()
        await stream.nack(response, "never", wanted[response.type_url])


async def refuse_delta(stream: DeltaStream) -> None:
    """`refuse`, incremental."""
    for kind, asked in {CDS: [], EDS: ONE, RDS: ["meshctl"]}.items():
        await stream.ask(kind, asked)
    while True:
        await stream.nack(await stream.read(), "never")


@pytest.mark.parametrize("delta", [False, True], ids=["state of the world", "delta"])
async def test_a_client_that_refuses_everything_freezes_nothing(delta: bool) -> None:
    """It refuses what another one accepts. So its word is not taken for the next change either, though it is the first
    to say something of it, and no route is held back for it."""
    async with serving() as served, AsyncExitStack() as stack:
        server = served.server
        if delta:
            work = refuse_delta(await stack.enter_async_context(delta_stream(server.address, "never")))
        else:
            work = refuse(await stack.enter_async_context(ads_stream(server.address, "never")))
        async with meanwhile(work):
            await served.until(lambda: refused_types(server, "never") == {"CDS", "EDS"})
            for a in (10, 20):
                goal = nacks(served) + 1
                server.apply(plan(one(a, 1000 - a)))
                await served.until(partial(refused_at_least, served, goal))
                await served.takes(a)
            await served.takes_changes()
            assert server.status().quarantined == {}
            assert {p.node: p.error for p in server.status().proxies} == {"good": "", "never": "never"}


def refused_types(server: XdsServer, node: str) -> set[str]:
    return {t.type for s in server.streams() if s.node == node for t in s.types if t.error}


def refused_at_least(served: Served, goal: float) -> bool:
    return nacks(served) >= goal


def nacks(served: Served) -> float:
    return served.metrics.registry.get_sample_value("meshctl_xds_nacks_total", {"type": "EDS"}) or 0.0


async def test_a_client_that_acknowledges_something_else_gets_one_response_of_a_type() -> None:
    """Its answers name nonces of no response that it has. Once it behaves it gets the newest state, once."""
    async with serving() as served, ads_stream(served.server.address, "stale") as stale:
        await stale.ask(EDS, ONE)
        first = await stale.read()
        for nonce in ("0", "-1", "x" * 100, first.nonce + "0"):
            await stale.ask(EDS, ONE, version=first.version_info, nonce=nonce)
        await served.takes_changes()
        await served.takes(1)
        await stale.ask(EDS, ONE, nonce="0", error="late")
        await stale.ack(first, ONE)
        newest = await stale.read()
        assert weights(newest) == [[1, 999]] * 4
        await stale.ack(newest, ONE)
        await stale.ask(LDS)
        assert (await stale.read()).type_url == LDS, "nothing else was under way"


LONG = [f"{number}-" + 100 * "n" for number in range(60_000)]
"""Names that there are not: an answer says so of each, in 7 MB."""


@asynccontextmanager
async def trickle(port: int) -> AsyncIterator[str]:
    """The address of a way to `port` on which, after 100 kB, what the server says comes a byte at a time."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, freely: int | None) -> None:
        with suppress(ConnectionError), closing(writer):
            while data := await reader.read(65_536 if freely is None or freely > 0 else 1):
                freely = freely if freely is None else freely - len(data)
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(1.0 if freely is not None and freely <= 0 else 0.0)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection("127.0.0.1", port)
        ways.append(asyncio.create_task(forward(reader, downstream, None)))
        ways.append(asyncio.create_task(forward(upstream, writer, 100_000)))

    ways: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await server.wait_closed()


async def test_a_client_that_reads_a_byte_a_second_holds_up_nobody() -> None:
    """It is no client any more after a while; what it holds is given back when its connection goes."""
    async with (
        serving(Limits(write_s=0.3)) as served,
        trickle(served.server.port) as address,
        delta_stream(address, "slow") as slow,
    ):
        await slow.ask(EDS, LONG)
        await served.takes_changes()
        await served.until(lambda: served.rejected("slow") == 1)
        assert [s.node for s in served.server.streams()] == ["good"]
        assert served.streams == 2, "counted until it has gone"


async def test_a_client_that_opens_ever_more_streams() -> None:
    """So many are open, the others are refused one by one; all of it ends with the client."""
    limit = 40
    async with serving(Limits(streams_per_peer=limit)) as served:
        async with aio.insecure_channel(served.server.address) as channel:
            streams = [AdsStream(open_call(channel), node_of(f"many-{i}")) for i in range(100)]
            codes = Counter(await asyncio.gather(*map(answer, streams)))
            assert codes == {"answered": limit - 1, grpc.StatusCode.RESOURCE_EXHAUSTED: 101 - limit}
            await served.takes_changes()
            assert served.streams == limit
        assert served.rejected("peer") == 101 - limit


async def answer(stream: AdsStream) -> object:
    """What a request for clusters comes to."""
    try:
        await stream.ask(CDS)
        await stream.read()
    except (aio.AioRpcError, asyncio.InvalidStateError):
        return await stream.code()
    return "answered"


async def test_what_is_inconsistent_is_kept_out() -> None:
    """It is said why, and nobody is sent anything; what comes next is served."""
    async with serving() as served:
        version = served.server.status().version
        good = translate(plan(one(1, 999), two()))
        bundle = good.routes[RouteId("n/two")]
        spoiled = replace(bundle, assignments=dict(list(bundle.assignments.items())[1:]))
        with pytest.raises(
            InconsistentError, match="clusters without load assignment, or the reverse: \\['n/two/small"
        ):
            served.server.publish(replace(good, routes={**good.routes, RouteId("n/two"): spoiled}))
        assert served.server.status().version == version
        assert served.server.status().proxies[0].synced
        await served.takes_changes()


async def test_a_client_that_moves_between_replicas_is_sent_what_is_new() -> None:
    """To another one with the same plan, where it is sent nothing; and back, with what it got there."""
    async with xds_server() as first, xds_server() as second:
        for server in (first, second):
            server.apply(plan(one(), two()))
        everything = sorted(ONE + TWO)
        versions = {}
        async with ads_stream(first.address) as stream:
            for kind, asked in {CDS: [], EDS: everything, RDS: ["meshctl"]}.items():
                await stream.ask(kind, asked)
                if kind is not RDS:
                    response = await stream.read()
                    await stream.ack(response, asked)
                    versions[kind] = response.version_info
            versions[RDS] = (await stream.read()).version_info
        for server, weight in ((second, 500), (first, 999)):
            async with ads_stream(server.address) as stream:
                for kind, asked in {CDS: [], EDS: everything, RDS: ["meshctl"]}.items():
                    await stream.ask(kind, asked, version=versions[kind])
                await server.wait_synced(DEADLINE_S)
                await stream.ask(LDS)
                listeners = await stream.read()
                assert listeners.type_url == LDS, "the first thing that it is sent"
                await stream.ack(listeners)
                if weight == 500:
                    for replica in (first, second):
                        replica.apply(plan(one(999, 1), two()))
                    response = await stream.read()
                    assert (response.type_url, names(response)) == (EDS, ONE)
                    await stream.ack(response, everything)
                    versions[EDS] = response.version_info


TWO = [name.replace("one", "two") for name in ONE]


@dataclass
class Client:
    """One Envoy over several streams: it asks for what it is told there is, and accepts everything."""

    name: str
    delta: bool
    clusters: tuple[str, ...] = ()
    versions: dict[str, Any] | None = None

    async def converse(self, stream: Any) -> None:
        """From the first request to the last acknowledgement; of what it has it says the version."""
        returns, self.versions = self.versions is not None, self.versions or {}
        for kind in (CDS, EDS, RDS):
            asked = {CDS: [], EDS: list(self.clusters), RDS: ["meshctl"]}[kind]
            if returns and self.delta:
                await stream.ask(kind, asked, versions=self.versions[kind])
            elif returns:
                await stream.ask(kind, asked, version=self.versions[kind])
            else:
                await stream.ask(kind, asked)
                await self._take(kind, await stream.read())
                await stream.ack(self._last, *([] if self.delta else [asked]))

    async def _take(self, kind: TypeUrl, response: DiscoveryResponse | DeltaDiscoveryResponse) -> None:
        assert self.versions is not None
        assert response.type_url == kind
        self._last = response
        if isinstance(response, DeltaDiscoveryResponse):
            self.versions[kind] = {r.name: r.version for r in response.resources}
            found = sorted(self.versions[kind])
        else:
            self.versions[kind] = response.version_info
            found = names(response)
        self.clusters = tuple(found) if kind is CDS else self.clusters


FEW_FILES = (
    "-c",
    "from resource import *; setrlimit(RLIMIT_NOFILE, (90, getrlimit(RLIMIT_NOFILE)[1])); import meshctl.__main__",
)
"""meshctl where a process may have 90 files open, fewer than clients, unless it asks for more."""


async def test_a_hundred_clients_come_back_to_a_server_that_was_killed_and_are_sent_nothing(tmp_path: Path) -> None:
    """SIGKILL, and another process with the same state: what they have is what there is, in both protocols. The files
    that a process may have open by default are no limit."""
    (tmp_path / "manifests").mkdir()
    endpoints = [{"address": "127.0.0.1", "port": p, "metricsPort": p, "gpu": g} for p, g in ((1, "V100"), (2, "T4"))]
    text = manifests.text(
        manifests.route(backend={"endpoints": endpoints}, expectedLoad=100, guard={"dwell": "1h"}),
        manifests.profile(),
        manifests.profile("resnet-t4", gpu="T4"),
    )
    (tmp_path / "manifests" / "fleet.yaml").write_text(text)
    clients = [Client(f"gw-{i}", delta=i % 2 == 1) for i in range(100)]
    xds = "127.0.0.1:0"
    for life in ("1", "2"):
        given = {"--manifests": "manifests", "--state": "state.json"}
        options = [word for option, name in given.items() for word in (option, str(tmp_path / name))]
        run = run_with(tmp_path / f"{life}.log", *options, "--xds", xds, "--tick", "60s", program=FEW_FILES)
        async with run as process, AsyncExitStack() as stack:
            xds = process.xds
            streams = [
                await stack.enter_async_context((delta_stream if c.delta else ads_stream)(xds, c.name)) for c in clients
            ]
            await asyncio.gather(*(c.converse(s) for c, s in zip(clients, streams, strict=True)))
            await api(process, "status", lambda view: sum(p["synced"] for p in view["proxies"]) == len(clients))
            async with aiohttp.ClientSession() as session, session.get(f"{process.admin}/metrics") as page:
                pushes = re.findall(r'meshctl_xds_pushes_total\{type="(\w+)"\} (\S+)', await page.text())
            count = len(clients) if life == "1" else 0
            assert {kind: float(n) for kind, n in pushes} == {"CDS": count, "EDS": count, "LDS": 0, "RDS": count}
            assert await process.end(signal.SIGKILL) == -signal.SIGKILL
            codes = await asyncio.gather(*(s.code() for s in streams))
            assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
