"""What a client can't take of the server, over real gRPC: who asks for too much is told so, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc import aio

from tests.featuretests.test_xds_dialogue import CDS, EDS, ONE, connect, names, one
from tests.harness.ads_client import DEADLINE_S, AdsStream, DeltaStream, ads_stream, delta_stream
from tests.harness.envoy import plan, xds_server
from xds.limits import Limits
from xds.metrics import XdsMetrics
from xds.server import XdsServer
from xds.wire import MOST_NAMES


@asynccontextmanager
async def serving(
    limits: Limits | None = None, metrics: XdsMetrics | None = None
) -> AsyncIterator[tuple[XdsServer, AdsStream]]:
    """A server with one client that is in sync, and still is at the end."""
    async with xds_server(limits=limits, metrics=metrics) as server, ads_stream(server.address, "good") as good:
        server.apply(plan(one()))
        await connect(good, ONE)
        await server.wait_synced(DEADLINE_S)
        yield server, good
        server.apply(plan(one(1, 999)))
        response = await good.read()
        assert (response.type_url, names(response)) == (EDS, ONE)
        await good.ack(response, ONE)
        await server.wait_synced(DEADLINE_S)


async def refused(stream: AdsStream | DeltaStream, code: grpc.StatusCode, words: str) -> None:
    assert await stream.code() is code
    assert words in await stream.details()


def nodes(server: XdsServer) -> list[str]:
    return [stream.node for stream in server.streams()]


async def until(server: XdsServer, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await server.wait_changed()


async def test_too_many_names_in_a_request() -> None:
    """65,536 are enough for 16,000 routes."""
    many = [f"n{number}" for number in range(MOST_NAMES + 1)]
    async with serving() as (server, _):
        async with ads_stream(server.address) as stream:
            await stream.ask(EDS, many)
            await refused(stream, grpc.StatusCode.INVALID_ARGUMENT, f"{MOST_NAMES}")
        async with delta_stream(server.address) as delta:
            await delta.ask(EDS, many[:-1])
            assert len((await delta.read()).removed_resources) == MOST_NAMES
            await delta.ask(EDS, many[-1:])
            await refused(delta, grpc.StatusCode.INVALID_ARGUMENT, f"{MOST_NAMES}")


async def test_too_large_a_message() -> None:
    """It is not read at all."""
    async with serving(Limits(message_bytes=10_000)) as (server, _), ads_stream(server.address) as stream:
        await stream.ask(EDS, ["n" * 10_001])
        await refused(stream, grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(streams=2), "2 streams are open here"),
        (Limits(streams_per_peer=2), "2 streams of ipv4:127.0.0.1 are open"),
    ],
    ids=["in all", "of one address"],
)
async def test_too_many_streams(limits: Limits, words: str) -> None:
    """The last one is refused until another one goes."""
    async with serving(limits) as (server, _):
        async with ads_stream(server.address, "second") as second:
            await second.ask(CDS)
            assert names(await second.read()) == ONE
            async with ads_stream(server.address, "third") as third:
                await refused(third, grpc.StatusCode.RESOURCE_EXHAUSTED, words)
        await until(server, lambda: nodes(server) == ["good"])
        async with ads_stream(server.address, "fourth") as fourth:
            await fourth.ask(CDS)
            assert names(await fourth.read()) == ONE


async def test_a_stream_without_a_request() -> None:
    """Connections that say nothing don't pile up; one that asked stays, however quiet it is then."""
    async with serving(Limits(first_request_s=0.1)) as (server, _), ads_stream(server.address) as stream:
        await refused(stream, grpc.StatusCode.RESOURCE_EXHAUSTED, "no request within 0.1 s")


LONG = [f"{number}-" + 400 * "n" for number in range(50_000)]
"""Names that there are not: the answer says so of each, in 20 MB. Of 7 MB gRPC takes in all for who does not read."""
LARGE = 2**25
"""Bytes of a request for them."""


def rejected(metrics: XdsMetrics, reason: str) -> float | None:
    """How many streams so far."""
    return metrics.registry.get_sample_value("meshctl_xds_rejected_streams_total", {"reason": reason})


async def test_a_connection_without_a_stream() -> None:
    """It is closed, in order; one with a stream that says nothing stays."""
    limits = Limits(first_request_s=0.2)
    async with (
        serving(limits) as (server, _),
        aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel,
        asyncio.timeout(DEADLINE_S),
    ):
        await channel.channel_ready()
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)


async def test_a_client_that_does_not_read_for_too_long() -> None:
    """It is no client any more; when it reads at last it learns that the stream has ended, and why."""
    metrics = XdsMetrics()
    async with (
        serving(Limits(write_s=0.1, message_bytes=LARGE), metrics) as (server, _),
        delta_stream(server.address, "lazy") as lazy,
    ):
        await lazy.ask(EDS, LONG)
        await until(server, lambda: rejected(metrics, "slow") == 1)
        assert nodes(server) == ["good"]
        assert len((await lazy.read()).removed_resources) == len(LONG)
        await refused(lazy, grpc.StatusCode.RESOURCE_EXHAUSTED, "nothing was read for 0.1 s")


@pytest.mark.parametrize("garbage", [True, False], ids=["garbage", "its own end"])
async def test_a_client_that_does_not_read_is_told_of_the_end_all_the_same(garbage: bool) -> None:
    """Of the end that it asked for, or that its garbage has brought."""
    async with serving(Limits(message_bytes=LARGE)) as (server, _), delta_stream(server.address, "lazy") as lazy:
        await lazy.ask(EDS, LONG)
        await until(server, lambda: "lazy" in nodes(server))
        if garbage:
            await lazy.call.write(b"\xff\xff")
        else:
            await lazy.call.done_writing()
        await until(server, lambda: nodes(server) == ["good"])
        assert len((await lazy.read()).removed_resources) == len(LONG)
        if garbage:
            await refused(lazy, grpc.StatusCode.INVALID_ARGUMENT, "not a protobuf message")
        else:
            await refused(lazy, grpc.StatusCode.OK, "")


async def test_a_client_that_never_reads_counts_until_it_goes() -> None:
    """Else one could take any amount of memory. It keeps no server from stopping."""
    metrics = XdsMetrics()
    async with serving(Limits(streams=2, write_s=0.1, message_bytes=LARGE), metrics) as (server, _):
        async with delta_stream(server.address, "lazy") as lazy:
            await lazy.ask(EDS, LONG)
            await until(server, lambda: rejected(metrics, "slow") == 1)
            async with ads_stream(server.address, "third") as third:
                await refused(third, grpc.StatusCode.RESOURCE_EXHAUSTED, "2 streams are open here")
        async with asyncio.timeout(DEADLINE_S):
            while not await served(server):
                pass  # it has not seen yet that the other one went
    limits = Limits(message_bytes=LARGE)
    async with xds_server(limits=limits) as server, delta_stream(server.address, "lazy") as lazy:
        server.apply(plan(one()))
        await lazy.ask(EDS, LONG)
        await until(server, lambda: "lazy" in nodes(server))
        await asyncio.wait_for(server.stop(), DEADLINE_S)


async def served(server: XdsServer) -> bool:
    """Whether a new client is."""
    async with ads_stream(server.address, "new") as stream:
        try:
            await stream.ask(CDS)
            return names(await stream.read()) == ONE
        except (aio.AioRpcError, asyncio.InvalidStateError):
            return False
