"""A copy of the objects of one kind, in one namespace or in all. Pure: listings, events and our own writes in.

Invariant: the copy never goes back. The watch tells everything in order, so its word is final, but for one case: what
we wrote ourselves is put here before the watch tells of it (`wrote`). Until the watch has come that far, what it says
of that object is older, and is not believed; and an answer to a write that arrives after the watch has passed it is
not believed either (it may be the ghost of an object that was deleted since).

"Older" is by resourceVersion, which may be compared among objects of one resource since Kubernetes 1.35 (KEP-5504),
and could be in effect before. Where a version is not a decimal number, nothing is compared and our own writes wait for
the watch.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from meshctl.adapters.kubernetes.kinds import Kind, Raw
from meshctl.ports import KubeObject, ObjectKey


class Mirror:
    """Fills `objects`, which other namespaces' mirrors of the same kind may share."""

    def __init__(self, kind: Kind, objects: MutableMapping[ObjectKey, KubeObject], namespace: str = "") -> None:
        self._kind, self._objects, self._namespace = kind, objects, namespace
        self._ahead: dict[ObjectKey, str] = {}
        """Written by us, not seen by the watch yet: in which version."""
        self.version = ""
        """Up to here the API server has told everything; "" before the first listing."""

    def listed(self, items: Iterable[tuple[ObjectKey, KubeObject]], version: str) -> tuple[ObjectKey, ...]:
        """All there are as of `version`; whatever else was held is gone. The keys whose object is another now."""
        found = dict(items)
        self._come_to(version)
        for key in self._ahead:
            found.pop(key, None)
        mine = [key for key in self._objects if not self._namespace or key.namespace == self._namespace]
        gone = [key for key in mine if key not in found and key not in self._ahead]
        for key in gone:
            del self._objects[key]
        return (*gone, *(key for key, value in found.items() if self._put(key, value)))

    def happened(self, what: str, raw: Raw) -> ObjectKey | None:
        """An event of the watch; the key of the object that is another now, or None."""
        version = raw["metadata"]["resourceVersion"]
        self._come_to(version)
        if what == "BOOKMARK":
            return None
        key = self._kind.key(raw)
        if key in self._ahead:
            return None
        if what == "DELETED":
            return key if self._objects.pop(key, None) is not None else None
        return key if self._put(key, self._kind.kept(raw)) else None

    def wrote(self, raw: Raw) -> ObjectKey | None:
        """What a write of ours returned; the key when the object is another now, or None."""
        key, version = self._kind.key(raw), raw["metadata"]["resourceVersion"]
        if not _later(version, self.version) or not _later(version, self._ahead.get(key, "0")):
            return None
        self._ahead[key] = version
        return key if self._put(key, self._kind.kept(raw)) else None

    def _come_to(self, version: str) -> None:
        self.version = version
        self._ahead = {key: written for key, written in self._ahead.items() if _later(written, version)}

    def _put(self, key: ObjectKey, value: KubeObject) -> bool:
        if self._objects.get(key) == value:
            return False
        self._objects[key] = value
        return True


def _later(version: str, other: str) -> bool:
    """False as well when they cannot be compared."""
    return version.isdecimal() and other.isdecimal() and int(version) > int(other)
