"""Whatever happens in whatever order, what was looked at step by step is what a fresh look finds."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.adapters.kubernetes.source import KubernetesSource
from meshctl.model import DesiredRoute, RouteId
from meshctl.ports import Desired, KubeObject, ObjectKey
from tests.harness.cluster_objects import endpoint_slice, member, node, pod, served, service
from tests.harness.manifests import profile, route
from tests.harness.objects import MemoryObjects

few = st.integers(0, 2)
names = st.sampled_from(["x", "y", "z"])
ports: st.SearchStrategy[int | str] = st.sampled_from(["http", 80, 81])
gpus = st.sampled_from(["", "V100", "A100"])


def routed(name: str, to: str, host: str, gateway: str, port: int | str) -> KubeObject:
    gateways = [gateway] if gateway else []
    backend = {"service": {"name": to, "port": port}}
    return served(route(name, hosts=[f"{host}.com"], gateways=gateways, backend=backend))


def members(draw: st.DrawFn) -> list[dict[str, Any]]:
    numbers = draw(st.lists(st.tuples(few, few, few, st.booleans()), max_size=4))
    return [member(f"p{p}", f"10.0.0.{a}", f"n{n}", conditions={"ready": ready}) for p, a, n, ready in numbers]


@st.composite
def objects(draw: st.DrawFn) -> KubeObject:
    """Any object that matters; few names, so that they meet. Valid: last good versions are what a fresh look lacks."""
    deleted = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if draw(st.integers(0, 3)) == 0 else {}
    makers: list[Callable[[], KubeObject]] = [
        lambda: routed(draw(names), draw(names), draw(names), draw(st.sampled_from(["", "g"])), draw(ports)),
        lambda: served(route(draw(names), slo={"latency": draw(st.sampled_from(["1s", "2s"]))})),
        lambda: served(profile(draw(names), gpu=draw(st.sampled_from(["V100", "A100"])))),
        lambda: service(draw(names)),
        lambda: endpoint_slice(draw(names), members(draw), of=draw(names)),
        lambda: pod(f"p{draw(few)}", f"n{draw(few)}", annotations={"meshctl.io/gpu-product": draw(gpus)}, **deleted),
        lambda: node(f"n{draw(few)}", draw(gpus)),
    ]
    return draw(st.sampled_from(makers))()


def connected() -> MemoryObjects:
    """A cluster where every object matters: what a step changes is in use."""
    cluster = MemoryObjects(served(profile()), *(node(f"n{n}", "V100") for n in range(3)))
    for p, name in enumerate(("x", "y", "z")):
        cluster.put(routed(name, name, name, "", "http"))
        cluster.put(service(name))
        cluster.put(pod(f"p{p}", f"n{p}"))
        cluster.put(endpoint_slice(name, [member(f"p{p}", f"10.0.0.{p}", f"n{p}")], of=name))
    return cluster


steps = st.lists(st.one_of(objects(), st.integers(0, 100)), min_size=1, max_size=5)
"""Put an object, or remove the n-th."""


def step(cluster: MemoryObjects, change: KubeObject | int) -> None:
    if not isinstance(change, int):
        cluster.put(change)
        return
    kinds = ("ModelRoute", "ModelProfile", "Service", "EndpointSlice", "Pod", "Node")
    keys: list[ObjectKey] = sorted(key for kind in kinds for key in cluster.every(kind))
    if keys:
        cluster.remove(keys[change % len(keys)])


def timeless(routes: Desired) -> dict[RouteId, DesiredRoute]:
    """Without our own generation, which counts what happened."""
    return {
        r: dataclasses.replace(found, spec=dataclasses.replace(found.spec, generation=1))
        for r, found in routes.routes.items()
    }


@given(st.lists(steps, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_step_by_step_is_what_a_fresh_look_finds(batches: list[list[KubeObject | int]]) -> None:
    """Each batch is one look. Routes and problems are those of a source that starts now; what did not change is the
    same object; a second look at the same changes nothing."""

    async def run() -> None:
        cluster = connected()
        source = await started(cluster)
        for batch in batches:
            before = source.desired()
            for change in batch:
                step(cluster, change)
            another = source.look()
            after = source.desired()
            assert another == (after != before)
            assert not source.look()
            fresh = (await started(cluster)).desired()
            assert timeless(after) == timeless(fresh)
            assert after.problems == fresh.problems
            assert list(after.routes) == sorted(after.routes)
            for r in after.routes.keys() & before.routes.keys():
                assert (after.routes[r] is before.routes[r]) == (after.routes[r] == before.routes[r])

    asyncio.run(run())


async def started(cluster: MemoryObjects) -> KubernetesSource:
    source = KubernetesSource(cluster)
    await source.start()
    return source
