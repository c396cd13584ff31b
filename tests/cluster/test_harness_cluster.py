"""The harness itself: what the other tests here take for granted."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import aiohttp
import pytest

from tests.cluster.cluster import GATEWAY, Cluster, Document, KubectlError
from tests.harness.envoy import Backends, request
from tests.harness.tools import page, until

pytestmark = pytest.mark.cluster


def test_our_crds_and_istios_are_established(cluster: Cluster) -> None:
    """Both sets of CRDs are there as soon as the cluster is."""
    kinds = cluster.kubectl_now("api-resources", "--output=name")
    assert {"modelroutes.meshctl.io", "virtualservices.networking.istio.io"} <= set(kinds.split())


async def test_istio_serves_weighted_endpoints(cluster: Cluster) -> None:
    """A VirtualService on the shared Gateway and a ServiceEntry with weights 3:1 split the requests 3:1."""
    namespace = await cluster.namespace()
    host, inner = f"{namespace}.example", f"inner.{namespace}.example"
    async with Backends(2) as backends, aiohttp.ClientSession() as session:
        await cluster.apply(
            _service_entry(namespace, inner, dict(zip(backends.addresses, (3, 1), strict=True))),
            _virtual_service(namespace, host, inner),
        )

        async def served() -> bool:
            return (await request(session, cluster.gateway().url, host=host))[0] == 200

        await until(served, f"{host} is served")
        backends.served.clear()
        statuses = Counter([(await request(session, cluster.gateway().url, host=host))[0] for _ in range(400)])
        other, _ = await request(session, cluster.gateway().url, host=f"other.{host}")
    assert statuses == {200: 400}
    assert backends.served[backends.addresses[0]] == pytest.approx(300, abs=10)  # LEAST_REQUEST keeps a schedule
    assert other == 404


async def test_gateways_share_one_address(cluster: Cluster) -> None:
    """As replicas behind a Service do: new connections come to either."""
    first, second = cluster.gateways
    assert (first.url, first.admin != second.admin, first.node != second.node) == (second.url, True, True)

    async def both_served() -> bool:
        async with aiohttp.ClientSession() as session:  # a new connection
            await request(session, first.url)
        pages = [page(f"http://{g.admin}/stats?filter=downstream_rq_4xx&usedonly") or "" for g in cluster.gateways]
        return all("http.outbound" in text for text in pages)

    await until(both_served, "both gateways served a request")


async def test_a_service_account_may_do_what_it_was_given_and_no_more(cluster: Cluster) -> None:
    """A kubeconfig for a service account is bound by RBAC."""
    namespace = await cluster.namespace()
    mine = await cluster.kubeconfig_for(f"{namespace}/default")
    with pytest.raises(KubectlError, match="cannot list resource"):
        await cluster.kubectl("get", "pods", "--namespace", namespace, kubeconfig=mine)
    given = ("create", "role", "reader", "--verb=list", "--resource=pods", "--namespace", namespace)
    await cluster.kubectl(*given)
    bound = ("create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:default")
    await cluster.kubectl(*bound, "--namespace", namespace)

    async def may() -> bool:
        with suppress(KubectlError):
            await cluster.kubectl("get", "pods", "--namespace", namespace, kubeconfig=mine)
            return True
        return False

    await until(may, "the role is in force")


def _service_entry(namespace: str, host: str, weights: dict[str, int]) -> Document:
    endpoints = [
        {"address": host, "ports": {"http": int(port)}, "weight": weight}
        for (host, _, port), weight in ((address.partition(":"), weight) for address, weight in weights.items())
    ]
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "servers", "namespace": namespace},
        "spec": {
            "hosts": [host],
            "location": "MESH_INTERNAL",
            "resolution": "STATIC",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
            "endpoints": endpoints,
        },
    }


def _virtual_service(namespace: str, host: str, destination: str) -> Document:
    route = {"route": [{"destination": {"host": destination, "port": {"number": 80}}}]}
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "route", "namespace": namespace},
        "spec": {"hosts": [host], "gateways": [GATEWAY], "http": [route]},
    }
