"""A directory of manifests at one instant, read so that nothing good is lost by something bad.

Decides which version of each object is in force after the files changed. Rules, per object and not per file:
- A valid object replaces its older version; one that is no longer in a file that can be read is gone; so are the
  objects of a file that was deleted.
- Everything else keeps what was good: an invalid object, a file that is not YAML, is unreadable or has just been
  emptied (an editor between truncating and writing), a directory that cannot be listed or vanished.
- An object in two files is taken from the first by path, whatever was written first.

Files are compared by `stat`, then by content, so that a look at an unchanged directory parses nothing. Hidden names are
skipped: a mounted ConfigMap keeps its real files in ``..2026_01_01`` and swaps the link ``..data``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshctl.api.document import Fault, ManifestError, Place, read_bounded
from meshctl.api.objects import Declared, Key, read_manifest
from meshctl.api.resolve import resolve
from meshctl.model import DesiredRoute, RouteId

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
SETTLED_NS = 1_000_000_000
"""A file that changed less than this before it was read may change again without a new time stamp (a kernel tick, or
the 1 s of old file systems), so it is read again at the next look."""

Objects = Mapping[Key, Declared]


@dataclass(frozen=True, slots=True)
class FileState:
    """What is in force of one file."""

    signature: tuple[int, ...] = ()
    """What `stat` says; () while the file may still be changing."""
    digest: bytes = b""
    objects: Objects = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in force of a directory."""

    identity: tuple[int, int] | None = None
    """Device and inode of the directory; None when it is gone."""
    unlisted: Mapping[Path, str] = field(default_factory=dict)
    """Folders that could not be listed, and why."""
    files: Mapping[Path, FileState] = field(default_factory=dict)
    objects: Objects = field(default_factory=dict)
    routes: Mapping[RouteId, DesiredRoute] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """Manifest files below a directory, ordered by path, and what could not be listed."""

    files: tuple[Path, ...]
    unlisted: Mapping[Path, str] = field(default_factory=dict)


def list_manifests(root: Path) -> Listing:
    """Names only; nothing is opened. A `root` that cannot be listed is itself in `unlisted`."""
    files: list[Path] = []
    unlisted: dict[Path, str] = {}

    def failed(error: OSError) -> None:
        if Path(error.filename) == root or not isinstance(error, FileNotFoundError):  # else: deleted meanwhile
            unlisted[Path(error.filename)] = error.strerror or str(error)

    for folder, folders, names in os.walk(root, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(folder, name) for name in names if _is_manifest(name))
    return Listing(tuple(sorted(files)), unlisted)


def _is_manifest(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix in SUFFIXES


def read_directory(root: Path, before: Contents) -> Contents:
    """What is in force now. Blocks on the file system; never raises for what it finds there."""
    listing = list_manifests(root)
    faults = [
        Fault(Place(str(path)), "", f"cannot be listed: {why}; what was read of it stays in force")
        for path, why in sorted(listing.unlisted.items())
    ]
    files = {path: state for path, state in before.files.items() if any(map(path.is_relative_to, listing.unlisted))}
    for path in listing.files:
        state = _read_file(path, before.files.get(path, FileState()), before.objects)
        if state is not None:
            files[path] = state
    identity = _identity(root)
    if (listing.unlisted, identity) == (before.unlisted, before.identity) and _same(files, before.files):
        return before
    for path in sorted(files):
        faults += files[path].faults
    objects, twice = merge({path: state.objects for path, state in files.items()})
    resolved = resolve(objects, before.routes)
    every_fault = (*faults, *twice, *resolved.faults)
    return Contents(identity, listing.unlisted, files, objects, resolved.routes, every_fault)


def _same(files: Mapping[Path, FileState], before: Mapping[Path, FileState]) -> bool:
    """True when every file is known and has not been read again."""
    return len(files) == len(before) and all(before.get(path) is state for path, state in files.items())


def _identity(root: Path) -> tuple[int, int] | None:
    try:
        found = root.stat()
    except OSError:  # reported by the listing, which met the same
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


def _read_file(path: Path, before: FileState, known: Objects) -> FileState | None:
    """The file's new state, `before` itself when nothing changed, None when the file is gone."""
    looked_at_ns = time.time_ns()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            return _unusable(before, Fault(Place(str(path)), "", "is not a regular file; move it away"))
        signature = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if signature == before.signature:
            return before
        content = read_bounded(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return None
        return _unusable(before, Fault(Place(str(path)), "", f"cannot be read: {error.strerror or error}"))
    except ManifestError as error:
        return _unusable(before, *error.faults)
    settled = signature if found.st_ctime_ns + SETTLED_NS < looked_at_ns else ()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if digest == before.digest:
        return dataclasses.replace(before, signature=settled)
    if not content.strip() and before.objects:
        return _unusable(before, Fault(Place(str(path)), "", "is empty; delete the file to remove its objects"))
    return dataclasses.replace(_understood(content, path, before.objects, known), signature=settled, digest=digest)


def _unusable(before: FileState, *faults: Fault) -> FileState:
    return FileState(objects=before.objects, faults=faults)


def _understood(content: bytes, path: Path, own: Objects, known: Objects) -> FileState:
    """`own` are the file's objects so far; `known` those of all files, for an object that moved here and broke."""
    manifest = read_manifest(content, str(path))
    kept = own if not manifest.complete else {}
    broken = {key: own.get(key) or known[key] for key in manifest.broken if key in own or key in known}
    objects = {**kept, **broken, **{key: _kept(new, own.get(key)) for key, new in manifest.objects.items()}}
    return FileState(objects=objects, faults=manifest.faults)


def _kept(new: Declared, old: Declared | None) -> Declared:
    """`old` where nothing at all changed: then its value is not held twice while both versions are alive."""
    return old if new == old else new


def merge(files: Mapping[Path, Objects]) -> tuple[dict[Key, Declared], list[Fault]]:
    """The objects of all files, the first by path winning, and a fault for each that stands in two."""
    objects: dict[Key, Declared] = {}
    faults: list[Fault] = []
    for path in sorted(files):
        for key, declared in sorted(files[path].items(), key=lambda item: item[0]):
            used = objects.setdefault(key, declared)
            if used is not declared:
                message = f"{key} stands in {used.place} too, and that one is used; remove one"
                faults.append(declared.fault("metadata.name", message))
    return objects, faults


def read_all(paths: Iterable[Path]) -> tuple[dict[Key, Declared], list[Fault]]:
    """Every object in the files and directories named, once, and everything wrong with them."""
    files: dict[Path, Objects] = {}
    faults: list[Fault] = []
    for named in paths:
        listing = list_manifests(named) if named.is_dir() else Listing((named,))
        faults += (Fault(Place(str(path)), "", f"cannot be listed: {why}") for path, why in listing.unlisted.items())
        for path in listing.files:
            try:
                manifest = read_manifest(read_bounded(path), str(path))
            except ManifestError as error:
                faults += error.faults
                continue
            files[path] = manifest.objects
            faults += manifest.faults
    objects, twice = merge(files)
    return objects, [*faults, *twice, *resolve(objects, {}).faults]
