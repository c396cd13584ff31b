"""GPU objects for tests, as an agent writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from meshctl.api.gpu import GPU

NOW = "2026-05-04T10:00:00Z"
Held = tuple[str, str, str, list[int]]
"""Namespace, pod, container, slots."""


def gpu_object(node: str, uuid: str, total: int = 10, held: Iterable[Held] = (), **status: Any) -> dict[str, Any]:
    """Plain data. `total` slots are free but for those that are `held`; `status` adds fields, or replaces them."""
    holders = [dict(zip(("namespace", "pod", "container", "slots"), holder, strict=True)) for holder in held]
    used = sum(len(holder["slots"]) for holder in holders)
    said = {
        "product": "Tesla V100-SXM2-16GB",
        "memory": "16Gi",
        "resourceName": "hpe.com/gpus",
        "mode": "MPS",
        "slots": {"total": total, "used": used, "free": total - used, "unavailable": 0},
        "summary": f"{used}/{total}",
        "holders": holders,
        "mps": {"state": "Running", "clients": len(holders), "restarts": 0},
        "heartbeat": NOW,
        "conditions": [condition("Healthy", "True", "Healthy", "")],
    }
    return {
        "apiVersion": "meshctl.io/v1alpha1",
        "kind": "GPU",
        "metadata": {"name": uuid.lower()},
        "spec": {"node": node, "uuid": uuid},
        "status": {name: value for name, value in {**said, **status}.items() if value is not None},
    }


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": NOW}


def read(data: Mapping[str, Any]) -> GPU:
    return GPU.model_validate_json(orjson.dumps(data))


def unhealthy(total: int, used: int, reason: str, message: str) -> dict[str, Any]:
    """What a GPU's status says when nothing of it may be given."""
    slots = {"total": total, "used": used, "free": 0, "unavailable": total - used}
    return {"slots": slots, "conditions": [condition("Healthy", "False", reason, message)]}
