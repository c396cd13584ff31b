"""Whose an object is, and whether it says what we want. Pure.

"Same" is compared on what we write: the whole spec, and of the metadata our labels, annotations and owner. What the API
server or other people add beside it (status, other labels, managedFields) is theirs and makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from istio.names import MANAGER, RESUMED_AT, route_of
from meshctl.model import RouteId
from meshctl.ports import KubeObject

OWNER_KIND = "ModelRoute"


def same(wanted: KubeObject, live: KubeObject | None) -> bool:
    """`live` says all that `wanted` does, and its spec nothing else."""
    if live is None or wanted.get("spec") != live.get("spec"):
        return False
    mine, theirs = wanted["metadata"], live["metadata"]
    return (
        _within(mine.get("labels"), theirs.get("labels"))
        and _within(mine.get("annotations"), theirs.get("annotations"))
        and _owners(mine) == _owners(theirs)
    )


def stranger(route: RouteId, live: KubeObject) -> str:
    """Why an object of a name that `route` needs is not ours to write; "" when it is.

    An owner of our own kind with another UID is an earlier route of the same name: its object is taken over, before
    the garbage collector takes it away from under the new one.
    """
    claimed = route_of(live)
    if claimed != route:
        return "it has no label and annotation of meshctl" if claimed is None else f"it belongs to the route {claimed}"
    others = sorted(
        f"{owner.get('kind')} {owner.get('name')}"
        for owner in live["metadata"].get("ownerReferences") or ()
        if owner.get("controller") and owner.get("kind") != OWNER_KIND
    )
    return f"it is controlled by {others[0]}" if others else ""


def route_served(live: KubeObject) -> RouteId | None:
    """The route that we wrote `live` for. None for others' objects, and for their copies of ours, in whatever name or
    namespace: those have our label and annotation, but we never wrote them.
    """
    route = route_of(live)
    if route is None or route.partition("/")[0] != live["metadata"].get("namespace") or not managed(live):
        return None
    return route


def managed(live: KubeObject) -> bool:
    """We have a part in the object, whatever became of its label."""
    entries = live["metadata"].get("managedFields") or ()
    return any(entry.get("manager") == MANAGER and not entry.get("subresource") for entry in entries)


def others_fields(wanted: KubeObject, live: KubeObject) -> Mapping[str, tuple[str, ...]]:
    """Field managers that own, in `live`, something of what `wanted` says: manager -> fields, both ordered."""
    found: dict[str, set[str]] = {}
    for entry in live["metadata"].get("managedFields") or ():
        if entry.get("manager") == MANAGER or entry.get("subresource"):
            continue
        fields = set(_ours_in(wanted, entry.get("fieldsV1") or {}))
        if fields:
            found.setdefault(str(entry.get("manager")), set()).update(fields)
    return {manager: tuple(sorted(found[manager])) for manager in sorted(found)}


def resumed_at(value: KubeObject | None) -> str:
    """The take-back that an object has seen; "" for none."""
    return "" if value is None else str((value["metadata"].get("annotations") or {}).get(RESUMED_AT, ""))


def version_of(live: KubeObject | None) -> str:
    """resourceVersion; "" for an object that is not there."""
    return "" if live is None else str(live["metadata"].get("resourceVersion", ""))


def _within(mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> bool:
    return all((theirs or {}).get(key) == value for key, value in (mine or {}).items())


def _owners(metadata: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(str(o["uid"]) for o in metadata.get("ownerReferences") or () if o.get("kind") == OWNER_KIND)


def _ours_in(wanted: KubeObject, tree: Mapping[str, Any]) -> Iterator[str]:
    """Names of the fields in a managedFields `tree` that `wanted` sets, as far as people tell them apart."""
    for name in tree.get("f:spec") or {}:
        yield f"spec.{str(name).removeprefix('f:')}"
    metadata = tree.get("f:metadata") or {}
    for part in ("labels", "annotations"):
        mine = wanted["metadata"].get(part) or {}
        owned = (str(name).removeprefix("f:") for name in metadata.get(f"f:{part}") or {})
        yield from (f"metadata.{part}[{name}]" for name in owned if name in mine)
