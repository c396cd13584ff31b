"""Manifests as data: the smallest valid objects, changed field by field, and written as a file."""

from __future__ import annotations

import copy
from typing import Any

import orjson

from meshctl.api.document import Document, parse

ABSENT = object()
"""As a value for `changed`: remove the field."""


def route(name: str = "resnet", **spec: Any) -> dict[str, Any]:
    """The smallest valid ModelRoute, with `spec` on top."""
    endpoints = [{"address": "10.0.0.1", "port": 8000, "gpu": "V100"}]
    smallest = {"model": "resnet50", "slo": {"latency": "150ms"}, "backend": {"endpoints": endpoints}}
    return _object("ModelRoute", name, {**smallest, **spec})


def profile(name: str = "resnet-v100", **spec: Any) -> dict[str, Any]:
    """The smallest valid ModelProfile, with `spec` on top."""
    smallest = {"model": "resnet50", "gpu": "V100", "service": {"base": "5ms", "perItem": "800us"}}
    return _object("ModelProfile", name, {**smallest, **spec})


def sharing_policy(name: str = "shared", **spec: Any) -> dict[str, Any]:
    """The smallest valid GPUSharingPolicy, with `spec` on top."""
    return _object("GPUSharingPolicy", name, spec)


def question(**fields: Any) -> dict[str, Any]:
    """The smallest valid input of `meshctl solve`, with `fields` on top."""
    sizes = [{"name": "small", "batch": 1, "share": 0.8}, {"name": "large", "batch": 8, "share": 0.2}]
    classes = [{"name": "V100", "endpoints": 3, "service": {"base": "5ms", "perItem": "0.8ms"}}]
    return {"slo": "150ms", "load": 100.5, "policy": "Balanced", "sizes": sizes, "classes": classes, **fields}


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "meshctl.io/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the field at ``a.b.0.c`` set to `value`, or removed (`ABSENT`)."""
    result = copy.deepcopy(data)
    *parents, last = path.split(".")
    here: Any = result
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if value is ABSENT:
        del here[last]
    elif isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return result


def text(*objects: Any) -> str:
    """One YAML file with these documents (JSON is YAML)."""
    return "---\n".join(orjson.dumps(o, option=orjson.OPT_INDENT_2).decode() + "\n" for o in objects)


def document(data: Any, file: str = "f.yaml") -> Document:
    """`data` as the only document of a file."""
    (only,) = parse(text(data).encode(), file)
    return only
