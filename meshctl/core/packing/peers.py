"""Other policies, to compare with: those of the experiment in "Beware of Fragmentation" (USENIX ATC '23), and Spread.

Each is what the experiment's simulator (hkust-adsl/kubernetes-scheduler-simulator) makes of it, its coarse scores too:
whole numbers from 0 to 100, so that many nodes are equal and the first by name is taken. That is no detail: where the
last digits of floats decide instead, FGD packs 4 points worse; in a fixed order equal nodes are filled one by one.

Fragmentation gradient descent takes the place that adds least to a node's expected fragments: the free GPU that a pod
drawn from the workload could not use there. It is all free GPU where the pod finds no place on the node, and otherwise
what is free on GPUs too full for it. Summed up by CPU and by how much of a GPU is free, the workload is a table, so a
cost is a few look-ups instead of a walk over the workload's pods (3.7 ms a decision). Rejected: keeping costs by node
state in a dict (most states are met once; the fleet keeps them by row already).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from meshctl.core.packing.scoring import Floats, Ints, Scorer, Table, Want, at_rows
from meshctl.core.packing.vocabulary import Policy

MOST_CPU_MILLI = 128_000
"""Largest node of the experiment: what CPU is measured by."""
MOST_GPUS = 8
_SCORES = 100
_WITHIN = 1e-3
"""Weight of the choice between a node's GPUs: below one score."""
_MILLI = 1000
"""Steps that a GPU's free share is looked up in."""


def peer(policy: Policy, seed: int) -> Scorer:
    """The policy of that name; the default has a module of its own."""
    return Random(seed) if policy is Policy.RANDOM else _PEERS[policy]()


class _Fixed:
    """A policy that learns nothing."""

    epoch = 0
    spread = False

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        """Costs depend on the demand and the node alone."""


class BestFit(_Fixed):
    """The node with the least CPU and GPU left, half each; there the tightest GPU."""

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        cpu = (table.cpu_free[rows] - want.cpu_milli) / MOST_CPU_MILLI
        gpu = (table.gpus_free[rows] - _gpus(want, table, rows)) / MOST_GPUS
        return _costs(1 - (cpu + gpu) / 2)[:, None] + _tightest(want, table, rows)


class DotProd(_Fixed):
    """The node whose free CPU and GPU, as a vector, have the smallest product with the demand's; the tightest GPU."""

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        cpu = table.cpu_free[rows] / MOST_CPU_MILLI * want.cpu_milli / MOST_CPU_MILLI
        gpu = table.gpus_free[rows] / MOST_GPUS * _gpus(want, table, rows) / MOST_GPUS
        return _costs(1 - (cpu + gpu) / 2)[:, None] + _tightest(want, table, rows)


class Packing(_Fixed):
    """GPUs in use before idle ones of nodes in use before those of idle nodes; the tightest GPU."""

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        if not want.items:
            return np.zeros((len(rows), 1))
        slots = at_rows(table.slots, rows)
        idle = ((at_rows(table.room, rows) == slots) & (slots > 0)).sum(axis=1)
        _, was = _packed(want, table, rows)
        fresh, left = (was == _MILLI).sum(axis=1), was.sum(axis=1) // 10
        new = np.maximum(_SCORES // 3 - idle, idle)
        begun = np.maximum(_SCORES // 2 - fresh, _SCORES // 3)
        shared = np.maximum(_SCORES - left // 10, _SCORES // 2)
        score = np.select([idle == (slots > 0).sum(axis=1), fresh > 0], [new, begun], shared)
        costs: Floats = _tightest(want, table, rows) - score[:, None]
        return costs


class Spread(_Fixed):
    """The node with the largest share of its CPU and GPU left, half each; there the emptiest GPU."""

    spread = True

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        cpu = (table.cpu_free[rows] - want.cpu_milli) / np.maximum(table.cpu_total[rows], 1)
        gpus = np.maximum((at_rows(table.slots, rows) > 0).sum(axis=1), 1)
        gpu = (table.gpus_free[rows] - _gpus(want, table, rows)) / gpus
        left: Floats = (cpu + gpu)[:, None] + _WITHIN * _WITHIN * _free(table, rows)
        return -left


class Random(_Fixed):
    """Any node, there any GPU. Every pod that arrives shuffles anew."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        self.epoch += 1

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        width = table.room.shape[1] if len(want.items) == 1 else 1
        costs: Floats = self._random.random((len(rows), 1)) + 1e-9 * self._random.random((len(rows), width))
        return costs


class _Kind(NamedTuple):
    """Pods of the workload that are alike."""

    cpu_milli: int
    gpus: int
    milli: int
    """Of each GPU."""
    products: frozenset[str] | None


class Fgd:
    """Fragmentation gradient descent. The workload is all that has arrived, looked at anew when it has doubled."""

    spread = False

    def __init__(self) -> None:
        self.epoch = 0
        self._kinds: Counter[_Kind] = Counter()
        self._arrived = 0
        self._known = 0
        self._workload = _Workload({}, ())

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        largest = max(gpus, default=0.0)
        self._kinds[_Kind(want.cpu_milli, len(gpus), _up(largest), want.products)] += 1
        self._arrived += 1
        if self._arrived >= 2 * self.epoch:
            self.epoch = self._arrived

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        if self._known != self.epoch or self._workload.products != tuple(table.products):
            self._known = self.epoch
            self._workload = _Workload(self._kinds, tuple(table.products))
        free = (_MILLI * _free(table, rows)).astype(np.int64)
        product, cpu = at_rows(table.product, rows), table.cpu_free[rows]
        before = self._workload.fragments(cpu, free, product)[:, None]
        after = self._after(want, table, rows, free, product)
        return _costs(1 / (1 + np.exp((after - before) / _MILLI)))

    def _after(self, want: Want, table: Table, rows: Ints, free: Ints, product: Ints) -> Floats:
        """(R, D) or (R, 1): fragments with the demand there."""
        cpu = table.cpu_free[rows] - want.cpu_milli
        if len(want.items) != 1:
            return self._workload.fragments(cpu, _packed(want, table, rows)[0], product)[:, None]
        asked = -(-_MILLI * want.items[0].slots // np.maximum(at_rows(table.slots, rows), 1))
        return self._workload.fragments_each(cpu, free, np.maximum(free - asked, 0), product)


class _Workload:
    """What pods ask for, as tables: the share of them that could use a GPU, by CPU, by how much of it is free.

    P products, L levels of CPU: level l has the pods that ask for less CPU than the l-th of `_cpu`.
    """

    def __init__(self, kinds: Mapping[_Kind, int], products: tuple[str, ...]) -> None:
        self.products = products
        total = max(sum(kinds.values()), 1)
        self._cpu = np.array(sorted({kind.cpu_milli for kind in kinds}), np.int64)
        """(L - 1,)"""
        shape = (max(len(products), 1), len(self._cpu) + 1)
        self._one = np.zeros((*shape, _MILLI + 1))
        """(P, L, 1001) of one GPU: share of the workload that finds room on a GPU with so much free."""
        self._several: list[tuple[int, int, Floats]] = []
        """Of several GPUs: (GPUs, milli of each, (P, L) share of the workload)."""
        with_gpus = sorted((kind for kind in kinds if kind.milli), key=lambda kind: (kind.gpus, kind.milli))
        for (gpus, milli), alike in groupby(with_gpus, key=lambda kind: (kind.gpus, kind.milli)):
            share = np.zeros(shape)
            for kind in alike:
                codes = [code for code, name in enumerate(products) if kind.products is None or name in kind.products]
                level = int(np.searchsorted(self._cpu, kind.cpu_milli)) + 1
                share[codes, level:] += kinds[kind] / total
            if gpus == 1:
                self._one[:, :, milli:] += share[:, :, None]
            else:
                self._several.append((gpus, milli, share))

    def fragments(self, cpu: Ints, free: Ints, product: Ints) -> Floats:
        """(R,) milli, of nodes with `cpu` (R,) and GPUs with `free` (R, D) milli of `product` (R, D)."""
        level = self._level(cpu)
        used = (free * self._one[product, level[:, None], free]).sum(axis=1)
        for gpus, milli, share in self._several:
            room = free >= milli
            used += (room.sum(axis=1) >= gpus) * share[product[:, 0], level] * (free * room).sum(axis=1)
        found: Floats = free.sum(axis=1) - used
        return found

    def fragments_each(self, cpu: Ints, free: Ints, left: Ints, product: Ints) -> Floats:
        """(R, D): with `left` instead of `free` on one GPU each."""
        level = self._level(cpu)
        at = level[:, None]
        was, now = free * self._one[product, at, free], left * self._one[product, at, left]
        used = was.sum(axis=1)[:, None] - was + now
        for gpus, milli, share in self._several:
            room, still = free >= milli, left >= milli
            count = room.sum(axis=1)[:, None] - room + still
            total = (free * room).sum(axis=1)[:, None] - free * room + left * still
            used += (count >= gpus) * share[product[:, 0], level][:, None] * total
        found: Floats = free.sum(axis=1)[:, None] - free + left - used
        return found

    def _level(self, cpu: Ints) -> Ints:
        return np.searchsorted(self._cpu, cpu, side="right")


_PEERS: Mapping[Policy, Callable[[], Scorer]] = {
    Policy.FGD: Fgd,
    Policy.BESTFIT: BestFit,
    Policy.PACKING: Packing,
    Policy.DOTPROD: DotProd,
    Policy.SPREAD: Spread,
}


def _up(gpus: float) -> int:
    """Milli, rounded up, at most a whole GPU; what floats add to a whole number is none."""
    return min(int(np.ceil(_MILLI * gpus - 1e-6)), _MILLI)


def _costs(score: Floats) -> Floats:
    """Scores from 0 to 1 -> costs, whole numbers: the least is best."""
    return -np.trunc(_SCORES * score)


def _free(table: Table, rows: Ints) -> Floats:
    """(R, D) share of each GPU that is free."""
    return at_rows(table.room, rows) / np.maximum(at_rows(table.slots, rows), 1)


def _gpus(want: Want, table: Table, rows: Ints) -> Floats:
    """(R,) GPUs that the demand is on each node."""
    asked = float(sum(item.slots for item in want.items))
    gpus: Floats = asked / np.maximum(at_rows(table.slots, rows).max(axis=1, initial=0), 1)
    return gpus


def _tightest(want: Want, table: Table, rows: Ints) -> Floats:
    """(R, D) or (R, 1): at most `_WITHIN`, 0 for the fullest GPU of each node that has room."""
    if len(want.items) != 1:
        return np.zeros((len(rows), 1))
    free = np.where(at_rows(table.room, rows) >= want.items[0].slots, _free(table, rows), 1.0)
    behind: Floats = _WITHIN * (free - free.min(axis=1, initial=1.0, keepdims=True))
    return behind


def _packed(want: Want, table: Table, rows: Ints) -> tuple[Ints, Ints]:
    """With each item, the largest first, on the fullest GPU that has room for it beside those before:

    (R, D) milli that are free then, and (R, items) what was free of each item's GPU at first.
    """
    at, slots = np.arange(len(rows)), np.maximum(at_rows(table.slots, rows), 1)
    before = (_MILLI * _free(table, rows)).astype(np.int64)
    free, was = before.copy(), np.zeros((len(rows), len(want.items)), np.int64)
    for index, item in enumerate(sorted(want.items, key=lambda item: -item.slots)):
        asked = -(-_MILLI * item.slots // slots)
        column = np.where(free >= asked, free, 2 * _MILLI).argmin(axis=1)
        was[:, index] = before[at, column]
        free[at, column] = np.maximum(free[at, column] - asked[at, column], 0)
    return free, was
