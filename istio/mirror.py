"""Our live objects by route, as far as the watched copy knows them. No I/O.

A route's mapping is a new object exactly when one of its objects changed: who keeps what it made of a mapping can tell
by identity that it is still right. Looking for changes costs one pass over our objects, a few ms for 10,000.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from istio.names import OURS
from istio.ownership import route_served
from meshctl.model import RouteId
from meshctl.ports import KubeObject, ObjectKey, Objects

NOTHING: Mapping[ObjectKey, KubeObject] = MappingProxyType({})


class Mirror:
    """See the module."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._known: dict[str, dict[ObjectKey, KubeObject]] = {kind: {} for kind in OURS}
        self._live: dict[RouteId, Mapping[ObjectKey, KubeObject]] = {}

    def live(self, route: RouteId) -> Mapping[ObjectKey, KubeObject]:
        """The objects of `route`; empty when there are none."""
        return self._live.get(route, NOTHING)

    def refresh(self) -> set[RouteId]:
        """Takes over what changed in the watched copy; the routes concerned."""
        changes: dict[RouteId, dict[ObjectKey, KubeObject | None]] = {}
        for kind, known in self._known.items():
            now = self._objects.every(kind)
            for key in [key for key in known if key not in now]:
                self._note(changes, key, known.pop(key), None)
            for key, value in now.items():
                if (old := known.get(key)) is not value:
                    known[key] = value
                    self._note(changes, key, old, value)
        for route, changed in changes.items():
            self._take(route, changed)
        return set(changes)

    def _note(
        self,
        changes: dict[RouteId, dict[ObjectKey, KubeObject | None]],
        key: ObjectKey,
        old: KubeObject | None,
        new: KubeObject | None,
    ) -> None:
        before, after = (None if value is None else route_served(value) for value in (old, new))
        if before is not None and before != after:
            changes.setdefault(before, {})[key] = None
        if after is not None:
            changes.setdefault(after, {})[key] = new

    def _take(self, route: RouteId, changed: Mapping[ObjectKey, KubeObject | None]) -> None:
        merged: dict[ObjectKey, KubeObject | None] = {**self._live.get(route, NOTHING), **changed}
        live = {key: value for key, value in sorted(merged.items()) if value is not None}
        if live:
            self._live[route] = live
        else:
            self._live.pop(route, None)
