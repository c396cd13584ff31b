"""A real Envoy that loses its server while a cluster warms: what it says on the next stream, and that it gets warm.

tests/property/test_xds_make_before_break.py has a model of this; here it is compared with what is modelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc import aio

from meshctl.model import LoadBalancer
from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness.envoy import Backends, plan, request, require_envoy, route_plan
from tests.harness.tools import DEADLINE_S
from xds.cache import Cache
from xds.services import METHODS
from xds.subscription import Subscription
from xds.wire import DeltaRequest, Request, TypeUrl, parse_delta_request, parse_request

pytestmark = pytest.mark.envoy


class LossyServer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type hints
    """Our protocol without our server: with `losing`, the stream ends where load assignments would be sent."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.losing = False
        self.requests: list[list[Request | DeltaRequest]] = []
        """Of each stream."""
        self.synced = asyncio.Event()
        self.wake: Callable[[], None] = lambda: None

    def service(self, call: Any) -> Any:
        found = METHODS.get(call.method)
        return None if found is None else grpc.stream_stream_rpc_method_handler(partial(self._serve, found[1]))

    async def _serve(self, delta: bool, requests: AsyncIterator[bytes], context: Any) -> None:
        subscription, said = Subscription(delta=delta), list[Request | DeltaRequest]()
        self.requests.append(said)
        due: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.wake = partial(due.put_nowait, None)

        async def read() -> None:
            async for data in requests:
                due.put_nowait(data)

        reading = asyncio.create_task(read())
        try:
            while True:
                data = await due.get()
                if data is not None:
                    said.append(parse_delta_request(data) if delta else parse_request(data))
                    subscription.receive(said[-1])
                while (response := subscription.respond(self._snapshot())) is not None:
                    if self.losing and subscription.newest is TypeUrl.ENDPOINT:
                        self.losing = False
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
                    await context.write(response)
                if subscription.synced(self._snapshot()):
                    self.synced.set()
        finally:
            reading.cancel()

    def _snapshot(self) -> Any:
        return self.cache.snapshot


@asynccontextmanager
async def serving(lossy: LossyServer) -> AsyncIterator[str]:
    server = aio.server()
    server.add_generic_rpc_handlers((lossy,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@pytest.mark.parametrize("delta", [False, True], ids=["state of the world", "delta"])
async def test_an_envoy_that_comes_back_while_clusters_warm_says_nothing_of_them_and_gets_their_endpoints(
    tmp_path: Path, delta: bool
) -> None:
    """Its load assignments are those that it had before, and it claims them. A server that believed that would leave it
    waiting; ours sends them, and then it is told of clusters, and serves."""
    require_envoy()
    async with Backends(1) as backends, aiohttp.ClientSession() as session:
        (a,) = backends.addresses
        lossy = LossyServer(Cache())
        lossy.cache.apply(plan(route_plan("default/r", {a: 1000})))
        async with (
            serving(lossy) as address,
            EnvoyProcess(tmp_path, gateway(address, "gw", delta=delta)) as envoy,
        ):
            await asyncio.wait_for(lossy.synced.wait(), DEADLINE_S)
            lossy.losing = True
            lossy.cache.apply(plan(route_plan("default/r", {a: 1000}, balancer=LoadBalancer(active_request_bias=0.5))))
            lossy.synced.clear()
            lossy.wake()
            await asyncio.wait_for(lossy.synced.wait(), DEADLINE_S)
            assert await request(session, envoy.url) == (200, a)
            _, second = lossy.requests
            kinds = [r.type_url for r in second]
            assert kinds.index(TypeUrl.ENDPOINT) < kinds.index(TypeUrl.CLUSTER)
            first = second[kinds.index(TypeUrl.ENDPOINT)]
            assert first.versions if isinstance(first, DeltaRequest) else first.version, "it claims what it had"
            stats = await envoy.get("/stats?filter=cluster_manager.warming_clusters")
            assert stats.strip().endswith(" 0")
