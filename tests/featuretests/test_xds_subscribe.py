"""State of the world, over real gRPC: what a client asks for by its names, versions and nonces, and what it is sent."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse

from tests.featuretests.test_xds_dialogue import CDS, EDS, LDS, ONE, SMOOTH, TWO, A, B, names, one, two
from tests.harness.ads_client import AdsStream, ads_stream
from tests.harness.envoy import plan, route_plan, xds_server

SMALL = {size: {A: 500, B: 500} for size in ("default", "medium", "large")} | {"small": {A: 1, B: 999}}
"""Weights that differ from those of `one()` in one size class."""


async def silent(stream: AdsStream) -> None:
    """Nothing more is due, and all that was said is taken in: what comes next is the answer to a new question. Once per
    stream: Envoys have no listeners of ours, which is said once."""
    await stream.ask(LDS)
    response = await stream.read()
    assert (response.type_url, response.resources) == (LDS, [])


async def subscribed(stream: AdsStream, clusters: list[str]) -> DiscoveryResponse:
    """The load assignments of `clusters`, accepted."""
    await stream.ask(EDS, clusters)
    response = await stream.read()
    assert names(response) == clusters
    await stream.ack(response, clusters)
    return response


async def test_a_client_that_names_no_clusters_gets_all_until_it_names_some() -> None:
    """The legacy wildcard: it stays one while the list is empty."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(CDS)
        response = await stream.read()
        assert names(response) == ONE
        await stream.ack(response)
        server.apply(plan(one(), two()))
        response = await stream.read()
        assert names(response) == sorted(ONE + TWO)
        await stream.ack(response, ONE[:1])
        server.apply(plan(replace(one(), load_balancer=SMOOTH), two()))
        assert names(await stream.read()) == ONE[:1]


@pytest.mark.parametrize("kind", [CDS, EDS])
async def test_a_star_is_everything_of_any_type(kind: str) -> None:
    """Also of those types that know no legacy wildcard."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(kind, ["*"])
        response = await stream.read()
        assert names(response) == ONE
        await stream.ack(response, ["*"])
        server.apply(plan(one(), two()))
        assert set(names(await stream.read())) >= set(TWO)


async def test_a_client_that_names_no_endpoints_gets_none() -> None:
    """Of load assignments an empty list is nothing."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS)
        await silent(stream)


async def test_a_name_that_was_let_go_and_is_asked_for_again_is_sent_again() -> None:
    """Though it has not changed; what was kept is not sent."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        response = await subscribed(stream, ONE)
        await stream.ack(response, ONE[1:])
        await stream.ack(response, ONE)
        assert names(await stream.read()) == ONE[:1]
        await silent(stream)


async def test_a_request_without_a_nonce_changes_the_names_and_answers_nothing() -> None:
    """What is in flight stays in flight; its answer brings the new names."""
    async with xds_server() as server, ads_stream(server.address) as stream:
        server.apply(plan(one()))
        await stream.ask(EDS, ONE[:1])
        response = await stream.read()
        await stream.ask(EDS, ONE)
        await silent(stream)
        await stream.ack(response, ONE)
        assert names(await stream.read()) == ONE[1:]


async def test_a_version_is_of_all_that_the_client_then_has() -> None:
    """Not only of what is in the response: two clients with the same have the same version, however they came to it."""
    async with (
        xds_server() as server,
        ads_stream(server.address, "first") as first,
        ads_stream(server.address, "second") as second,
    ):
        server.apply(plan(one()))
        before = await subscribed(first, ONE)
        server.apply(plan(route_plan("n/one", SMALL, hosts=("one",))))
        changed = await first.read()
        assert names(changed) == ["n/one/small"]
        assert changed.version_info != before.version_info
        assert changed.version_info == (await subscribed(second, ONE)).version_info


@pytest.mark.parametrize(
    ("kind", "code"), [("", None), (CDS, None), (EDS, grpc.StatusCode.INVALID_ARGUMENT)], ids=["none", "own", "other"]
)
async def test_a_stream_for_one_type_is_for_that_type(kind: str, code: grpc.StatusCode | None) -> None:
    """Which need not be said; another one ends the stream, and the client learns why."""
    async with xds_server() as server, ads_stream(server.address, only=CDS) as stream:
        server.apply(plan(one()))
        await stream.ask(kind)
        if code is None:
            assert names(await stream.read()) == ONE
        else:
            assert await stream.code() is code
            assert "use ADS for several types" in await stream.details()
