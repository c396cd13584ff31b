"""What fits on which nodes, and how the items of one pod are laid on the GPUs of one node.

What must be of one GPU is an `Item`. A container is one by itself, unless the kubelet gives it the slots of an init
container that has ended: it does so for the pod's next containers, in order, until those slots are used up, and only
then fresh ones. So an init container and those that follow, as far as its slots reach into, are one item.

Nodes are judged as arrays where a formula does it: items that are all equal fit when the whole items that each GPU has
room for add up. Of unequal ones that must hold for each size and the items that are no smaller; it rules out most of
what does not fit, and the rest is tried out, GPU by GPU (`arrange`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from meshctl.core.packing.scoring import Bools, Ints, Item, Want, at_rows
from meshctl.core.packing.state import NOBODY, State
from meshctl.core.packing.vocabulary import Ask, Demand

_MOST_STEPS = 1000
"""Of one search, 3 ms: what takes longer counts as not fitting. Of 3000 drawn cases (2 to 10 unequal items that fill 70
to 100 % of what is free on 2 to 16 GPUs) two took more steps, and did not fit; 99 % took less than 60."""

Laid = tuple[tuple[tuple[int, int], ...], ...]
"""For each item (column, slots) of the GPUs that it is on; several only where all of them allow it."""


class Need(NamedTuple):
    """What a demand wants of the GPUs of one resource, as numbers."""

    resource: str
    sizes: tuple[int, ...]
    """Slots of each item, largest first."""

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def equal(self) -> bool:
        return self.sizes[0] == self.sizes[-1]


def items_of(asks: Sequence[Ask]) -> tuple[Item, ...]:
    """What must be of one GPU each. `asks` in the kubelet's order."""
    items: list[Item] = []
    left: dict[str, tuple[int, int]] = {}
    """Resource -> its last item, and how many of the slots of ended init containers are for the next container."""
    for position, ask in enumerate(asks):
        at, spare = left.get(ask.resource, (0, 0))
        if spare:
            item = items[at]
            items[at] = Item(item.resource, item.slots + max(ask.slots - spare, 0), (*item.asks, position))
        else:
            at = len(items)
            items.append(Item(ask.resource, ask.slots, (position,)))
        left[ask.resource] = (at, max(spare, ask.slots) if ask.init else max(spare - ask.slots, 0))
    return tuple(items)


def want_of(demand: Demand, *, isolation: bool) -> Want:
    """What counts of a demand; the namespace only where a GPU is isolated."""
    unfit = tuple(sorted(demand.unfit.items())) if demand.unfit else ()
    namespace = demand.namespace if isolation else ""
    return Want(demand.cpu_milli, demand.memory_mib, items_of(demand.asks), demand.products, unfit, namespace)


def needs_of(want: Want) -> tuple[Need, ...]:
    resources = sorted({item.resource for item in want.items})
    return tuple(
        Need(resource, tuple(sorted((item.slots for item in want.items if item.resource == resource), reverse=True)))
        for resource in resources
    )


# ------------------------------------------------------------------------------------------------------- nodes as rows


def fitting(want: Want, needs: Sequence[Need], state: State, rows: Ints) -> tuple[Bools, Ints]:
    """(R,) whether the demand fits on each of `rows`; and (R, D) the slots that it could have for the last need."""
    fits = np.ones(len(rows), np.bool_)
    room = np.zeros((len(rows), 0), np.int64)
    if want.cpu_milli > 0:
        fits &= state.cpu_free[rows] >= want.cpu_milli
    if want.memory_mib > 0:
        fits &= state.memory_free[rows] >= want.memory_mib
    for need in needs:
        room = usable(want, need, state, rows)
        fits &= holds(need, room, divisible(state, rows))
    return fits, room


def usable(want: Want, need: Need, state: State, rows: Ints, *, anybody: bool = False) -> Ints:
    """(R, D) slots that the demand could have of each GPU now; `anybody`: if it were of the right tenant."""
    room = at_rows(state.room, rows)
    if not (state.uniform and state.resource_code(need.resource) >= 0):
        room = room * (at_rows(state.resource, rows) == state.resource_code(need.resource))
    if want.products is not None or want.unfit:
        room = room * will_do(want, state)[at_rows(state.product, rows)]
    if state.isolation and not anybody:
        room = room * admits(want, state, rows)
    return room


def divisible(state: State, rows: Ints) -> Bools | None:
    """(R, D) whether a container may have slots of the GPU and of others; None: of none."""
    return at_rows(state.several, rows) if state.division else None


def will_do(want: Want, state: State) -> Bools:
    """(products,) for each product's code."""
    slow = {product for product, _ in want.unfit}
    return np.fromiter(
        ((want.products is None or product in want.products) and product not in slow for product in state.products),
        np.bool_,
        len(state.products),
    )


def admits(want: Want, state: State, rows: Ints) -> Bools:
    """(R, D) no other tenant has the GPU for itself."""
    tenant = at_rows(state.tenant, rows)
    ours: Bools = (tenant == NOBODY) | (tenant == state.tenant_code(want.namespace))
    return ours


def holds(need: Need, room: Ints, several: Bools | None) -> Bools:
    """(R,) whether the items find place in `room` (R, D), together."""
    if len(need.sizes) == 1 and several is None:
        one: Bools = room.max(axis=1) >= need.sizes[0]
        return one
    if several is None:
        several = np.zeros(room.shape, np.bool_)
    pool, alone = (room * several).sum(axis=1), room * ~several
    enough: Bools = room.sum(axis=1) >= need.total
    for size in set(need.sizes):
        count = sum(other >= size for other in need.sizes)
        enough &= (alone // size).sum(axis=1) * size + pool >= count * size
    if not need.equal:
        for row in np.flatnonzero(enough):
            enough[row] = arrange(need.sizes, tuple(room[row].tolist()), tuple(several[row].tolist())) is not None
    return enough


# ------------------------------------------------------------------------------------------------- one node, its items


@lru_cache(maxsize=8192)
def arrange(
    sizes: tuple[int, ...], room: tuple[int, ...], several: tuple[bool, ...], spread: bool = False
) -> Laid | None:
    """The items (largest first) on GPUs with so much room; None: they do not fit together.

    Fullest GPU first, or emptiest (`spread`), with every way tried before giving up. An item is split only over GPUs
    that allow it, and, unless `spread`, only when it fits on none."""
    search = _Search(sizes, list(room), several, spread)
    return search.laid() if search.place(0, 0) else None


class _Search:
    def __init__(self, sizes: Sequence[int], room: list[int], several: Sequence[bool], spread: bool) -> None:
        self.sizes = sizes
        self.room = room
        self.several = several
        self.spread = spread
        self.column = [-1] * len(sizes)
        """Of each item; -1: split."""
        self.steps = 0

    def place(self, item: int, split: int) -> bool:
        """The items from `item` on find place beside those before; `split` slots are still to be taken from anywhere
        that allows several."""
        self.steps += 1
        if self.steps > _MOST_STEPS or split > self._pool():
            return False
        if item == len(self.sizes):
            return True
        if self.spread and self._divide(item, split):
            return True
        size, seen = self.sizes[item], set()
        for column in sorted(
            range(len(self.room)), key=lambda at: (-self.room[at] if self.spread else self.room[at], at)
        ):
            like = (self.room[column], self.several[column])
            if self.room[column] < size or like in seen:
                continue
            seen.add(like)
            self.room[column] -= size
            self.column[item] = column
            if self.place(item + 1, split):
                return True
            self.room[column] += size
        return not self.spread and self._divide(item, split)

    def _divide(self, item: int, split: int) -> bool:
        self.column[item] = -1
        return any(self.several) and self.place(item + 1, split + self.sizes[item])

    def _pool(self) -> int:
        return sum(room for room, several in zip(self.room, self.several, strict=True) if several)

    def laid(self) -> Laid:
        return tuple(
            ((column, size),) if column >= 0 else self._parts(size)
            for column, size in zip(self.column, self.sizes, strict=True)
        )

    def _parts(self, size: int) -> tuple[tuple[int, int], ...]:
        """Of as few GPUs as can be; `spread`: slot by slot of the emptiest."""
        parts: dict[int, int] = {}
        while size:
            column = max(
                (at for at, several in enumerate(self.several) if several), key=lambda at: (self.room[at], -at)
            )
            slots = 1 if self.spread else min(size, self.room[column])
            self.room[column] -= slots
            size -= slots
            parts[column] = parts.get(column, 0) + slots
        return tuple(sorted(parts.items()))


def dealt(item: Item, asks: Sequence[Ask], parts: Sequence[tuple[str, int]]) -> Mapping[int, Mapping[str, int]]:
    """Position in `asks` -> UUID -> slots, as the kubelet gives them: those of ended init containers first."""
    fresh, spare = dict(parts), dict[str, int]()
    given: dict[int, dict[str, int]] = {}
    for position in item.asks:
        reused = _draw(spare, asks[position].slots)
        new = _draw(fresh, asks[position].slots - sum(reused.values()))
        given[position] = {uuid: reused.get(uuid, 0) + new.get(uuid, 0) for uuid in sorted(reused.keys() | new.keys())}
        if asks[position].init:
            for uuid, slots in given[position].items():
                spare[uuid] = spare.get(uuid, 0) + slots
    return given


def _draw(pot: dict[str, int], slots: int) -> dict[str, int]:
    """So many slots, or all there are, out of the pot."""
    drawn: dict[str, int] = {}
    for uuid in list(pot):
        if take := min(slots, pot[uuid]):
            drawn[uuid] = take
            pot[uuid] -= take
            slots -= take
    return drawn
