"""`meshctl run` on a real cluster of which parts are missing, go away, or answer badly: no request is lost, no weight
moves, nothing is written twice, and people are told."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.cluster.cluster import GATEWAY, OUR_CRDS, Cluster, KubectlError
from tests.cluster.proxy import ApiProxy
from tests.cluster.world import NAME, World, decisions, meshctl, problems, world
from tests.harness.controller import RunProcess, api
from tests.harness.pages import EMPTY, Bad, Pages, Reply, http, json_answer, query_of
from tests.harness.tools import completed, page, until

pytestmark = pytest.mark.cluster

GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
OLDER = """
import istio.policies
from meshctl.cli import main

istio.policies.UNLIMITED = 1_000_000
main()
"""
"""A version of meshctl that says something else in one object."""


@pytest.mark.timeout(400)  # a cluster of its own, and six things that go away one after the other
async def test_everything_is_missing_or_goes_away_once_and_no_request_is_lost(tmp_path: Path) -> None:
    """Istio comes after the controller; then, under load, the controller, the API server and istiod are killed or
    frozen, one after the other, and what is changed meanwhile is put in force once; last, an object is not valid."""
    async with Cluster(tmp_path / "cluster") as cluster, world(cluster, tmp_path) as here:
        await here.apply(policy="Proportional")
        async with here.controller() as first:
            await _istio_comes_late(here, first)
        async with here.confirming() as second:
            await decisions(second, 4)
            async with here.load() as outcome:
                weights = await here.weights()
                before = await here.istio_versions()
                await second.end(signal.SIGKILL)
                async with here.confirming() as third:
                    await decisions(third, 4)
                    assert await here.istio_versions() == before
                    await _api_server_is_killed(here, third)
                    await _api_server_freezes(here, third)
                    await _istiod_is_killed(here)
                    assert await here.weights() == weights
                    await _object_is_not_valid(here)
                    assert await here.weights() == weights
    assert outcome.failed == 0, outcome.statuses
    assert outcome.statuses[200] > 100


async def _istio_comes_late(here: World, controller: RunProcess) -> None:
    """Without its CRDs the route says what is missing, and the loop goes on; with them it is served."""
    await here.until_condition("Programmed", "False", "Pending")
    said = await here.message("Programmed")
    assert "are Istio's CRDs installed?" in said
    assert "the CRD of serviceentries.networking.istio.io" in said
    await decisions(controller, 4)
    assert await here.conditions() == {**await here.conditions(), "Ready": ("False", "Pending")}
    assert [line for line in controller.lines() if line["event"] == "failed"] == []
    await here.cluster.start_istio()
    await here.served()
    await here.until_condition("Ready", "True")
    assert "istio" not in await problems(controller, lambda said: "istio" not in said)


async def _api_server_is_killed(here: World, controller: RunProcess) -> None:
    """Decisions go on for 10 s, and say what is wrong; then there is nothing to write, until something changes."""
    before = await here.istio_versions()
    await here.cluster.stop_apiserver()
    assert here.cluster.server in await problems(controller, lambda said: "may be behind" in said)
    await decisions(controller, 40)
    await here.cluster.start_apiserver()
    assert await problems(controller, lambda said: not said) == ""
    assert await here.istio_versions() == before
    await _changed(here, "20s")


async def _api_server_freezes(here: World, controller: RunProcess) -> None:
    """In the moment of a change."""
    await here.patch('{"spec": {"timeout": "21s"}}')
    here.cluster.freeze()
    await decisions(controller, 12)
    here.cluster.thaw()
    await _says(here, "21s")


async def _istiod_is_killed(here: World) -> None:
    """A change made before it is back arrives in its gateways after it."""
    istiod = here.cluster.istiod
    assert istiod is not None
    await istiod.end(signal.SIGKILL)
    await _changed(here, "22s")
    await here.cluster.restart_istiod()

    async def arrived() -> bool:
        dumped = await completed(
            page, f"http://{here.cluster.gateway().admin}/config_dump?resource=dynamic_route_configs"
        )
        return '"timeout": "22s"' in (dumped or "")

    await until(arrived, "the gateway has the change")
    await here.until_condition("Programmed", "True", "Acknowledged")


async def _changed(here: World, timeout: str) -> None:
    """A change of the route arrives in the VirtualService, by one write, and in nothing else."""
    generation = (await here.get("VirtualService"))["metadata"]["generation"]
    entries = await here.istio_versions("ServiceEntry")
    await here.patch(_json({"spec": {"timeout": timeout}}))
    await _says(here, timeout)
    assert (await here.get("VirtualService"))["metadata"]["generation"] == generation + 1
    assert await here.istio_versions("ServiceEntry") == entries


async def _says(here: World, timeout: str) -> None:
    """Wait until every rule of the live VirtualService has `timeout`."""

    async def live() -> bool:
        return {rule["timeout"] for rule in (await here.get("VirtualService"))["spec"]["http"]} == {timeout}

    await until(live, f"the VirtualService says {timeout}")


async def _object_is_not_valid(here: World) -> None:
    """An older schema let it in: its last valid version stays in force, and the route says so, with our schema back as
    well, until it is valid again."""
    crd = await here.cluster.get("crd", "modelroutes.meshctl.io")
    for version in crd["spec"]["versions"]:
        version["schema"]["openAPIV3Schema"]["properties"]["spec"] = {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
        }
    await here.cluster.kubectl("replace", "--filename=-", stdin=_json(crd))

    async def taken() -> bool:
        try:
            await here.patch('{"spec": {"timeout": "soon"}}')
        except KubectlError:
            return False
        return True

    await until(taken, "the API server takes what the older schema allows")
    before = await here.istio_versions()
    await here.until_condition("Resolved", "False", "InvalidInput")
    assert "the last good version is in force" in await here.message("Resolved")
    assert "timeout" in await here.message("Resolved")
    await here.cluster.kubectl("apply", "--server-side", "--force-conflicts", f"--filename={OUR_CRDS}")
    await here.until_condition("Ready", "True")
    assert await here.istio_versions() == before
    await here.patch('{"spec": {"timeout": "22s"}}')
    await here.until_condition("Resolved", "True")
    assert await here.istio_versions() == before


async def test_an_api_server_that_answers_badly_delays_and_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """429, 409, 500, refusals of a moment, slow answers, cut and expired watches: the route is served all the same and
    changed by the fewest writes; `meshctl status` says what is wrong, and nothing once it is well."""
    async with world(cluster, tmp_path) as here, ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        busy = {"Retry-After": "1"}
        proxy.answer("LIST modelroutes", 429, busy)
        proxy.answer("LIST pods", 500, body=b"<html>Bad Gateway</html>")
        proxy.answer("LIST gateways", 403, body={"message": "not yet", "reason": "Forbidden"})
        proxy.answer("PATCH serviceentries", 429, busy)
        proxy.answer("PATCH serviceentries", 409, body={"message": "modified", "reason": "Conflict"})
        proxy.answer("PATCH destinationrules", 503, busy)
        proxy.answer("PATCH virtualservices", 500)
        proxy.answer("PATCH modelroutes", 429, busy)
        proxy.pauses_s = dict.fromkeys(("PATCH virtualservices", "LIST services", "WATCH modelroutes"), 1.0)
        await here.apply(policy="Proportional")
        async with here.confirming(kubeconfig=proxy.kubeconfig) as controller:
            await here.served()
            await here.until_condition("Ready", "True")
            assert await problems(controller, lambda said: not said) == ""

            proxy.cut(b'{"type":"DELETED","object":{"metadata":{"name":"resnet"')
            await _changed(here, "20s")
            proxy.deafen()
            await here.patch(_json({"spec": {"timeout": "21s"}}))
            for kind in ("modelroutes", "virtualservices", "serviceentries"):
                proxy.say(f"WATCH {kind}", {"type": "ERROR", "object": GONE})
            await _says(here, "21s")

            before = await here.istio_versions()
            await proxy.down()
            assert "may be behind" in await problems(controller, lambda said: "may be behind" in said)
            assert "may be behind" in await meshctl("status", "--admin", controller.admin)
            await decisions(controller, 4)
            await proxy.up()
            assert await problems(controller, lambda said: not said) == ""
            asked = len(proxy.asked)
            await decisions(controller, 8)
            assert [what for what in proxy.asked[asked:] if what.startswith(("PATCH", "DELETE"))] == []
            assert await here.istio_versions() == before
            assert "may be behind" not in await meshctl("status", "--admin", controller.admin)


async def test_two_versions_at_once_fight_no_war(cluster: Cluster, tmp_path: Path) -> None:
    """Without a Lease, each wants something else of the same object: over 20 decisions it is written a few times, the
    route is served, nothing else is written, and the one that gives way says why."""
    older = tmp_path / "older.py"
    older.write_text(OLDER)
    async with world(cluster, tmp_path) as here, ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        await here.apply(policy="Proportional")
        async with here.confirming(kubeconfig=proxy.kubeconfig, program=(older,)) as old:
            await here.until_condition("Ready", "True")
            entries = await here.istio_versions("ServiceEntry")
            async with here.load() as outcome, here.confirming(kubeconfig=proxy.kubeconfig) as new:
                asked = len(proxy.asked)
                await decisions(new, 20)
                await decisions(old, 20)
                written = Counter(what for what in proxy.asked[asked:] if what.startswith(("PATCH", "DELETE")))
                said = await problems(old, lambda said: "destinationrule" in said.lower())
            assert await here.istio_versions("ServiceEntry") == entries
    assert written["PATCH destinationrules"] <= 3, written
    assert written["PATCH modelroutes"] <= 10, written
    assert written.keys() <= {"PATCH destinationrules", "PATCH modelroutes"}
    assert "another meshctl" in said
    assert outcome.failed == 0


async def test_a_host_is_of_the_first_route_that_claims_it(cluster: Cluster, tmp_path: Path) -> None:
    """The second one says so, and has no objects; when the first is gone it is served."""
    async with world(cluster, tmp_path) as here:
        await here.apply()
        await cluster.apply(here.route("zweite"))
        async with here.confirming():
            await here.served()
            await here.until_condition("Ready", "True")
            await here.until_condition("Ready", "False", name="zweite")
            assert f"is served by ModelRoute {here.namespace}/{NAME}" in await here.message("Resolved", "zweite")
            assert not [name for name in await here.objects() if "zweite" in name]
            await cluster.kubectl("delete", "modelroute", NAME, f"--namespace={here.namespace}")
            await here.until_condition("Ready", "True", name="zweite")
            await here.served()


async def test_git_keeps_its_root_and_we_the_delegate(cluster: Cluster, tmp_path: Path) -> None:
    """Git's root VirtualService is applied again and again, changed, too: ours stays as it is, and no conflict."""
    async with world(cluster, tmp_path) as here:
        await here.apply(delegate=True, hosts=["*"], gateways=[])
        root = _root(here, "1s")
        await cluster.apply(root)
        async with here.confirming() as controller:
            await here.served()
            await here.until_condition("Ready", "True")
            before = await here.istio_versions()
            async with here.load() as outcome:
                for _ in range(2):
                    await cluster.apply(root)
                await cluster.apply(_root(here, "2s"))
                await decisions(controller, 8)
            after = await here.istio_versions()
            assert (await here.conditions())["Conflict"] == ("False", "NoConflict")
    assert {name for name in before if before[name] != after[name]} == {"VirtualService/root"}
    assert outcome.failed == 0


async def test_a_route_deleted_while_it_is_applied_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Its writes are still on their way when it goes; a new one of the same name is served."""
    async with world(cluster, tmp_path) as here, ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        proxy.pauses_s = dict.fromkeys(("PATCH serviceentries", "PATCH destinationrules"), 1.0)
        async with here.confirming(kubeconfig=proxy.kubeconfig) as controller:
            await here.apply()

            async def writing() -> bool:
                return "PATCH serviceentries" in proxy.asked

            await until(writing, "the first write is on its way")
            await cluster.kubectl("delete", "modelroute", NAME, f"--namespace={here.namespace}")

            async def gone() -> bool:
                return not await here.objects()

            await decisions(controller, 8)
            await until(gone, "nothing of Istio's is left")
            await here.apply()
            await here.served()
            assert await problems(controller, lambda said: not said) == ""


def _root(here: World, timeout: str) -> dict[str, Any]:
    """As somebody keeps it in Git."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "root", "namespace": here.namespace, "annotations": {"example.com/version": timeout}},
        "spec": {"hosts": [here.host], "gateways": [GATEWAY], "http": [{"delegate": {"name": NAME}}]},
    }


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


async def test_a_prometheus_that_lies_moves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Values that can't be, samples of long ago, no answers at all: the weights stay and nothing is written; the route
    says that its metrics are not fresh, the controller why; the truth ends it."""
    async with world(cluster, tmp_path) as here, Pages(lambda path: http("")) as prometheus:
        servers = [{**e, "metricsPort": e["port"]} for e in here.endpoints()]
        instances = [f"{e['address']}:{e['port']}" for e in servers]
        prometheus.reply = _prometheus(instances)
        guard = {"staleAfter": "1s", "decay": "1h"}
        await here.apply(backend={"endpoints": servers}, guard=guard)
        async with here.confirming("--prometheus", prometheus.url) as controller:
            path = f"routes/{here.namespace}/{NAME}"
            await api(controller, path, lambda route: _fresh(route) == "True")
            await here.until_condition("Ready", "True")
            before = await here.steady(controller)
            for name, (lie, fresh) in _lies(instances).items():
                prometheus.reply = lie
                await api(controller, path, lambda route, fresh=fresh: _fresh(route) == fresh)  # type: ignore[misc]
                await decisions(controller, 4)
                assert await here.istio_versions() == before, name
                status = await api(controller, "status")
                assert status["problems"]["signals"] or name == "old samples", name
                prometheus.reply = _prometheus(instances)
                await api(controller, path, lambda route: _fresh(route) == "True")
            await decisions(controller, 8)
            assert await here.istio_versions() == before
            prometheus.reply = _prometheus(instances, "-1")
            await here.until_condition("MetricsFresh", "False", "SignalStale")


TRUTH = {
    "compute_input": "0.006",
    "exec_count": "0.2",
    "queue_duration": "0.001",
    "inference_count": "1",
    "pending": "0",
    "request_failure": "0",
    "nv_gpu_utilization": "0.3",
    "request_success": "5",
}
"""What a query is answered, by the first of these words that is in it."""


def _prometheus(instances: Sequence[str], value: str = "", age_s: float = 0.0) -> Callable[[str], bytes]:
    """One that knows Triton's series of these servers: the truth, or `value` for everything, sampled `age_s` ago."""

    def reply(path: str) -> bytes:
        query = query_of(path)
        known = next((number for word, number in TRUTH.items() if word in query), None)
        if known is None:
            return EMPTY
        said = str(time.time() - age_s) if "timestamp(" in query else value or known
        labels = [{"instance": instance, "model": "resnet50"} for instance in instances]
        result = [{"metric": each, "value": [time.time(), said]} for each in labels]
        return json_answer({"status": "success", "data": {"resultType": "vector", "result": result}})

    return reply


def _lies(instances: Sequence[str]) -> Mapping[str, tuple[Callable[[str], Reply], str]]:
    """What is answered, and whether the metrics are fresh then: a ratio of NaN is 0/0, the news that nothing came."""
    return {
        "NaN": (_prometheus(instances, "NaN"), "True"),
        "-1": (_prometheus(instances, "-1"), "False"),
        "1e9": (_prometheus(instances, "1e9"), "False"),
        "old samples": (_prometheus(instances, age_s=3600.0), "False"),
        "a page": (lambda _: http("<html>welcome</html>", content_type="text/html"), "False"),
        "silence": (lambda _: Bad.HANG, "False"),
    }


def _fresh(route: Any) -> str:
    return str(next(c["status"] for c in route["conditions"] if c["type"] == "MetricsFresh"))
