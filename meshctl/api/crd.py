"""The CustomResourceDefinitions in crds/ and docs/reference/api.md, generated from the models.

``python -m meshctl.api.crd`` writes them, with ``--check`` it says which differ (exit 1). A test does the same.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from meshctl.api.base import API_VERSION, is_namespaced
from meshctl.api.gpu import GPU, GPUSpec, GPUStatus
from meshctl.api.gpusharingpolicy import GPUSharingPolicy, GPUSharingPolicySpec, GPUSharingPolicyStatus
from meshctl.api.modelprofile import ModelProfile, ModelProfileSpec, ModelProfileStatus
from meshctl.api.modelroute import ModelRoute, ModelRouteSpec, ModelRouteStatus
from meshctl.api.reference import reference
from meshctl.api.schema import Schema, openapi

GROUP, VERSION = API_VERSION.split("/")
ROOT = Path(__file__).parents[2]
HEADER = "# Generated from meshctl/api by `python -m meshctl.api.crd`; edit the models, not this file.\n"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of `kubectl get`."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False
    """Only with `-o wide`."""

    def data(self) -> dict[str, Any]:
        column = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return column | {"priority": 1} if self.wide else column


def _condition(name: str, *, wide: bool = False) -> Column:
    return Column(name, f'.status.conditions[?(@.type=="{name}")].status', wide=wide)


def _reason(title: str, condition: str, *, wide: bool = False) -> Column:
    """Why the condition is as it is, where True and False say too little."""
    return Column(title, f'.status.conditions[?(@.type=="{condition}")].reason', wide=wide)


_AGE = Column("Age", ".metadata.creationTimestamp", "date")


@dataclass(frozen=True, slots=True)
class Resource:
    """What the schema of a kind does not say."""

    model: type[BaseModel]
    spec: type[BaseModel]
    status: type[BaseModel]
    plural: str
    short: str
    """"": none."""
    columns: tuple[Column, ...]
    """What `kubectl get` prints, in this order."""


RESOURCES = (
    Resource(
        ModelRoute,
        ModelRouteSpec,
        ModelRouteStatus,
        "modelroutes",
        "mr",
        (
            Column("Policy", ".spec.policy"),
            Column("Mechanism", ".spec.mechanism"),
            Column("SLO", ".spec.slo.latency"),
            Column("Attainment", ".status.attainment"),
            _condition("Ready"),
            _AGE,
            Column("Model", ".spec.model", wide=True),
            _condition("Programmed", wide=True),
            _condition("Conflict", wide=True),
            Column("Suspended", ".spec.suspend", "boolean", wide=True),
        ),
    ),
    Resource(
        ModelProfile,
        ModelProfileSpec,
        ModelProfileStatus,
        "modelprofiles",
        "mp",
        (
            Column("Model", ".spec.model"),
            Column("GPU", ".spec.gpu"),
            Column("Source", ".spec.source"),
            _condition("Accepted"),
            _AGE,
        ),
    ),
    Resource(
        GPUSharingPolicy,
        GPUSharingPolicySpec,
        GPUSharingPolicyStatus,
        "gpusharingpolicies",
        "gsp",
        (
            Column("Mode", ".spec.mode"),
            Column("Replicas", ".spec.replicas", "integer"),
            Column("Resource", ".spec.resourceName"),
            Column("GPUs", ".status.gpus", "integer"),
            Column("Ready", ".status.ready", "integer"),
            _condition("Accepted"),
            _condition("Programmed"),
            _AGE,
            Column("Priority", ".spec.priority", "integer", wide=True),
            Column("Isolation", ".spec.isolation", wide=True),
            _condition("Conflict", wide=True),
        ),
    ),
    Resource(
        GPU,
        GPUSpec,
        GPUStatus,
        "gpus",
        "",
        (
            Column("Node", ".spec.node"),
            Column("Product", ".status.product"),
            Column("Memory", ".status.memory"),
            Column("Mode", ".status.mode"),
            Column("Slots", ".status.summary"),
            _condition("Healthy"),
            _reason("Shared", "Shared"),
            Column("Tenant", ".status.tenant"),
            _AGE,
            _reason("Health", "Healthy", wide=True),
            Column("UUID", ".spec.uuid", wide=True),
            Column("CC", ".status.computeCapability", wide=True),
            Column("MPS", ".status.mps.state", wide=True),
            Column("Policy", ".status.policy.name", wide=True),
        ),
    ),
)


def definition(resource: Resource) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind."""
    kind = resource.model.__name__
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": resource.plural,
                "singular": kind.lower(),
                **({"shortNames": [resource.short]} if resource.short else {}),
                "categories": ["meshctl"],
            },
            "scope": "Namespaced" if is_namespaced(resource.model) else "Cluster",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [column.data() for column in resource.columns],
                    "schema": {"openAPIV3Schema": _object(resource)},
                }
            ],
        },
    }


def _object(resource: Resource) -> Schema:
    """Of the object's own fields only the spec and the status are described: the rest is Kubernetes'."""
    whole = openapi(resource.model)
    described: Schema = {key: whole[key] for key in ("description", "x-kubernetes-validations") if key in whole}
    return described | {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": openapi(resource.spec),
            "status": openapi(resource.status),
        },
    }


def generated() -> Mapping[Path, str]:
    """Every generated file, by its path in the repository."""
    definitions = {
        Path("crds", f"{GROUP}_{resource.plural}.yaml"): HEADER + _yaml(definition(resource)) for resource in RESOURCES
    }
    return MappingProxyType({**definitions, Path("docs", "reference", "api.md"): reference()})


class _Quoting(SafeRepresenter):
    """Quotes the words that YAML 1.1, and so kubectl, takes for booleans: the enum value Off would be false."""

    def text(self, data: str) -> Any:
        style = "'" if data.lower() in {"y", "n", "yes", "no", "on", "off"} else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Quoting.add_representer(str, _Quoting.text)


def _yaml(data: dict[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Quoting
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # ruamel declares None, documents bool
    yaml.width = 120
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m meshctl.api.crd [--check]\n")
        return 2
    files = {ROOT / path: text for path, text in generated().items()}
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        sys.stdout.write(f"{path.relative_to(ROOT)} {'differs' if arguments else 'written'}\n")
        if not arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return 1 if arguments and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
