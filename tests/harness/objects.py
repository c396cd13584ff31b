"""Kubernetes objects in memory: `meshctl.ports.Objects` and `ObjectStatus` for tests that need no API server.

What it keeps of the real one: UIDs, resourceVersions, generations, server-side apply with owners per field (lists are
atomic, as in Istio's CRDs), `managedFields` as the server writes them, conflicts, and no change where nothing differs.
What it leaves out: schemas, defaults, admission, garbage collection, and the delay of a watch.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshctl.errors import FieldConflictError, MeshctlError, RefusedError
from meshctl.ports import KubeObject, ObjectKey

MANAGER = "meshctl"
STATUS_MANAGER = "meshctl-status"

Path = tuple[str, ...]
Owners = dict[Path, set[tuple[str, str]]]
"""Field -> (manager, operation) that own it."""


@dataclass(frozen=True, slots=True)
class Write:
    """One request that would have gone to the API server."""

    verb: str
    """``apply``, ``delete``, ``status`` or ``event``."""
    key: ObjectKey
    changed: bool
    """False: the object was already so."""
    force: bool = False


@dataclass(frozen=True, slots=True)
class PostedEvent:
    """An Event as it was posted."""

    about: ObjectKey
    type: str
    reason: str
    message: str
    action: str


class MemoryObjects:
    """`put` and `remove` are what other people do; `apply`, `delete` and what `ObjectStatus` has, what meshctl does."""

    def __init__(self, *objects: KubeObject) -> None:
        self.writes: list[Write] = []
        """Everything that meshctl sent and that was taken, in order."""
        self.events: list[PostedEvent] = []
        self.failing: Callable[[str, ObjectKey], MeshctlError | None] = lambda verb, key: None
        """Asked before each write of meshctl's; what it returns is raised, and nothing is written."""
        self._objects: dict[str, dict[ObjectKey, dict[str, Any]]] = {}
        self._owners: dict[ObjectKey, Owners] = {}
        self._missing: dict[str, str] = {}
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)
        self._changed = asyncio.Event()
        for value in objects:
            self.put(value)

    # ------------------------------------------------------------------------------------------------------- reading

    def find(self, key: ObjectKey) -> KubeObject | None:
        return self._objects.get(key.kind, {}).get(key)

    def every(self, kind: str) -> Mapping[ObjectKey, KubeObject]:
        return self._objects.get(kind, {})

    def missing(self, kind: str) -> str:
        return self._missing.get(kind, "")

    async def wait_changed(self) -> None:
        await self._changed.wait()

    # -------------------------------------------------------------------------------------------- what others do

    def put(self, value: KubeObject, manager: str = "kubectl") -> KubeObject:
        """Create or replace, as `manager`; metadata that is not given (uid, generation ...) stays or is made up."""
        key = _key(value)
        old = self.find(key)
        new = _with_identity(_plain(value), old)
        status = new.pop("status", None if old is None else old.get("status"))
        return self._store(key, new, self._updated(key, old, new, manager), status)

    def remove(self, key: ObjectKey) -> None:
        """Delete, whoever asks; nothing happens when it is not there."""
        if self._objects.get(key.kind, {}).pop(key, None) is not None:
            self._owners.pop(key, None)
            self._wake()

    def set_missing(self, kind: str, why: str) -> None:
        """From now on `missing` says `why`; "" for complete."""
        self._missing[kind] = why
        self._wake()

    # -------------------------------------------------------------------------------------------- what meshctl does

    async def apply(self, wanted: KubeObject, *, force: bool = False) -> KubeObject:
        key = _key(wanted)
        self._admit("apply", key)
        old = self.find(key)
        owners = {path: set(who) for path, who in self._owners.get(key, {}).items()}
        new = _with_identity({} if old is None else _plain(old), old)
        new |= {"apiVersion": wanted["apiVersion"], "kind": wanted["kind"]}
        new["metadata"] |= {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})
        me, fields = (MANAGER, "Apply"), dict(_leaves(wanted))
        conflicts = _conflicts(new, fields, owners, me)
        if conflicts and not force:
            raise FieldConflictError(f"{key}: {'; '.join(conflicts)}")
        for path in [path for path, who in owners.items() if me in who and path not in fields]:
            owners[path].discard(me)
            if not owners[path]:
                del owners[path]
                _drop(new, path)
        for path, value in fields.items():
            if _at(new, path) != value:
                owners[path] = set()
                _set(new, path, value)
            owners.setdefault(path, set()).add(me)
        stored = self._store(key, new, owners, None if old is None else old.get("status"))
        self.writes.append(Write("apply", key, stored is not old, force))
        return stored

    async def delete(self, key: ObjectKey, uid: str) -> None:
        self._admit("delete", key)
        found = self.find(key)
        same = found is not None and found["metadata"]["uid"] == uid
        if same:
            self.remove(key)
        self.writes.append(Write("delete", key, same))

    async def apply_status(self, wanted: KubeObject) -> KubeObject:
        key = _key(wanted)
        self._admit("status", key)
        old = self.find(key)
        if old is None:
            raise RefusedError(f"{key}: not found; its status cannot be written")
        new = _plain(old)
        new.pop("status", None)
        stored = self._store(key, new, self._owners[key], copy.deepcopy(wanted["status"]))
        self.writes.append(Write("status", key, stored is not old, True))
        return stored

    async def post_event(self, about: ObjectKey, uid: str, type_: str, reason: str, message: str, action: str) -> None:
        self._admit("event", about)
        self.events.append(PostedEvent(about, type_, reason, message, action))
        self.writes.append(Write("event", about, True))

    # ------------------------------------------------------------------------------------------------------ the parts

    def _admit(self, verb: str, key: ObjectKey) -> None:
        if (error := self.failing(verb, key)) is not None:
            raise error

    def _updated(self, key: ObjectKey, old: KubeObject | None, new: KubeObject, manager: str) -> Owners:
        """Owners after a plain update: whoever changes a field has it alone."""
        before = self._owners.get(key, {})
        owners: Owners = {}
        for path, value in _leaves(new):
            same = old is not None and path in before and _at(old, path) == value
            owners[path] = set(before[path]) if same else {(manager, "Update")}
        return owners

    def _store(self, key: ObjectKey, new: dict[str, Any], owners: Owners, status: Any) -> KubeObject:
        """`new` with what the server counts; the old object itself where nothing differs."""
        old = self._objects.setdefault(key.kind, {}).get(key)
        metadata = new["metadata"]
        if status is not None:
            new["status"] = status
        if old is not None and new == _plain(old) and owners == self._owners[key]:
            return old
        metadata.setdefault("uid", f"00000000-0000-4000-8000-{next(self._uids):012d}")
        if old is None:
            metadata.setdefault("generation", 1)
        elif _content(new) != _content(old):
            metadata["generation"] = old["metadata"]["generation"] + 1
        metadata["resourceVersion"] = str(next(self._versions))
        metadata["managedFields"] = _managed(owners, str(new.get("apiVersion", "v1")))
        self._objects[key.kind][key] = new
        self._owners[key] = owners
        self._wake()
        return new

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _key(value: KubeObject) -> ObjectKey:
    metadata = value["metadata"]
    return ObjectKey(str(value["kind"]), str(metadata.get("namespace", "")), str(metadata["name"]))


def _plain(value: KubeObject) -> dict[str, Any]:
    """A copy without managedFields."""
    new = copy.deepcopy(dict(value))
    new.setdefault("metadata", {}).pop("managedFields", None)
    return new


def _with_identity(new: dict[str, Any], old: KubeObject | None) -> dict[str, Any]:
    """What the server counts stays as it was, whatever an older copy says; another UID is another object."""
    metadata = new.setdefault("metadata", {})
    kept = {} if old is None else old["metadata"]
    if metadata.get("uid", kept.get("uid")) == kept.get("uid"):
        metadata |= {name: kept[name] for name in ("uid", "generation", "resourceVersion") if name in kept}
    return new


def _content(value: KubeObject) -> dict[str, Any]:
    return {name: part for name, part in value.items() if name not in ("metadata", "status")}


_SERVERS: frozenset[Path] = frozenset(
    {("apiVersion",), ("kind",)}
    | {
        ("metadata", name)
        for name in ("name", "namespace", "uid", "generation", "resourceVersion", "creationTimestamp", "managedFields")
    }
)
"""Fields that nobody owns."""


def _leaves(value: KubeObject, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field with its value; lists and empty mappings are one field."""
    for name, part in value.items():
        path = (*at, str(name))
        if path in _SERVERS or path == ("status",):
            continue
        if isinstance(part, Mapping) and part:
            yield from _leaves(part, path)
        else:
            yield path, copy.deepcopy(part)


def _at(value: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def _set(value: dict[str, Any], path: Path, new: Any) -> None:
    for name in path[:-1]:
        value = value.setdefault(name, {})
    value[path[-1]] = new


def _drop(value: dict[str, Any], path: Path) -> None:
    *parents, last = path
    inside = _at(value, tuple(parents))
    if isinstance(inside, dict):
        inside.pop(last, None)
        if not inside and parents and tuple(parents) not in (("metadata",), ("spec",)):
            _drop(value, tuple(parents))


def _conflicts(live: KubeObject, fields: Mapping[Path, Any], owners: Owners, me: tuple[str, str]) -> list[str]:
    found = []
    for path, value in sorted(fields.items()):
        others = sorted(manager for manager, operation in owners.get(path, set()) - {me})
        if others and _at(live, path) != value:
            found.append(f'conflict with "{others[0]}": .{".".join(path)}')
    return found


def _managed(owners: Owners, api_version: str) -> list[dict[str, Any]]:
    entries = []
    for manager, operation in sorted({who for owning in owners.values() for who in owning}):
        tree: dict[str, Any] = {}
        for path in sorted(path for path, owning in owners.items() if (manager, operation) in owning):
            _set(tree, tuple(f"f:{name}" for name in path), {})
        entries.append(
            {
                "manager": manager,
                "operation": operation,
                "apiVersion": api_version,
                "fieldsType": "FieldsV1",
                "fieldsV1": tree,
            }
        )
    return entries
