"""What a client can't take of the server, over real gRPC: who asks for too much is told so, and nobody else notices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from tests.featuretests.test_xds_dialogue import CDS, EDS, ONE, connect, names, one
from tests.harness.ads_client import DEADLINE_S, AdsStream, DeltaStream, ads_stream, delta_stream
from tests.harness.envoy import plan, xds_server
from xds.limits import Limits
from xds.server import XdsServer
from xds.wire import MOST_NAMES


@asynccontextmanager
async def serving(limits: Limits | None = None) -> AsyncIterator[tuple[XdsServer, AdsStream]]:
    """A server with one client that is in sync, and still is at the end."""
    async with xds_server(limits=limits) as server, ads_stream(server.address, "good") as good:
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
        while len(server.streams()) > 1:
            await server.wait_changed()
        async with ads_stream(server.address, "fourth") as fourth:
            await fourth.ask(CDS)
            assert names(await fourth.read()) == ONE


async def test_a_stream_without_a_request() -> None:
    """Connections that say nothing don't pile up; one that asked stays, however quiet it is then."""
    async with serving(Limits(first_request_s=0.1)) as (server, _), ads_stream(server.address) as stream:
        await refused(stream, grpc.StatusCode.RESOURCE_EXHAUSTED, "no request within 0.1 s")
