"""A real `meshctl run` in a real cluster: how soon what happens there holds in a real gateway, and who writes.

Times begin right before a request to the API server is sent and end when the gateway itself shows the effect: by an
answer, or by its own list of endpoints. They include what the measuring takes on the same cores.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from bench.report import Figure, Report, at_most, progress, quantiles
from istio.names import DOMAIN, OURS, SERVICE_ENTRY, VIRTUAL_SERVICE
from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.errors import MeshctlError
from meshctl.ports import KubeObject, ObjectKey
from meshctl.sim.load import INFER_PATH
from tests.cluster.cluster import GATEWAY, Cluster
from tests.harness import manifests
from tests.harness.controller import RunProcess, run_with
from tests.harness.envoy import Backends, load

ROUTE_S, POD_S, FAILOVER_S = 1.0, 1.0, 15.0
PODS = 3
"""Behind the Service, on GPUs in turn."""
LATEST_S = 60.0
"""What takes longer is an error."""
LOOK_S = 0.01
"""Between two looks at what only shows by asking: a gateway's answer, its endpoints."""
REST_S = 0.6
"""Every measurement begins when nothing has moved for so long: several quiet times of the writer and of istiod."""
GPUS = ("V100", "T4", "P100")
SIZES = {"classes": [{"name": "small", "min": 1, "max": 7}, {"name": "large", "min": 8, "max": 128}]}
_ENDPOINTS = "/config_dump?include_eds&resource=dynamic_endpoint_configs"
_PORT = 8000


@dataclass
class Place:
    """A namespace of its own, what is in it as the API server tells, and a way to write to it."""

    cluster: Cluster
    namespace: str
    directory: Path
    client: Client
    objects: ClusterObjects
    session: aiohttp.ClientSession
    _runs: itertools.count[int] = field(default_factory=itertools.count)

    def key(self, kind: str, name: str) -> ObjectKey:
        return ObjectKey(kind, self.namespace, name)

    def placed(self, made: dict[str, Any]) -> dict[str, Any]:
        made["metadata"]["namespace"] = self.namespace
        return made

    async def profiles(self) -> None:
        """What the GPUs do, so that the weights are not alike."""
        for index, gpu in enumerate(GPUS):
            service = {"base": f"{5 * (index + 1)}ms", "perItem": "800us"}
            await self.client.create(self.placed(manifests.profile(f"p-{gpu.lower()}", gpu=gpu, service=service)))

    async def route(self, name: str, backend: Mapping[str, Any], policy: str = "Balanced") -> None:
        spec = {"hosts": [self.host(name)], "gateways": [GATEWAY], "requestSize": SIZES, "warmUp": "0s"}
        made = manifests.route(name, **spec, expectedLoad=10, policy=policy, backend=backend)
        await self.client.create(self.placed(made))

    def host(self, name: str) -> str:
        return f"{name}.{self.namespace}.example"

    @asynccontextmanager
    async def controller(self, *options: str) -> AsyncIterator[RunProcess]:
        where = ("--kubeconfig", str(self.cluster.kubeconfig), "--namespace", self.namespace)
        istio = ("--istio", "--istiod", self.cluster.istiod_debug)
        log = self.directory / f"run-{self.namespace}-{next(self._runs)}.log"
        async with run_with(log, *where, *istio, *options) as running:
            yield running

    async def served(self, host: str, model: str = "any") -> float:
        """When (perf_counter) a request for `host` was answered."""
        url = self.cluster.gateway().url + INFER_PATH.format(model=model)

        async def answered() -> bool:
            async with self.session.post(url, headers={"host": host, "x-batch-size": "1"}) as answer:
                return answer.status == 200

        return await shown(answered, f"{host} is served")

    async def endpoints(self) -> dict[str, dict[str, int]]:
        """Cluster of a size class -> ``address:port`` -> weight, as the gateway balances by them."""
        async with self.session.get(f"http://{self.cluster.gateway().admin}{_ENDPOINTS}") as answer:
            configs = orjson.loads(await answer.read()).get("configs", ())
        found: dict[str, dict[str, int]] = {}
        for config in configs:
            name = str(config["endpoint_config"].get("cluster_name", ""))
            if name.endswith(f".{self.namespace}.sizes.{DOMAIN}"):
                members = [m for locality in config["endpoint_config"].get("endpoints", ()) for m in _members(locality)]
                found[name] = dict(members)
        return found

    async def seen(self, holds: Callable[[], bool], what: str) -> float:
        """When (perf_counter) `holds` of the watched objects."""
        reader = self.objects.reader()
        try:
            async with asyncio.timeout(LATEST_S):
                while not holds():
                    await reader.wait_changed()
        except TimeoutError as late:
            raise MeshctlError(f"not within {LATEST_S:g} s: {what}") from late
        return time.perf_counter()

    def istio(self) -> dict[ObjectKey, KubeObject]:
        return {key: value for kind in OURS for key, value in sorted(self.objects.every(kind).items())}


@asynccontextmanager
async def place(cluster: Cluster, directory: Path) -> AsyncIterator[Place]:
    """In the end the namespace is deleted, so that the gateway forgets its routes."""
    namespace = await cluster.namespace("bench")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(cluster.kubeconfig))
        objects = await ClusterObjects(client, namespaces=(namespace,), istio=True).start(LATEST_S)
        stack.push_async_callback(objects.stop)
        stack.push_async_callback(cluster.kubectl, "delete", "namespace", namespace, "--wait=false")
        timeout = aiohttp.ClientTimeout(total=LATEST_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        yield Place(cluster, namespace, directory, client, objects, session)


async def shown(holds: Callable[[], Awaitable[bool]], what: str) -> float:
    """When (perf_counter) a look found that it holds. Raises MeshctlError after `LATEST_S`."""
    try:
        async with asyncio.timeout(LATEST_S):
            while not await holds():  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(LOOK_S)  # a gateway tells nobody: asking is all there is
    except TimeoutError as late:
        raise MeshctlError(f"not within {LATEST_S:g} s: {what}") from late
    return time.perf_counter()


def _members(locality: Mapping[str, Any]) -> list[tuple[str, int]]:
    found = []
    for member in locality.get("lb_endpoints", ()):
        address = member["endpoint"]["address"]["socket_address"]
        weight = int(member.get("load_balancing_weight", 1))
        found.append((f"{address['address']}:{address['port_value']}", weight))
    return found


# ------------------------------------------------------------------------------------------------ a route -> served


async def bench_route(report: Report, cluster: Cluster, directory: Path, repeats: int) -> None:
    """One new ModelRoute after the other; those before stay."""
    async with place(cluster, directory) as here, Backends(len(GPUS)) as backends, here.controller():
        await here.profiles()
        pairs = zip(backends.addresses, GPUS, strict=True)
        servers = [{"address": a.partition(":")[0], "port": int(a.partition(":")[2]), "gpu": gpu} for a, gpu in pairs]
        times = []
        for turn in range(repeats):
            await asyncio.sleep(REST_S)
            name = f"r{turn}"
            start_s = time.perf_counter()
            await here.route(name, {"endpoints": servers})
            times.append(await here.served(here.host(name)) - start_s)
            await _check_weights(here, name)
        report.add(
            *quantiles(
                "ModelRoute applied -> first answer, by weights",
                times,
                "s",
                {0.99: at_most(ROUTE_S), 1.0: None},
                "one after the other, each with 5 objects of Istio's",
            )
        )


async def _check_weights(here: Place, name: str) -> None:
    """The gateway has every size class' weights as they were written. Raises MeshctlError."""
    count = len(SIZES["classes"]) + 1

    async def same() -> bool:
        entries = [
            v for key, v in here.istio().items() if key.kind == SERVICE_ENTRY and key.name.startswith(f"{name}.")
        ]
        wanted = {f"outbound|80||{entry['spec']['hosts'][0]}": _written(entry) for entry in entries}
        inside = await here.endpoints()
        return len(wanted) == count and all(inside.get(cluster) == weights for cluster, weights in wanted.items())

    await shown(same, f"{name}: the gateway balances by the weights of {count} ServiceEntries")


def _written(entry: KubeObject) -> dict[str, int]:
    return {f"{e['address']}:{e['ports']['http']}": e["weight"] for e in entry["spec"]["endpoints"]}


# --------------------------------------------------------------------------------------------------- a pod that goes


async def bench_pod(report: Report, cluster: Cluster, directory: Path, repeats: int) -> None:
    """A pod is deleted, out of its Service's three, and another one comes."""
    async with place(cluster, directory) as here, here.controller():
        await here.profiles()
        ports = [{"name": "http", "port": 80, "targetPort": "http"}]
        kind = {"apiVersion": "v1", "kind": "Service"}
        spec = {"selector": {"app": "triton"}, "ports": ports}
        await here.client.create({**kind, "metadata": {"name": "triton", "namespace": here.namespace}, "spec": spec})
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": here.namespace}}  # slices ask for it
        await here.client.create(node)
        numbers = itertools.count()
        pods = [await _pod(here, next(numbers)) for _ in range(PODS)]
        # Every pod gets something of every size class, and so is in every cluster.
        await here.route("pods", {"service": {"name": "triton", "port": "http"}}, "Proportional")
        await _all_balanced(here, pods)
        shows: list[list[float]] = [[], [], []]
        come = []
        for _ in range(repeats):
            await asyncio.sleep(REST_S)
            pod = pods.pop(0)
            start_s = time.perf_counter()
            deleting = asyncio.create_task(
                here.client.delete(here.key("Pod", pod.name))
            )  # for its grace period it stays
            times = await asyncio.gather(*_signs(here, pod))
            await deleting
            for found, at_s in zip(shows, times, strict=True):
                found.append(at_s - start_s)
            await _forget(here, pod)
            pods.append(await _pod(here, next(numbers)))
            start_s = time.perf_counter()
            come.append(await _all_balanced(here, pods) - start_s)
    told, written, gone = shows
    limits, note = {0.99: at_most(POD_S), 1.0: None}, "from the DELETE's sending"
    report.add(
        *quantiles("a pod is deleted -> its EndpointSlice says so", told, "s", {0.99: None}, note),
        *quantiles("a pod is deleted -> out of every ServiceEntry", written, "s", limits, note),
        *quantiles("a pod is deleted -> out of Envoy", gone, "s", limits, note),
        *quantiles("a pod is ready -> in every cluster of Envoy", come, "s", {0.99: None}, "from its status written"),
    )


@dataclass(frozen=True, slots=True)
class _Pod:
    name: str
    address: str

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{_PORT}"


async def _pod(here: Place, number: int) -> _Pod:
    """Ready, as a kubelet would say, on a GPU product of its own; there is no kubelet, and nobody sends requests."""
    pod = _Pod(f"t-{number}", f"10.64.{number // 200}.{number % 200 + 1}")
    containers = [{"name": "triton", "image": "triton", "ports": [{"name": "http", "containerPort": _PORT}]}]
    metadata = {
        "name": pod.name,
        "namespace": here.namespace,
        "labels": {"app": "triton"},
        "annotations": {"meshctl.io/gpu-product": GPUS[number % len(GPUS)]},
    }
    spec = {"nodeName": here.namespace, "containers": containers, "terminationGracePeriodSeconds": 600}
    await here.client.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    ready = [{"type": "Ready", "status": "True"}]
    status = {"phase": "Running", "podIP": pod.address, "podIPs": [{"ip": pod.address}], "conditions": ready}
    await here.client.merge_patch(here.key("Pod", pod.name), {"status": status}, subresource="status")
    return pod


def _signs(here: Place, pod: _Pod) -> list[Awaitable[float]]:
    """When its end shows in the EndpointSlices, in the ServiceEntries, and in the gateway."""

    def terminating() -> bool:
        slices = here.objects.every("EndpointSlice").values()
        mine = [e for s in slices for e in s["endpoints"] if e["addresses"] == [pod.address]]
        return not any(e["conditions"].get("ready", True) for e in mine)

    def left_out() -> bool:
        entries = here.objects.every(SERVICE_ENTRY).values()
        return all(e["address"] != pod.address for entry in entries for e in entry["spec"].get("endpoints", ()))

    async def forgotten() -> bool:
        return all(pod.endpoint not in members for members in (await here.endpoints()).values())

    return [
        here.seen(terminating, f"{pod.name} is terminating in its EndpointSlice"),
        here.seen(left_out, f"{pod.name} is in no ServiceEntry"),
        shown(forgotten, f"{pod.name} is in no cluster of the gateway"),
    ]


async def _all_balanced(here: Place, pods: list[_Pod]) -> float:
    wanted = {pod.endpoint for pod in pods}

    async def there() -> bool:
        clusters = await here.endpoints()
        return len(clusters) == len(SIZES["classes"]) + 1 and all(m.keys() == wanted for m in clusters.values())

    return await shown(there, f"the gateway's clusters have {sorted(wanted)}")


async def _forget(here: Place, pod: _Pod) -> None:
    """As a kubelet does when its containers have ended."""
    where = ("--namespace", here.namespace, "--grace-period=0", "--force")
    await here.cluster.kubectl("delete", "pod", pod.name, *where)


# ---------------------------------------------------------------------------------------------------------- fail-over


async def bench_failover(report: Report, cluster: Cluster, directory: Path, repeats: int) -> None:
    """Two replicas; the one that leads is killed under load, again and again."""
    async with place(cluster, directory) as here, Backends(len(GPUS)) as backends:
        await here.profiles()
        pairs = zip(backends.addresses, GPUS, strict=True)
        servers = [{"address": a.partition(":")[0], "port": int(a.partition(":")[2]), "gpu": gpu} for a, gpu in pairs]
        await here.route("r", {"endpoints": servers})
        lease, times, strays, failed, sent = ("--lease", f"{here.namespace}/meshctl"), [], 0, 0, 0
        async with AsyncExitStack() as stack:
            leader = await stack.enter_async_context(here.controller(*lease))
            await here.served(here.host("r"))
            for turn in range(repeats):
                follower = await stack.enter_async_context(here.controller(*lease))
                await asyncio.sleep(2 * REST_S)  # it follows: nothing tells of it from outside
                async with load(cluster.gateway().url, workers=2, host=here.host("r")) as outcome:
                    took_s, written = await _killed(here, leader, f"{20 + turn}s")
                times.append(took_s)
                strays += written
                failed, sent = failed + outcome.failed, sent + outcome.statuses.total()
                progress(f"fail-over {turn + 1}: {took_s:.1f} s")
                leader = follower
    note = "kill -9 of the holder -> a change made right after it is written by the other"
    report.add(
        *quantiles("fail-over: next write", times, "s", {1.0: at_most(FAILOVER_S)}, note),
        Figure("fail-over: other writes to Istio's objects", strays, "writes", at_most(0), "weights among them"),
        Figure("fail-over: failed requests", failed, "requests", at_most(0), f"of {sent}"),
    )


async def _killed(here: Place, leader: RunProcess, timeout: str) -> tuple[float, int]:
    """Seconds from the kill to the first write, which is the change of `timeout`; how many other objects changed."""
    before, route = here.istio(), here.key(VIRTUAL_SERVICE, "r")

    def written() -> bool:
        rules = here.istio()[route]["spec"]["http"]
        return {rule["timeout"] for rule in rules} == {timeout}

    start_s = time.perf_counter()
    await leader.end(signal.SIGKILL)
    await here.client.merge_patch(here.key("ModelRoute", "r"), {"spec": {"timeout": timeout}}, manager="bench")
    took_s = await here.seen(written, f"the VirtualService says {timeout}") - start_s
    await asyncio.sleep(2 * REST_S)  # what else the new leader might write
    after = here.istio()
    return took_s, sum(after.get(key) != before.get(key) for key in after.keys() | before.keys() if key != route)
