"""docs/howto/istio.md: what it tells people to apply, applied."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from ruamel.yaml import YAML

from istio.analyze import analyze
from tests.cluster.cluster import GATEWAY, Cluster

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/howto/istio.md").read_text(), re.MULTILINE | re.DOTALL)


def documents(group: str) -> list[Any]:
    """The page's objects of one API group, in its order."""
    found = [document for block in BLOCKS for document in YAML(typ="safe").load_all(block)]
    return [document for document in found if str(document.get("apiVersion", "")).startswith(f"{group}/")]


async def test_its_routes_profiles_and_root_are_taken_by_the_api_server(cluster: Cluster) -> None:
    """Each document; none of them is kept."""
    namespace = await cluster.namespace("howto")
    wanted = documents("meshctl.io") + documents("networking.istio.io")
    assert [document["kind"] for document in wanted] == ["ModelProfile"] * 2 + ["ModelRoute"] * 2 + ["VirtualService"]
    for document in wanted:
        document["metadata"]["namespace"] = namespace
    stdin = "\n---\n".join(orjson.dumps(document).decode() for document in wanted)
    command = ("create", "--dry-run=server", "--filename=-", "--output=json")
    taken = YAML(typ="safe").load_all((await cluster.kubectl(*command, stdin=stdin)).replace("\n}\n{", "\n}\n---\n{"))
    specs = [document["spec"] for document in taken if document["kind"] == "ModelRoute"]
    assert [spec["delegate"] for spec in specs] == [False, True]


def test_its_root_goes_with_a_delegate() -> None:
    """The root delegates to the route of the page, and contradicts nothing that meshctl would put there."""
    (root,) = documents("networking.istio.io")
    route = next(r for r in documents("meshctl.io") if r["kind"] == "ModelRoute" and r["spec"].get("delegate"))
    rules = [
        {"match": [{"headers": {"x-batch-size": {"regex": "[1-8]"}}}], "route": [{"destination": {"host": "a"}}]},
        {"route": [{"destination": {"host": "b"}}]},
    ]
    metadata = {"name": route["metadata"]["name"], "namespace": route["metadata"]["namespace"]}
    delegate = {**root, "metadata": metadata, "spec": {"http": rules}}
    assert {finding.code for finding in analyze([root, delegate])} == {"UnknownGateway"}
    assert GATEWAY.split("/")[0] == root["spec"]["gateways"][0].split("/")[0]


def test_its_overlay_builds(cluster: Cluster, tmp_path: Path) -> None:
    """With deploy/ of this repository in place of its address; the patch for istiod applies too."""
    (overlay,) = documents("kustomize.config.k8s.io")
    overlay["resources"] = [os.path.relpath(ROOT / "deploy", tmp_path)]
    (patch,) = [d["patches"] for block in BLOCKS if "patches:" in block for d in YAML(typ="safe").load_all(block)]
    with (tmp_path / "kustomization.yaml").open("w") as stream:
        YAML(typ="safe").dump({**overlay, "patches": patch}, stream)
    built = list(YAML(typ="safe").load_all(cluster.kubectl_now("kustomize", str(tmp_path))))
    (deployment,) = [document for document in built if document["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (config,) = [document for document in built if document["kind"] == "ConfigMap"]
    assert container["image"] == "REGISTRY/meshctl:0.1.0"
    assert container["args"][-1].startswith("--istiod=http://")
    assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    assert config["data"] == {"PROMETHEUS_URL": "http://prometheus.monitoring:9090"}
