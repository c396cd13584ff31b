"""What the server says that a client holds, and what a real Envoy says that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness.envoy import plan, require_envoy, route_plan, xds_server
from xds.inspect import SyncState, decode
from xds.server import XdsServer

pytestmark = pytest.mark.envoy
SYNC_S = 30.0
A, B = "127.0.0.1:9", "127.0.0.1:10"


def told(server: XdsServer) -> dict[str, dict[str, Any]]:
    """The resources that the server says the Envoy holds: type -> name -> content."""
    held = server.config("gw")
    assert held is not None
    return {kind: {r.name: decode(r.packed) for r in found} for kind, found in held.items()}


async def dumped(envoy: EnvoyProcess) -> dict[str, dict[str, Any]]:
    """The resources that it got from us, as the Envoy says it."""
    parts = {part["@type"].rpartition(".")[2]: part for part in (await envoy.config_dump())["configs"]}
    clusters = [one["cluster"] for one in parts["ClustersConfigDump"]["dynamic_active_clusters"]]
    endpoints = [one["endpoint_config"] for one in parts["EndpointsConfigDump"]["dynamic_endpoint_configs"]]
    routes = [one["route_config"] for one in parts["RoutesConfigDump"]["dynamic_route_configs"]]
    return {
        "CDS": {one["name"]: one for one in clusters},
        "EDS": {one["cluster_name"]: one for one in endpoints},
        "LDS": {},
        "RDS": {one["name"]: one for one in routes},
    }


def weights(assignment: Any, weight: str, endpoints: str) -> list[int]:
    """In order; protobuf's JSON has names in camel case, Envoy's dump as they are written."""
    return [e[weight] for locality in assignment.get("endpoints", ()) for e in locality[endpoints]]


async def test_what_an_envoy_holds_is_what_the_server_says(tmp_path: Path) -> None:
    """By name, type by type, and the weights of each; before a change and after it, when a route is gone."""
    require_envoy()
    async with xds_server() as server:
        one = route_plan("default/one", {A: 700, B: 300}, hosts=("one",))
        two = route_plan("default/two", {A: 1000}, hosts=("two",))
        server.apply(plan(one, two))
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy:
            for change in ((one, two), (route_plan("default/one", {A: 1, B: 999}, hosts=("one", "uno")),)):
                server.apply(plan(*change))
                await server.wait_synced(SYNC_S)
                ours, its = told(server), await dumped(envoy)
                assert {kind: found.keys() for kind, found in ours.items()} == {
                    kind: found.keys() for kind, found in its.items()
                }
                for name, assignment in ours["EDS"].items():
                    there = weights(its["EDS"][name], "load_balancing_weight", "lb_endpoints")
                    assert weights(assignment, "loadBalancingWeight", "lbEndpoints") == there
                (stream,) = server.streams()
                assert {kind.state for kind in stream.types} == {SyncState.SYNCED, SyncState.NOT_ASKED}
