"""Who is connected to the xDS server and what they hold: the admin API over HTTP, and the commands as processes."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
import pytest
from rich.console import Console, RenderableType

from meshctl.cli.status import proxies_table
from meshctl.controller.admin import AdminServer
from meshctl.controller.loop import Loop
from meshctl.controller.proxies import StreamView, TypeView, Wanted, config_view, stream_views
from meshctl.controller.views import ProxyView
from meshctl.ports import Desired
from tests.harness.controller import ANY_PORT, DEADLINE_S, ManualClock, MemoryProxies, MemorySignals, MemorySource
from tests.harness.envoy import route_plan
from tests.unit.test_cli_admin import meshctl
from xds.inspect import StreamStatus, SyncState, TypeStatus
from xds.translate import Resource, translate_route

ROUTE = translate_route(route_plan("demo/resnet", {"10.0.0.1:8000": 600, "10.0.0.2:8000": 400}))
ENVOY = StreamStatus(
    node="gw-1",
    group="meshctl",
    flavour="Envoy",
    peer="ipv4:10.1.2.3:4711",
    identity="spiffe://example.org/gateways/gw-1",
    protocol="delta",
    service="ADS",
    connected_s=200.0,
    types=(
        TypeStatus("CDS", SyncState.SYNCED, 4, "c" * 32, sent_at_s=990.0, acked_at_s=990.5),
        TypeStatus("EDS", SyncState.STALE, 4, "e" * 32, sent_at_s=998.0, acked_at_s=990.5),
        TypeStatus("LDS", SyncState.NOT_SENT),
        TypeStatus("RDS", SyncState.NACKED, 1, "d" * 32, sent_at_s=991.0, acked_at_s=980.0, error="no such [thing]"),
    ),
)
CLIENT = StreamStatus(
    node="python/client 7",
    group="chat",
    flavour="gRPC",
    peer="ipv6:[::1]:4712",
    identity="",
    protocol="sotw",
    service="ADS",
    connected_s=3.21,
    types=(TypeStatus("LDS", SyncState.SYNCED, 1, "a" * 32, 990.0, 990.0), TypeStatus("CDS", SyncState.NOT_ASKED)),
)


@dataclass
class MemoryStreams:
    """An xDS server with these clients; what a node holds is by its id."""

    current: tuple[StreamStatus, ...]
    held: Mapping[str, Mapping[str, Sequence[Resource]]]

    def streams(self) -> tuple[StreamStatus, ...]:
        return self.current

    def config(self, node: str) -> Mapping[str, Sequence[Resource]] | None:
        return self.held.get(node)


HELD = {
    "gw-1": {"EDS": tuple(ROUTE.assignments.values())[::-1], "CDS": tuple(ROUTE.clusters.values())},
    "python/client 7": {},
}


@pytest.fixture
async def admin() -> AsyncIterator[str]:
    """URL of the admin API of a controller with the two clients."""
    loop = Loop(MemorySource(Desired({})), MemorySignals(), MemoryProxies(), ManualClock(), tick_s=0.05)
    server = AdminServer(loop.state, loop.metrics, MemoryStreams((CLIENT, ENVOY), HELD))
    await server.start(ANY_PORT)
    try:
        yield f"http://{server.address}"
    finally:
        await server.stop()


async def get(admin: str, path: str) -> tuple[int, Any]:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{admin}/api/v1/{path}") as response:
        return response.status, await response.json()


# --------------------------------------------------------------------------------------------------------------- views


def test_times_become_ages_and_unknown_stays_unknown() -> None:
    """Streams are in order of the node id; an instant of the server's clock is seconds ago."""
    first, second = stream_views((CLIENT, ENVOY), 1000.0)
    assert (first.node, second.node) == ("gw-1", "python/client 7")
    assert first.types[1] == TypeView("EDS", SyncState.STALE, 4, "e" * 32, 2.0, 9.5, "")
    assert (first.types[2].sent_age_s, first.types[2].acked_age_s) == (None, None)
    assert (first.connected_s, first.identity) == (200.0, ENVOY.identity)


def test_resources_are_in_order_of_type_and_name() -> None:
    """Whatever the order they were given in; the bytes only where they are wanted."""
    view = config_view("gw-1", (CLIENT, ENVOY), HELD["gw-1"], Wanted(), 1000.0)
    assert [s.node for s in view.streams] == ["gw-1"]
    assert [(r.type, r.name) for r in view.resources] == [
        (kind, f"demo/resnet/{size}") for kind in ("CDS", "EDS") for size in ("default", "large", "medium", "small")
    ]
    first = view.resources[0]
    resource = ROUTE.clusters[first.name]
    assert (first.route, first.size_bytes, first.version) == (
        "demo/resnet",
        len(resource.packed),
        f"{resource.digest:032x}",
    )
    assert {r.packed is None for r in view.resources} == {True}


@pytest.mark.parametrize(
    ("wanted", "count"),
    [(Wanted("EDS"), 4), (Wanted(name="demo/resnet/small"), 2), (Wanted("CDS", "*/l*"), 1), (Wanted("RDS"), 0)],
    ids=str,
)
def test_what_is_wanted_is_taken(wanted: Wanted, count: int) -> None:
    """By type, and by name with * for any characters."""
    assert len(config_view("gw-1", (), HELD["gw-1"], wanted, 0.0).resources) == count


# ----------------------------------------------------------------------------------------------------------------- API


async def test_config_in_full_has_the_bytes(admin: str) -> None:
    """Those that were sent, for the asker to decode; the filters hold for it too."""
    status, view = await get(admin, "proxies/gw-1/config?type=eds&name=demo/resnet/small&full=1")
    assert status == 200
    (found,) = view["resources"]
    assert b64decode(found["packed"]) == ROUTE.assignments["demo/resnet/small"].packed


async def test_a_node_id_may_have_any_characters(admin: str) -> None:
    """A slash and a blank, quoted in the path; who holds nothing is shown with its stream."""
    status, view = await get(admin, f"proxies/{quote(CLIENT.node, safe='')}/config")
    assert (status, view["node"], view["resources"]) == (200, CLIENT.node, [])
    assert [s["flavour"] for s in view["streams"]] == ["gRPC"]


async def test_what_is_not_there_is_said_with_what_is(admin: str) -> None:
    """404 names the nodes, 400 the types."""
    status, answer = await get(admin, "proxies/nope/config")
    assert (status, answer) == (404, {"error": "no proxy nope", "proxies": ["gw-1", "python/client 7"]})
    status, answer = await get(admin, "proxies/gw-1/config?type=sds")
    assert (status, answer) == (400, {"error": "no type SDS; write one of CDS, EDS, LDS, RDS"})


async def test_a_controller_without_an_xds_server_has_no_proxies() -> None:
    """Empty, not an error."""
    loop = Loop(MemorySource(Desired({})), MemorySignals(), MemoryProxies(), ManualClock(), tick_s=0.05)
    server = AdminServer(loop.state, loop.metrics)
    await server.start(ANY_PORT)
    try:
        assert await get(f"http://{server.address}", "proxies") == (200, [])
        assert (await get(f"http://{server.address}", "proxies/x/config"))[0] == 404
    finally:
        await server.stop()


# ------------------------------------------------------------------------------------------------------------ commands


async def test_proxy_status_has_a_line_per_stream_and_the_words_of_refusals(admin: str) -> None:
    """States as istioctl names them; brackets of a message are text."""
    outcome = await meshctl("proxy-status", admin=admin)
    assert (outcome.status, outcome.err) == (0, "")
    lines = [" ".join(line.replace("│", " ").split()) for line in outcome.out.splitlines()]
    assert any(line.startswith("gw-1 meshctl Envoy ADS delta SYNCED STALE") for line in lines)
    assert "python/client 7 chat gRPC ADS sotw - - SYNCED - 3.2 s" in lines
    assert "gw-1 RDS refused: no such [thing]" in lines


async def test_proxy_status_of_one_node_tells_versions_and_ages(admin: str) -> None:
    """And where it comes from, as whom."""
    outcome = await meshctl("proxy-status", "--node", "gw-1", admin=admin)
    assert f"from {ENVOY.peer} as {ENVOY.identity}, connected 3 min" in outcome.out
    assert "c" * 12 in outcome.out
    assert "c" * 13 not in outcome.out
    assert "python/client" not in outcome.out
    unknown = await meshctl("proxy-status", "--node", "nope", admin=admin)
    assert (unknown.status, unknown.err) == (
        2,
        "meshctl: no proxy nope; the proxies are: gw-1, python/client 7\n",
    )


async def test_proxy_status_as_json_is_the_view(admin: str) -> None:
    """What the API says, all of it."""
    outcome = await meshctl("proxy-status", "-o", "json", admin=admin)
    found = orjson.loads(outcome.out)
    assert [stream["node"] for stream in found] == ["gw-1", "python/client 7"]
    assert set(found[0]) == set(StreamView.__slots__)
    assert [kind["state"] for kind in found[0]["types"]] == ["SYNCED", "STALE", "NOT SENT", "NACKED"]


async def test_proxy_config_lists_resources_and_json_has_their_content(admin: str) -> None:
    """A table of names, versions and sizes; -o json is in full."""
    table = await meshctl("proxy-config", "gw-1", "cds", admin=admin)
    assert (table.status, table.out.count("demo/resnet/"), table.out.count("EDS")) == (0, 4, 0)
    version = f"{ROUTE.clusters['demo/resnet/small'].digest:032x}"
    assert version[:12] in table.out
    full = await meshctl("proxy-config", "gw-1", "eds", "--name", "*/small", "-o", "json", admin=admin)
    (found,) = orjson.loads(full.out)["resources"]
    assert "packed" not in found
    assert found["resource"]["clusterName"] == "demo/resnet/small"
    (locality,) = found["resource"]["endpoints"]
    assert [e["loadBalancingWeight"] for e in locality["lbEndpoints"]] == [600, 400]


async def test_proxy_config_of_who_is_not_there_names_those_who_are(admin: str) -> None:
    """Exit 2; a wrong type is the command line's fault."""
    outcome = await meshctl("proxy-config", "a/b", admin=admin)
    assert (outcome.status, outcome.err) == (2, "meshctl: no proxy a/b; the proxies are: gw-1, python/client 7\n")
    wrong = await meshctl("proxy-config", "gw-1", "sds", admin=admin)
    assert wrong.status == 2
    assert "sds" in wrong.err


def test_status_shows_the_late_of_many_proxies_first() -> None:
    """And counts the rest; few are all shown."""
    proxies = [ProxyView(f"gw-{i:03}", "", i != 77, "") for i in range(100)]
    shown = drawn(proxies_table(proxies))
    assert [line.split()[1] for line in shown.splitlines() if "gw-" in line][:2] == ["gw-077", "gw-000"]
    assert "and 80 more, 0 of them not in sync; `meshctl proxy-status` shows all" in shown
    assert "more" not in drawn(proxies_table(proxies[:20]))


def drawn(table: RenderableType) -> str:
    page = StringIO()
    Console(width=120, file=page).print(table)
    return page.getvalue()
