"""Many clients at once, over real gRPC: who is served when, and how the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc import aio
from prometheus_client import CollectorRegistry

from tests.featuretests.test_xds_dialogue import CDS, EDS, ONE, RDS, connect, names, one
from tests.harness.ads_client import DEADLINE_S, AdsStream, ads_stream, node_of, open_call
from tests.harness.envoy import plan, xds_server
from xds.inspect import SyncState
from xds.limits import Limits
from xds.metrics import XdsMetrics
from xds.server import XdsServer

NOT_SERVING, SERVING = b"\x08\x02", b"\x08\x01"


async def until(server: XdsServer, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await server.wait_changed()


def states(server: XdsServer) -> dict[str, SyncState]:
    """Of each client's clusters: STALE while its turn has not come."""
    return {stream.node: stream.types[0].state for stream in server.streams()}


async def test_who_comes_with_many_others_waits_for_its_turn() -> None:
    """Until one that came before is up to date; it is not refused meanwhile."""
    async with (
        xds_server(limits=Limits(starting=1, starting_s=DEADLINE_S)) as server,
        ads_stream(server.address, "first") as first,
        ads_stream(server.address, "second") as second,
    ):
        server.apply(plan(one()))
        await first.ask(CDS)
        response = await first.read()
        await second.ask(CDS)
        await until(server, lambda: "second" in states(server))
        (waiting,) = (stream for stream in server.streams() if stream.node == "second")
        assert waiting.types[0].sent_at_s is None
        await first.ask(EDS, ONE)
        endpoints = await first.read()
        await first.ack(response)
        await first.ack(endpoints, ONE)
        await first.ask(RDS, ["meshctl"])
        await first.ack(await first.read(), ["meshctl"])
        assert names(await second.read()) == ONE


async def test_who_does_not_get_up_to_date_holds_up_nobody_for_long() -> None:
    """Its turn is over after a while; it is served all the same."""
    async with (
        xds_server(limits=Limits(starting=1, starting_s=0.1)) as server,
        ads_stream(server.address, "lazy") as lazy,
        ads_stream(server.address, "second") as second,
    ):
        server.apply(plan(one()))
        await lazy.ask(CDS)
        await lazy.read()
        await connect(second, ONE)
        await lazy.ask(EDS, ONE)
        assert names(await lazy.read()) == ONE


async def test_who_comes_back_with_all_there_is_takes_no_turn() -> None:
    """It is in sync before its turn has come: it is told of changes at once, and holds up nobody later."""
    async with xds_server(limits=Limits(starting=1, starting_s=2 * DEADLINE_S)) as server:
        server.apply(plan(one()))
        async with ads_stream(server.address, "before") as stream:
            held = await connect(stream, ONE)
        async with (
            ads_stream(server.address, "back") as back,
            ads_stream(server.address, "new") as new,
        ):
            async with ads_stream(server.address, "lazy") as lazy:
                await lazy.ask(CDS)
                await lazy.read()
                await back.ask(CDS, version=held[CDS])
                await back.ask(EDS, ONE, version=held[EDS])
                await back.ask(RDS, ["meshctl"], version=held[RDS])
                await until(server, lambda: any(p.synced for p in server.status().proxies))
                server.apply(plan(one(1, 999)))
                assert (await back.read()).type_url == EDS
                await new.ask(CDS)
                await until(server, lambda: "new" in states(server))
            assert names(await new.read()) == ONE


async def test_who_goes_before_its_turn_waits_no_more() -> None:
    """Nothing is kept of it, and the metric of those who wait has it no more."""
    registry = CollectorRegistry()
    async with (
        xds_server(limits=Limits(starting=1, starting_s=2 * DEADLINE_S), metrics=XdsMetrics(registry)) as server,
        ads_stream(server.address, "lazy") as lazy,
    ):
        server.apply(plan(one()))
        await lazy.ask(CDS)
        await lazy.read()
        async with ads_stream(server.address, "second") as second:
            await second.ask(CDS)
            await until(server, lambda: "second" in states(server))
            assert registry.get_sample_value("meshctl_xds_streams_waiting") == 1
        await until(server, lambda: "second" not in states(server))
        assert registry.get_sample_value("meshctl_xds_streams_waiting") == 0


async def test_a_client_in_sync_is_told_of_changes_while_others_wait() -> None:
    """Turns are for those who come, not for those who are there."""
    async with (
        xds_server(limits=Limits(starting=1, starting_s=DEADLINE_S)) as server,
        ads_stream(server.address, "there") as there,
        ads_stream(server.address, "lazy") as lazy,
    ):
        server.apply(plan(one()))
        await connect(there, ONE)
        await lazy.ask(CDS)
        await lazy.read()
        server.apply(plan(one(1, 999)))
        response = await there.read()
        assert (response.type_url, names(response)) == (EDS, ONE)


async def test_a_server_that_ends_says_so_and_lets_its_clients_go_one_by_one() -> None:
    """First its health; then the streams, in order and without an error. Who comes meanwhile is sent elsewhere."""
    async with (
        xds_server(limits=Limits(drain_s=0.3)) as server,
        ads_stream(server.address, "first") as first,
        ads_stream(server.address, "second") as second,
        aio.insecure_channel(server.address) as channel,
    ):
        server.apply(plan(one()))
        await connect(first, ONE)
        await connect(second, ONE)
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=DEADLINE_S)
        assert await watch.read() == SERVING
        stopping = asyncio.ensure_future(server.stop())
        assert await watch.read() == NOT_SERVING
        async with ads_stream(server.address, "new") as new:
            assert await ended(new) is grpc.StatusCode.UNAVAILABLE
        assert [await ended(first), await ended(second)] == [grpc.StatusCode.OK] * 2
        await stopping


async def ended(stream: AdsStream) -> grpc.StatusCode:
    code: grpc.StatusCode = await stream.code()
    return code


async def test_an_old_connection_is_asked_to_come_back() -> None:
    """The next stream is on a new one, to whichever replica that leads; what is open on the old one goes on for now."""
    async with (
        xds_server(limits=Limits(connection_age_s=0.2)) as server,
        aio.insecure_channel(server.address) as channel,
    ):
        server.apply(plan(one()))
        old = AdsStream(open_call(channel), node_of("old"))
        await connect(old, ONE)
        async with asyncio.timeout(DEADLINE_S):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        new = AdsStream(open_call(channel), node_of("new"))
        await new.ask(CDS)
        await new.read()
        peers = {stream.node: stream.peer for stream in server.streams()}
        assert peers["old"] != peers["new"]
        server.apply(plan(one(1, 999)))
        assert (await old.read()).type_url == EDS
