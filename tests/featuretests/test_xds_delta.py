"""Incremental xDS as a dialogue over real gRPC: what is subscribed to, sent, removed, had already and refused."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryResponse

from tests.featuretests.test_xds_dialogue import CDS, EDS, LDS, ONE, RDS, SMOOTH, TWO, A, B, one, two
from tests.harness.ads_client import DEADLINE_S, DeltaStream, delta_stream
from tests.harness.envoy import plan, route_plan, xds_server

BOTH = sorted(ONE + TWO)


def names(response: DeltaDiscoveryResponse) -> list[str]:
    return [resource.name for resource in response.resources]


def versions(*responses: DeltaDiscoveryResponse) -> dict[str, str]:
    return {resource.name: resource.version for response in responses for resource in response.resources}


async def silent(stream: DeltaStream, type_url: str = LDS, name: str = "no such resource") -> None:
    """Nothing more is due, and all that was said is taken in: what comes next answers a new question, about a name that
    there is not."""
    await stream.ask(type_url, [name])
    response = await stream.read()
    assert (response.type_url, names(response), response.removed_resources) == (type_url, [], [name])
    await stream.ack(response)


async def connect(stream: DeltaStream, clusters: list[str]) -> tuple[DeltaDiscoveryResponse, ...]:
    """What an Envoy does when it starts: clusters, their endpoints, routes; each accepted."""
    await stream.ask(CDS)
    response = await stream.read()
    assert (response.type_url, names(response)) == (CDS, clusters)
    await stream.ask(EDS, clusters)
    endpoints = await stream.read()
    assert (endpoints.type_url, names(endpoints)) == (EDS, clusters)
    await stream.ack(response)
    await stream.ack(endpoints)
    await stream.ask(RDS, ["meshctl"])
    routes = await stream.read()
    assert (routes.type_url, names(routes)) == (RDS, ["meshctl"])
    await stream.ack(routes)
    return response, endpoints, routes


async def test_an_envoy_connects() -> None:
    """As with state of the world; each resource has its name and version."""
    async with xds_server() as server, delta_stream(server.address, "gw") as stream:
        server.apply(plan(one()))
        clusters, endpoints, _ = await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        assert len(set(versions(clusters).values())) == len(ONE)
        assert clusters.removed_resources == endpoints.removed_resources == []
        assert clusters.system_version_info


async def test_a_change_sends_what_changed() -> None:
    """One load assignment of four; nothing else is said."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        _, endpoints, _ = await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        tables = {size: {A: 500, B: 500} for size in ("default", "medium", "large")} | {"small": {A: 1, B: 999}}
        server.apply(plan(route_plan("n/one", tables, hosts=("one",))))
        response = await stream.read()
        assert (response.type_url, names(response)) == (EDS, ["n/one/small"])
        assert versions(response)["n/one/small"] != versions(endpoints)["n/one/small"]
        await stream.ack(response)
        await server.wait_synced(DEADLINE_S)
        await silent(stream)


async def test_changes_in_flight_are_coalesced() -> None:
    """While a response is unanswered no second one of its type is sent; then the newest state is, once."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        for share in (100, 200, 300):
            server.apply(plan(one(share, 1000 - share)))
        first = await stream.read()
        await silent(stream)
        await stream.ack(first)
        second = await stream.read()
        await stream.ack(second)
        await server.wait_synced(DEADLINE_S)
        await silent(stream)


async def test_routes_come_after_their_clusters_and_go_before_them() -> None:
    """Make before break: added in the order clusters, endpoints, routes; removed in the reverse, by name."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one(), two()))
        clusters = await stream.read()
        assert (clusters.type_url, names(clusters)) == (CDS, TWO)
        await stream.ask(EDS, TWO)
        endpoints = await stream.read()
        assert (endpoints.type_url, names(endpoints)) == (EDS, TWO)
        await stream.ack(clusters)
        await silent(stream)
        await stream.ack(endpoints)
        routes = await stream.read()
        assert routes.type_url == RDS
        await stream.ack(routes)
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one()))
        routes = await stream.read()
        assert (routes.type_url, names(routes)) == (RDS, ["meshctl"])
        await stream.ack(routes)
        gone = await stream.read()
        assert (gone.type_url, names(gone), gone.removed_resources) == (CDS, [], TWO)
        await stream.ask(EDS, unsubscribe=TWO)
        await stream.ack(gone)
        await server.wait_synced(DEADLINE_S)


async def test_a_wildcard_over_nothing_is_answered() -> None:
    """An empty response: the client knows that there is nothing, and does not wait."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan())
        await stream.ask(CDS)
        response = await stream.read()
        assert (response.type_url, names(response), response.removed_resources) == (CDS, [], [])


async def test_the_explicit_wildcard_comes_and_goes() -> None:
    """`*` beside a name; without it the name stays subscribed, and what changes elsewhere is not told."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS, ["*", ONE[0]])
        response = await stream.read()
        assert names(response) == ONE
        await stream.ack(response)
        await stream.ask(CDS, unsubscribe=["*"])
        await silent(stream, CDS)
        server.apply(plan(one(), two()))
        await stream.ask(CDS, [TWO[0]])
        response = await stream.read()
        assert names(response) == TWO[:1]
        await stream.ack(response)
        await stream.ask(CDS, ["*"])
        assert names(await stream.read()) == sorted({*BOTH} - {ONE[0], TWO[0]})


async def test_every_name_subscribed_to_is_answered() -> None:
    """With the resource; under removed_resources where there is none, and then again once there is one."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, [ONE[0], TWO[0]])
        response = await stream.read()
        assert (names(response), response.removed_resources) == (ONE[:1], TWO[:1])
        await stream.ack(response)
        server.apply(plan(one(), two()))
        response = await stream.read()
        assert (names(response), response.removed_resources) == (TWO[:1], [])


async def test_a_name_subscribed_to_again_is_sent_again() -> None:
    """Changed or not; the others are not."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ONE)
        await stream.ack(await stream.read())
        await stream.ask(EDS, ONE[:1])
        response = await stream.read()
        assert names(response) == ONE[:1]
        await stream.ack(response)
        await silent(stream)


async def test_what_is_unsubscribed_from_is_not_told_any_more() -> None:
    """Neither that it changed nor that it went."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ONE)
        await stream.ack(await stream.read())
        await stream.ask(EDS, unsubscribe=ONE[1:])
        await silent(stream)
        server.apply(plan(one(1, 999)))
        response = await stream.read()
        assert names(response) == ONE[:1]
        await stream.ack(response)
        await silent(stream)


async def test_what_a_wildcard_covers_is_sent_again_when_it_is_unsubscribed_from() -> None:
    """The client has dropped it, and is to have it all the same."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS, ["*", ONE[0]])
        await stream.ack(await stream.read())
        await stream.ask(CDS, unsubscribe=ONE[:1])
        assert names(await stream.read()) == ONE[:1]


async def test_who_comes_back_with_all_of_it_is_sent_nothing() -> None:
    """Not by another server either: versions are content."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        had = [versions(response) for response in await connect(stream, ONE)]
    async with xds_server() as other, delta_stream(other.address) as stream:
        other.apply(plan(one()))
        await stream.ask(CDS, versions=had[0])
        await stream.ask(EDS, ONE, versions=had[1])
        await stream.ask(RDS, ["meshctl"], versions=had[2])
        await silent(stream)
        await other.wait_synced(DEADLINE_S)


async def test_who_comes_back_with_some_of_it_is_sent_the_rest() -> None:
    """What is old or missing is sent, what is no more is removed, what is as it should be is not said."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS)
        had = versions(await stream.read())
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS, versions={ONE[0]: had[ONE[0]], ONE[1]: "old", "n/gone/small": had[ONE[2]]})
        response = await stream.read()
        assert (names(response), response.removed_resources) == (ONE[1:], ["n/gone/small"])


async def test_what_a_client_refused_is_not_sent_to_it_again() -> None:
    """What the error names, until it changes; the others of the response are, as what it has of them is unknown."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS)
        await stream.nack(await stream.read(), f"{ONE[0]} is odd")
        response = await stream.read()
        assert names(response) == ONE[1:]
        await stream.ack(response)
        await silent(stream, CDS)
        server.apply(plan(replace(one(), load_balancer=SMOOTH)))
        assert names(await stream.read()) == ONE


async def test_what_a_proxy_refused_is_quarantined() -> None:
    """Its route goes back to what was accepted before; the next version of it is sent again."""
    async with xds_server() as server, delta_stream(server.address, "gw-7") as stream:
        server.apply(plan(one(), two()))
        await connect(stream, BOTH)
        await server.wait_synced(DEADLINE_S)
        bad = route_plan("n/two", {A: 1, B: 999}, hosts=("two",))
        server.apply(plan(one(), bad))
        response = await stream.read()
        assert names(response) == TWO
        await stream.nack(response, "weights of n/two/small look odd")
        again = await stream.read()
        assert (again.type_url, names(again)) == (EDS, TWO), "what it has of them is unknown"
        await stream.ack(again)
        await server.wait_synced(DEADLINE_S)
        assert server.status().quarantined == {"n/two": "gw-7: weights of n/two/small look odd"}
        server.apply(plan(one(), route_plan("n/two", {A: 2, B: 998}, hosts=("two",))))
        assert names(await stream.read()) == TWO


@pytest.mark.parametrize(
    ("type_url", "code"),
    [("", None), (CDS, None), (EDS, grpc.StatusCode.INVALID_ARGUMENT)],
    ids=["none", "own", "other"],
)
async def test_a_stream_for_one_type_is_for_that_type(type_url: str, code: grpc.StatusCode | None) -> None:
    """Which need not be said; another one ends the stream."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(type_url, ["*"])
        if code is None:
            assert names(await stream.read()) == ONE
        else:
            assert await stream.code() is code
