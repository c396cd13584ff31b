"""What a GPU object says: the physical GPU as placement sees it, and who holds which of its slots. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from meshctl.api.gpulabels import hyphened, product
from meshctl.core.packing.vocabulary import Device
from meshctl.ports import KubeObject, ObjectKey
from meshctl.sharing import RESOURCE, Isolation

HEALTHY, SHARED = "Healthy", "Shared"
"""Conditions of a GPU that are read here."""
DRAINING = "Draining"
"""Reason of `SHARED`: free slots are withdrawn until the GPU is empty."""
_LONGEST = 200
"""Characters of a condition's message that people are shown with a pod."""


class Holding(NamedTuple):
    """Slots of one container, as the kubelet says."""

    pod: ObjectKey
    """Known by its name alone."""
    container: str
    slots: frozenset[int]


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU object."""

    uuid: str
    node: str
    device: Device | None
    """None: it is not shared, so it has no slots."""
    used: int = 0
    """Slots that are held by a container or promised to one that is starting."""
    holdings: tuple[Holding, ...] = ()
    """Without what is promised."""


def card_of(value: KubeObject) -> Card:
    spec, status = value["spec"], value.get("status") or {}
    uuid, slots = str(spec["uuid"]), status.get("slots") or {}
    return Card(
        uuid=uuid,
        node=str(spec["node"]),
        device=_device(uuid, status, int(slots.get("total") or 0)),
        used=int(slots.get("used") or 0),
        holdings=tuple(_holding(holder) for holder in status.get("holders") or ()),
    )


def _device(uuid: str, status: Mapping[str, Any], total: int) -> Device | None:
    if not total or not status.get("mode"):
        return None
    return Device(
        uuid=uuid,
        slots=total,
        product=product(hyphened(str(status.get("product") or ""))),
        resource=str(status.get("resourceName") or RESOURCE),
        isolated=status.get("isolation") == Isolation.TENANT,
        several=bool(status.get("severalGPUs")),
        closed=_closed(status),
    )


def _closed(status: Mapping[str, Any]) -> str:
    """Why nobody new may come, in words; "" when it is open. A GPU that waits for its pods to end before it is shared
    otherwise goes on as before, and is open."""
    conditions = {condition.get("type"): condition for condition in status.get("conditions") or ()}
    healthy, shared = conditions.get(HEALTHY) or {}, conditions.get(SHARED) or {}
    if healthy.get("status") == "False":
        return f"unhealthy: {_said(healthy)}"
    withdrawn = bool((status.get("slots") or {}).get("unavailable"))
    if withdrawn or (shared.get("status") == "False" and shared.get("reason") == DRAINING):
        return f"withdrawn: {_said(shared)}" if shared.get("status") == "False" else "withdrawn for a moment"
    return ""


def _said(condition: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (str(condition.get("reason") or ""), str(condition.get("message") or ""))))[:_LONGEST]


def _holding(holder: Mapping[str, Any]) -> Holding:
    pod = ObjectKey("Pod", str(holder.get("namespace") or ""), str(holder.get("pod") or ""))
    return Holding(pod, str(holder.get("container") or ""), frozenset(holder.get("slots") or ()))
