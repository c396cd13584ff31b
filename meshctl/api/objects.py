"""Documents -> objects: which kind a document is, its name, and whether it is valid.

An object's identity (kind, namespace, name) is read before it is validated, so that a broken object is still known by
name and its last good version can stay in force.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from meshctl.api.base import API_VERSION, DNS_LABEL, DNS_SUBDOMAIN, is_namespaced, validated
from meshctl.api.document import Document, Fault, ManifestError, Place, parse, short
from meshctl.api.gpusharingpolicy import GPUSharingPolicy
from meshctl.api.modelprofile import ModelProfile
from meshctl.api.modelroute import ModelRoute
from meshctl.ports import KubeObject

Object = ModelRoute | ModelProfile | GPUSharingPolicy
KINDS: Mapping[str, type[Object]] = MappingProxyType(
    {"ModelRoute": ModelRoute, "ModelProfile": ModelProfile, "GPUSharingPolicy": GPUSharingPolicy}
)
"""What people write."""
ROUTING = ("ModelProfile", "ModelRoute")
"""Of these, what routes are made of."""
WRITTEN_BY: Mapping[str, str] = MappingProxyType({"GPU": "the agent of its node"})
"""Kinds of this API that no manifest has, and who writes them."""


class Key(NamedTuple):
    """What makes an object the same object."""

    kind: str
    namespace: str
    """"" of what is in none."""
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Declared:
    """A valid object and where it stands."""

    key: Key
    value: Object
    place: Place
    """Of its name."""

    def fault(self, field: str, message: str) -> Fault:
        return Fault(self.place, field, message, str(self.key))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one file says."""

    objects: Mapping[Key, Declared]
    """The valid ones."""
    broken: frozenset[Key]
    """Objects that are in the file, but not valid."""
    complete: bool
    """Every document's identity could be read: what is in neither of the two above is not in the file."""
    faults: tuple[Fault, ...]


def read_manifest(content: bytes, file: str) -> Manifest:
    """The objects of one file. Never raises: what is wrong is in `faults`."""
    try:
        documents = parse(content, file)
    except ManifestError as error:
        return Manifest({}, frozenset(), complete=False, faults=error.faults)
    return _manifest(documents)


def read_object(value: KubeObject, where: str) -> Manifest:
    """The same for one object as the API server gives it; `where` stands for the file. Never raises: an object that
    an older schema let in, and this one does not, is `broken`."""
    return _manifest([Document(value, where, {(): (0, 0)})])


def _manifest(documents: Iterable[Document]) -> Manifest:
    objects: dict[Key, Declared] = {}
    broken: set[Key] = set()
    faults: list[Fault] = []
    complete = True
    for document in documents:
        try:
            key = _identity(document)
        except ManifestError as error:
            faults += error.faults
            complete = False
            continue
        try:
            declared = _declared(document, key)
        except ManifestError as error:
            broken.add(key)
            faults += (dataclasses.replace(fault, subject=str(key)) for fault in error.faults)
            continue
        if key in objects:
            used = objects[key].place
            faults.append(declared.fault("metadata.name", f"{key} stands twice; {used} is used, remove one"))
        objects.setdefault(key, declared)
    return Manifest(objects, frozenset(broken), complete, tuple(faults))


def _declared(document: Document, key: Key) -> Declared:
    return Declared(key, validated(KINDS[key.kind], document), document.place(("metadata", "name")))


def _identity(document: Document) -> Key:
    """Kind, namespace and name. Raises ManifestError."""
    data = document.data
    if not isinstance(data, dict):
        raise _unreadable(document, (), f"must be an object (apiVersion, kind, metadata, spec), not {short(data)}")
    version, kind = data.get("apiVersion"), data.get("kind")
    if version != API_VERSION:
        raise _unreadable(
            document, ("apiVersion",), f"must be {API_VERSION}, not {short(version)}; keep others elsewhere"
        )
    if isinstance(kind, str) and kind in WRITTEN_BY:
        raise _unreadable(
            document, ("kind",), f"a {kind} is written by {WRITTEN_BY[kind]}, from no manifest; remove it"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise _unreadable(document, ("kind",), f"must be one of {', '.join(sorted(KINDS))}, not {short(kind)}")
    metadata = data.get("metadata")
    if not isinstance(metadata, dict):
        raise _unreadable(document, ("metadata",), f"must be a mapping with a name, not {short(metadata)}")
    name = _name(document, "name", metadata.get("name"), DNS_SUBDOMAIN)
    if not is_namespaced(KINDS[kind]):
        return Key(kind, "", name)
    return Key(kind, _name(document, "namespace", metadata.get("namespace", "default"), DNS_LABEL), name)


def _name(document: Document, field: str, value: object, pattern: str) -> str:
    if not isinstance(value, str) or len(value) > 253 or not re.fullmatch(pattern, value):
        raise _unreadable(document, ("metadata", field), f"must be a DNS-1123 name, not {short(value)}")
    return value


def _unreadable(document: Document, path: tuple[str, ...], message: str) -> ManifestError:
    return ManifestError((document.fault(path, message),))
