"""The default policy: a pod goes where the least GPU is made useless, for want of CPU or in pieces nobody asks for.

Three losses are counted, in GPUs.
- Pieces: a share that comes to a GPU free to level r leaves r - s. It costs what the piece was worth, less what is left
  is worth, less the share (`prices`). Of equally dear GPUs the one with the least left.
- CPU: with rho = the CPU that pods with GPUs ask for per GPU, on the mean, a node of G free GPUs and C free CPU strands
  max(0, G - C / rho) of them; a pod costs what it adds to that, which may be less than nothing. Pods without GPU do not
  count in rho: they can go elsewhere, and counted in they make the nodes with most GPUs look short of CPU, so that
  pods spread over them, and those of eight GPUs find none empty.
- Places for pods of k GPUs: to take the GPU that makes a node of k untouched ones one of less costs `_DEAR` while such
  places are scarce. Where pods depart nothing else is lost but those pods: single GPUs fall free, eight at once do not.
For a share pieces come first, and the others decide between equals: a node has CPU to spare for long, a GPU is cut for
good. Last comes the node with the fewest untouched GPUs, so that some node stays whole.

All is learned from what arrived, and nothing is known beforehand; before anybody has arrived it is the tightest fit.
Costs of the whole fleet are asked for again when they change, so that is once in `_EVERY` arrivals (each doubling
first). Measured against others on the openb traces: docs/decisions/0007.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from meshctl.core.packing.prices import LEVELS, prices
from meshctl.core.packing.scoring import Floats, Ints, Table, Want, at_rows

_PRIOR_MILLI = 8000.0
"""CPU per GPU before anybody has asked: nodes for inference have 8 to 16 cores per GPU."""
_EVERY = 256
"""Arrivals. 1000 do as well on the mean, and lose 0.2 points in a cluster that fills in 8000; 50 gain nothing."""
_UNTOUCHED = 1e-3
"""Weight of an untouched GPU against a stranded one: between equals, and between nodes as good as equal."""
_DEAR = 1.0
"""Of the last GPU for a pod of several against a stranded one. 0.3 loses 0.15 points under departures; 3 is as good."""
_SCARCE = 4.0
"""Places are scarce when fewer than so many times the pods that would come for them until the free GPUs are full; pods
depart meanwhile, and more come. 2 loses 0.1 points under departures; 10 loses 0.3 where many ask for eight."""
_LEFT = 1e-5
"""Weight of a hundredth left against a hundredth lost, which is rounded to 1e-2: between equals."""
_NODE = 1e-7
"""Weight of what a node strands (at most some ten GPUs) against that: between equals of these."""


class Stranding:
    """The policy. `table`: the fleet as it is when `learn` is called; None: prices are not wanted, `stranded` only."""

    spread = False

    def __init__(self, table: Table | None = None) -> None:
        self.epoch = 0
        self._table = table
        self._arrivals = 0
        self._due = 1
        self._cpu_milli = 0.0
        self._gpus = 0.0
        self._items: Floats = np.zeros(LEVELS + 1)
        self._several: Counter[int] = Counter()
        """Whole GPUs, from two -> pods that asked for so many."""
        self._scarce: list[int] = []
        """Of these, those that places are scarce for."""
        self._rho_milli = _PRIOR_MILLI
        self._worth: Floats = np.zeros(LEVELS + 1)
        self._kept: dict[tuple[int, int], Floats] = {}
        """What `_lost` has answered since the last change."""

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        """A pod that asks for GPUs: its CPU, and the sizes of its shares."""
        if not gpus:
            return
        self._arrivals += 1
        self._cpu_milli += want.cpu_milli
        self._gpus += sum(gpus)
        for gpu in gpus:
            whole, part = divmod(gpu, 1.0)
            self._items[LEVELS] += whole
            self._items[round(part * LEVELS)] += 1
        self._items[0] = 0.0
        if (wholes := sum(map(int, gpus))) > 1:
            self._several[wholes] += 1
        if self._arrivals >= self._due:
            self._due = self._arrivals + min(self._arrivals, _EVERY)
            self._refresh()

    def stranded(self, gpus_free: Floats, cpu_free: Floats | Ints) -> Floats:
        """GPUs that nobody can use for want of CPU; any shape."""
        return np.maximum(gpus_free - np.maximum(cpu_free, 0) / self._rho_milli, 0.0)

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        slots, room = at_rows(table.slots, rows), at_rows(table.room, rows)
        free, cpu = table.gpus_free[rows], table.cpu_free[rows]
        untouched = _untouched(room, slots)
        before = self.stranded(free, cpu) - _UNTOUCHED * untouched
        cpu = cpu - want.cpu_milli
        if len(want.items) != 1:
            most = np.maximum(slots.max(axis=1, initial=0), 1)
            taken = sum(item.slots for item in want.items) / most
            grown: Floats = self.stranded(free - taken, cpu) - before + self._broken(untouched, np.floor(taken))
            return grown[:, None]
        size = want.items[0].slots
        broken = _NODE * self._broken(untouched, 1)
        costs: Floats = np.zeros(room.shape)
        for kind in np.flatnonzero(np.bincount(slots.ravel())).tolist():  # nearly always one: how finely GPUs are cut
            if kind >= size:
                strands = _NODE * (self.stranded(free - size / kind, cpu) - before)
                found = self._lost(kind, size).take(room, mode="clip") + strands[:, None]
                found += (room == kind) * broken[:, None]
                costs = np.where(slots == kind, found, costs)
        return costs

    def _broken(self, untouched: Floats, taken: Floats | int) -> Floats:
        """(R,) what it costs that so many of a node's untouched GPUs are taken: scarce places that are none then."""
        costs = np.zeros(untouched.shape)
        for wholes in self._scarce:
            costs[(untouched >= wholes) & (untouched - taken < wholes)] += _DEAR
        return costs

    def _lost(self, slots: int, size: int) -> Floats:
        """(slots + 1,) the cost in pieces, of GPUs cut into `slots`, by how many of them are free."""
        if (lost := self._kept.get((slots, size))) is None:
            room = np.arange(slots + 1)
            level, left = _level(room, slots), _level(np.maximum(room - size, 0), slots)
            pieces = np.round(self._worth[level] - self._worth[left] - (level - left), 2)
            lost = self._kept[slots, size] = pieces + _LEFT * left
        return lost

    def _refresh(self) -> None:
        """What is used from now on is what has been learned by now."""
        self._rho_milli = max(self._cpu_milli / self._gpus, 1.0)
        self._kept.clear()
        self.epoch += 1
        if self._table is None:
            return
        table = self._table
        usable = 1.0 - self.stranded(table.gpus_free, table.cpu_free) / np.maximum(table.gpus_free, 1e-9)
        levels = _level(table.room, np.maximum(table.slots, 1))
        weights = np.broadcast_to(usable[:, None], levels.shape)
        asked = float(table.gpus_free @ usable) * _SCARCE / self._gpus
        untouched = _untouched(table.room, table.slots)
        self._scarce = [k for k in sorted(self._several) if (untouched // k).sum() < asked * self._several[k]]
        free = np.bincount(levels.ravel(), weights.ravel(), LEVELS + 1).astype(np.float64)
        self._worth = prices(free, self._items)


def _untouched(room: Ints, slots: Ints) -> Floats:
    """(R,) GPUs of each node that nobody has anything of; both (R, D)."""
    found: Floats = ((room == slots) & (slots > 0)) @ np.ones(slots.shape[1])
    return found


def _level(room: Ints, slots: Ints | int) -> Ints:
    """Hundredths of a GPU, rounded; any shape."""
    return (room * LEVELS * 2 + slots) // (2 * slots)
