"""Stranding-aware best fit: the tightest GPU; among equals, the node where the least GPU becomes useless.

A GPU is stranded when its node has no CPU left for who would use it. With rho = the CPU that pods ask for per GPU, on
the mean of all that have arrived, a node of G free GPUs and C free CPU strands max(0, G - C / rho) of them. A place
costs what the pod adds to that. A share of a GPU goes first of all where it leaves the least of that GPU: what is left
in pieces, nobody uses.

Measured against fragmentation gradient descent on the openb traces: docs/decisions/0007. Slower to change than rho
itself, the rho in use: it moves when they differ by `_DRIFT`, since each move costs a look at the whole fleet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshctl.core.packing.scoring import Floats, Ints, Table, Want

_PRIOR_MILLI = 8000.0
"""CPU per GPU before anybody has asked: nodes for inference have 8 to 16 cores per GPU."""
_DRIFT = 1.02
_TIGHTNESS = 1e6
"""Weight of a GPU's leftover over what a node strands: one slot (at most 1/1000 of a GPU) outweighs 16 GPUs."""


class Stranding:
    """The default policy."""

    spread = False

    def __init__(self) -> None:
        self.epoch = 0
        self._cpu_milli = 0.0
        self._gpus = 0.0
        self._rho_milli = _PRIOR_MILLI

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        """CPU and GPUs of all that have arrived, added up."""
        if not gpus:
            return
        self._cpu_milli += want.cpu_milli
        self._gpus += sum(gpus)
        rho = max(self._cpu_milli / self._gpus, 1.0)
        if not 1 / _DRIFT <= rho / self._rho_milli <= _DRIFT:
            self._rho_milli = rho
            self.epoch += 1

    def stranded(self, gpus_free: Floats, cpu_free: Floats | Ints) -> Floats:
        """GPUs that nobody can use for want of CPU; any shape."""
        return np.maximum(gpus_free - np.maximum(cpu_free, 0) / self._rho_milli, 0.0)

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        free, cpu = table.gpus_free[rows], table.cpu_free[rows]
        before = self.stranded(free, cpu)
        if len(want.items) != 1:
            taken = sum(item.slots for item in want.items) / np.maximum(table.slots[rows].max(axis=1, initial=0), 1)
            return (self.stranded(free - taken, cpu - want.cpu_milli) - before)[:, None]
        slots = np.maximum(table.slots[rows], 1)
        size = want.items[0].slots
        after = self.stranded(free[:, None] - size / slots, (cpu - want.cpu_milli)[:, None])
        return (table.room[rows] - size) / slots * _TIGHTNESS + (after - before[:, None])
