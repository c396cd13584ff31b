"""The state file: what a restart needs so that it moves no weight.

It holds the decision's memory, the routes as they were served, and how many proxies there were. Routes are kept too,
because a manifest may be broken just while the controller restarts: its last good version is then only here.

Invariants: the file is always complete (temporary file beside it, fsync, rename, fsync of the directory), it is written
before the plan that it describes is published, and a file that can't be read stops the start: it is never replaced by
an empty one. Rejected: a database (one writer, one small value), and reading the weights back from the proxies (they
know no history, and may be restarting too).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from meshctl.core.decide import Memory
from meshctl.errors import InputError
from meshctl.model import DesiredRoute, RouteId

VERSION = 1


@dataclass(frozen=True, slots=True)
class Saved:
    """What one run leaves to the next."""

    memory: Memory = field(default_factory=Memory)
    routes: Mapping[RouteId, DesiredRoute] = field(default_factory=lambda: MappingProxyType({}))
    gateways: int = 1


class Checkpoint:
    """One state file. `load` and `save` block (fsync): call them outside the event loop."""

    def __init__(self, path: Path, wall_s: Callable[[], float] = time.time) -> None:
        """`wall_s` gives Unix seconds: the only clock that two runs share, used for the time in between."""
        self.path = path
        self._wall_s = wall_s

    def load(self, now_s: float) -> Saved | None:
        """What was saved, its times moved to this run's clock; None when there is no file.

        Raises InputError when the file can't be read or is not whole.
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"cannot read the state file {self.path} (--state): {error.strerror}") from error
        try:
            return self._decode(raw, now_s)
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # ValidationError is a ValueError
            raise InputError(_unreadable(self.path, error)) from error

    def save(self, saved: Saved, now_s: float) -> None:
        """Replace the file by `saved`, all or nothing. Raises OSError; the old file is then still whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.writelines(self._encode(saved, now_s))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):  # the first failure is the one to report
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(self.path.parent)

    def _encode(self, saved: Saved, now_s: float) -> tuple[bytes, ...]:
        """The parts of the document: the body is megabytes for 1000 routes, and is not copied."""
        body = orjson.dumps(
            {
                "saved_at_unix_s": self._wall_s(),
                "gateways": saved.gateways,
                "memory": saved.memory.to_json(now_s),
                "routes": saved.routes,
            },
            default=_plain,
        )
        return b'{"version":%d,"sha256":"%b","body":' % (VERSION, _digest(body).encode()), body, b"}"

    def _decode(self, raw: bytes, now_s: float) -> Saved:
        document = orjson.loads(raw)
        if document["version"] != VERSION:
            raise ValueError(f"its version is {document['version']}, this meshctl reads {VERSION}")
        body: dict[str, Any] = document["body"]
        # orjson writes what it has read byte for byte the same: key order is kept, floats are the shortest exact form
        if document["sha256"] != _digest(orjson.dumps(body)):
            raise ValueError("its checksum does not match its content")
        down_s = max(0.0, self._wall_s() - body["saved_at_unix_s"])  # never negative: the wall clock may jump back
        return Saved(
            memory=Memory.from_json(body["memory"], now_s - down_s),
            routes=MappingProxyType(_ROUTES.validate_python(body["routes"])),
            gateways=max(1, int(body["gateways"])),
        )


_ROUTES = TypeAdapter(dict[RouteId, DesiredRoute])


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _plain(value: object) -> object:
    """What orjson does not know by itself; sets are sorted so that the same state is the same bytes."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def _unreadable(path: Path, error: Exception) -> str:
    detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error) or type(error).__name__
    return (
        f"the state file {path} can't be used: {detail}. Nothing was changed. Restore it from a backup, or move it away"
        " (or name another with --state) to start without it: weights then start from the declared load and profiles"
    )


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_path(manifests: Path) -> Path:
    """One file per manifests directory, under XDG_STATE_HOME."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    name = hashlib.sha256(str(manifests.resolve()).encode()).hexdigest()[:16]
    return Path(home).expanduser() / "meshctl" / f"{name}.json"
