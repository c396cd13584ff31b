"""The controller's state file: what a restart needs so that it moves no weight.

It holds the decision's memory, the routes as they were served, and how many proxies there were. Routes are kept too,
because a manifest may be broken just while the controller restarts: its last good version is then only here. It is
written before the plan that it describes is published. Rejected: reading the weights back from the proxies (they know
no history, and may be restarting too).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import orjson
from pydantic import TypeAdapter

from meshctl.core.decide import Memory
from meshctl.model import DesiredRoute, RouteId
from meshctl.statefile import Body, StateFile

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
        self._file = StateFile(path, VERSION, "weights then start from the declared load and profiles", {})
        self._wall_s = wall_s

    def load(self, now_s: float) -> Saved | None:
        """What was saved, its times moved to this run's clock; None when there is no file.

        Raises InputError when the file can't be read or is not whole.
        """
        return self._file.load(lambda body: self._saved(body, now_s))

    def save(self, saved: Saved, now_s: float) -> None:
        """Replace the file by `saved`, all or nothing. Raises OSError; the old file is then still whole."""
        self._file.save(
            orjson.dumps(
                {
                    "saved_at_unix_s": self._wall_s(),
                    "gateways": saved.gateways,
                    "memory": saved.memory.to_json(now_s),
                    "routes": saved.routes,
                },
                default=_plain,
            )
        )

    def _saved(self, body: Body, now_s: float) -> Saved:
        down_s = max(0.0, self._wall_s() - body["saved_at_unix_s"])  # never negative: the wall clock may jump back
        return Saved(
            memory=Memory.from_json(body["memory"], now_s - down_s),
            routes=MappingProxyType(_ROUTES.validate_python(body["routes"])),
            gateways=max(1, int(body["gateways"])),
        )


_ROUTES = TypeAdapter(dict[RouteId, DesiredRoute])


def _plain(value: object) -> object:
    """What orjson does not know by itself; sets are sorted so that the same state is the same bytes."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def default_path(manifests: Path) -> Path:
    """One file per manifests directory, under XDG_STATE_HOME."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    name = hashlib.sha256(str(manifests.resolve()).encode()).hexdigest()[:16]
    return Path(home).expanduser() / "meshctl" / f"{name}.json"
