"""A file that holds what a process needs of the one before it: whole, checked, or refused.

Invariants: the file is always complete (temporary file beside it, fsync, rename, and where it must outlast a power cut
fsync of the directory), and one that can't be read stops the start: it is never taken for an empty one, never replaced
by one. Rejected: a database (one writer, one small value).

    {"version": 1, "sha256": "<of body>", "body": {...}}
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from meshctl.errors import InputError

Body = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StateFile:
    """`load` and `save` block (fsync): call them outside the event loop."""

    path: Path
    version: int
    """What `save` writes."""
    without: str
    """What starting without the file means, for people: ``weights then start from the declared load``."""
    migrations: Mapping[int, Callable[[Body], Body]]
    """From an older version's body to that of the next version."""

    def load(self, decode: Callable[[Body], T]) -> T | None:
        """What `decode` makes of the body; None when there is no file.

        Raises InputError when the file can't be read, is not whole, or `decode` raises ValueError, TypeError,
        LookupError or AttributeError (a body of another shape).
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"cannot read the state file {self.path} (--state): {error.strerror}") from error
        try:
            return decode(self._body(orjson.loads(raw)))
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # ValidationError is a ValueError
            raise InputError(self._unreadable(error)) from error

    def save(self, body: bytes, *, lasting: bool = True) -> None:
        """Replace the file, all or nothing; `body` is a JSON object as orjson writes it.

        After a power cut it is this one, or without `lasting` perhaps the one before: half the time of a write. Raises
        OSError; the old file is then still whole.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                # in parts: a body is megabytes for 1000 routes, and is not copied
                file.writelines(
                    (b'{"version":%d,"sha256":"%b","body":' % (self.version, _digest(body).encode()), body, b"}")
                )
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):  # the first failure is the one to report
                temporary.unlink(missing_ok=True)
            raise
        if lasting:
            _sync_directory(self.path.parent)

    def _body(self, document: Body) -> Body:
        version = document["version"]
        if version != self.version and version not in self.migrations:
            raise ValueError(f"its version is {version}, this meshctl reads {self.version}")
        body: Body = document["body"]
        # orjson writes what it has read byte for byte the same: key order is kept, floats are the shortest exact form
        if document["sha256"] != _digest(orjson.dumps(body)):
            raise ValueError("its checksum does not match its content")
        while version != self.version:
            body, version = self.migrations[version](body), version + 1
        return body

    def _unreadable(self, error: Exception) -> str:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error) or type(error).__name__
        return (
            f"the state file {self.path} can't be used: {detail}. Nothing was changed. Restore it from a backup, or"
            f" move it away (or name another with --state) to start without it: {self.without}"
        )


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
