"""The ADS protocol as a dialogue over real gRPC: what is sent, in which order, and what is not."""

from __future__ import annotations

import grpc
import pytest
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse

from meshctl.errors import InputError, MeshctlError
from meshctl.model import LoadBalancer, ProxyStatus, RoutePlan
from tests.harness.ads_client import DEADLINE_S, AdsStream, ads_stream
from tests.harness.envoy import SIZES, plan, route_plan, xds_server
from xds.server import XdsServer
from xds.wire import TypeUrl

CDS, EDS, RDS, LDS = TypeUrl.CLUSTER, TypeUrl.ENDPOINT, TypeUrl.ROUTE, TypeUrl.LISTENER
A, B = "127.0.0.1:9001", "127.0.0.1:9002"
SMOOTH = LoadBalancer(active_request_bias=0.5)
ONE = [f"n/one/{size}" for size in ("default", "large", "medium", "small")]
TWO = [name.replace("one", "two") for name in ONE]


def one(a: int = 500, b: int = 500) -> RoutePlan:
    return route_plan("n/one", {A: a, B: b}, hosts=("one",))


def two() -> RoutePlan:
    return route_plan("n/two", {A: 1000}, hosts=("two",))


def names(response: DiscoveryResponse) -> list[str]:
    """Names of the resources in a response: field 1 of each, but for a load assignment's cluster_name, also field 1."""
    found = [resource.unpack() for resource in response.resources]
    return sorted(getattr(r, "name", "") or getattr(r, "cluster_name", "") for r in found)


def weights(response: DiscoveryResponse) -> list[list[int | None]]:
    """Of each load assignment in a response."""
    found = [ClusterLoadAssignment.parse(resource.value) for resource in response.resources]
    return [[e.load_balancing_weight for group in f.endpoints for e in group.lb_endpoints] for f in found]


async def connect(stream: AdsStream, clusters: list[str]) -> dict[str, str]:
    """What an Envoy does when it starts: clusters, their endpoints, routes; each accepted. The versions by type."""
    await stream.ask(CDS)
    response = await stream.read()
    assert (response.type_url, names(response)) == (CDS, clusters)
    await stream.ask(EDS, clusters)
    endpoints = await stream.read()
    assert (endpoints.type_url, names(endpoints)) == (EDS, clusters)
    await stream.ack(response)
    await stream.ack(endpoints, clusters)
    await stream.ask(RDS, ["meshctl"])
    routes = await stream.read()
    assert routes.type_url == RDS
    await stream.ack(routes, ["meshctl"])
    return {r.type_url: r.version_info for r in (response, endpoints, routes)}


async def test_an_envoy_connects() -> None:
    """Clusters, endpoints, routes; then it is in sync and says where its admin interface is."""
    async with xds_server() as server, ads_stream(server.address, "gw", admin="127.0.0.1:9901") as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        assert server.status().proxies == (ProxyStatus("gw", "127.0.0.1:9901", synced=True),)


async def test_nothing_is_said_before_the_first_plan() -> None:
    """A restarted server must not tell a serving proxy that there is nothing."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        await stream.ask(CDS)
        while not server.status().proxies:
            await server.wait_changed()
        with pytest.raises(MeshctlError, match="not in sync: \\['test"):
            await server.wait_synced(0.05)
        server.apply(plan())
        response = await stream.read()
        assert (response.type_url, names(response)) == (CDS, [])


async def test_a_weight_change_sends_one_response() -> None:
    """Only the load assignments that changed; clusters and routes are left alone."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one(), two()))
        await connect(stream, sorted(ONE + TWO))
        await server.wait_synced(DEADLINE_S)
        assert server.apply(plan(one(900, 100), two())) == 4
        response = await stream.read()
        assert (response.type_url, names(response)) == (EDS, ONE)
        await stream.ack(response, ONE + TWO)
        await server.wait_synced(DEADLINE_S)


async def test_changes_in_flight_are_coalesced() -> None:
    """While one response is unanswered no second one of its type is sent; then the newest state is, once."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one(600, 400)))
        first = await stream.read()
        for a in range(700, 1000, 10):
            server.apply(plan(one(a, 1000 - a)))
        await stream.ack(first, ONE)
        second = await stream.read()
        assert weights(second) == [[990, 10]] * 4
        await stream.ack(second, ONE)
        await server.wait_synced(DEADLINE_S)


async def test_a_new_route_waits_for_its_endpoints() -> None:
    """Make: clusters, endpoints, and only when both are accepted the routes."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one(), two()))
        clusters = await stream.read()
        assert (clusters.type_url, names(clusters)) == (CDS, sorted(ONE + TWO))
        await stream.ask(EDS, ONE + TWO)
        endpoints = await stream.read()
        assert (endpoints.type_url, names(endpoints)) == (EDS, TWO)
        await stream.ack(endpoints, ONE + TWO)
        # The routes are not sent before the clusters are accepted too: the next response would be theirs.
        server.apply(plan(one(1, 999), two()))
        moved = await stream.read()
        assert (moved.type_url, names(moved)) == (EDS, ONE)
        await stream.ack(moved, ONE + TWO)
        await stream.ack(clusters)
        assert (await stream.read()).type_url == RDS


async def test_a_removed_route_is_pruned_last() -> None:
    """Break: routes first; clusters only once no accepted routes name them."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one(), two()))
        await connect(stream, sorted(ONE + TWO))
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one()))
        routes = await stream.read()
        assert routes.type_url == RDS
        await stream.ack(routes, ["meshctl"])
        clusters = await stream.read()
        assert (clusters.type_url, names(clusters)) == (CDS, ONE)
        await stream.ask(EDS, ONE)
        await stream.ack(clusters)
        await server.wait_synced(DEADLINE_S)


async def test_a_changed_cluster_gets_its_endpoints_again() -> None:
    """It warms only on a fresh load assignment, though that one did not change."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        resized = route_plan("n/one", {A: 500, B: 500}, hosts=("one",), balancer=SMOOTH)
        assert server.apply(plan(resized)) == 4
        clusters = await stream.read()
        assert clusters.type_url == CDS
        endpoints = await stream.read()
        assert (endpoints.type_url, names(endpoints)) == (EDS, ONE)


async def test_a_reconnect_with_the_current_versions_is_sent_nothing() -> None:
    """What comes first on the new stream is the answer to the next change."""
    async with xds_server() as server:
        server.apply(plan(one()))
        async with ads_stream(server.address) as stream:
            held = await connect(stream, ONE)
            await server.wait_synced(DEADLINE_S)
        async with ads_stream(server.address) as stream:
            await stream.ask(CDS, version=held[CDS])
            await stream.ask(EDS, ONE, version=held[EDS])
            await stream.ask(RDS, ["meshctl"], version=held[RDS])
            await server.wait_synced(DEADLINE_S)
            server.apply(plan(one(1, 999)))
            assert (await stream.read()).type_url == EDS


async def test_a_returning_proxy_keeps_the_clusters_its_old_routes_name() -> None:
    """It left before a route was removed: the clusters go only after it has the new routes."""
    async with xds_server() as server:
        server.apply(plan(one(), two()))
        async with ads_stream(server.address) as stream:
            await connect(stream, sorted(ONE + TWO))
        server.apply(plan(one()))
        async with ads_stream(server.address) as stream:
            await stream.ask(CDS, version="of the earlier stream")
            clusters = await stream.read()
            assert names(clusters) == sorted(ONE + TWO)
            await stream.ask(EDS, ONE + TWO, version="old")
            endpoints = await stream.read()
            assert names(endpoints) == sorted(ONE + TWO)
            await stream.ack(endpoints, ONE + TWO)
            await stream.ack(clusters)
            await stream.ask(RDS, ["meshctl"], version="old")
            routes = await stream.read()
            assert routes.type_url == RDS
            await stream.ack(routes, ["meshctl"])
            assert names(await stream.read()) == ONE


async def test_a_refused_version_is_quarantined() -> None:
    """The route goes back to its last good state and keeps the proxy's words; the content is not sent again."""
    async with xds_server() as server, ads_stream(server.address, "gw-7") as stream:
        server.apply(plan(one(), two()))
        await connect(stream, sorted(ONE + TWO))
        await server.wait_synced(DEADLINE_S)
        bad = route_plan("n/two", {A: 1, B: 999}, hosts=("two",))
        server.apply(plan(one(), bad))
        response = await stream.read()
        await stream.nack(response, "weights of n/two/small look odd", ONE + TWO)
        again = await stream.read()
        assert (again.type_url, names(again)) == (EDS, TWO)
        assert weights(again) == [[1000]] * 4
        assert server.status().proxies[0].error == "weights of n/two/small look odd"
        await stream.ack(again, ONE + TWO)
        await server.wait_synced(DEADLINE_S)
        status = server.status()
        assert status.quarantined == {"n/two": "gw-7: weights of n/two/small look odd"}
        assert status.proxies[0].error == ""
        assert server.apply(plan(one(), route_plan("n/two", {A: 1, B: 999}, hosts=("two",)))) == 0
        assert server.apply(plan(one(10, 990), bad)) == 4
        assert names(await stream.read()) == ONE


async def test_what_another_proxy_accepted_is_not_quarantined() -> None:
    """One odd proxy does not roll back the others; it is just not in sync."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "good") as good,
        ads_stream(server.address, "odd") as odd,
    ):
        server.apply(plan(one()))
        await connect(good, ONE)
        await server.wait_synced(DEADLINE_S)
        await odd.ask(CDS)
        await odd.nack(await odd.read(), "too new for me")
        while not any(p.error for p in server.status().proxies):
            await server.wait_changed()
        status = server.status()
        assert [(p.node, p.synced, p.error) for p in status.proxies] == [
            ("good", True, ""),
            ("odd", False, "too new for me"),
        ]
        assert status.quarantined == {}


async def test_unknown_names_and_types_are_ignored() -> None:
    """No answer, no harm: the stream goes on, and the name is answered once it exists."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", ["x"])
        await stream.ask(RDS, ["no such routes"])
        await stream.ask(EDS, ["n/two/small", "nonsense"])
        await stream.ask(LDS)
        listeners = await stream.read()
        assert (listeners.type_url, list(listeners.resources)) == (LDS, [])
        await stream.ack(listeners)
        server.apply(plan(one(), two()))
        response = await stream.read()
        assert (response.type_url, names(response)) == (EDS, ["n/two/small"])


async def test_a_stale_nonce_is_ignored() -> None:
    """An answer to a response before the last one neither acknowledges nor refuses."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await connect(stream, ONE)
        await server.wait_synced(DEADLINE_S)
        server.apply(plan(one(1, 999)))
        response = await stream.read()
        await stream.ask(EDS, ONE, nonce="0", error="late")
        await stream.ack(response, ONE)
        await server.wait_synced(DEADLINE_S)
        assert server.status().quarantined == {}


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x12\x03\x0a\x09x", b"\x0a\x02\xff\xfe"])
async def test_garbage_ends_its_own_stream_only(garbage: bytes) -> None:
    """The sender learns why; the other proxy does not notice."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "good") as good,
        ads_stream(server.address, "bad") as bad,
    ):
        server.apply(plan(one()))
        await connect(good, ONE)
        await bad.call.write(garbage)
        assert await bad.code() is grpc.StatusCode.INVALID_ARGUMENT
        await server.wait_synced(DEADLINE_S)
        assert [p.node for p in server.status().proxies] == ["good"]
        server.apply(plan(one(1, 999)))
        assert (await good.read()).type_url == EDS


async def test_a_proxy_that_leaves_in_mid_push_disturbs_nobody() -> None:
    """It goes with a response unanswered; the other one gets everything."""
    async with xds_server() as server, ads_stream(server.address, "stays") as stays:
        server.apply(plan(one()))
        await connect(stays, ONE)
        async with ads_stream(server.address, "leaves") as leaves:
            await leaves.ask(CDS)
            await leaves.read()
            server.apply(plan(one(), two()))
        clusters = await stays.read()
        assert names(clusters) == sorted(ONE + TWO)
        while len(server.status().proxies) > 1:
            await server.wait_changed()


async def test_other_services_are_unimplemented() -> None:
    """And do no harm."""
    async with xds_server() as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary("/envoy.service.cluster.v3.ClusterDiscoveryService/FetchClusters")(b"")
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_that_is_taken_is_the_callers_error() -> None:
    """Two servers on one port would each see half of the proxies."""
    async with xds_server() as server:
        with pytest.raises(InputError, match=f"can't listen on 127.0.0.1:{server.port}"):
            await XdsServer.start(port=server.port)


def test_the_size_classes_of_these_tests() -> None:
    """The names above are the harness's."""
    assert sorted([*(s.name for s in SIZES), "default"]) == [name.rpartition("/")[2] for name in ONE]
