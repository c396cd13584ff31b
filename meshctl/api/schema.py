"""A pydantic model -> a structural OpenAPI v3 schema, as a CustomResourceDefinition wants it.

Structural means: no references, no alternatives, a type at every node
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema).
pydantic's JSON schema has both; an optional field is written there as "this or null", here as a field that is not
required. Closed objects need no `additionalProperties: false` here: the API server prunes or refuses what is unknown.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from meshctl.api.units import DURATION_PATTERN, format_duration

Schema = dict[str, Any]


def openapi(model: type[BaseModel]) -> Schema:
    """The schema of `model`, everything inlined, properties in the order of the model."""
    schema = model.model_json_schema()
    return _structural(schema, schema.get("$defs", {}))


def _structural(node: Schema, defs: Schema) -> Schema:
    node = _optional(_inlined(node, defs), defs)
    result = {key: value for key, value in node.items() if key not in _LEFT_OUT}
    for key, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if key in node:  # a number in JSON schema, a flag beside the bound in OpenAPI v3.0
            result |= {inclusive: node[key], key: True}
    if "const" in node:
        result["enum"] = [node["const"]]
    if "items" in node:
        result["items"] = _structural(node["items"], defs)
    if isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _structural(node["additionalProperties"], defs)
    if "properties" in node:
        result["properties"] = {name: _structural(child, defs) for name, child in node["properties"].items()}
    if "description" in node:
        result["description"] = " ".join(node["description"].split())
    if node.get("default") is not None:
        result["default"] = _default(result, node["default"])
    return result


_LEFT_OUT = frozenset({"$defs", "title", "additionalProperties", "const", "default"})


def _inlined(node: Schema, defs: Schema) -> Schema:
    if "$ref" not in node:
        return node
    target = defs[node["$ref"].removeprefix("#/$defs/")]
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def _optional(node: Schema, defs: Schema) -> Schema:
    if "anyOf" not in node:
        return node
    (only,) = (choice for choice in node["anyOf"] if choice != {"type": "null"})
    return {**_inlined(only, defs), **{key: value for key, value in node.items() if key != "anyOf"}}


def _default(schema: Schema, default: Any) -> Any:
    """As a person would write it. An object's is empty: the defaults of its fields fill it."""
    match default:
        case dict() if schema.get("type") == "object" and not schema.get("required"):
            return {}
        case dict():
            return {key: value for key, value in default.items() if value is not None}
        case list():
            return [_default(schema["items"], item) for item in default]
        case float() if schema.get("pattern") == DURATION_PATTERN:
            return format_duration(default)
        case _:
            return default
