"""grpc.health.v1 as gRPC clients and Kubernetes' gRPC probe see it, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from tests.harness.tools import DEADLINE_S
from xds.health import Health
from xds.wire import field

ADS = field(1, b"envoy.service.discovery.v3.AggregatedDiscoveryService")
"""A HealthCheckRequest; b"" is the one about the whole server."""
UNKNOWN = field(1, b"nope")
SERVING, NOT_SERVING, SERVICE_UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"


class _Only(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type hints
    def __init__(self, health: Health) -> None:
        self._health = health

    def service(self, call: Any) -> Any:
        return self._health.handler(call.method)


@asynccontextmanager
async def served(health: Health, *options: tuple[str, str]) -> AsyncIterator[aio.Channel]:
    """A channel with `options` to a server that has nothing but `health`."""
    server = aio.server()
    server.add_generic_rpc_handlers((_Only(health),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            yield channel
    finally:
        await server.stop(0)


async def check(channel: aio.Channel, request: bytes = b"") -> Any:
    return await channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=DEADLINE_S)


def watch(channel: aio.Channel, request: bytes = b"") -> Any:
    return channel.unary_stream("/grpc.health.v1.Health/Watch")(request, timeout=DEADLINE_S)


@pytest.mark.parametrize("request_", [b"", ADS, b"\x10\x01"], ids=["server", "ads", "unknown field"])
async def test_check_follows_what_is_set(request_: bytes) -> None:
    """Not serving before the first snapshot, serving after it, not serving while draining."""
    health = Health()
    async with served(health) as channel:
        assert await check(channel, request_) == NOT_SERVING
        health.set(True)
        assert await check(channel, request_) == SERVING
        health.set(False)
        assert await check(channel, request_) == NOT_SERVING


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (UNKNOWN, grpc.StatusCode.NOT_FOUND),
        (b"\x0a\x7fcut short", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x08\x01", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x01\xff", grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["unknown service", "cut short", "a number", "not UTF-8"],
)
async def test_what_is_asked_wrongly_is_refused(request_: bytes, code: grpc.StatusCode) -> None:
    """With the protocol's codes, and the server goes on."""
    async with served(Health()) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await check(channel, request_)
        assert caught.value.code() is code
        assert await check(channel) == NOT_SERVING


async def test_watch_tells_each_change_once() -> None:
    """The state at once, then what changes; setting the same again says nothing."""
    health = Health()
    async with served(health) as channel:
        call = watch(channel, ADS)
        assert await call.read() == NOT_SERVING
        health.set(False)
        health.set(True)
        assert await call.read() == SERVING
        health.set(True)
        health.set(False)
        assert await call.read() == NOT_SERVING
        call.cancel()


async def test_watch_of_an_unknown_service_stays_open() -> None:
    """SERVICE_UNKNOWN, as the protocol asks, and no end of the call."""
    health = Health()
    async with served(health) as channel:
        call = watch(channel, UNKNOWN)
        assert await call.read() == SERVICE_UNKNOWN
        health.set(True)
        assert await check(channel) == SERVING
        assert not call.done()
        call.cancel()


async def test_watches_are_bounded_and_ended_ones_make_room() -> None:
    """One too many is refused with RESOURCE_EXHAUSTED; checks go on; a cancelled one counts no more."""
    async with served(Health(watchers=2)) as channel:
        calls = [watch(channel) for _ in range(2)]
        assert [await call.read() for call in calls] == [NOT_SERVING] * 2
        assert await watch(channel).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await check(channel) == NOT_SERVING
        calls[0].cancel()
        async with asyncio.timeout(DEADLINE_S):
            while await (again := watch(channel)).read() != NOT_SERVING:  # until the server saw the cancellation
                pass
        again.cancel()
        calls[1].cancel()


CHECKED = """{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig":
    {"serviceName": "envoy.service.discovery.v3.AggregatedDiscoveryService"}}"""
"""The service config of a client that looks at the health of its servers."""


async def test_grpcs_own_health_checking_follows_it() -> None:
    """A client of gRPC's with health checking is ready exactly while we say that we serve."""
    health = Health()
    async with served(health, ("grpc.service_config", CHECKED)) as channel:
        for serving in (False, True, False, True):
            health.set(serving)
            wanted = grpc.ChannelConnectivity.READY if serving else grpc.ChannelConnectivity.TRANSIENT_FAILURE
            async with asyncio.timeout(DEADLINE_S):
                while (state := channel.get_state(try_to_connect=True)) is not wanted:
                    await channel.wait_for_state_change(state)
