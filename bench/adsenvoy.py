"""The xDS server and a real Envoy: what it says, when a decision is in force in it, and changes under load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import grpc
import numpy as np
from grpc import aio

from bench.adsacks import Acks
from bench.adsdialogue import SOTW_METHOD, skimmed
from bench.adsplans import PUSHED, many_routes, with_host, with_route
from bench.loop import CHANGE_LOAD, random_weights
from bench.report import Figure, Report, at_most, progress, quantiles
from meshctl.model import Plan, RouteId
from meshctl.sim.envoy import EnvoyProcess, gateway
from meshctl.sim.fleet import FleetProcess
from meshctl.sim.load import Load, LoadConfig
from meshctl.sim.reference import MIX, MODEL, SIZES, capacity_rps, fleet_config
from meshctl.sim.versus import endpoint_of
from tests.harness.envoy import Backends, plan, request, route_plan, xds_server
from xds.server import XdsServer
from xds.wire import TypeUrl, response

ONE_MS, MANY_MS = 10.0, 40.0
ENDPOINTS_OF_A_ROUTE = 10
SYNC_S, START_S = 60.0, 120.0
REST_S = 0.02
LOOK_S = 0.001
"""Between two requests that see whether a decision is in force: without a pause they take the time they measure."""
CHANGES_RPS = 50.0
HOST = "r0000.example"
"""Of the route that changes."""


# --------------------------------------------------------------------------------------------------- what Envoy says


async def said_by_envoy() -> tuple[bytes, bytes]:
    """The first DiscoveryRequest of a real Envoy on a stream, and its acknowledgement of an empty list of clusters."""
    heard: list[bytes] = []
    enough = asyncio.Event()

    async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
        async for data in requests:
            heard.append(data)
            if len(heard) == 1:
                await context.write(response(TypeUrl.CLUSTER, "0" * 32, "1", b""))
            elif skimmed(data).type_url == TypeUrl.CLUSTER:
                enough.set()

    server = aio.server()
    _, service, name = SOTW_METHOD.split("/")
    handlers = {name: grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with TemporaryDirectory(prefix="meshctl-bench-") as directory:
            config = gateway(f"127.0.0.1:{port}", "bench")
            async with EnvoyProcess(Path(directory), config, wait_ready=False), asyncio.timeout(SYNC_S):
                await enough.wait()
    finally:
        await server.stop(0)
    return heard[0], next(data for data in heard[1:] if skimmed(data).type_url == TypeUrl.CLUSTER)


# ------------------------------------------------------------------------------------------- a decision -> in force


@dataclass(slots=True)
class _InForce:
    """In ms, of each change."""

    acknowledged: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)


async def bench_in_force(report: Report, acks: Acks, routes: int, repeats: int) -> None:
    """A decision for one route of 1 and of `routes`: its weights, and another host."""
    for count, limit in ((1, ONE_MS), (routes, MANY_MS)):
        progress(f"{repeats} decisions of {count} routes, in force in a real Envoy ...")
        async with Backends(2) as backends, xds_server() as server, _envoy(server, acks) as measured:
            a, b = backends.addresses
            others = many_routes(count, ENDPOINTS_OF_A_ROUTE)
            to_a, to_b = (
                with_route(others, route_plan(PUSHED, {a: w, b: 1000 - w}, hosts=(HOST,), sizes=SIZES))
                for w in (1000, 0)
            )
            await measured.begin(to_a)
            weights = await measured.changes([to_a, to_b], repeats, (HOST, [(200, a), (200, b)]))
            other = "other.example"
            hosted = with_route(to_a, with_host(to_a.routes[RouteId(PUSHED)], other))
            hosts = await measured.changes([to_a, hosted], repeats, (other, [(404, ""), (200, a)]))
        for name, found in (("weights", weights), ("a host", hosts)):
            note = f"one of {count} routes changed: {name}"
            target = {0.99: at_most(limit)}
            title = f"decision -> {{}}, {count} routes, {name}"
            report.add(
                *quantiles(title.format("ACKed by Envoy"), found.acknowledged, "ms", target, note),
                *quantiles(title.format("first answer by it"), found.answered, "ms", target, note),
            )


@dataclass(slots=True)
class _Measured:
    server: XdsServer
    acks: Acks
    envoy: EnvoyProcess
    session: aiohttp.ClientSession

    async def begin(self, first: Plan) -> None:
        self.server.apply(first)
        await self.envoy.wait_ready(START_S)
        await self.server.wait_synced(START_S)

    async def changes(self, plans: list[Plan], repeats: int, expected: tuple[str, list[tuple[int, str]]]) -> _InForce:
        """From one plan to the other and back; `expected`: a host, and what it is answered under each of them."""
        found = _InForce()
        host, answers = expected
        for step in range(1, repeats + 1):
            which = step % 2
            await asyncio.sleep(REST_S)  # a pace, so that each change begins at rest
            self.acks.expect(1)
            start_s = time.perf_counter()
            self.server.apply(plans[which])
            waiting = asyncio.create_task(self.acks.wait())
            async with asyncio.timeout(SYNC_S):
                while await self._ask(host) != answers[which]:  # noqa: ASYNC110 (an answer is all there is to see)
                    await asyncio.sleep(LOOK_S)
            found.answered.append(1e3 * (time.perf_counter() - start_s))
            found.acknowledged += (await waiting)[:1]
            await self.server.wait_synced(SYNC_S)
        return found

    async def _ask(self, host: str) -> tuple[int, str]:
        return await request(self.session, self.envoy.url, host=host)


@asynccontextmanager
async def _envoy(server: XdsServer, acks: Acks) -> AsyncIterator[_Measured]:
    with TemporaryDirectory(prefix="meshctl-bench-") as directory:
        async with (
            EnvoyProcess(Path(directory), gateway(server.address, "bench"), wait_ready=False) as envoy,
            aiohttp.ClientSession() as session,
        ):
            yield _Measured(server, acks, envoy, session)


# ------------------------------------------------------------------------------------------------ changes under load


async def bench_changes(report: Report, changes: int) -> None:
    """Random weights, endpoints and a second route that come and go, 50 a second, whatever was acknowledged."""
    progress(f"{changes} changes at {CHANGES_RPS:g}/s under load ...")
    with TemporaryDirectory(prefix="meshctl-bench-") as directory:
        async with FleetProcess(fleet_config()) as fleet, xds_server() as server:
            addresses = [endpoint_of(s) for s in fleet.info.servers]
            random = np.random.default_rng(1)
            server.apply(plan(route_plan("bench/r", random_weights(random, addresses), sizes=SIZES)))
            async with EnvoyProcess(Path(directory), gateway(server.address, "bench")) as envoy:
                config = LoadConfig((envoy.url,), CHANGE_LOAD * capacity_rps(), MIX, float("inf"), model=MODEL)
                load = Load(config)
                sending = asyncio.create_task(load.run())
                seconds = await _paced(lambda step: server.apply(_random_plan(random, addresses, step)), changes)
                await server.wait_synced(SYNC_S)
                load.stop()
                result = await sending
    note = f"{changes / seconds:.0f} changes/s; {result.requests} requests at {result.rate_rps:.0f}/s"
    report.add(Figure(f"failed requests during {changes} changes", result.failed, "requests", at_most(0), note))
    report.details["changes"] = {"failures": dict(result.failures), "p99_ms": result.p99_ms}


def _random_plan(random: np.random.Generator, addresses: list[str], step: int) -> Plan:
    some = addresses if step % 5 else addresses[: len(addresses) - 1 - int(random.integers(4))]
    served = route_plan("bench/r", random_weights(random, some), sizes=SIZES)
    if step % 7:
        return plan(served)
    return plan(served, route_plan("bench/s", random_weights(random, some), hosts=("s.example",), sizes=SIZES))


async def _paced(change: Callable[[int], object], changes: int) -> float:
    """At `CHANGES_RPS`, counted from the beginning; how long it took, in s."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for step in range(changes):
        change(step)
        await asyncio.sleep(max(0.0, began_s + (step + 1) / CHANGES_RPS - loop.time()))
    return loop.time() - began_s
