"""GPUSharingPolicy and GPU on a real API server: judged as `meshctl validate` does, stored as the models say, shown."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshctl.api.base import validated
from meshctl.api.document import Document
from meshctl.api.gpu import GPU
from tests.cluster.cluster import Cluster, KubectlError
from tests.cluster.verdicts import asking, both_read, edges, judged_otherwise, spec_fields
from tests.harness.manifests import changed, sharing_policy, text
from tests.unit.test_api_gpu import SMALLEST, STATUS
from tests.unit.test_api_gpusharingpolicy import BAD, FULL

pytestmark = pytest.mark.cluster
SEVERAL = sharing_policy(mode="TimeSlicing", replicas=3, nodeSelector={"a": "b"}, products=["T4"])


def with_line(line: str) -> str:
    """A policy as somebody writes it, with a line of YAML in its spec."""
    return f"apiVersion: meshctl.io/v1alpha1\nkind: GPUSharingPolicy\nmetadata: {{name: a}}\nspec:\n  {line}\n"


GOOD_LINES = [
    "{}",
    "mode: ~",
    "replicas: ~",
    "replicas: 60",
    "replicas: 3.0",
    "mode: Exclusive",
    "mode: Exclusive\n  replicas: 1\n  severalGPUs: yes",
    "mode: TimeSlicing\n  replicas: 100\n  mps: {clientsPerContainer: 16}",
    "mps: {clientsPerContainer: 6}",
    "mps: {memoryLimit: None}",
    "mps: {oversubscription: 1}",
    "nodeSelector: {a: ~, b: '', c.d/e: f}",
    "nodeSelector:",
    f"nodeSelector: {{{', '.join(f'a.b/c{i}: d' for i in range(32))}}}",
    "resourceName: a/b",
    "resourceName: nvidia.com/gpu.shared",
    f"resourceName: {'a' * 180}/{'b' * 63}",
    "products: []",
    "health: {recoverAfter: 1s, ignoredXIDs: [1, 1000], criticalXIDs: [1]}",
    "priority: -1000",
]
BAD_LINES = [
    "mode: mps",
    "mode: Exclusive\n  replicas: 2",
    "severalGPUs: true",
    "replicas: 61",
    "mps: {clientsPerContainer: 7}",
    "replicas: 16\n  mps: {clientsPerContainer: 4}",
    "nodeSelector: {a b: c}",
    "nodeSelector: {/a: c}",
    "nodeSelector: {A.b/c: d}",
    f"nodeSelector: {{{'a' * 64}: d}}",
    f"nodeSelector: {{a: {'b' * 64}}}",
    "nodeSelector: {a: yes}",
    f"nodeSelector: {{{', '.join(f'c{i}: d' for i in range(33))}}}",
    f"resourceName: {'a' * 181}/{'b' * 63}",
    "products: [T4, T4]",
    "health: {ignoredXIDs: [7, 7]}",
]


def good() -> Iterator[str]:
    """Documents that both take."""
    yield text(sharing_policy())
    yield text(FULL)
    yield text(changed(FULL, "metadata.namespace", "anywhere"))
    yield text(FULL | {"status": {"gpus": 2, "ready": 1}})
    yield from map(with_line, GOOD_LINES)


def bad() -> Iterator[str]:
    """Documents that both refuse."""
    yield from (text(changed(FULL, path, value)) for _, path, value, *_ in BAD)
    yield from map(with_line, BAD_LINES)


def at_edges() -> Iterator[str]:
    """Each field at its edges, whatever the verdict, in the three modes."""
    for path, schema in spec_fields("GPUSharingPolicy"):
        for base in (SEVERAL, changed(SEVERAL, "spec.mode", "MPS"), sharing_policy(mode="Exclusive")):
            yield from (text(changed(base, path, value)) for value in edges(schema))


async def test_good_and_bad_policies_are_judged_the_same(cluster: Cluster, tmp_path: Path) -> None:
    """The API server and `meshctl validate` take and refuse the same texts (behaviour 20: more than 60 replicas)."""
    async with asking(cluster, "default") as server:
        assert await judged_otherwise(server, tmp_path, good=good(), bad=bad(), any_=at_edges()) == []


async def test_stored_policy_is_what_the_file_says(cluster: Cluster) -> None:
    """What the API server makes of a text, defaults and all, is read as the very value that the text is read as."""
    async with asking(cluster, "default") as server:
        for document in good():
            live, written = await both_read(server, document)
            assert live.value.spec == written.value.spec, document
            assert live.key == written.key
        _, stored = await server.answer(text(sharing_policy()))
        _, written = await both_read(server, text(sharing_policy()))
        assert stored["spec"] == written.value.spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def condition(kind: str, status: str) -> dict[str, str]:
    time = "2026-01-01T00:00:00Z"
    return {"type": kind, "status": status, "reason": "Ok", "message": "", "lastTransitionTime": time}


async def set_status(cluster: Cluster, kind: str, name: str, status: dict[str, Any]) -> None:
    patch = orjson.dumps({"status": status}).decode()
    await cluster.kubectl("patch", kind, name, "--type=merge", f"--patch={patch}", "--subresource=status")


async def test_a_policy_shows_at_a_glance(cluster: Cluster) -> None:
    """`kubectl get gsp`: how, how many, and whether it is so; its status changes no generation."""
    name = f"gsp-{secrets.token_hex(4)}"
    await cluster.apply(sharing_policy(name, replicas=4, priority=-1000, nodeSelector={"of": name}))
    conditions = [condition("Accepted", "True"), condition("Programmed", "False"), condition("Conflict", "False")]
    nodes = [{"name": "n1", "gpus": 2, "ready": 1, "message": "GPU-1 waits for 2 pods to end"}]
    status = {"observedGeneration": 1, "gpus": 2, "ready": 1, "nodes": nodes, "conditions": conditions}
    await set_status(cluster, "gsp", name, status)
    stored = await cluster.get("gsp", name)
    assert (stored["status"], stored["metadata"]["generation"]) == (status, 1)
    header, row = (await cluster.kubectl("get", "gsp", name, "--output=wide")).splitlines()
    shown = dict(zip(header.split(), row.split(), strict=True))
    del shown["AGE"]
    assert shown == {
        "NAME": name,
        "MODE": "MPS",
        "REPLICAS": "4",
        "RESOURCE": "hpe.com/gpus",
        "GPUS": "2",
        "READY": "1",
        "ACCEPTED": "True",
        "PROGRAMMED": "False",
        "PRIORITY": "-1000",
        "ISOLATION": "None",
        "CONFLICT": "False",
    }
    await cluster.kubectl("delete", "gsp", name)


async def test_a_nodes_gpus_show_at_a_glance(cluster: Cluster) -> None:
    """`kubectl get gpus`: where, what, how shared, how full, healthy, shared as wanted, whose; and -o wide the rest."""
    name = f"gpu-{secrets.token_hex(4)}"
    gpu = SMALLEST | {"metadata": {"name": name}, "spec": {"node": "n1", "uuid": name.upper()}}
    await cluster.apply(gpu)
    conditions = [condition("Healthy", "True"), condition("Shared", "False") | {"reason": "Draining"}]
    await set_status(cluster, "gpu", name, STATUS | {"product": "V100", "conditions": conditions})
    header, row = (await cluster.kubectl("get", "gpus", name)).splitlines()
    assert header.split() == [
        "NAME",
        "NODE",
        "PRODUCT",
        "MEMORY",
        "MODE",
        "SLOTS",
        "HEALTHY",
        "SHARED",
        "TENANT",
        "AGE",
    ]
    assert row.split()[:-1] == [name, "n1", "V100", "16Gi", "MPS", "3/10", "True", "Draining", "team-a"]
    header, row = (await cluster.kubectl("get", "gpus", name, "--output=wide")).splitlines()
    assert header.split()[10:] == ["HEALTH", "UUID", "CC", "MPS", "POLICY"]
    assert row.split()[10:] == ["Ok", name.upper(), "7.0", "Running", "shared"]
    read = validated(GPU, Document(await cluster.get("gpu", name), name, {}))
    assert (read.spec.node, read.status is not None) == ("n1", True)
    await cluster.kubectl("delete", "gpu", name)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("metadata.name", "gpu-2", r"metadata\.name must be spec\.uuid in small letters"),
        ("spec.node", "", "at least 1 chars"),
        ("status.slots.fre", 1, "unknown field"),
    ],
)
async def test_a_wrong_gpu_is_refused(cluster: Cluster, path: str, value: Any, said: str) -> None:
    """A programmer's mistake in the agent is found by the API server."""
    wrong = changed(SMALLEST | {"status": STATUS}, path, value)
    with pytest.raises(KubectlError, match=said):
        await cluster.kubectl("create", "--filename=-", "--dry-run=server", stdin=orjson.dumps(wrong).decode())
