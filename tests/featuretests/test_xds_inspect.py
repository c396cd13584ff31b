"""What the server says of its clients while they do this and that: `streams`, `config`, metrics and health."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from grpc import aio
from prometheus_client import CollectorRegistry

from tests.featuretests.test_xds_dialogue import CDS, EDS, LDS, ONE, RDS, A, B, connect, one, two
from tests.harness.ads_client import DEADLINE_S, ads_stream, delta_stream
from tests.harness.envoy import plan, route_plan, xds_server
from xds.inspect import SHORT, StreamStatus, SyncState
from xds.metrics import XdsMetrics
from xds.server import XdsServer

SYNCED, STALE, NACKED, NOT_SENT, NOT_ASKED = SyncState


async def seen(server: XdsServer, holds: Callable[[dict[str, StreamStatus]], bool]) -> dict[str, StreamStatus]:
    """The streams by node, as soon as what is said of them `holds`."""
    async with asyncio.timeout(DEADLINE_S):
        while not holds(found := {stream.node: stream for stream in server.streams()}):
            await server.wait_changed()
    return found


def states(stream: StreamStatus) -> dict[str, SyncState]:
    return {status.type: status.state for status in stream.types}


def held(server: XdsServer, node: str) -> dict[str, list[str]]:
    """Names of what a node holds, by type."""
    config = server.config(node)
    assert config is not None
    return {kind: [resource.name for resource in found] for kind, found in config.items()}


async def test_an_envoy_is_followed_from_its_first_request_until_it_goes() -> None:
    """Not asked, not sent before there is a plan, stale while unanswered, synced; gone when it is gone."""
    async with xds_server() as server:
        assert server.streams() == ()
        async with ads_stream(server.address, "gw", cluster="blue") as stream:
            await stream.ask(CDS)
            found = await seen(server, lambda s: "gw" in s)
            assert states(found["gw"]) == {"CDS": NOT_SENT, "EDS": NOT_ASKED, "LDS": NOT_ASKED, "RDS": NOT_ASKED}
            said = found["gw"]
            assert (said.group, said.flavour, said.protocol, said.service) == ("blue", "envoy", "sotw", "ADS")
            assert said.peer.startswith("ipv4:127.0.0.1:")
            server.apply(plan(one()))
            response = await stream.read()
            assert response.resources == [], "no route is for the group"
            found = await seen(server, lambda s: states(s["gw"])["CDS"] is STALE)
            assert found["gw"].types[0].sent_at_s is not None
            assert found["gw"].types[0].acked_at_s is None
            await stream.ack(response)
            found = await seen(server, lambda s: states(s["gw"])["CDS"] is SYNCED)
            assert found["gw"].types[0].acked_at_s is not None
        await seen(server, lambda s: not s)
        assert server.config("gw") is None


async def test_what_is_held_is_what_was_acknowledged() -> None:
    """Not what was sent: that is stale, and held only once it is accepted."""
    async with xds_server() as server, ads_stream(server.address, "gw") as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        (status,) = server.streams()
        assert states(status) == {"CDS": SYNCED, "EDS": SYNCED, "LDS": NOT_ASKED, "RDS": SYNCED}
        assert [kind.resources for kind in status.types] == [4, 4, 0, 1]
        assert held(server, "gw") == {"CDS": ONE, "EDS": ONE, "LDS": [], "RDS": ["meshctl"]}
        server.apply(plan(one(), two()))
        response = await stream.read()
        assert response.type_url == CDS
        (status,) = server.streams()
        assert states(status) == {"CDS": STALE, "EDS": SYNCED, "LDS": NOT_ASKED, "RDS": STALE}
        assert held(server, "gw")["CDS"] == ONE
        await stream.ack(response)
        await seen(server, lambda s: states(s["gw"])["CDS"] is SYNCED)
        assert len(held(server, "gw")["CDS"]) == 8


async def test_a_refusal_is_shown_word_for_word_and_what_was_before_is_held() -> None:
    """Until something newer is accepted; metrics and other types are told apart."""
    registry = CollectorRegistry()
    async with xds_server(metrics=XdsMetrics(registry)) as server:
        async with ads_stream(server.address, "gw") as stream:
            server.apply(plan(one()))
            await connect(stream, ONE)
            await server.wait_synced(DEADLINE_S)
            before = server.config("gw")
            server.apply(plan(route_plan("n/one", {A: 1, B: 999}, hosts=("one",))))
            await stream.nack(await stream.read(), "odd [weights]", ONE)
            found = await seen(server, lambda s: states(s["gw"])["EDS"] is NACKED)
            (cds, eds, lds, rds) = found["gw"].types
            assert (eds.error, cds.error, lds.error, rds.error) == ("odd [weights]", "", "", "")
            assert (cds.state, rds.state) == (SYNCED, SYNCED)
            assert before is not None
            assert held(server, "gw")["CDS"] == [resource.name for resource in before["CDS"]]
            again = await stream.read()
            await stream.ack(again, ONE)
            found = await seen(server, lambda s: states(s["gw"])["EDS"] is SYNCED)
            assert found["gw"].types[1].error == ""
            assert server.config("gw") == before

        def counted(name: str, kind: str) -> float | None:
            return registry.get_sample_value(f"meshctl_xds_{name}", {"type": SHORT[kind]})

        assert [counted("nacks_total", kind) for kind in (CDS, EDS, LDS, RDS)] == [0, 1, 0, 0]
        assert [counted("pushes_total", kind) for kind in (CDS, EDS, LDS, RDS)] == [1, 3, 0, 1]
        assert [counted("ack_seconds_count", kind) for kind in (CDS, EDS, LDS, RDS)] == [1, 2, 0, 1]
        assert [counted("requests_total", kind) for kind in (CDS, EDS, LDS, RDS)] == [2, 4, 0, 2]
        await seen(server, lambda s: not s)
        assert registry.get_sample_value("meshctl_xds_streams", {"protocol": "sotw"}) == 0


async def test_a_delta_stream_for_one_type_is_shown_as_such() -> None:
    """And two streams of one node are two; what they hold together is one configuration."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "gw") as stream,
        delta_stream(server.address, "gw", only=CDS) as other,
    ):
        server.apply(plan(one()))
        await connect(stream, ONE)
        await other.ask(CDS, ONE[:1])
        await other.ack(await other.read())
        async with asyncio.timeout(DEADLINE_S):
            while [s.types[0].state for s in server.streams()] != [SYNCED, SYNCED]:
                await server.wait_changed()
        assert {(s.service, s.protocol): s.types[0].resources for s in server.streams()} == {
            ("ADS", "sotw"): 4,
            ("CDS", "delta"): 1,
        }
        assert held(server, "gw")["CDS"] == ONE


async def test_health_is_that_of_what_is_published() -> None:
    """Over the server's own port: not serving before the first plan, then serving, and no more before it ends."""
    async with xds_server() as server, aio.insecure_channel(server.address) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=DEADLINE_S)
        assert await watch.read() == b"\x08\x02"
        server.apply(plan(one()))
        assert await watch.read() == b"\x08\x01"
        await server.stop()
        assert await watch.read() == b"\x08\x02"
