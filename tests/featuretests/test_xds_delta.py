"""Incremental xDS as a dialogue over real gRPC: what is sent, in which order, and what is not."""

from __future__ import annotations

import grpc
import pytest
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryResponse

from meshctl.model import LoadBalancer, RoutePlan
from tests.harness.ads_client import DEADLINE_S, DeltaStream, delta_stream
from tests.harness.envoy import plan, route_plan, xds_server
from xds.server import XdsServer
from xds.wire import TypeUrl

CDS, EDS, RDS, LDS = TypeUrl.CLUSTER, TypeUrl.ENDPOINT, TypeUrl.ROUTE, TypeUrl.LISTENER
A, B = "127.0.0.1:9001", "127.0.0.1:9002"
ONE = [f"n/one/{size}" for size in ("default", "large", "medium", "small")]
TWO = [name.replace("one", "two") for name in ONE]


def one(a: int = 500, *, small: int | None = None, bias: float = 0.0) -> RoutePlan:
    """`small`: A's weight for the class of that name."""
    weights = {size: {A: a, B: 1000 - a} for size in ("default", "large", "medium", "small")}
    if small is not None:
        weights["small"] = {A: small, B: 1000 - small}
    return route_plan("n/one", weights, hosts=("one",), balancer=LoadBalancer(active_request_bias=bias))


def two() -> RoutePlan:
    return route_plan("n/two", {A: 1000}, hosts=("two",))


def names(response: DeltaDiscoveryResponse) -> list[str]:
    return sorted(resource.name for resource in response.resources)


def versions(response: DeltaDiscoveryResponse) -> dict[str, str]:
    return {resource.name: resource.version for resource in response.resources}


async def connect(stream: DeltaStream, clusters: list[str]) -> dict[TypeUrl, dict[str, str]]:
    """What an Envoy does when it starts: clusters, their endpoints, routes; each accepted. What it has then."""
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
    return {CDS: versions(response), EDS: versions(endpoints), RDS: versions(routes)}


async def in_sync(server: XdsServer, stream: DeltaStream) -> None:
    """And nothing is under way: what comes next is the answer to the next question."""
    await server.wait_synced(DEADLINE_S)
    await stream.ask(RDS, ["no such routes"])
    silence = await stream.read()
    assert (silence.type_url, names(silence), silence.removed_resources) == (RDS, [], ["no such routes"])
    await stream.ack(silence)
    await stream.ask(RDS, [], ["no such routes"])


async def test_an_envoy_connects() -> None:
    """Clusters, endpoints, routes; then it is in sync and hears nothing more."""
    async with xds_server() as server, delta_stream(server.address, "gw") as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await in_sync(server, stream)
        assert [(s.node, s.protocol) for s in server.streams()] == [("gw", "delta")]


async def test_a_wildcard_over_nothing_is_answered_once() -> None:
    """With an empty response: a client that waits for its clusters learns that there are none."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan())
        for kind in (CDS, LDS):
            await stream.ask(kind)
            response = await stream.read()
            assert (response.type_url, names(response), response.removed_resources) == (kind, [], [])
            await stream.ack(response)
        server.apply(plan(one()))
        assert names(await stream.read()) == ONE


async def test_only_what_changed_is_sent() -> None:
    """One weight of one size class is one resource of one response; its version alone is another one."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one(), two()))
        before = (await connect(stream, sorted(ONE + TWO)))[EDS]
        await in_sync(server, stream)
        assert server.apply(plan(one(small=900), two())) == 1
        response = await stream.read()
        assert (response.type_url, names(response), response.removed_resources) == (EDS, ["n/one/small"], [])
        assert versions(response)["n/one/small"] not in before.values()
        await stream.ack(response)
        server.apply(plan(one(), two()))
        back = await stream.read()
        assert versions(back) == {"n/one/small": before["n/one/small"]}, "a version is the content's"
        await stream.ack(back)
        await in_sync(server, stream)


async def test_changes_in_flight_are_coalesced() -> None:
    """While one response is unanswered no second one of its type is sent; then the newest state is, once."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one(600)))
        first = await stream.read()
        for a in range(700, 1000, 10):
            server.apply(plan(one(a)))
        await stream.ack(first)
        await stream.ack(await stream.read())
        await in_sync(server, stream)


async def test_a_route_is_added_before_it_is_used_and_removed_after() -> None:
    """Make: clusters, endpoints, and only then routes. Break: routes, and only then the clusters, by name."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await in_sync(server, stream)
        server.apply(plan(one(), two()))
        clusters = await stream.read()
        assert (clusters.type_url, names(clusters)) == (CDS, TWO)
        await stream.ask(EDS, TWO)
        endpoints = await stream.read()
        assert (endpoints.type_url, names(endpoints)) == (EDS, TWO)
        await stream.ack(endpoints)
        server.apply(plan(one(1), two()))  # the routes are not sent before the clusters are accepted too
        moved = await stream.read()
        assert (moved.type_url, names(moved)) == (EDS, ONE)
        await stream.ack(moved)
        await stream.ack(clusters)
        routes = await stream.read()
        assert (routes.type_url, names(routes)) == (RDS, ["meshctl"])
        await stream.ack(routes)
        await in_sync(server, stream)
        server.apply(plan(one(1)))
        routes = await stream.read()
        assert routes.type_url == RDS
        await stream.ack(routes)
        pruned = await stream.read()
        assert (pruned.type_url, names(pruned), pruned.removed_resources) == (CDS, [], TWO)
        await stream.ask(EDS, [], TWO)
        await stream.ack(pruned)
        await in_sync(server, stream)


async def test_a_changed_cluster_gets_its_endpoints_again() -> None:
    """It warms only on a fresh load assignment, though that one did not change."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        before = await connect(stream, ONE)
        await in_sync(server, stream)
        assert server.apply(plan(one(bias=0.5))) == 4
        clusters = await stream.read()
        assert (clusters.type_url, names(clusters)) == (CDS, ONE)
        endpoints = await stream.read()
        assert (endpoints.type_url, versions(endpoints)) == (EDS, before[EDS])


async def test_what_does_not_exist_is_said_to_be_removed_and_sent_once_it_is_there() -> None:
    """A client that subscribes waits for an answer."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ["n/one/small", "n/two/small"])
        response = await stream.read()
        assert (names(response), response.removed_resources) == (["n/one/small"], ["n/two/small"])
        await stream.ack(response)
        server.apply(plan(one(), two()))
        response = await stream.read()
        assert (names(response), response.removed_resources) == (["n/two/small"], [])


async def test_a_name_that_is_subscribed_to_again_is_answered_again() -> None:
    """With or without unsubscribing in between; what was kept is not sent."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ONE)
        await stream.ack(await stream.read())
        await stream.ask(EDS, [], ONE[:2])
        await stream.ask(EDS, ONE[1:3])
        response = await stream.read()
        assert (names(response), response.removed_resources) == (ONE[1:3], [])
        await stream.ack(response)
        server.apply(plan(one(900)))
        assert names(await stream.read()) == ONE[1:], "what was unsubscribed from is not sent"


async def test_a_wildcard_comes_beside_names_and_goes() -> None:
    """The names stay when it goes; what only the wildcard covered is the client's to drop."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS, ["n/one/small"])
        first = await stream.read()
        assert names(first) == ["n/one/small"]
        await stream.ack(first)
        await stream.ask(CDS, ["*"])
        rest = await stream.read()
        assert names(rest) == ONE[:3]
        await stream.ack(rest)
        await stream.ask(CDS, ["nothing"], ["*"])
        taken_in = await stream.read()
        assert (names(taken_in), taken_in.removed_resources) == ([], ["nothing"])
        await stream.ack(taken_in)
        server.apply(plan(one(bias=0.5), two()))
        response = await stream.read()
        assert (names(response), response.removed_resources) == (["n/one/small"], [])


async def test_a_reconnect_with_what_there_is_is_sent_nothing() -> None:
    """Of another server too: versions are of the content, and two replicas agree."""
    async with xds_server() as server, xds_server() as other:
        server.apply(plan(one(), two()))
        other.apply(plan(two(), one()))
        async with delta_stream(server.address) as stream:
            has = await connect(stream, sorted(ONE + TWO))
            await server.wait_synced(DEADLINE_S)
        for replica in (server, other):
            async with delta_stream(replica.address) as stream:
                await stream.ask(CDS, versions=has[CDS])
                await stream.ask(EDS, sorted(ONE + TWO), versions=has[EDS])
                await stream.ask(RDS, ["meshctl"], versions=has[RDS])
                await in_sync(replica, stream)


async def test_a_reconnect_with_less_is_sent_the_rest() -> None:
    """What it does not have, what it has in another version, and the word that the rest is gone."""
    async with xds_server() as server:
        server.apply(plan(one()))
        async with delta_stream(server.address) as stream:
            has = await connect(stream, ONE)
        async with delta_stream(server.address) as stream:
            claims = {ONE[0]: has[CDS][ONE[0]], ONE[1]: "old", "n/gone/small": "old"}
            await stream.ask(CDS, versions=claims)
            response = await stream.read()
            assert (names(response), response.removed_resources) == (ONE[1:], []), "its routes may name what is gone"
            await stream.ask(EDS, ONE, versions=has[EDS])
            warm = await stream.read()
            assert names(warm) == ONE[1:], "clusters that were sent warm again"
            await stream.ack(warm)
            await stream.ack(response)
            await stream.ask(RDS, ["meshctl"], versions={"meshctl": "old"})
            routes = await stream.read()
            assert names(routes) == ["meshctl"]
            await stream.ack(routes)
            pruned = await stream.read()
            assert (names(pruned), pruned.removed_resources) == ([], ["n/gone/small"])
            await stream.ack(pruned)
            await in_sync(server, stream)


async def test_a_refusal_that_names_one_resource_is_about_that_one() -> None:
    """Its route goes back to its last good state; the others in the response, which Envoy may have dropped with it, are
    sent once more."""
    async with xds_server() as server, delta_stream(server.address, "gw-7") as stream:
        server.apply(plan(one(), two()))
        await connect(stream, sorted(ONE + TWO))
        await server.wait_synced(DEADLINE_S)
        odd = route_plan("n/two", {A: 1, B: 999}, hosts=("two",))
        server.apply(plan(one(900), odd))
        response = await stream.read()
        assert names(response) == sorted(ONE + TWO)
        await stream.nack(response, "n/two/small looks odd")
        again = await stream.read()
        assert names(again) == sorted(ONE + TWO)
        assert server.status().proxies[0].error == "n/two/small looks odd"
        sent, refused = versions(again), versions(response)
        assert all(sent[name] == refused[name] for name in ONE)
        assert all(sent[name] != refused[name] for name in TWO), "back to what it accepted before"
        await stream.ack(again)
        await in_sync(server, stream)
        assert server.status().quarantined == {"n/two": "gw-7: n/two/small looks odd"}
        assert server.apply(plan(one(900), odd)) == 0


@pytest.mark.parametrize("nonce", ["", "0", "made up"])
async def test_a_stale_nonce_answers_nothing_but_subscribes(nonce: str) -> None:
    """Subscriptions are differences: to ignore one would lose it."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one(), two()))
        await stream.ask(EDS, ONE)
        first = await stream.read()
        await stream.ask(EDS, TWO, nonce=nonce, error="late" if nonce else "")
        await stream.ack(first)
        response = await stream.read()
        assert (names(response), response.removed_resources) == (TWO, [])
        assert server.status().proxies[0].error == ""


@pytest.mark.parametrize("kind", [CDS, EDS, LDS, RDS])
async def test_a_stream_of_one_type(kind: TypeUrl) -> None:
    """The type need not be said; routes come without their clusters."""
    async with xds_server() as server, delta_stream(server.address, only=kind) as stream:
        server.apply(plan(one()))
        await stream.ask("", {EDS: ONE, RDS: ["meshctl"]}.get(kind, []))
        response = await stream.read()
        expected = {CDS: ONE, EDS: ONE, LDS: [], RDS: ["meshctl"]}[kind]
        assert (response.type_url, names(response)) == (kind, expected)
        await stream.ack(response)
        await server.wait_synced(DEADLINE_S)


async def test_nothing_is_said_before_the_first_plan() -> None:
    """A restarted server must not tell a serving proxy that what it has is gone."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        await stream.ask(CDS, versions={"n/two/small": "of the earlier server"})
        while not server.status().proxies:
            await server.wait_changed()
        server.apply(plan(one()))
        assert names(await stream.read()) == ONE


async def silent(stream: DeltaStream, type_url: TypeUrl) -> None:
    """Nothing is due, and all that was said is taken in: what comes next answers a new question."""
    await stream.ask(type_url, ["no such resource"])
    response = await stream.read()
    assert (response.type_url, names(response), response.removed_resources) == (type_url, [], ["no such resource"])
    await stream.ack(response)


async def test_what_is_unsubscribed_from_is_not_told_any_more() -> None:
    """Neither that it changed nor that it went."""
    async with xds_server() as server, delta_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ONE)
        await stream.ack(await stream.read())
        await stream.ask(EDS, unsubscribe=ONE[1:])
        await silent(stream, LDS)
        server.apply(plan(one(1)))
        response = await stream.read()
        assert names(response) == ONE[:1]
        await stream.ack(response)
        await silent(stream, LDS)


async def test_what_a_wildcard_covers_is_sent_again_when_it_is_unsubscribed_from() -> None:
    """The client has dropped it, and is to have it all the same."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS, ["*", ONE[0]])
        await stream.ack(await stream.read())
        await stream.ask(CDS, unsubscribe=ONE[:1])
        assert names(await stream.read()) == ONE[:1]


async def test_what_a_client_refused_is_not_sent_to_it_again() -> None:
    """One that is no gateway: nothing is quarantined. What the error names waits for its next version."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS)
        await stream.nack(await stream.read(), f"{ONE[0]} is odd")
        response = await stream.read()
        assert names(response) == ONE[1:]
        await stream.ack(response)
        await silent(stream, CDS)
        assert server.status().quarantined == {}
        server.apply(plan(one(bias=0.5)))
        assert names(await stream.read()) == ONE


async def test_another_type_on_a_stream_for_one_type_ends_it() -> None:
    """The client learns why."""
    async with xds_server() as server, delta_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ["*"])
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "use ADS for several types" in await stream.details()
