"""What stands in for the API server of a large cluster that a machine with two cores can't hold: as much of its API as
`meshctl extender` asks for, with objects as large as real ones, each made from its number when it is listed.

    python -m bench.apistub PORT NODES PODS PENDING

Lists come in pages, watches say what bindings did, the Lease is as it was left. Every node has 8 GPUs of 10 slots; the
bound pods have about 60 % of them. Runs until it is terminated.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson
from aiohttp import web

from meshctl.adapters.kubernetes.kinds import KINDS
from tests.harness.extender_objects import container, pod
from tests.harness.gpus import gpu_object

GPUS, SLOTS = 8, 10
PODS_ON_A_NODE = 4
"""Each with two GPUs."""
NAMESPACE = "team"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
BOUND_PHASE = "Running"
_ENVIRONMENT = [{"name": f"SETTING_{number}", "value": "some value of a setting"} for number in range(20)]
_TOLERATIONS = [
    {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    for key in ("not-ready", "unreachable")
]


class Size(NamedTuple):
    nodes: int
    pods: int
    """Bound."""
    pending: int


def node_name(number: int) -> str:
    return f"node-{number:05}"


def uuid(node: int, gpu: int) -> str:
    return f"GPU-{node:08x}-{gpu:04x}-4444-8888-123456789abc"


def pod_name(number: int) -> str:
    return f"triton-7d9c5b6f4-{number:06}"


def held(number: int) -> Mapping[str, tuple[str, int]]:
    """Container -> GPU and slots of the bound pod of this number."""
    draw = random.Random(number)  # noqa: S311 (the same objects in each run)
    node, place = divmod(number, PODS_ON_A_NODE)
    parts = {"server": draw.randint(3, SLOTS), "second": draw.randint(0, SLOTS)}
    return {name: (uuid(node, 2 * place + gpu), slots) for gpu, (name, slots) in enumerate(parts.items()) if slots}


def bound_pod(number: int) -> dict[str, Any]:
    parts = held(number)
    containers = [container(name, slots, cpu="4", memory="16Gi") for name, (_, slots) in parts.items()]
    plan = {name: {gpu: slots} for name, (gpu, slots) in parts.items()}
    where = node_name(number // PODS_ON_A_NODE)
    return _large(pod(pod_name(number), *containers, namespace=NAMESPACE, node=where, phase=BOUND_PHASE, plan=plan))


def pending_pod(number: int) -> dict[str, Any]:
    """`number` counts from 0 among the pending ones."""
    draw = random.Random(-1 - number)  # noqa: S311 (likewise)
    asked = container(slots=draw.randint(1, SLOTS), cpu=str(draw.choice((1, 2, 4, 8, 12))), memory="16Gi")
    return _large(pod(f"new-{number:06}", asked, namespace=NAMESPACE))


def _large(value: dict[str, Any]) -> dict[str, Any]:
    """With what other fields such objects have."""
    value["metadata"]["labels"] = {"app": "triton", "pod-template-hash": "7d9c5b6f4"}
    value["metadata"]["ownerReferences"] = [
        {"kind": "ReplicaSet", "name": "triton-7d9c5b6f4", "uid": "u", "controller": True}
    ]
    value["spec"] |= {"tolerations": _TOLERATIONS, "serviceAccountName": "default", "dnsPolicy": "ClusterFirst"}
    for one in value["spec"]["containers"]:
        one |= {
            "env": _ENVIRONMENT,
            "terminationMessagePath": "/dev/termination-log",
            "imagePullPolicy": "IfNotPresent",
        }
    value["status"]["conditions"] = [
        {"type": kind, "status": "True", "lastTransitionTime": "2026-05-04T10:00:00Z"}
        for kind in ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    ]
    return value


def node(number: int) -> dict[str, Any]:
    """As a kubelet fills it: images are most of it."""
    resources = {"cpu": "96", "memory": "768Gi", "pods": "110", "hpe.com/gpus": str(GPUS * SLOTS)}
    digest = "0123456789abcdef" * 4
    images = [
        {
            "names": [f"registry.example/ml/image-{n}@sha256:{digest}", f"registry.example/ml/image-{n}:v1"],
            "sizeBytes": n,
        }
        for n in range(30)
    ]
    labels = {"kubernetes.io/hostname": node_name(number), "kubernetes.io/arch": "amd64", "gpu.product": "V100"}
    return {
        "metadata": {"name": node_name(number), "uid": f"uid-{number}", "resourceVersion": "1", "labels": labels},
        "spec": {"podCIDR": "10.0.0.0/24"},
        "status": {"capacity": resources, "allocatable": resources, "images": images},
    }


def gpu(number: int, pods: int) -> dict[str, Any]:
    where, index = divmod(number, GPUS)
    owner = where * PODS_ON_A_NODE + index // 2
    mine = uuid(where, index)
    holders = [
        (NAMESPACE, pod_name(owner), name, list(range(slots)))
        for name, (on, slots) in (held(owner) if owner < pods else {}).items()
        if on == mine
    ]
    return gpu_object(node_name(where), mine, SLOTS, holders, isolation="None", driver="570.1", computeCapability="7.0")


class ApiStub:
    """The state: pending pods, the Lease, and who watches pods."""

    def __init__(self, size: Size) -> None:
        self._pending = {one["metadata"]["name"]: one for one in map(pending_pod, range(size.pending))}
        self._watching: list[asyncio.Queue[bytes]] = []
        self._version = 1
        self._lease: dict[str, Any] = {}
        pending = list(self._pending)
        self._lists: Mapping[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
            KINDS["Node"].path(): (size.nodes, node),
            KINDS["GPU"].path(): (size.nodes * GPUS, lambda number: gpu(number, size.pods)),
            KINDS["Pod"].path(): (
                size.pods + len(pending),
                lambda number: bound_pod(number) if number < size.pods else self._pending[pending[number - size.pods]],
            ),
            **{KINDS[kind].path(): (0, node) for kind in ("Service", "ModelRoute", "ModelProfile")},
        }

    def application(self) -> web.Application:
        found = web.Application()
        found.add_routes([web.get(path, self._list) for path in self._lists])
        pods = KINDS["Pod"].path("{namespace}", "{name}")
        lease = f"{LEASE}/{{name}}"
        found.add_routes(
            [
                web.get(pods, self._get_pod),
                web.post(f"{pods}/binding", self._bind),
                web.get(lease, self._get_lease),
                web.post(LEASE, self._put_lease),
                web.put(lease, self._put_lease),
            ]
        )
        return found

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if "watch" in request.query:
            return await self._watch(request)
        count, made = self._lists[request.path]
        first, limit = int(request.query.get("continue", "0")), int(request.query.get("limit", "500"))
        last = min(first + limit, count)
        metadata = {"resourceVersion": str(self._version)} | ({"continue": str(last)} if last < count else {})
        return _json({"metadata": metadata, "items": [made(number) for number in range(first, last)]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        """Bindings, to who watches pods; nothing to others."""
        response = web.StreamResponse()
        await response.prepare(request)
        lines: asyncio.Queue[bytes] = asyncio.Queue()
        if request.path == KINDS["Pod"].path():
            self._watching.append(lines)
        while True:
            await response.write(await lines.get())

    async def _get_pod(self, request: web.Request) -> web.Response:
        found = self._pending.get(request.match_info["name"])
        return _json(found) if found is not None else _json({"reason": "NotFound", "code": 404}, 404)

    async def _bind(self, request: web.Request) -> web.Response:
        binding = orjson.loads(await request.read())
        value = self._pending[request.match_info["name"]]
        self._version += 1
        value["metadata"] |= {"resourceVersion": str(self._version), "annotations": binding["metadata"]["annotations"]}
        value["spec"]["nodeName"] = binding["target"]["name"]
        line = orjson.dumps({"type": "MODIFIED", "object": value}) + b"\n"
        for lines in self._watching:
            lines.put_nowait(line)
        return _json({"kind": "Status", "status": "Success"}, 201)

    async def _get_lease(self, _: web.Request) -> web.Response:
        return _json(self._lease) if self._lease else _json({"reason": "NotFound", "code": 404}, 404)

    async def _put_lease(self, request: web.Request) -> web.Response:
        self._version += 1
        self._lease = orjson.loads(await request.read())
        self._lease["metadata"] |= {"uid": "lease", "resourceVersion": str(self._version)}
        return _json(self._lease)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


if __name__ == "__main__":
    port, *counts = map(int, sys.argv[1:])
    web.run_app(ApiStub(Size(*counts)).application(), host="127.0.0.1", port=port, print=lambda *_: None)
