"""Other policies, to compare with: those of the experiment in "Beware of Fragmentation" (USENIX ATC '23), and Spread.

Each is what the experiment's simulator (hkust-adsl/kubernetes-scheduler-simulator) makes of it, its coarse scores too:
whole numbers from 0 to 100, so that many nodes are equal and the first by name is taken. That is no detail: where the
last digits of floats decide instead, FGD packs 4 points worse; in a fixed order equal nodes are filled one by one.

Fragmentation gradient descent takes the place that adds least to a node's expected fragments: the free GPU that a pod
drawn from the workload could not use there. It is all free GPU where the pod finds no place on the node, and otherwise
what is free on GPUs too full for it. As the paper defines it, a pod finds none for want of memory, too; its simulator
looks at CPU alone, which packs 0.05 to 0.2 points worse. Pods are counted in whole numbers, which floats add up exactly
in any order. Rejected: keeping costs by node state in a dict (most states are met once; the fleet keeps them by row).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """Any node, there any GPU. Every pod that arrives shuffles anew; until then a question has one answer."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: Floats = np.zeros((0, 0))
        """(N, 1 + D): for the node, and for its GPUs."""
        self._known = -1

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        self.epoch += 1

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        nodes, width = table.slots.shape
        if self._known != self.epoch or self._drawn.shape != (nodes, 1 + width):
            self._known = self.epoch
            self._drawn = np.random.default_rng((self._seed, self.epoch)).random((nodes, 1 + width))
        drawn = self._drawn[rows]
        costs: Floats = drawn[:, :1] + 1e-9 * drawn[:, 1:] if len(want.items) == 1 else drawn[:, :1]
        return costs


class _Kind(NamedTuple):
    """Pods of the workload that are alike."""

    cpu_milli: int
    memory_mib: int
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
        self._kinds[_Kind(want.cpu_milli, want.memory_mib, len(gpus), _up(largest), want.products)] += 1
        self._arrived += 1
        if self._arrived >= 2 * self.epoch:
            self.epoch = self._arrived

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        if self._known != self.epoch or self._workload.products != tuple(table.products):
            self._known = self.epoch
            self._workload = _Workload(self._kinds, tuple(table.products))
        free = (_MILLI * _free(table, rows)).astype(np.int64)
        product = at_rows(table.product, rows)
        before = self._workload.fragments(
            self._workload.users(table.cpu_free[rows], table.memory_free[rows]), free, product
        )
        return _costs(1 / (1 + np.exp((self._after(want, table, rows, free, product) - before[:, None]) / _MILLI)))

    def _after(self, want: Want, table: Table, rows: Ints, free: Ints, product: Ints) -> Floats:
        """(R, D) or (R, 1): fragments with the demand there."""
        users = self._workload.users(table.cpu_free[rows] - want.cpu_milli, table.memory_free[rows] - want.memory_mib)
        if len(want.items) != 1:
            return self._workload.fragments(users, _packed(want, table, rows)[0], product)[:, None]
        asked = -(-_MILLI * want.items[0].slots // np.maximum(at_rows(table.slots, rows), 1))
        return self._workload.fragments_each(users, free, np.maximum(free - asked, 0), product)


class _Users(NamedTuple):
    """Pods of the workload that a node has CPU and memory for."""

    one: Floats
    """(R, P, S + 1) how many of those that ask for one GPU would do with one that is free for so many of the sizes."""
    several: Sequence[Floats]
    """(R, P) for each of `_Workload._several`."""


class _Workload:
    """What pods ask for. K kinds of pods with GPUs, P products, S sizes that one GPU is asked for in."""

    def __init__(self, kinds: Mapping[_Kind, int], products: tuple[str, ...]) -> None:
        self.products = products
        self._total = max(sum(kinds.values()), 1)
        known = sorted((kind for kind in kinds if kind.milli), key=lambda kind: kind[:4])
        self._cpu = np.array([kind.cpu_milli for kind in known], np.int64)
        self._memory = np.array([kind.memory_mib for kind in known], np.int64)
        self._sizes = np.unique([kind.milli for kind in known if kind.gpus == 1]).astype(np.int64)
        """(S,) milli."""
        self._several = sorted({(kind.gpus, kind.milli) for kind in known if kind.gpus > 1})
        """GPUs, milli of each."""
        self._one = np.zeros((len(known), max(len(products), 1), len(self._sizes) + 1))
        self._many = np.zeros((len(self._several), len(known), max(len(products), 1)))
        for at, kind in enumerate(known):
            codes = [code for code, name in enumerate(products) if kind.products is None or name in kind.products]
            if kind.gpus == 1:
                self._one[at, codes, int(np.searchsorted(self._sizes, kind.milli)) + 1 :] = kinds[kind]
            else:
                self._many[self._several.index((kind.gpus, kind.milli)), at, codes] = kinds[kind]

    def users(self, cpu: Ints, memory: Ints) -> _Users:
        """Of nodes with so much of it free, (R,) each."""
        able = ((cpu[:, None] >= self._cpu) & (memory[:, None] >= self._memory)).astype(np.float64)
        return _Users(np.tensordot(able, self._one, 1), [able @ many for many in self._many])

    def fragments(self, users: _Users, free: Ints, product: Ints) -> Floats:
        """(R,) milli, of nodes with GPUs with `free` (R, D) milli of `product` (R, D)."""
        used = self._used(users, free, product).sum(axis=1)
        for (gpus, milli), pods in zip(self._several, users.several, strict=True):
            room = free >= milli
            used += (room.sum(axis=1) >= gpus) * _of_product(pods, product) * (free * room).sum(axis=1)
        found: Floats = free.sum(axis=1) - used / self._total
        return found

    def fragments_each(self, users: _Users, free: Ints, left: Ints, product: Ints) -> Floats:
        """(R, D): with `left` instead of `free` on one GPU each."""
        was = self._used(users, free, product)
        used = was.sum(axis=1)[:, None] - was + self._used(users, left, product)
        for (gpus, milli), pods in zip(self._several, users.several, strict=True):
            room, still = free >= milli, left >= milli
            count = room.sum(axis=1)[:, None] - room + still
            total = (free * room).sum(axis=1)[:, None] - free * room + left * still
            used += (count >= gpus) * _of_product(pods, product)[:, None] * total
        found: Floats = free.sum(axis=1)[:, None] - free + left - used / self._total
        return found

    def _used(self, users: _Users, free: Ints, product: Ints) -> Floats:
        """(R, D) milli of each GPU, times the pods of one GPU that could use it."""
        passed = np.searchsorted(self._sizes, free, side="right")
        used: Floats = free * users.one[np.arange(len(free))[:, None], product, passed]
        return used


def _of_product(pods: Floats, product: Ints) -> Floats:
    """(R,) of (R, P): for the product of each node's first GPU."""
    return pods[np.arange(len(pods)), product[:, 0]]


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
