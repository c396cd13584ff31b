"""Groups of clients over real gRPC: each is served the routes that name it, and no others."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.google.protobuf import Struct

from meshctl.model import RoutePlan
from tests.featuretests.test_xds_dialogue import CDS, ONE, RDS, TWO, connect, names, one, two
from tests.harness.ads_client import DEADLINE_S, AdsStream, ads_stream
from tests.harness.envoy import plan, xds_server
from xds.wire import GROUP_METADATA


def served_to(route: RoutePlan, *groups: str) -> RoutePlan:
    """`route`, with these in its spec.proxyGroups."""
    return replace(route, route=replace(route.route, spec=replace(route.route.spec, proxy_groups=groups)))


async def test_each_group_is_served_its_own_routes() -> None:
    """By node cluster, or by the node's metadata, which counts more; a route may be for several groups."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "gw") as default,
        ads_stream(server.address, "blue", cluster="blue") as blue,
        ads_stream(server.address, "both", cluster="blue") as both,
    ):
        both.node.metadata = Struct.from_dict({GROUP_METADATA: "both"})
        server.apply(plan(served_to(one(), "meshctl", "both"), served_to(two(), "blue", "both")))
        await connect(default, ONE)
        await connect(blue, TWO)
        await connect(both, sorted(ONE + TWO))
        await server.wait_synced(DEADLINE_S, proxies=3)
        assert {stream.node: stream.group for stream in server.streams()} == {
            "gw": "meshctl",
            "blue": "blue",
            "both": "both",
        }


async def test_a_change_of_one_group_is_not_said_to_the_others() -> None:
    """The version of what they have stays, too."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "gw") as default,
        ads_stream(server.address, "blue", cluster="blue") as blue,
    ):
        server.apply(plan(one(), served_to(two(), "blue")))
        await connect(default, ONE)
        await connect(blue, TWO)
        await server.wait_synced(DEADLINE_S, proxies=2)
        before = server.config("gw")
        server.apply(plan(one()))
        routes = await blue.read()
        assert routes.type_url == RDS
        assert server.config("gw") == before
        assert [s.node for s in server.streams() if any(t.state == "STALE" for t in s.types)] == ["blue"]


async def test_a_route_that_changes_its_group_leaves_one_and_comes_to_the_other() -> None:
    """In each in the order that breaks nothing: pruned last where it goes, its clusters first where it comes."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "gw") as default,
        ads_stream(server.address, "blue", cluster="blue") as blue,
    ):
        server.apply(plan(one(), served_to(two(), "blue")))
        await connect(default, ONE)
        await connect(blue, TWO)
        await server.wait_synced(DEADLINE_S, proxies=2)
        server.apply(plan(one(), served_to(two(), "meshctl")))
        assert (await blue.read()).type_url == RDS
        response = await default.read()
        assert (response.type_url, names(response)) == (CDS, sorted(ONE + TWO))


async def test_a_group_that_no_route_names_is_served_nothing() -> None:
    """It is told so: no clusters, and routes that answer 404."""
    async with xds_server() as server, ads_stream(server.address, cluster="unheard-of") as stream:
        server.apply(plan(one()))
        await stream.ask(CDS)
        response = await stream.read()
        assert response.resources == []
        await stream.ack(response)
        await stream.ask(RDS, ["meshctl"])
        (resource,) = (await stream.read()).resources
        assert RouteConfiguration.parse(resource.value).virtual_hosts == []


async def test_one_host_may_be_another_routes_in_another_group() -> None:
    """Within a group the first route keeps it."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "gw") as default,
        ads_stream(server.address, "blue", cluster="blue") as blue,
    ):
        same = two()
        same = replace(same, route=replace(same.route, spec=replace(same.route.spec, hosts=("one",))))
        server.apply(plan(one(), served_to(same, "blue")))
        assert not server.problems
        for stream, clusters in ((default, ONE), (blue, TWO)):
            await connect(stream, clusters)
        server.apply(plan(one(), served_to(same, "meshctl")))
        assert [problem.where for problem in server.problems] == ["ModelRoute n/two"]


@pytest.mark.parametrize("what", ["id", "cluster", "user_agent_name"])
async def test_a_node_stays_who_it_is(what: str) -> None:
    """Another id, group or flavour on the same stream ends it; the same node said again does not."""
    async with xds_server() as server, ads_stream(server.address, "gw") as stream:
        server.apply(plan(one()))
        await stream.ask(CDS)
        response = await stream.read()
        await say_again(stream)
        await stream.ack(response)
        setattr(stream.node, what, "gRPC Python")
        await say_again(stream)
        await stream.ask(RDS, ["meshctl"])
        assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "open a stream for each node" in await stream.details()


async def say_again(stream: AdsStream) -> None:
    """The next request has the node again."""
    stream._named = False  # noqa: SLF001 (the client of the tests)
