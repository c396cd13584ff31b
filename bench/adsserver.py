"""An xDS server in a process of its own, as `meshctl run` has one, or the least that could do its work.

    python -m bench.adsserver PORT ROUTES ENDPOINTS [--bare] [--delta]

Told by lines (bench.lines): `change` publishes another set of weights and answers how long each stream took until its
acknowledgement was taken in; `synced` waits until so many streams are in sync, `gone` until there are none.

The least (`--bare`) writes the same bytes to as many streams and counts the answers: a grpc.aio server that decides,
encodes and remembers nothing. What the real one takes beyond it is its own.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import uvloop
from grpc import aio

from bench.adsacks import Acks
from bench.adsdialogue import Proxy, method
from bench.adsplans import PUSHED, many_routes, reweighted, with_route
from bench.lines import ANSWER_S, serve
from bench.report import quiet_logs
from meshctl.cli.run import MAPPED_BYTES
from meshctl.errors import MeshctlError
from meshctl.heap import give_back, share_heap
from meshctl.model import Plan, RouteId
from meshctl.openfiles import allow_many_connections
from meshctl.sim.load import calm_gc
from xds.cache import Cache
from xds.limits import Limits
from xds.server import XdsServer
from xds.services import options

HEAP_S = 3.0
LOOK_S = 0.01
"""Between two looks at what there is no event for."""


class Served(ABC):
    """A server that a bench can push with."""

    port = 0

    def __init__(self, acks: Acks) -> None:
        self.acks = acks

    @abstractmethod
    async def start(self, port: int) -> None:
        """Listens, with the first plan."""

    @abstractmethod
    def push(self, step: int) -> None:
        """Changes every weight of one route."""

    @property
    @abstractmethod
    def connected(self) -> int:
        """Streams."""

    @abstractmethod
    async def wait(self, streams: int, timeout_s: float) -> bool:
        """Whether so many streams, and all, had what they should in time."""

    async def change(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        self.acks.expect(self.connected)
        self.push(asked["step"])
        pushed_ms = 1e3 * (time.perf_counter() - self.acks.pushed_s)
        return {"ms": await self.acks.wait(), "publish_ms": pushed_ms}

    async def synced(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """How long it takes from now."""
        began_s = time.monotonic()
        complete = await self.wait(asked["streams"], asked["timeout_s"])
        return {"s": time.monotonic() - began_s, "all": complete, "connected": self.connected}

    async def cpu(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"s": time.process_time()}

    async def gone(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        async with asyncio.timeout(ANSWER_S / 2):
            while self.connected:  # noqa: ASYNC110 (nothing tells of it)
                await asyncio.sleep(LOOK_S)
        return {}


class Ours(Served):
    """The real one."""

    def __init__(self, acks: Acks, plan: Plan) -> None:
        super().__init__(acks)
        self._plans = [plan, with_route(plan, reweighted(plan.routes[RouteId(PUSHED)], 1))]
        self._server: XdsServer | None = None

    @property
    def server(self) -> XdsServer:
        if self._server is None:
            raise MeshctlError("the server was not started")
        return self._server

    async def start(self, port: int) -> None:
        self._server = await XdsServer.start(port=port)
        self._server.apply(self._plans[0])
        self.port = self._server.port

    def push(self, step: int) -> None:
        self.server.apply(self._plans[step % 2])

    @property
    def connected(self) -> int:
        return len(self.server.status().proxies)

    async def wait(self, streams: int, timeout_s: float) -> bool:
        try:
            await self.server.wait_synced(timeout_s, streams)
        except MeshctlError:
            return False
        return True


class Bare(Served):
    """See the module."""

    def __init__(self, acks: Acks, payloads: list[bytes], *, delta: bool) -> None:
        super().__init__(acks)
        self._payloads = payloads
        self._method = method(delta=delta)
        self._wakes: set[asyncio.Event] = set()
        self._payload = b""
        self._server = aio.server(options=options(Limits()))

    async def start(self, port: int) -> None:
        _, service, name = self._method.split("/")
        handlers = {name: grpc.stream_stream_rpc_method_handler(self._serve)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    def push(self, step: int) -> None:
        self._payload = self._payloads[step % 2]
        for wake in self._wakes:
            wake.set()

    @property
    def connected(self) -> int:
        return len(self._wakes)

    async def wait(self, streams: int, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        asyncio.get_running_loop().call_later(HEAP_S, give_back)  # as the real one does when a burst is over
        while self.connected < streams and time.monotonic() < until_s:  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(LOOK_S)
        return self.connected >= streams

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> None:
        wake = asyncio.Event()
        writer = asyncio.create_task(self._write(wake, context))
        try:
            async for data in requests:
                self._wakes.add(wake)  # once it has asked
                self.acks.took()
                del data  # or the first, which is large, stays until the second
        finally:
            self._wakes.discard(wake)
            writer.cancel()

    async def _write(self, wake: asyncio.Event, context: Any) -> None:
        while True:
            await wake.wait()
            wake.clear()
            await context.write(self._payload)


def payloads(plan: Plan, *, delta: bool) -> list[bytes]:
    """What the real server sends one stream when every weight of one route changes, and when they change back."""
    cache, proxy = Cache(), Proxy(delta=delta)
    cache.apply(plan)
    proxy.settle(cache)
    found = []
    for changed in (with_route(plan, reweighted(plan.routes[RouteId(PUSHED)], 1)), plan):
        cache.apply(changed)
        found += proxy.settle(cache)
    return found[::-1]


async def main(port: int, routes: int, endpoints: int, *, bare: bool, delta: bool) -> None:
    plan = many_routes(routes, endpoints)
    served: Served = Bare(Acks(), payloads(plan, delta=delta), delta=delta) if bare else Ours(Acks.installed(), plan)
    await served.start(port)
    calm_gc()
    handlers = {"change": served.change, "synced": served.synced, "gone": served.gone, "cpu": served.cpu}
    await serve({"address": f"127.0.0.1:{served.port}"}, handlers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("port", "routes", "endpoints"):
        parser.add_argument(name, type=int)
    for option in ("--bare", "--delta"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    allow_many_connections()
    quiet_logs()
    share_heap(mapped_bytes=MAPPED_BYTES)  # as `meshctl run` does
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(args.port, args.routes, args.endpoints, bare=args.bare, delta=args.delta))
