"""gRPC servers behind a real Envoy: HTTP/2 on both sides, one route for proxies and for clients without one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc import aio

from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness.envoy import plan, require_envoy, xds_server
from tests.harness.grpc_servers import Client, GrpcServers, grpc_client, grpc_plan

pytestmark = pytest.mark.envoy


async def test_grpc_through_envoy_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights and size classes for both; a server that is drained and ends under load loses no call."""
    require_envoy()
    async with GrpcServers(3) as servers, xds_server() as server:
        a, b, c = servers.addresses
        tables = {size: {a: 700, b: 300, c: 0} for size in ("small", "medium", "default")} | {"large": {c: 1000}}
        server.apply(plan(grpc_plan("default/r", tables, hosts=("model.example", "*"))))
        async with (
            EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy,
            aio.insecure_channel(envoy.url.removeprefix("http://")) as channel,
            grpc_client(monkeypatch, server.address, "model.example") as direct,
        ):
            through = Client(channel)
            found = await through.ask(100)
            # Envoy begins its schedule anywhere: a request more or less
            assert (found.failed, set(found.served)) == ({}, {a, b})
            assert abs(found.served[a] - 70) <= 1
            for client in (through, direct):
                assert (await client.ask(20, {"x-batch-size": "64"})).served == {c: 20}
            asking = [asyncio.create_task(client.ask(400)) for client in (through, direct)]
            server.apply(plan(grpc_plan("default/r", {a: 0, b: 500, c: 500}, hosts=("model.example", "*"))))
            for client in (through, direct):
                await client.settled({b, c})
            await servers.leave(0)
            assert [answers.failed for answers in await asyncio.gather(*asking)] == [{}, {}]
            for client in (through, direct):
                assert set((await client.ask(60)).served) == {b, c}
