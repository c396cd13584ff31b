"""istio.analyze against the real ones: istioctl's verdicts, Istio's CRDs, and objects in a live cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from ruamel.yaml import YAML

from istio.analyze import Severity, analyze
from istio.analyze.shape import Entries, Items, Message, Scalar, Shape
from istio.analyze.shapes import SHAPES
from meshctl.api.document import parse
from tests.cluster.cluster import GATEWAY, Cluster
from tests.harness.tools import DEADLINE_S, require

pytestmark = pytest.mark.cluster
CASES = sorted((Path(__file__).parents[1] / "data" / "istio").glob("*.yaml"))


@pytest.fixture(scope="module")
def istio() -> Path:
    """The folder with istioctl and crds.yaml."""
    return require("istio")


@pytest.fixture(scope="module")
def crds(istio: Path) -> dict[str, Any]:
    with (istio / "crds.yaml").open() as stream:
        return {crd["spec"]["names"]["kind"]: crd for crd in YAML(typ="safe").load_all(stream) if crd}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_istioctl_agrees(path: Path, istio: Path) -> None:
    """An error here is an error of `istioctl validate` or `istioctl analyze`, and the other way round; a document where
    they differ says so, and why, in its second line."""
    objects = [document.data for document in parse(path.read_bytes(), str(path))]
    ours = any(finding.severity is Severity.ERROR for finding in analyze(objects))
    theirs = _refuses(istio, "validate", "-f", path) or _refuses(istio, "analyze", "--use-kube=false", path)
    differs = path.read_text().splitlines()[1].startswith("# istioctl: ")
    assert (ours != theirs) == differs


def _refuses(istio: Path, *arguments: str | Path) -> bool:
    ran = subprocess.run([istio / "istioctl", *arguments], capture_output=True, timeout=DEADLINE_S)
    return ran.returncode != 0


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_the_known_fields_are_those_of_istios_crd(kind: str, crds: dict[str, Any]) -> None:
    """Every field and its type, no more and no fewer: a new version of Istio shows here."""
    (version,) = (found for found in crds[kind]["spec"]["versions"] if found["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert sorted(_ours(SHAPES[kind], "spec")) == sorted(_theirs(schema, "spec"))


def _ours(shape: Shape, path: str) -> Iterator[tuple[str, str]]:
    match shape:
        case Scalar(type):
            yield path, type
        case Items(of):
            yield from _ours(of, f"{path}[]")
        case Entries(of):
            yield from _ours(of, f"{path}{{}}")
        case Message(fields):
            for name, child in fields.items():
                yield from _ours(child, f"{path}.{name}")


def _theirs(schema: Any, path: str) -> Iterator[tuple[str, str]]:
    match schema["type"]:
        case "array":
            yield from _theirs(schema["items"], f"{path}[]")
        case "object" if "additionalProperties" in schema:
            yield from _theirs(schema["additionalProperties"], f"{path}{{}}")
        case "object":
            for name, child in schema.get("properties", {}).items():
                yield from _theirs(child, f"{path}.{name}")
        case scalar:
            yield path, scalar


async def test_what_is_live_and_files_as_if_they_were_applied(cluster: Cluster, tmp_path: Path) -> None:
    """-n judges a namespace beside everything else; -f with -n judges the files in the same surroundings."""
    namespace = await cluster.namespace()
    rule = _object("DestinationRule", "a", {"host": "a", "subsets": [{"name": "t4"}]}, namespace)
    service = {"metadata": {"name": "a", "namespace": namespace}, "spec": {"ports": [{"port": 80}]}}
    await cluster.apply(rule, {"apiVersion": "v1", "kind": "Service", **service})
    hosts = {"hosts": [f"{namespace}.example"], "gateways": [GATEWAY]}
    good = _object("VirtualService", "good", {**hosts, "http": [_to("a", "t4")]}, namespace)
    await cluster.apply(good)
    assert await _analyzed(cluster, "-n", namespace) == (0, [])
    bad = {**good, "spec": {**hosts, "http": [_to("a", "v100")]}}
    later = _object("VirtualService", "later", {**hosts, "http": [_to("b", "")]}, namespace)
    (tmp_path / "files.json").write_bytes(b"\n---\n".join(map(orjson.dumps, (bad, later))))
    assert await _analyzed(cluster, "-f", str(tmp_path), "-n", namespace) == (
        1,
        [("good", "UndefinedSubset"), ("later", "HostClaimedTwice"), ("later", "UnknownDestination")],
    )
    assert await _analyzed(cluster, "-n", namespace) == (0, [])  # nothing was applied


async def test_with_rights_in_one_namespace_nothing_elsewhere_is_called_missing(cluster: Cluster) -> None:
    """The gateway and its pods can't be seen; what is wrong in the namespace itself is still found."""
    namespace = await cluster.namespace()
    hosts = {"hosts": [f"{namespace}.example"], "gateways": ["edge/not-seen"]}
    await cluster.apply(_object("VirtualService", "v", {**hosts, "http": [_to("elsewhere.svc", "t4")]}, namespace))
    kinds = "virtualservices,destinationrules,serviceentries,gateways"
    resources = ",".join(f"{kind}.networking.istio.io" for kind in kinds.split(","))
    within = ("--namespace", namespace)
    await cluster.kubectl("create", "role", "look", "--verb=list", f"--resource={resources},services", *within)
    await cluster.kubectl(
        "create", "rolebinding", "look", "--role=look", f"--serviceaccount={namespace}:default", *within
    )
    kubeconfig = await cluster.kubeconfig_for(f"{namespace}/default")
    assert await _analyzed(cluster, "-n", namespace, kubeconfig=kubeconfig) == (0, [])
    assert (await _analyzed(cluster, "-n", namespace))[1] == [
        ("v", "UndefinedSubset"),
        ("v", "UnknownDestination"),
        ("v", "UnknownGateway"),
    ]


async def _analyzed(
    cluster: Cluster, *arguments: str, kubeconfig: Path | None = None
) -> tuple[int, list[tuple[str, str]]]:
    """Exit code, and (object, finding) in order."""
    credentials = f"--kubeconfig={kubeconfig or cluster.kubeconfig}"
    command = (sys.executable, "-m", "meshctl", "analyze", credentials, "-o", "json")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, *arguments, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode in (0, 1), err.decode()
    findings = [(finding["name"], finding["code"]) for finding in orjson.loads(out)["findings"]]
    return process.returncode or 0, sorted(findings)


def _object(kind: str, name: str, spec: dict[str, Any], namespace: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _to(host: str, subset: str) -> dict[str, Any]:
    return {"route": [{"destination": {"host": host, **({"subset": subset} if subset else {})}}]}
