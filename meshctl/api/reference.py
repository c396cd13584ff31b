"""docs/reference/api.md: every field of every object, from the same schemas as the CRDs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel

from meshctl.api.base import API_VERSION
from meshctl.api.gpu import GPUSpec, GPUStatus
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec, GPUSharingPolicyStatus
from meshctl.api.modelprofile import ModelProfileSpec, ModelProfileStatus
from meshctl.api.modelroute import ModelRouteSpec, ModelRouteStatus
from meshctl.api.schema import Schema, openapi
from meshctl.api.solve import SolveInput
from meshctl.api.units import DURATION_PATTERN, ZERO_ALLOWED

_INTRODUCTION = f"""<!-- Generated from meshctl/api by `python -m meshctl.api.crd`; edit the models, not this file. -->
# API reference

Objects of `{API_VERSION}`. The same manifests work in a directory (`meshctl run --manifests DIR`) and in Kubernetes
(`crds/`); `meshctl validate FILE...` checks them. Unknown fields are errors.

- A *duration* is a number with a unit (`ns`, `us`, `ms`, `s`, `m`, `h`), or several of them: `150ms`, `1m30s`; at most
  a day.
- Shares and ratios are 0..1. Only `percentile` is a percentage, 0..100.
- A route uses the ModelProfiles of its own namespace (`default` where a file names none). GPUSharingPolicies and GPUs
  are in no namespace; a GPU is written by the agent of its node, never by people.
- A field that is null is one that is not there.
- Of two routes that want the same host, and of two profiles for the same model and GPU, the oldest is used, and of
  files, which have no age, the first by name.
"""


def reference() -> str:
    """The whole page."""
    parts = [
        _INTRODUCTION,
        _section("ModelRoute", {"spec": ModelRouteSpec, "status": ModelRouteStatus}),
        _section("ModelProfile", {"spec": ModelProfileSpec, "status": ModelProfileStatus}),
        _section("GPUSharingPolicy", {"spec": GPUSharingPolicySpec, "status": GPUSharingPolicyStatus}),
        _section("GPU", {"spec": GPUSpec, "status": GPUStatus}),
        _section("The file of `meshctl solve`", {"": SolveInput}),
    ]
    return "\n".join(parts)


def _section(title: str, models: dict[str, type[BaseModel]]) -> str:
    lines = [f"## {title}"]
    for prefix, model in models.items():
        schema = openapi(model)
        lines += ["", _words(schema), "", "| field | type | default | description |", "|---|---|---|---|"]
        lines += _rows(schema, prefix)
        lines += [f"\nRules: {rules}." for rules in ["; ".join(_rules(schema, prefix))] if rules]
    return "\n".join(lines) + "\n"


def _rows(schema: Schema, prefix: str) -> Iterator[str]:
    """One row per field, a structure's own fields after it."""
    required = schema.get("required", [])
    for name, child in schema.get("properties", {}).items():
        path = f"{prefix}.{name}".removeprefix(".")
        default = "required" if name in required else f"`{_compact(child['default'])}`" if "default" in child else "-"
        yield f"| `{path}` | {_type(child)} | {default} | {_words(child)} |"
        yield from _rows(child, path)
        yield from _rows(child.get("items", {}), f"{path}[]")


def _rules(schema: Schema, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if schema.get("pattern") != DURATION_PATTERN:  # a duration's own rules are its type
            yield f"`{path}`: {rule['message']}" if path else rule["message"]
    for name, child in schema.get("properties", {}).items():
        inner = f"{path}.{name}".removeprefix(".")
        yield from _rules(child, inner)
        yield from _rules(child.get("items", {}), f"{inner}[]")


def _type(schema: Schema) -> str:
    match schema:
        case {"pattern": pattern} if pattern == DURATION_PATTERN:
            return "duration, 0 allowed" if ZERO_ALLOWED in schema["x-kubernetes-validations"] else "duration"
        case {"x-kubernetes-int-or-string": True}:
            return f"integer, {_range(schema)}, or string"
        case {"enum": values}:
            return " \\| ".join(f"`{value}`" for value in values)
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": values}:
            return f"map to {_type(values)}"
        case _:
            return ", ".join(filter(None, (schema["type"], _range(schema))))


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    left = "" if low is None else f"{'>' if above else '>='} {low:g}" if low < 1e6 else f">= {low}"
    right = "" if high is None else f"{'<' if below else '<='} {high:,.0f}"
    return " and ".join(filter(None, (left, right)))


def _words(schema: Schema) -> str:
    return " ".join(schema.get("description", "").split()).replace("|", "\\|")


def _compact(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
