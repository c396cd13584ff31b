"""crds/ and docs/reference/ are what the models say, in the form that Kubernetes takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshctl.adapters.kubernetes.kinds import KINDS as ADAPTER
from meshctl.api.crd import RESOURCES, ROOT, Resource, definition, generated, main
from meshctl.api.document import parse
from meshctl.api.objects import KINDS, WRITTEN_BY

# Keywords of apiextensions.k8s.io/v1 JSONSchemaProps that a structural schema may have and that are used here.
ALLOWED = {
    "type", "description", "required", "properties", "items", "additionalProperties", "default", "enum", "pattern",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems",
    "maxItems", "minProperties", "maxProperties", "x-kubernetes-validations", "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string",
}  # fmt: skip


def nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every schema inside `schema`, itself first."""
    yield schema
    children = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for child in children:
        if child is not None:
            yield from nodes(child)


@pytest.mark.parametrize("path", generated(), ids=str)
def test_generated_file_is_current(path: Path) -> None:
    """Whoever changes a model runs `python -m meshctl.api.crd`."""
    assert (ROOT / path).read_text() == generated()[path]


def test_check_passes_on_a_current_tree() -> None:
    """The command agrees with the test."""
    assert main(["--check"]) == 0
    assert main(["--wrong"]) == 2


def test_every_kind_has_a_definition() -> None:
    """A kind that can be read can also be installed, and so can what only programs write."""
    models = {resource.model.__name__: resource.model for resource in RESOURCES}
    assert {kind: model for kind, model in models.items() if kind not in WRITTEN_BY} == dict(KINDS)
    assert models.keys() == {*KINDS, *WRITTEN_BY}


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_adapter_knows_each_kind_as_its_definition_says(resource: Resource) -> None:
    """Group, version, plural and scope are the same in crds/ and where objects are watched."""
    spec = definition(resource)["spec"]
    kind = ADAPTER[spec["names"]["kind"]]
    assert (kind.group, kind.version, kind.plural) == (
        spec["group"],
        spec["versions"][0]["name"],
        spec["names"]["plural"],
    )
    assert kind.namespaced == (spec["scope"] == "Namespaced")


def test_every_definition_is_deployed() -> None:
    """crds/Kustomization names all of them."""
    (kustomization,) = parse((ROOT / "crds" / "Kustomization").read_bytes(), "Kustomization")
    assert set(kustomization.data["resources"]) == {f"meshctl.io_{resource.plural}.yaml" for resource in RESOURCES}


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_schema_is_structural(resource: Resource) -> None:
    """A type at every node, no references or alternatives, exclusive bounds as flags, keys of lists required."""
    (version,) = definition(resource)["spec"]["versions"]
    for node in nodes(version["schema"]["openAPIV3Schema"]):
        assert set(node) <= ALLOWED
        if not node.get("x-kubernetes-int-or-string"):
            assert node["type"] in {"object", "array", "string", "number", "integer", "boolean"}
        assert node.get("exclusiveMinimum") in {None, True}
        assert not {"properties", "additionalProperties"} <= set(node)
        if node.get("x-kubernetes-list-type") == "map":
            assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"])


@pytest.mark.parametrize("resource", RESOURCES, ids=lambda r: r.plural)
def test_definition_is_complete(resource: Resource) -> None:
    """Names, short name, category, status subresource and columns are there, and the file says the same."""
    found = definition(resource)
    names, (version,) = found["spec"]["names"], found["spec"]["versions"]
    assert found["metadata"]["name"] == f"{names['plural']}.meshctl.io"
    assert (names.get("shortNames", [""]), names["categories"]) == ([resource.short], ["meshctl"])
    assert version["subresources"] == {"status": {}}
    narrow = [column["name"] for column in version["additionalPrinterColumns"] if "priority" not in column]
    assert narrow[-1] == "Age"
    path = ROOT / "crds" / f"meshctl.io_{resource.plural}.yaml"
    assert parse(path.read_bytes(), str(path))[0].data == found


def test_every_field_is_described() -> None:
    """Whoever reads `kubectl explain` finds words at every field."""
    for resource in RESOURCES:
        schema = definition(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for part in ("spec", "status"):
            for node in nodes(schema["properties"][part]):
                missing = [name for name, child in node.get("properties", {}).items() if not child.get("description")]
                assert missing == []
