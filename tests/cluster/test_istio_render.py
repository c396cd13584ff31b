"""What we render, judged by the real istioctl, API server, istiod and Envoy."""

from __future__ import annotations

import dataclasses
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import aiohttp
import orjson
import pytest

from istio.names import DESTINATION_RULE, NETWORKING, SERVICE_ENTRY, VIRTUAL_SERVICE, size_host
from istio.render import PORT, render, weights_of
from meshctl.model import DEFAULT_CLASS, EndpointId, Mechanism, Origin, Retry, RoutePlan, Workload
from meshctl.ports import KubeObject
from tests.cluster.cluster import GATEWAY, Cluster
from tests.cluster.processes import binary
from tests.e2e.test_envoy_headers import CASES
from tests.harness import istio_plans
from tests.harness.envoy import SIZES, Backends, request
from tests.harness.istio_plans import meshed, objects, with_endpoints
from tests.harness.tools import DEADLINE_S, completed, until

pytestmark = pytest.mark.cluster

NAMES = (*(s.name for s in SIZES), DEFAULT_CLASS)


def documents(values: Iterable[KubeObject]) -> str:
    return "\n---\n".join(orjson.dumps(value).decode() for value in values)


async def applied(cluster: Cluster, values: Iterable[KubeObject], *options: str) -> str:
    """As the controller writes: server-side, with its field manager; unknown fields are refused."""
    how = ("apply", "--server-side", "--field-manager=meshctl", "--validate=strict", *options, "--filename=-")
    return await cluster.kubectl(*how, stdin=documents(values))


def plans(namespace: str) -> list[RoutePlan]:
    """Every form a route can take."""
    weights = {"192.0.2.1:8000": 300, "192.0.2.2:8001": 700}
    pod = Workload(namespace, "p", "n", (("security.istio.io/tlsMode", "istio"), ("app", "triton")), "triton")

    def route(name: str, **changes: Any) -> RoutePlan:
        return meshed(f"{namespace}/{name}", weights, hosts=(f"{name[:60]}.{namespace}.example",), **changes)

    both = route("subsets", mechanism=Mechanism.SUBSETS)
    first, second = both.route.endpoints
    mixed = (
        dataclasses.replace(first, gpu="Tesla V100/SXM2", workload=pod),
        dataclasses.replace(second, address="2001:db8::2", gpu=""),
    )
    retry = Retry(attempts=3, per_try_timeout_s=0.5, idempotent=True)
    return [
        route("plain", origin=Origin("0b3bba13-3a5e-4b0e-bb0e-000000000001", 1, "2026-01-02T03:04:05Z")),
        route("a.b", delegate=True, timeout_s=0.15, retry=Retry(attempts=0)),
        route("l" * 200, warm_up_s=0.0, retry=retry),
        with_endpoints(both, mixed),
        with_endpoints(route("pods"), mixed),
        route("away", not_ready=tuple(weights)),
        route("away-subsets", not_ready=tuple(weights), mechanism=Mechanism.SUBSETS),
        with_endpoints(route("none"), ()),
        with_endpoints(route("none-subsets", mechanism=Mechanism.SUBSETS), ()),
    ]


async def test_everything_we_render_is_valid(cluster: Cluster) -> None:
    """istioctl (istiod's own validation) has not even a warning, and the API server takes every field as it is."""
    assert istio_plans.GATEWAY == GATEWAY
    namespace = await cluster.namespace()
    rendered = [value for plan in plans(namespace) for value in objects(render(plan))]
    assert await completed(partial(_validated, documents(rendered))) == (0, "validation succeed\n")
    taken = orjson.loads(await applied(cluster, rendered, "--dry-run=server", "--output=json"))["items"]
    assert [value["spec"] for value in taken] == [value["spec"] for value in rendered], "else each round would write"


async def test_every_header_value_reaches_its_class(cluster: Cluster) -> None:
    """As through our own xDS: by a root VirtualService of ours, and by a delegate that somebody else's root names."""
    namespace = await cluster.namespace()
    own, other = f"own.{namespace}.example", f"other.{namespace}.example"
    async with Backends(len(NAMES)) as backends, aiohttp.ClientSession() as session:
        class_of = dict(zip(backends.addresses, NAMES, strict=True))
        tables = {size: {a: 1000 * (a == address) for a in class_of} for address, size in class_of.items()}
        root = meshed(f"{namespace}/own", tables, hosts=(own,))
        delegate = meshed(f"{namespace}/delegated", tables, delegate=True)
        await applied(cluster, [*objects(render(root)), *objects(render(delegate)), _root(namespace, other)])
        for host in (own, other):
            await until(partial(_serves, session, cluster, host), f"{host} is served")
            got = {}
            for name, headers, _ in CASES:
                status, body = await request(session, cluster.gateway().url, headers, host)
                got[name] = class_of.get(body, f"{status}: {body}")
            assert got == {name: expected for name, _, expected in CASES}


async def test_weights_arrive_with_the_routes_policies(cluster: Cluster) -> None:
    """EDS has the endpoints' weights; the wildcard DestinationRule holds for every size class; Envoy splits by them.
    What the API server has reads as the weights that were written."""
    namespace = await cluster.namespace()
    host = f"weights.{namespace}.example"
    async with Backends(3) as backends, aiohttp.ClientSession() as session:
        a, b, c = backends.addresses
        plan = meshed(f"{namespace}/r", {a: 300, b: 700, c: 0}, hosts=(host,), warm_up_s=0.0)
        await applied(cluster, objects(render(plan)))
        await until(partial(_serves, session, cluster, host), f"{host} is served")
        live = await _live(cluster, namespace)
        assert weights_of(plan.route, live) == plan.weights
        clusters = [f"outbound|{PORT}||{size_host(plan.route.spec.id, size)}" for size in NAMES]
        for name in clusters:
            assert await _weights(session, cluster, name) == {a: 300, b: 700}
            config = await _cluster(session, cluster, name)
            assert config["lb_policy"] == "LEAST_REQUEST"
            assert config["common_lb_config"] == {"healthy_panic_threshold": {}}, "no weighing of zones"
            assert config["circuit_breakers"]["thresholds"][0]["max_pending_requests"] == 2**31 - 1
            assert config["outlier_detection"]["consecutive_gateway_failure"] == 3
        backends.served.clear()
        for _ in range(200):
            assert (await request(session, cluster.gateway().url, host=host))[0] == 200
        assert backends.served == pytest.approx(Counter({a: 60, b: 140}), abs=2)

        moved = dataclasses.replace(plan, weights={**plan.weights, "large": {EndpointId(b): 500, EndpointId(c): 500}})
        await applied(cluster, objects(render(moved)))

        async def arrived() -> bool:
            return await _weights(session, cluster, clusters[2]) == {b: 500, c: 500}

        await until(arrived, "the new weights are in force")
        assert await _weights(session, cluster, clusters[0]) == {a: 300, b: 700}


async def test_subsets_split_by_gpu_class(cluster: Cluster) -> None:
    """Weighted destinations over subsets; a class with weight 0 gets nothing."""
    namespace = await cluster.namespace()
    host = f"subsets.{namespace}.example"
    async with Backends(3) as backends, aiohttp.ClientSession() as session:
        a, b, c = backends.addresses
        tables = {**{size: {a: 300, b: 300, c: 400} for size in NAMES}, "large": {a: 500, b: 500, c: 0}}
        plan = meshed(f"{namespace}/r", tables, hosts=(host,), mechanism=Mechanism.SUBSETS, warm_up_s=0.0)
        gpu = {a: "V100", b: "V100", c: "T4"}
        plan = with_endpoints(plan, (dataclasses.replace(e, gpu=gpu[e.id]) for e in plan.route.endpoints))
        await applied(cluster, objects(render(plan)))
        await until(partial(_serves, session, cluster, host), f"{host} is served")
        assert weights_of(plan.route, await _live(cluster, namespace)) == plan.weights
        backends.served.clear()
        for _ in range(100):
            assert (await request(session, cluster.gateway().url, [("x-batch-size", "64")], host))[0] == 200
        assert backends.served[c] == 0
        for _ in range(400):
            assert (await request(session, cluster.gateway().url, host=host))[0] == 200
        assert backends.served[c] == pytest.approx(160, abs=50)  # 5 standard deviations


def _validated(text: str) -> tuple[int, str]:
    """istioctl's exit code, and all it says."""
    command = (binary("istioctl", "istio"), "validate", "--filename=-")
    said = subprocess.run(command, input=text, capture_output=True, text=True, timeout=DEADLINE_S)
    return said.returncode, said.stdout + said.stderr


def _root(namespace: str, host: str) -> KubeObject:
    """Somebody else's root, which names our delegate."""
    delegate = {"name": "delegated", "namespace": namespace}
    return {
        "apiVersion": NETWORKING,
        "kind": VIRTUAL_SERVICE,
        "metadata": {"name": "root", "namespace": namespace},
        "spec": {
            "hosts": [host],
            "gateways": [GATEWAY],
            "http": [{"match": [{"uri": {"prefix": "/v2"}}], "delegate": delegate}],
        },
    }


async def _serves(session: aiohttp.ClientSession, cluster: Cluster, host: str) -> bool:
    return (await request(session, cluster.gateway().url, host=host))[0] == 200


async def _live(cluster: Cluster, namespace: str) -> list[KubeObject]:
    kinds = ",".join(kind.lower() for kind in (SERVICE_ENTRY, DESTINATION_RULE, VIRTUAL_SERVICE))
    items: list[KubeObject] = (await cluster.get(kinds, "--namespace", namespace))["items"]
    return items


async def _weights(session: aiohttp.ClientSession, cluster: Cluster, name: str) -> Mapping[str, int]:
    """Address -> weight of a cluster's endpoints, as the gateway has them."""
    async with session.get(f"http://{cluster.gateway().admin}/clusters?format=json") as answer:
        statuses = {s["name"]: s.get("host_statuses", ()) for s in (await answer.json())["cluster_statuses"]}
    sockets = [(host["address"]["socket_address"], host["weight"]) for host in statuses.get(name, ())]
    return {f"{socket['address']}:{socket['port_value']}": weight for socket, weight in sockets}


async def _cluster(session: aiohttp.ClientSession, cluster: Cluster, name: str) -> Any:
    url = f"http://{cluster.gateway().admin}/config_dump?resource=dynamic_active_clusters"
    async with session.get(url) as answer:
        configs = (await answer.json(content_type=None))["configs"]
    return next(c["cluster"] for c in configs if c["cluster"]["name"] == name)
