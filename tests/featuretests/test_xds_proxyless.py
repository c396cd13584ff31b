"""gRPC's own `xds:///` resolver against our xDS server: no proxy between a client and the servers that answer it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from meshctl.model import Plan, Retry
from tests.harness.certificates import Authority, tls_files
from tests.harness.envoy import plan, xds_server
from tests.harness.grpc_servers import DEADLINE_S as CALL_DEADLINE_S
from tests.harness.grpc_servers import HANG, Answers, GrpcServers, grpc_client, grpc_plan
from xds.credentials import Security
from xds.grpcbootstrap import ClientTls

HOST = "model.example"


def shares(servers: GrpcServers, *weights: int) -> dict[str, int]:
    return dict(zip(servers.addresses, weights, strict=True))


def published(servers: GrpcServers, *weights: int, host: str = HOST) -> Plan:
    """One route; the first two servers are V100s, the others T4s."""
    gpus = {address: "V100" if i < 2 else "T4" for i, address in enumerate(servers.addresses)}
    return plan(grpc_plan("ml/model", shares(servers, *weights), hosts=(host, "*"), gpus=gpus))


async def test_weights_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between GPU products, and inside one; a server of weight 0 gets nothing."""
    async with GrpcServers(4) as servers, xds_server() as xds:
        xds.apply(published(servers, 500, 250, 250, 0))
        async with grpc_client(monkeypatch, xds.address, HOST) as client:
            await client.settled(set(servers.addresses[:3]))
            found = await client.ask(2000)
    assert not found.failed
    a, b, c = (found.served[address] for address in servers.addresses[:3])
    # six standard deviations of what is drawn
    assert abs(a - 1000) < 135
    assert abs(b - 500) < 117
    assert abs(c - 500) < 117
    assert a + b + c == 2000


async def test_servers_of_weights_alike_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by chance: one after the other, also where weights differ by rounding."""
    async with GrpcServers(3) as servers, xds_server() as xds:
        xds.apply(plan(grpc_plan("ml/model", shares(servers, 333, 333, 334), hosts=(HOST,))))
        async with grpc_client(monkeypatch, xds.address, HOST) as client:
            await client.settled(set(servers.addresses))
            found = await client.ask(300, at_once=1)
    assert sum(found.served.values()) == 300
    # drawn by chance, they would be off by 8 as often as not
    assert all(abs(count - 100) <= 3 for count in found.served.values())


async def test_the_size_header_steers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Envoy: the first header present wins, nonsense is the default class's."""
    async with GrpcServers(4) as servers, xds_server() as xds:
        small, medium, large, default = servers.addresses
        tables = {
            size: {address: 1000 if address == own else 0 for address in servers.addresses}
            for size, own in zip(("small", "medium", "large", "default"), servers.addresses, strict=True)
        }
        gpus = {small: "V100", medium: "V100", large: "A100 80/G", default: ""}
        xds.apply(plan(grpc_plan("ml/model", tables, hosts=(HOST,), gpus=gpus)))
        async with grpc_client(monkeypatch, xds.address, HOST) as client:
            asked = [
                ({}, default),
                ({"x-batch-size": "1"}, small),
                ({"x-batch-size": "+008"}, medium),
                ({"x-batch-size": "64"}, large),
                ({"batch_size": "128"}, large),
                ({"nv-inferrequest": "request_id: 7 batch_size: 32 x"}, medium),
                ({"x-batch-size": "abc", "batch_size": "64"}, default),
                ({"x-batch-size": "1e1"}, default),
                ({"x-batch-size": "129"}, default),
            ]
            found = {str(metadata): (await client.ask(4, metadata)).served for metadata, _ in asked}
    assert found == {str(metadata): Counter({address: 4}) for metadata, address in asked}


async def test_changes_under_load_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights move from server to server and from product to product, to 0 and back; a server leaves for good."""
    async with GrpcServers(4) as servers, xds_server() as xds:
        xds.apply(published(servers, 250, 250, 250, 250))
        async with grpc_client(monkeypatch, xds.address, HOST) as client:
            await client.settled(set(servers.addresses))
            stop, total = asyncio.Event(), Answers()

            async def load() -> None:
                while not stop.is_set():
                    found = await client.ask(40, at_once=4)
                    total.served.update(found.served)
                    total.failed.update(found.failed)

            asking = asyncio.create_task(load())
            try:
                for step in range(20):
                    one_product = (600, 400, 0, 0) if step % 2 else (0, 0, 300, 700)
                    for weights in (one_product, (10 * step, 1000 - 10 * step, 0, 0), (250, 250, 250, 250)):
                        xds.apply(published(servers, *weights))
                        await asyncio.sleep(0.005)  # a change while the one before it is on its way
                xds.apply(published(servers, 0, 0, 1000, 0))
                await client.settled({servers.addresses[2]})
                await servers.leave(0)
                left = dict.fromkeys(servers.addresses[1:2], 1000)
                xds.apply(plan(grpc_plan("ml/model", left, hosts=(HOST,))))
                await client.settled(set(left))
            finally:
                stop.set()
                await asking
    assert not total.failed
    assert sum(total.served.values()) > 0


async def test_an_xds_server_that_restarts_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients keep what they have, and take what is new once it is back."""
    async with GrpcServers(2) as servers:
        first, second = servers.addresses
        async with xds_server() as xds:
            port = xds.port
            xds.apply(plan(grpc_plan("ml/model", {first: 1000, second: 0}, hosts=(HOST,))))
            async with grpc_client(monkeypatch, xds.address, HOST) as client:
                await client.settled({first})
                await xds.stop()
                assert (await client.ask(40)).served == {first: 40}
                async with xds_server(port) as again:
                    assert (await client.ask(40)).served == {first: 40}
                    again.apply(plan(grpc_plan("ml/model", {first: 0, second: 1000}, hosts=(HOST,))))
                    await client.settled({second})


async def test_the_routes_timeout_ends_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the client's own deadline, which is longer."""
    async with GrpcServers(1) as servers, xds_server() as xds:
        xds.apply(plan(grpc_plan("ml/model", shares(servers, 1000), hosts=(HOST,), timeout_s=0.2)))
        async with grpc_client(monkeypatch, xds.address, HOST) as client:
            began_s = time.monotonic()
            found = await client.ask(1, method=HANG)
    assert [reason.partition(":")[0] for reason in found.failed] == ["DEADLINE_EXCEEDED"]
    assert time.monotonic() - began_s < CALL_DEADLINE_S


async def test_a_client_of_a_group_over_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the bootstrap's certificates it is served its group's route for the host, not that of others."""
    pki = Authority(tmp_path)
    server, edge = pki.issue("server", san="IP:127.0.0.1"), pki.issue("edge", subject="/CN=edge")
    tls = ClientTls(pki.ca, edge, edge.with_suffix(".key"))
    security = Security(tls_files(server, pki.ca))
    async with GrpcServers(2) as servers, xds_server(security=security) as xds:
        theirs, own = servers.addresses
        routes = [
            grpc_plan("ml/all", {theirs: 1000}, hosts=(HOST,)),
            grpc_plan("ml/edge", {own: 1000}, hosts=(HOST,), proxy_groups=("edge",)),
        ]
        xds.apply(plan(*routes))
        async with grpc_client(monkeypatch, xds.address, HOST, group="edge", tls=tls) as client:
            assert (await client.ask(20)).served == {own: 20}
        assert not xds.problems


async def test_nobody_ready_is_unavailable_until_somebody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Envoy's 503: at once, not at the deadline."""
    async with GrpcServers(1) as servers, xds_server() as xds:
        (only,) = servers.addresses
        xds.apply(plan(grpc_plan("ml/model", {only: 1000}, hosts=(HOST,), not_ready=(only,))))
        async with grpc_client(monkeypatch, xds.address, HOST) as client:
            found = await client.ask(1)
            assert [reason.partition(":")[0] for reason in found.failed] == ["UNAVAILABLE"]
            xds.apply(plan(grpc_plan("ml/model", {only: 1000}, hosts=(HOST,), retry=Retry(2, None, idempotent=True))))
            await client.settled({only})
