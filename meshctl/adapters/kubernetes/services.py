"""The servers behind Services, looked up again only where something changed. No I/O: it reads the watched copy.

Each discovery is remembered with every object it asked for, found or not. A look compares the copy with the one before,
object by object by identity, and repeats what asked for something that changed. 10,000 pods take 2 ms to compare; a
pod that changed costs its own Service's discovery on top. What comes out equal stays the SAME object.

Rejected: being told by the reflectors what changed. A walk can't miss anything, and what it costs is little.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import compress

from meshctl.adapters.kubernetes.discovery import discover, service_of
from meshctl.adapters.kubernetes.holders import GpuHolders
from meshctl.api.resolve import Servers, ServiceRef
from meshctl.ports import KubeObject, ObjectKey, Objects

KINDS = ("Service", "EndpointSlice", "Pod", "Node", "GPU")
"""What servers are found in."""
NO_OBJECTS: Mapping[ObjectKey, KubeObject] = {}


class Services:
    """`look` at the copy, then ask for `servers`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._seen: dict[str, Mapping[ObjectKey, KubeObject]] = {}
        self._slices: dict[ObjectKey, dict[ObjectKey, KubeObject]] = {}
        """By Service."""
        self._holders = GpuHolders()
        self._known: dict[ServiceRef, Servers] = {}
        self._asked: dict[ServiceRef, set[ObjectKey]] = {}
        self._askers: dict[ObjectKey, set[ServiceRef]] = {}
        self._stale: set[ServiceRef] = set()

    def look(self) -> bool:
        """Take in what changed in the copy; True when servers that were asked for may differ."""
        self._stale |= {ref for kind in KINDS for key in self._changed(kind) for ref in self._askers.get(key, ())}
        if not self._stale:
            return False
        for ref in sorted(self._stale, key=str):
            self._found(ref)
            self._stale.discard(ref)
        return True

    def keep(self, used: Iterable[ServiceRef]) -> None:
        """Forget all Services but these."""
        for ref in self._known.keys() - set(used):
            self._forget(ref)

    def servers(self, ref: ServiceRef) -> Servers:
        """What is behind the Service as of the last look: the same object until that changes."""
        known = self._known.get(ref)
        return self._found(ref) if known is None else known

    # ------------------------------------------------------------------------------------------------------ the parts

    def _changed(self, kind: str) -> set[ObjectKey]:
        """Objects that are new, another or gone since the last look; of slices, their Services; of GPUs, the pods
        of which they say something else."""
        now, before = self._objects.every(kind), self._seen.get(kind, NO_OBJECTS)
        changed = set(compress(now, map(operator.is_not, now.values(), map(before.get, now))))
        if len(now) - sum(key not in before for key in changed) != len(before):
            changed.update(before.keys() - now.keys())
        if changed:
            self._seen[kind] = dict(now)
        if kind == "GPU":
            return {pod for key in changed for pod in self._holders.take(key, now.get(key))}
        if kind != "EndpointSlice":
            return changed
        return {service for key in changed for service in self._moved(key, before.get(key), now.get(key))}

    def _moved(self, key: ObjectKey, old: KubeObject | None, new: KubeObject | None) -> set[ObjectKey]:
        """Index a slice that changed; the Services that it was and is of."""
        was, is_of = (None if value is None else service_of(value) for value in (old, new))
        if was is not None and self._slices[was].pop(key, None) is not None and not self._slices[was]:
            del self._slices[was]
        if is_of is not None and new is not None:
            self._slices.setdefault(is_of, {})[key] = new
        return {service for service in (was, is_of) if service is not None}

    def _found(self, ref: ServiceRef) -> Servers:
        """Look behind the Service again. An equal result is the one of before."""
        asked: set[ObjectKey] = set()

        def find(key: ObjectKey) -> KubeObject | None:
            asked.add(key)
            return self._objects.find(key)

        service = ObjectKey("Service", ref.namespace, ref.name)
        found = discover(ref, self._slices.get(service, {}).values(), find, self._holders.of)
        before = self._known.get(ref)
        self._forget(ref)
        self._asked[ref] = asked
        for key in asked:
            self._askers.setdefault(key, set()).add(ref)
        self._known[ref] = before if found == before and before is not None else found
        return self._known[ref]

    def _forget(self, ref: ServiceRef) -> None:
        self._known.pop(ref, None)
        self._stale.discard(ref)
        for key in self._asked.pop(ref, ()):
            askers = self._askers[key]
            askers.discard(ref)
            if not askers:
                del self._askers[key]
