"""Plans to publish, tiny servers that count, and real Envoys in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
import pytest
from aiohttp import web

from meshctl.errors import InputError
from meshctl.model import (
    DEFAULT_CLASS,
    DesiredRoute,
    Endpoint,
    EndpointId,
    LoadBalancer,
    Plan,
    RouteId,
    RoutePlan,
    RouteSpec,
    ServiceProfile,
    SizeClass,
)
from meshctl.sim.envoy import envoy_binary
from xds.credentials import Security
from xds.limits import Limits
from xds.metrics import XdsMetrics
from xds.server import XdsServer

HEADERS = ("x-batch-size", "batch_size", "nv-inferrequest")
SIZES = (SizeClass("small", 1, 7, 1, 0.8), SizeClass("medium", 8, 32, 8, 0.15), SizeClass("large", 33, 128, 64, 0.05))
TABLE = LoadBalancer(active_request_bias=0.0)
"""Follows the weights exactly, whatever is in flight: what a test can count."""


def require_envoy() -> None:
    """Skips the test where there is no Envoy to start."""
    try:
        envoy_binary()
    except InputError as error:
        pytest.skip(str(error))


def endpoint(address: str, *, ready: bool = True) -> Endpoint:
    host, _, port = address.rpartition(":")
    return Endpoint(EndpointId(address), host, int(port), gpu="V100", metrics=address, ready=ready)


def route_plan(
    name: str,
    weights: Mapping[str, Mapping[str, int]] | Mapping[str, int],
    *,
    hosts: Sequence[str] = ("*",),
    sizes: Sequence[SizeClass] = SIZES,
    headers: Sequence[str] = HEADERS,
    balancer: LoadBalancer = TABLE,
    not_ready: Sequence[str] = (),
    timeout_s: float = 30.0,
) -> RoutePlan:
    """A route whose size classes have `weights` by endpoint address: one table for all, or one per size class."""
    names = [*(s.name for s in sizes), DEFAULT_CLASS]
    tables = {size: {EndpointId(a): w for a, w in _table(weights, size).items()} for size in names}
    addresses = sorted({address for table in tables.values() for address in table})
    spec = RouteSpec(RouteId(name), tuple(hosts), "m", 0.15, 0.99, tuple(headers), tuple(sizes), timeout_s=timeout_s)
    endpoints = tuple(endpoint(a, ready=a not in not_ready) for a in addresses)
    return RoutePlan(
        route=DesiredRoute(spec, endpoints, {"V100": ServiceProfile.affine(0.005, 0.001)}),
        weights=tables,
        load_balancer=balancer,
        attainment={},
        utilization={},
        load_rps=0.0,
        feasible=True,
        drained=frozenset(),
        reasons=(),
    )


def _table(weights: Mapping[str, Mapping[str, int]] | Mapping[str, int], size: str) -> Mapping[str, int]:
    value = weights.get(size)
    if isinstance(value, Mapping):
        return value
    return {str(name): weight for name, weight in weights.items() if isinstance(weight, int)}


def plan(*routes: RoutePlan) -> Plan:
    return Plan({route.route.spec.id: route for route in routes})


@asynccontextmanager
async def xds_server(
    port: int = 0,
    security: Security | None = None,
    limits: Limits | None = None,
    metrics: XdsMetrics | None = None,
) -> AsyncIterator[XdsServer]:
    """A server of ours, stopped at the end."""
    server = await XdsServer.start(port=port, security=security, limits=limits, metrics=metrics)
    try:
        yield server
    finally:
        await server.stop()


@dataclass
class Backends:
    """HTTP servers on loopback, by name; each answers 200 with its name and counts."""

    count: int
    served: Counter[str] = field(default_factory=Counter)
    addresses: list[str] = field(default_factory=list)
    _leaving: set[int] = field(default_factory=set)
    _runners: list[web.AppRunner] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        for _ in range(self.count):
            await self._start()
        return self

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**20)
        index = len(self.addresses)

        async def answer(_: web.Request) -> web.Response:
            self.served[self.addresses[index]] += 1
            response = web.Response(text=self.addresses[index])
            if index in self._leaving:
                response.force_close()
            return response

        app.router.add_route("*", "/{tail:.*}", answer)
        # Header limits above Envoy's: a long header must get through to be seen served.
        runner = web.AppRunner(app, access_log=None, max_field_size=200_000, max_line_size=200_000)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._runners.append(runner)
        self.addresses.append(f"127.0.0.1:{runner.addresses[0][1]}")

    async def leave(self, index: int) -> None:
        """As a server does that is told to end: no new connections, and each one closed after its next answer."""
        self._leaving.add(index)
        for site in list(self._runners[index].sites):
            await site.stop()

    async def die(self, index: int) -> None:
        """As a server does that is killed: every connection is reset, whatever was asked on it."""
        await self.leave(index)
        server = self._runners[index].server
        for connection in server.connections if server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            await runner.cleanup()


@dataclass
class Outcome:
    """What a stream of requests came to."""

    statuses: Counter[int | str] = field(default_factory=Counter)
    bodies: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status != 200)


async def request(
    session: aiohttp.ClientSession, url: str, headers: Sequence[tuple[str, str]] = (), host: str = ""
) -> tuple[int, str]:
    """Status and body of one request."""
    named = [*headers, *([("host", host)] if host else [])]
    async with session.post(url + "/v2/models/m/infer", headers=named, data=b"{}") as answer:
        return answer.status, await answer.text()


@asynccontextmanager
async def load(url: str, *, workers: int = 8, host: str = "") -> AsyncIterator[Outcome]:
    """Requests one after the other from `workers` clients for as long as the block lasts."""
    outcome, stop = Outcome(), asyncio.Event()

    async def work(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            try:
                status, body = await request(session, url, host=host)
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome.statuses[repr(error)] += 1
            else:
                outcome.statuses[status] += 1
                outcome.bodies[body] += status == 200

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        tasks = [asyncio.create_task(work(session)) for _ in range(workers)]
        try:
            yield outcome
        finally:
            stop.set()
            await asyncio.gather(*tasks)
