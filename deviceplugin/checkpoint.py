"""The agent's state file: what its next run cannot learn from anybody else.

Who holds which slot the kubelet tells. It does not tell how a GPU is shared under the pods that are there (the policy
may be another by now), which slots were promised to containers that it does not show yet, and which GPU is ill: that is
here, written before the kubelet hears of a promise and before a GPU is shared otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
from pydantic import TypeAdapter

from deviceplugin.ledger import Pending
from deviceplugin.node import Saved, SavedGpu
from meshctl.sharing import Slot
from meshctl.statefile import Body, StateFile

VERSION = 1


class Checkpoint:
    """One state file. `load` and `save` block (fsync): call them outside the event loop."""

    def __init__(self, path: Path, wall_s: Callable[[], float] = time.time) -> None:
        """`wall_s` gives Unix seconds: the only clock that two runs share."""
        self.path = path
        without = "a GPU that has pods is then taken to be shared as its policy says now"
        self._file = StateFile(path, VERSION, without, {})
        self._wall_s = wall_s

    def load(self, now_s: float) -> Saved | None:
        """What was saved, its times moved to this run's clock; None when there is no file.

        Raises InputError when the file can't be read or is not whole.
        """
        return self._file.load(lambda body: self._saved(body, now_s))

    def save(self, saved: Saved, now_s: float, *, lasting: bool = True) -> None:
        """Replace the file, all or nothing (`lasting`: see StateFile). Raises OSError; the old file is then whole."""
        shift_s = self._wall_s() - now_s
        body = {
            "gpus": [
                {"gpu": one.gpu, "sharing": one.sharing, "health": one.health.shifted(shift_s)}
                for _, one in sorted(saved.gpus.items())
            ],
            "pending": [
                {"slot": str(slot), "pending": replace(promise, at_s=promise.at_s + shift_s)}
                for slot, promise in sorted(saved.pending.items())
            ],
        }
        self._file.save(orjson.dumps(body, default=_listed), lasting=lasting)

    def _saved(self, body: Body, now_s: float) -> Saved:
        shift_s = now_s - self._wall_s()
        gpus = (_GPU.validate_python(one) for one in body["gpus"])
        pending = {}
        for one in body["pending"]:
            promise = _PENDING.validate_python(one["pending"])
            # never in the future: the wall clock may jump back, and a promise must expire
            pending[Slot.parse(one["slot"])] = replace(promise, at_s=min(now_s, promise.at_s + shift_s))
        shifted = {one.gpu.uuid: SavedGpu(one.gpu, one.sharing, one.health.shifted(shift_s)) for one in gpus}
        return Saved(MappingProxyType(shifted), MappingProxyType(pending))


def _listed(value: tuple[object, ...] | frozenset[Any]) -> list[Any]:
    """What JSON has no word for. A set is sorted, so that the same state is the same bytes; the parts of an Owner keep
    their order."""
    return sorted(value) if isinstance(value, frozenset) else list(value)


_GPU = TypeAdapter(SavedGpu)
_PENDING = TypeAdapter(Pending)
