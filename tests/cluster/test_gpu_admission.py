"""deploy/admission.yaml on the real API server: pods can't leave their share of a GPU, choose GPUs, or ask for more
than there is; an agent writes the GPUs of its node. Everything else goes on as without it.

The policies are installed under names of the test's own, for its own namespace and its own GPUs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from ruamel.yaml import YAML

from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.api import gpuresources
from meshctl.api.allocation import ALLOCATION
from meshctl.api.gpulabels import GPU_PRODUCT, GPU_UUID
from meshctl.sharing import RESOURCE
from tests.cluster.cluster import Cluster, KubectlError
from tests.cluster.verdicts import Server, asking
from tests.harness.manifests import text
from tests.harness.tools import completed, until

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]
POLICIES = Path(__file__).parents[2] / "deploy" / "admission.yaml"
OTHER = "example.com/slices"
"""A resource that only the ConfigMap knows."""
EXTRA = "Impersonate-Extra-authentication.kubernetes.io%2Fnode-name"
AGENT = "system:serviceaccount:meshctl-agent:meshctl-agent"
FORGED = '{"version": 1, "containers": [{"name": "main", "gpus": {"GPU-1": 1}}]}'
Change = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Admission:
    """The API server with the policies in force for `namespace`."""

    server: Server
    namespace: str

    async def said(self, value: Mapping[str, Any], path: str, method: str = "POST", **who: str) -> str:
        """Why the object is refused; "" when it is taken (and not stored)."""
        status, body = await self.server.ask(method, path, orjson.dumps(value).decode(), **who)
        assert status in {200, 201, 403, 422}, (method, path, body["message"])
        return "" if status < 300 else str(body["message"])

    async def pod(self, value: Mapping[str, Any], **who: str) -> str:
        return await self.said(value, KINDS["Pod"].path(self.namespace), **who)

    async def changed(self, value: Mapping[str, Any], subresource: str = "", **who: str) -> str:
        path = KINDS["Pod"].path(self.namespace, value["metadata"]["name"], subresource)
        return await self.said(value, path, "PUT", **who)

    async def gpu(self, name: str, node: str, **who: str) -> str:
        """Creating one."""
        spec = {"node": node, "uuid": name.upper()}
        metadata = {"name": name, "labels": {"of": self.namespace}}
        value = {"apiVersion": "meshctl.io/v1alpha1", "kind": "GPU", "metadata": metadata, "spec": spec}
        return await self.said(value, KINDS["GPU"].path(), **who)

    async def changed_gpu(self, name: str, node: str, subresource: str = "", **who: str) -> str:
        headers = {**who, "Content-Type": "application/merge-patch+json"}
        patch = {"spec": {"node": node}, "status": {"summary": "1/2"}}
        return await self.said(patch, KINDS["GPU"].path(name=name, subresource=subresource), "PATCH", **headers)

    async def deleted_gpu(self, name: str, **who: str) -> str:
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "dryRun": ["All"]}  # its body wins over the query
        return await self.said(options, KINDS["GPU"].path(name=name), "DELETE", **who)


def who(user: str, **extra: str) -> dict[str, str]:
    """Headers of an administrator who acts as somebody with the rights of an administrator."""
    return {"Impersonate-User": user, "Impersonate-Group": "system:masters", **extra}


def agent_of(node: str) -> dict[str, str]:
    return who(AGENT, **{EXTRA: node})


def pod(resource: str = RESOURCE, slots: int = 1, **env: str) -> dict[str, Any]:
    """One container, `main`, that asks for slots."""
    main: dict[str, Any] = {
        "name": "main",
        "image": "i",
        "env": [{"name": name, "value": value} for name, value in env.items()],
    }
    if resource:
        main["resources"] = {"limits": {resource: str(slots)}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [main]}}


def annotated(value: dict[str, Any], **annotations: str) -> dict[str, Any]:
    """A copy with annotations of meshctl.io."""
    own = {f"meshctl.io/{name.replace('_', '-')}": text for name, text in annotations.items()}
    return {**value, "metadata": {**value["metadata"], "annotations": own}}


def beside(value: dict[str, Any], kind: str, **env: str) -> dict[str, Any]:
    """A copy with a second container that asks for nothing."""
    second = {"name": "second", "image": "i", "env": [{"name": name, "value": text} for name, text in env.items()]}
    return {**value, "spec": {**value["spec"], kind: [*value["spec"].get(kind, []), second]}}


def binding(name: str, **annotations: str) -> dict[str, Any]:
    target = {"kind": "Node", "name": "n"}
    return annotated(
        {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}, **annotations
    )


def installed(namespace: str, parameters: str = "") -> list[dict[str, Any]]:
    """The policies under other names, for objects of `namespace` (or labelled so) alone; parameters from there, or
    from the namespace `parameters`."""
    with POLICIES.open() as stream:
        documents = [document for document in YAML(typ="safe").load_all(stream) if document]
    for document in documents:
        document["metadata"]["name"] += f".{namespace}"
        spec = document["spec"]
        if document["kind"] != "ValidatingAdmissionPolicyBinding":
            continue
        spec["policyName"] += f".{namespace}"
        if "objects" in spec["policyName"]:
            spec["matchResources"] = {"objectSelector": {"matchLabels": {"of": namespace}}}
        else:
            labels = {"kubernetes.io/metadata.name": namespace}
            spec["matchResources"] = {"namespaceSelector": {"matchLabels": labels}}
        if "paramRef" in spec:
            assert spec["paramRef"]["name"] == gpuresources.NAME
            assert spec["paramRef"]["namespace"] == gpuresources.NAMESPACE
            spec["paramRef"]["namespace"] = parameters or namespace
    return documents


def config_map(namespace: str, limits: Mapping[str, int]) -> dict[str, Any]:
    metadata = {"name": gpuresources.NAME, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": gpuresources.data(limits)}


async def in_force(cluster: Cluster, namespace: str, server: Server, limits: Mapping[str, int]) -> Admission:
    """Installed, and each of them known to refuse something."""
    await cluster.apply(*installed(namespace), *([config_map(namespace, limits)] if limits else []))
    admission = Admission(server, namespace)

    async def refuses() -> bool:
        known = [await admission.pod(pod(resource, CUDA_MPS_PIPE_DIRECTORY="/p")) for resource in limits or {RESOURCE}]
        known.append(await admission.pod(annotated(pod(""), gpu_allocation=FORGED)))
        known.append(await admission.gpu("gpu-1", "n", **agent_of("other")))
        return all(known)

    await until(refuses, "the policies are in force")
    return admission


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def admission(cluster: Cluster) -> AsyncIterator[Admission]:
    """10 slots of hpe.com/gpus for one container, no known limit of example.com/slices."""
    namespace = await cluster.namespace("admission")
    async with asking(cluster, namespace) as server:
        yield await in_force(cluster, namespace, server, {RESOURCE: 10, OTHER: 0})
    await cluster.kubectl("delete", "--filename=-", "--wait=false", stdin=text(*installed(namespace)))


@pytest.mark.parametrize(
    "name", ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"]
)
@pytest.mark.parametrize("resource", [RESOURCE, OTHER])
async def test_a_pod_that_overrides_its_share_is_refused(admission: Admission, resource: str, name: str) -> None:
    """The pod's own variables would come after the agent's; the message names container and variable."""
    assert f"container main sets {name}; remove" in await admission.pod(pod(resource, 1, **{name: "100"}))
    from_a_field = pod(resource)
    source = {"fieldRef": {"fieldPath": "metadata.name"}}
    from_a_field["spec"]["containers"][0]["env"] = [{"name": name, "valueFrom": source}]
    assert name in await admission.pod(from_a_field)


@pytest.mark.parametrize("kind", ["containers", "initContainers"])
async def test_a_container_beside_it_must_not_either(admission: Admission, kind: str) -> None:
    """It is on the same GPU's node, and would see GPUs that it did not ask for."""
    assert "container second sets NVIDIA_VISIBLE_DEVICES" in await admission.pod(
        beside(pod(), kind, NVIDIA_VISIBLE_DEVICES="all")
    )


async def test_several_mistakes_are_told_at_once(admission: Admission) -> None:
    """Each container with each variable."""
    said = await admission.pod(beside(pod(CUDA_MPS_A="1", CUDA_MPS_B="2"), "containers", CUDA_VISIBLE_DEVICES="0"))
    assert "container main sets CUDA_MPS_A, CUDA_MPS_B; container second sets CUDA_VISIBLE_DEVICES; remove" in said


@pytest.mark.parametrize(
    "value",
    [
        pod(),
        pod(slots=10),
        pod(OTHER, 1000),
        pod(PATH="/bin", NVIDIA_DRIVER_CAPABILITIES="compute", NVIDIA_REQUIRE_CUDA="cuda>=12"),
        pod(NVIDIA_VISIBLE_DEVICES="void"),
        beside(pod(), "containers", NVIDIA_VISIBLE_DEVICES="none"),
        pod("", CUDA_MPS_PIPE_DIRECTORY="/p", NVIDIA_VISIBLE_DEVICES="all"),
        pod("nvidia.com/gpu", 64, CUDA_VISIBLE_DEVICES="0"),
        annotated(pod(""), gpu_uuid="GPU-1", gpu_product="T4"),
        annotated(pod("nvidia.com/gpu"), gpu_uuid="GPU-1"),
        annotated(pod(), gpu="x"),
    ],
    ids=str,
)
async def test_other_pods_are_let_in(admission: Admission, value: dict[str, Any]) -> None:
    """What has nothing to do with shares, hides GPUs, or asks for GPUs of another plugin."""
    assert await admission.pod(value) == ""


async def test_more_slots_than_there_are_is_refused(admission: Admission) -> None:
    """By container, in limits alone (the API server wants equal requests); a peak of an init container too."""
    said = await admission.pod(pod(slots=11))
    assert f"container main asks for 11 {RESOURCE} (one container can get at most 10): ask for fewer, or let" in said
    first = pod(slots=11)["spec"]["containers"]
    value = pod()
    value["spec"]["initContainers"] = [{**first[0], "name": "first"}]
    assert "container first asks for 11" in await admission.pod(value)
    assert "main asks for 2k" in await admission.pod(pod(slots=2000))


async def test_half_a_slot_is_refused(admission: Admission) -> None:
    """By Kubernetes itself; the policies do not stumble over it."""
    half = pod()
    half["spec"]["containers"][0]["resources"]["limits"][RESOURCE] = "500m"
    assert "must be an integer" in await admission.pod(half)


async def test_a_large_pod_is_judged_too(admission: Admission) -> None:
    """20 containers of 200 variables stay within what the API server spends on an expression; one mistake is found."""
    large = pod()
    more = [{"name": f"V{index}", "value": "x" * 20} for index in range(200)]
    large["spec"]["containers"] += [{"name": f"c{index}", "image": "i", "env": more} for index in range(19)]
    assert await admission.pod(large) == ""
    more.append({"name": "CUDA_MPS_LOG_DIRECTORY", "value": "/l"})
    assert "container c0 sets CUDA_MPS_LOG_DIRECTORY; container c1" in await admission.pod(large)


async def test_19_a_forged_allocation_annotation_is_refused(admission: Admission) -> None:
    """By whoever creates the pod, whatever it asks for; by the scheduler's own accounts it is taken."""
    for resource in (RESOURCE, OTHER, ""):
        forged = annotated(pod(resource), gpu_allocation=FORGED)
        for user in ("somebody", "system:serviceaccount:default:meshctl", "system:serviceaccount:meshctl-systems:m"):
            assert f"{ALLOCATION} may be set, changed or removed by the scheduler" in await admission.pod(
                forged, **who(user)
            )
        for user in ("system:kube-scheduler", "system:serviceaccount:meshctl-system:meshctl"):
            assert await admission.pod(forged, **who(user)) == ""


@pytest.mark.parametrize("name", [GPU_UUID, GPU_PRODUCT])
async def test_a_pod_that_asks_for_a_share_does_not_say_which_gpu_it_has(admission: Admission, name: str) -> None:
    """What it says would be believed by the routing."""
    for resource in (RESOURCE, OTHER):
        value = pod(resource)
        value["metadata"]["annotations"] = {name: "x"}
        assert f"{name} may be set by the scheduler only" in await admission.pod(value)
        assert await admission.pod(value, **who("system:kube-scheduler")) == ""


async def test_a_pod_that_is_there_keeps_what_the_scheduler_wrote(cluster: Cluster, admission: Admission) -> None:
    """No update, status or binding of others sets, changes or removes it; all the rest of the pod may be changed."""
    path = KINDS["Pod"].path(admission.namespace)
    for name, written in (("bound", {ALLOCATION: FORGED}), ("free", {})):
        value = pod()
        value["metadata"] = {"name": name, "annotations": written}
        created = ("create", "--filename=-", "--namespace", admission.namespace, "--as=system:kube-scheduler")
        await cluster.kubectl(*created, "--as-group=system:masters", stdin=text(value))
    bound, free = [await cluster.get("pod", name, "--namespace", admission.namespace) for name in ("bound", "free")]

    def with_annotations(value: dict[str, Any], **annotations: str) -> dict[str, Any]:
        return {**value, "metadata": {**value["metadata"], "annotations": annotations, "labels": {"a": "b"}}}

    for subresource in ("", "status"):
        for value in (
            with_annotations(bound),
            with_annotations(bound, **{ALLOCATION: "{}"}),
            with_annotations(free, **{ALLOCATION: FORGED}),
        ):
            assert "by the scheduler only" in await admission.changed(value, subresource)
            assert await admission.changed(value, subresource, **who("system:kube-scheduler")) == ""
        assert "gpu-uuid may be set" in await admission.changed(with_annotations(free, **{GPU_UUID: "x"}), subresource)
        assert await admission.changed(with_annotations(bound, **{ALLOCATION: FORGED, "a": "b"}), subresource) == ""
        assert await admission.changed(with_annotations(free, a="b"), subresource) == ""
    for at in (f"{path}/free/binding", path.replace("/pods", "/bindings")):
        for written in ({"gpu_allocation": FORGED}, {"gpu_uuid": "x"}, {"gpu_product": "x"}):
            assert "by the scheduler only" in await admission.said(binding("free", **written), at)
        scheduler = who("system:kube-scheduler")
        assert await admission.said(binding("free", gpu_allocation=FORGED), at, **scheduler) == ""
        assert await admission.said(binding("free", gpu="x"), at) == ""


async def test_a_container_for_debugging_must_not_override_either(cluster: Cluster, admission: Admission) -> None:
    """Added later to a pod with a share; to one without it may set what it likes."""
    for name, resource in (("shares", RESOURCE), ("alone", "")):
        value = pod(resource)
        value["metadata"] = {"name": name}
        await cluster.kubectl("create", "--filename=-", "--namespace", admission.namespace, stdin=text(value))
        stored = await cluster.get("pod", name, "--namespace", admission.namespace)
        said = await admission.changed(
            beside(stored, "ephemeralContainers", NVIDIA_VISIBLE_DEVICES="all"), "ephemeralcontainers"
        )
        assert ("container second sets NVIDIA_VISIBLE_DEVICES" in said) == bool(resource), said
        assert await admission.changed(beside(stored, "ephemeralContainers", A="b"), "ephemeralcontainers") == ""


async def test_a_pod_from_before_the_policies_can_still_be_changed(cluster: Cluster) -> None:
    """A pod that would be refused now gets its status, its labels and its deletion."""
    namespace = await cluster.namespace("admission")
    old = {**pod(slots=50, CUDA_MPS_PIPE_DIRECTORY="/p"), "metadata": {"name": "old"}}
    await cluster.kubectl("create", "--filename=-", "--namespace", namespace, stdin=text(old))
    stored = await cluster.get("pod", "old", "--namespace", namespace)
    async with asking(cluster, namespace) as server:
        admission = await in_force(cluster, namespace, server, {RESOURCE: 10})
        stored["metadata"]["labels"] = {"a": "b"}
        assert [await admission.changed(stored, part) for part in ("", "status")] == ["", ""]
        added = beside(stored, "ephemeralContainers", A="b")
        assert await admission.changed(added, "ephemeralcontainers") == ""
    await cluster.kubectl("delete", "pod", "old", "--namespace", namespace, "--wait=false")


async def test_without_the_config_map_shares_are_still_kept(cluster: Cluster) -> None:
    """hpe.com/gpus is known to everybody; no number is too large, and other resources are nobody's business."""
    namespace = await cluster.namespace("admission")
    async with asking(cluster, namespace) as server:
        admission = await in_force(cluster, namespace, server, {})
        assert "container main sets CUDA_VISIBLE_DEVICES" in await admission.pod(pod(CUDA_VISIBLE_DEVICES="0"))
        assert await admission.pod(pod(slots=1000)) == ""
        assert await admission.pod(pod(OTHER, CUDA_VISIBLE_DEVICES="0")) == ""


async def test_an_agent_writes_the_gpus_of_its_own_node(cluster: Cluster, admission: Admission) -> None:
    """It creates, changes, moves and deletes no other's; an administrator may."""
    for name, node in (("gpu-1", "n1"), ("gpu-2", "n2")):
        unique = f"{name}.{admission.namespace}"
        spec = {"node": node, "uuid": unique.upper()}
        metadata = {"name": unique, "labels": {"of": admission.namespace}}
        await cluster.apply({"apiVersion": "meshctl.io/v1alpha1", "kind": "GPU", "metadata": metadata, "spec": spec})
    own, other = f"gpu-1.{admission.namespace}", f"gpu-2.{admission.namespace}"
    agent = agent_of("n1")
    assert await admission.gpu("gpu-9", "n1", **agent) == ""
    assert "the agent of node n1 may not write a GPU of node n2" in await admission.gpu("gpu-9", "n2", **agent)
    assert "names no node" in await admission.gpu("gpu-9", "n1", **who(AGENT))
    assert await admission.gpu("gpu-9", "n2", **who("somebody")) == ""
    for subresource in ("", "status"):
        assert await admission.changed_gpu(own, "n1", subresource, **agent) == ""
        assert "of node n2" in await admission.changed_gpu(other, "n2", subresource, **agent)
    assert "of node n2, n1" in await admission.changed_gpu(own, "n2", **agent)
    assert "of node n1, n2" in await admission.changed_gpu(other, "n1", **agent)
    assert await admission.deleted_gpu(own, **agent) == ""
    assert "of node n2" in await admission.deleted_gpu(other, **agent)
    for name in (own, other):
        await cluster.kubectl("delete", "gpu", name)


async def test_an_agents_token_says_its_node(cluster: Cluster, admission: Admission) -> None:
    """As the API server signs it, not only as somebody claims; a token that is bound to no node writes nothing."""
    node, account = f"node-{admission.namespace}", f"{admission.namespace}/meshctl-agent"
    await cluster.kubectl("create", "serviceaccount", "meshctl-agent", "--namespace", admission.namespace)
    role = ("--clusterrole=cluster-admin", f"--serviceaccount={account.replace('/', ':')}")
    await cluster.kubectl("create", "clusterrolebinding", admission.namespace, *role)
    await cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
    name = f"gpu-3.{admission.namespace}"
    metadata = {"name": name, "labels": {"of": admission.namespace}}
    gpu = {"apiVersion": "meshctl.io/v1alpha1", "kind": "GPU", "metadata": metadata}
    gpu["spec"] = {"node": node, "uuid": name.upper()}
    with pytest.raises(KubectlError, match="names no node"):
        await cluster.apply(gpu, kubeconfig=await cluster.kubeconfig_for(account))
    await cluster.apply(gpu, kubeconfig=await completed(cluster.kubeconfig_bound, account, node))
    for thing in (("gpu", name), ("node", node), ("clusterrolebinding", admission.namespace)):
        await cluster.kubectl("delete", *thing)
