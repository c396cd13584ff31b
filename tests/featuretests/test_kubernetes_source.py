"""KubernetesSource: objects in, desired routes out; nothing good is lost by something bad or missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from meshctl.adapters.kubernetes.source import KubernetesSource
from meshctl.errors import MeshctlError
from meshctl.model import DesiredRoute, Problem, RouteId
from meshctl.ports import Desired, KubeObject, ObjectKey, Source
from tests.harness.cluster_objects import endpoint_slice, gpu, member, node, pod, served, service
from tests.harness.manifests import changed, profile, route
from tests.harness.objects import MemoryObjects

A, B = RouteId("default/a"), RouteId("default/b")
KEY_A = ObjectKey("ModelRoute", "default", "a")
DEADLINE_S = 60.0


def routed(name: str, to: str = "triton", **spec: Any) -> KubeObject:
    return served(route(name, hosts=[f"{name}.com"], backend={"service": {"name": to, "port": "http"}}, **spec))


def cluster() -> MemoryObjects:
    """Route a -> Service triton -> pod t-0 on a V100; route b -> Service other -> pod o-0 on an A100."""
    return MemoryObjects(
        node("n1", "V100"),
        node("n2", "A100"),
        served(profile()),
        served(profile("resnet-a100", gpu="A100")),
        *(routed("a"), service(), pod("t-0", "n1"), endpoint_slice("t", [member("t-0", "10.0.0.1", "n1")])),
        *(routed("b", "other"), service("other"), pod("o-0", "n2")),
        endpoint_slice("o", [member("o-0", "10.0.1.1", "n2")], of="other"),
    )


async def started(objects: MemoryObjects) -> KubernetesSource:
    source = KubernetesSource(objects)
    await source.start()
    return source


async def until(source: Source, condition: Callable[[Desired], bool]) -> Desired:
    """`desired`, as soon as it fulfils `condition`, woken only by `wait_changed`."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition(source.desired()):
            await source.wait_changed()
    return source.desired()


def endpoints(found: DesiredRoute) -> list[tuple[str, str, bool]]:
    return [(e.id, e.gpu, e.ready) for e in found.endpoints]


async def test_routes_have_the_servers_behind_their_services() -> None:
    """After the start everything is there, without problems, and where it came from."""
    objects = cluster()
    source = await started(objects)
    desired = source.desired()
    assert desired.problems == ()
    assert {r: endpoints(found) for r, found in desired.routes.items()} == {
        A: [("10.0.0.1:8000", "V100", True)],
        B: [("10.0.1.1:8000", "A100", True)],
    }
    assert list(desired.routes[A].profiles) == ["V100"]
    origin, live = desired.routes[A].spec.origin, objects.find(KEY_A)
    assert origin is not None
    assert live is not None
    assert (origin.uid, origin.generation) == (live["metadata"]["uid"], live["metadata"]["generation"])


async def test_every_kind_of_change_arrives_and_leaves_the_others_alone() -> None:
    """A pod comes, gets another GPU, is deleted; its node moves; its slice goes; the Service goes. b never changes."""
    objects = cluster()
    source = await started(objects)
    b = source.desired().routes[B]
    both = [member("t-0", "10.0.0.1", "n1"), member("t-1", "10.0.0.2", "n1")]
    steps: list[tuple[Callable[[], object], list[tuple[str, str, bool]]]] = [
        (
            lambda: objects.put(endpoint_slice("t", both)),
            [("10.0.0.1:8000", "V100", True), ("10.0.0.2:8000", "V100", True)],
        ),
        (
            lambda: objects.put(pod("t-1", "n1", annotations={"meshctl.io/gpu-product": "L4"})),
            [("10.0.0.1:8000", "V100", True), ("10.0.0.2:8000", "L4", True)],
        ),
        (
            lambda: objects.put(pod("t-1", "n1", deletionTimestamp="2026-01-01T00:00:00Z")),
            [("10.0.0.1:8000", "V100", True), ("10.0.0.2:8000", "V100", False)],
        ),
        (lambda: objects.put(endpoint_slice("t", both[:1])), [("10.0.0.1:8000", "V100", True)]),
        (lambda: objects.put(node("n1", "V100-32GB")), [("10.0.0.1:8000", "V100-32GB", True)]),
        (
            lambda: objects.put(gpu("GPU-1", "n1", "NVIDIA H200", "default/t-0")),
            [("10.0.0.1:8000", "NVIDIA-H200", True)],
        ),
        (lambda: objects.remove(ObjectKey("GPU", "", "gpu-1")), [("10.0.0.1:8000", "V100-32GB", True)]),
        (
            lambda: objects.put(endpoint_slice("t2", [member("t-9", "10.0.0.9")])),
            [("10.0.0.1:8000", "V100-32GB", True), ("10.0.0.9:8000", "", True)],
        ),
        (lambda: objects.remove(ObjectKey("EndpointSlice", "default", "t2")), [("10.0.0.1:8000", "V100-32GB", True)]),
        (lambda: objects.remove(ObjectKey("EndpointSlice", "default", "t")), []),
        (lambda: objects.remove(ObjectKey("Service", "default", "triton")), []),
    ]
    for change, expected in steps:
        change()
        await source.wait_changed()
        assert endpoints(source.desired().routes[A]) == expected
        assert source.desired().routes[B] is b
    assert source.desired().problems == (
        Problem(
            "ModelRoute default/a",
            "spec.backend.service: Service default/triton does not exist; create it, or correct the name",
            A,
        ),
    )


async def test_what_a_gpu_says_of_others_changes_nothing() -> None:
    """A heartbeat, and a pod of no route that gets slots beside ours: the endpoints are the very same objects."""
    objects = cluster()
    objects.put(gpu("GPU-1", "n1", "NVIDIA H200", "default/t-0"))
    source = await started(objects)
    before = source.desired()
    assert endpoints(before.routes[A]) == [("10.0.0.1:8000", "NVIDIA-H200", True)]
    objects.put(gpu("GPU-1", "n1", "NVIDIA H200", "default/t-0", "default/x", heartbeat="2026-01-01T00:00:00Z"))
    assert not source.look()
    assert source.desired().routes[A] is before.routes[A]


async def test_a_slice_that_changes_hands_is_no_longer_the_old_services() -> None:
    """Somebody relabels it: one route loses its endpoints, the other gets them."""
    objects = cluster()
    source = await started(objects)
    objects.put(endpoint_slice("t", [member("t-0", "10.0.0.1", "n1")], of="other"))
    await source.wait_changed()
    assert [len(source.desired().routes[r].endpoints) for r in (A, B)] == [0, 2]


async def test_routes_come_change_and_go() -> None:
    """A new route, a new generation, a deletion under way (it is gone at once), and one that is gone."""
    objects = cluster()
    source = await started(objects)
    objects.put(routed("c", "other"))
    assert len((await until(source, lambda d: len(d.routes) == 3)).routes[RouteId("default/c")].endpoints) == 1
    objects.put(routed("a", slo={"latency": "300ms"}))
    found = await until(source, lambda d: d.routes[A].spec.slo_s == 0.3)
    assert (origin := found.routes[A].spec.origin) is not None
    assert origin.generation == 2
    objects.put(changed(dict(routed("b", "other")), "metadata.deletionTimestamp", "2026-01-01T00:00:00Z"))
    await until(source, lambda d: B not in d.routes)
    objects.remove(KEY_A)
    assert list((await until(source, lambda d: A not in d.routes)).routes) == ["default/c"]


async def test_what_is_not_read_wakes_nobody() -> None:
    """A status of our own, a label, an object of another kind, a pod of nobody's: no change; what follows is one."""
    objects = cluster()
    source = await started(objects)
    before = source.desired()
    waiting = asyncio.ensure_future(source.wait_changed())
    await asyncio.sleep(0)
    await objects.apply_status({**routed("a"), "status": {"conditions": []}})
    objects.put(changed(dict(routed("b", "other")), "metadata.labels", {"team": "x"}))
    objects.put(pod("lonely", "n1"))
    objects.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}})
    objects.put(pod("t-0", "n2", labels={"app": "triton"}))
    async with asyncio.timeout(DEADLINE_S):
        await waiting
    assert before.routes[B] is source.desired().routes[B]
    assert source.desired().routes[A].spec.origin == before.routes[A].spec.origin


async def test_an_invalid_object_keeps_its_last_valid_version() -> None:
    """It is said which field is wrong and that the old one is served; a repair ends it; a successor starts anew."""
    objects = cluster()
    source = await started(objects)
    good = source.desired().routes[A]
    objects.put(changed(dict(routed("a")), "spec.slo.latency", "-1s"))
    found = await until(source, lambda d: bool(d.problems))
    assert found.routes[A] is good
    (problem,) = found.problems
    assert (problem.where, problem.route) == ("ModelRoute default/a", A)
    assert problem.message.startswith("spec.slo.latency: ")
    assert problem.message.endswith("(its last valid version stays in force)")
    objects.put(pod("t-0", "n1", deletionTimestamp="2026-01-01T00:00:00Z"))
    assert not (await until(source, lambda d: d.routes[A] is not good)).routes[A].endpoints[0].ready
    objects.put(routed("a"))
    assert (await until(source, lambda d: not d.problems)).routes[A].spec.slo_s == 0.15
    objects.remove(KEY_A)
    objects.put(changed(dict(routed("a")), "spec.model", 7))
    gone = await until(source, lambda d: A not in d.routes)
    assert [(p.where, p.route) for p in gone.problems] == [("ModelRoute default/a", A)]
    assert gone.routes[B] is source.desired().routes[B]


async def test_an_object_of_another_schema_is_a_problem_of_its_own() -> None:
    """A field that this version does not know: the route is known by its problem, the others are served."""
    objects = cluster()
    objects.put(changed(dict(routed("a")), "spec.trafficPolicy", "x"))
    source = await started(objects)
    assert list(source.desired().routes) == [B]
    (problem,) = source.desired().problems
    assert (problem.where, problem.route) == ("ModelRoute default/a", A)
    assert "spec.trafficPolicy: is not a field here" in problem.message


async def test_a_start_waits_for_what_decides_and_says_what_is_missing() -> None:
    """Not listed yet: the start waits. Never listed: it fails with the reasons. Nodes can be done without."""
    objects = cluster()
    objects.set_missing("Pod", "not listed yet")
    objects.set_missing("Node", "forbidden")
    with pytest.raises(MeshctlError, match=r"after 0\.01 s: Pod: not listed yet\. .*deploy/rbac\.yaml"):
        await KubernetesSource(objects, start_s=0.01).start()
    source = KubernetesSource(objects, optional_s=0.01)
    starting = asyncio.ensure_future(source.start())
    await asyncio.sleep(0)
    assert not starting.done()
    objects.set_missing("Pod", "")
    async with asyncio.timeout(DEADLINE_S):
        await starting
    assert list(source.desired().routes) == [A, B]
    assert source.desired().problems == ()


async def test_while_a_kind_is_missing_everything_stays() -> None:
    """The CRD is taken away and comes back, the API server is away: nothing is lost, and it is said."""
    objects = cluster()
    away: list[Problem] = []
    source = KubernetesSource(objects, lambda: tuple(away))
    await source.start()
    before = source.desired().routes
    away.append(Problem("Kubernetes", "the API server is away"))
    objects.set_missing("ModelRoute", "no such kind")
    objects.remove(KEY_A)
    objects.remove(ObjectKey("Pod", "default", "o-0"))
    await source.wait_changed()
    held = source.desired()
    assert held.routes is before
    assert [p.where for p in held.problems] == ["Kubernetes ModelRoute", "Kubernetes"]
    away.clear()
    objects.put(routed("a"))
    objects.put(pod("o-0", "n2"))
    objects.set_missing("ModelRoute", "")
    back = await until(source, lambda d: not d.problems)
    assert back.routes[B] is before[B]
    assert back.routes[A].endpoints == before[A].endpoints


async def test_two_routes_to_one_service_share_its_servers_and_differ_in_ports() -> None:
    """Each says its own port and concurrency; a change of the pod reaches both."""
    objects = cluster()
    objects.put(served(route("c", hosts=["c"], backend={"service": {"name": "triton", "port": 80, "concurrency": 3}})))
    source = await started(objects)
    c = RouteId("default/c")
    assert [source.desired().routes[r].endpoints[0].concurrency for r in (A, c)] == [1, 3]
    objects.put(pod("t-0", "n1", deletionTimestamp="2026-01-01T00:00:00Z"))
    await source.wait_changed()
    assert [source.desired().routes[r].endpoints[0].ready for r in (A, c)] == [False, False]
