"""Why a node is refused, in words: for people who read `kubectl describe pod`, where equal words of many nodes add up.

Looked at from what lasts to what passes: GPUs of another resource or product or too small, closed ones, other tenants,
no room on a single GPU, CPU, memory. So an earlier reason is one that evicting pods would not cure. Numbers stand in
the words only where few different ones are to be expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from meshctl.core.packing.fit import Need, admits, holds, will_do
from meshctl.core.packing.scoring import Bools, Ints, Want
from meshctl.core.packing.state import State
from meshctl.core.packing.vocabulary import Device, Reason, Refusal

REASONS = tuple(Reason)
"""A reason's code is its position."""
CODE: Mapping[Reason, int] = {reason: code for code, reason in enumerate(REASONS)}
UNKNOWN = Refusal(Reason.UNKNOWN_NODE, "nothing is known of this node (yet)")
WORSE = Refusal(Reason.WORSE, "the pod would fit, but another node is better")
BRIEF: Mapping[Reason, str] = {
    Reason.UNKNOWN_NODE: "are not known",
    Reason.NO_GPU: "have no such GPU",
    Reason.PRODUCT: "have GPUs of other products",
    Reason.TOO_SLOW: "have GPUs that are too slow for the model",
    Reason.TOO_SMALL: "have too small GPUs",
    Reason.CLOSED: "have GPUs that take nobody new",
    Reason.TENANT: "have GPUs of other namespaces",
    Reason.NO_ROOM: "have no GPU with room",
    Reason.CPU: "have too little CPU",
    Reason.MEMORY: "have too little memory",
}
"""What is said of nodes that are only counted."""


class Speaker:
    """The refusals of one demand."""

    def __init__(self, want: Want, needs: Sequence[Need]) -> None:
        self._want = want
        self._needs = needs
        self._said: dict[int, Refusal] = {}
        """By key: reason, need, and two numbers that it is about."""

    def refusals(self, state: State, rows: Ints) -> tuple[Ints, list[Refusal]]:
        """Why each of `rows` (R,), none of which fits, does not: (R,) codes of reasons, and the words."""
        found = np.full((4, len(rows)), -1, np.int64)
        """Reason, need, and two numbers."""
        for index, need in enumerate(self._needs):
            still = np.flatnonzero(found[0] < 0)
            found[:, still] = self._of_gpus(state, rows[still], index, need)
        still = np.flatnonzero(found[0] < 0)
        short = (self._want.cpu_milli > 0) & (state.cpu_free[rows[still]] < self._want.cpu_milli)
        found[0, still] = np.where(short, CODE[Reason.CPU], CODE[Reason.MEMORY])
        found[1:, still] = 0
        keys = (((found[0] << 8 | found[1]) << 24 | found[2]) << 24 | found[3]).tolist()
        for key, at in {key: at for at, key in enumerate(keys)}.items():
            if key not in self._said:
                self._said[key] = self._say(state, *found[:, at].tolist())
        return found[0], list(map(self._said.__getitem__, keys))

    def _of_gpus(self, state: State, rows: Ints, index: int, need: Need) -> Ints:
        """(4, R) what the GPUs of one resource are refused for; -1 where for nothing."""
        slots, several = state.slots[rows], state.several[rows]
        ours = state.resource[rows] == state.resource_code(need.resource)
        product = state.product[rows]
        right = ours & _within(self._want.products, state)[product]
        quick = right & will_do(self._want, state)[product]
        mine = quick & admits(self._want, state, rows)
        room = np.where(mine, state.room[rows], 0)
        kind = state.kind[rows]
        most, all_ = room.max(axis=1, initial=0), room.sum(axis=1)
        size = np.where(quick, slots, 0)
        stages: tuple[tuple[Reason, Bools, Ints, Ints], ...] = (
            (Reason.NO_GPU, ~ours.any(axis=1), kind, kind),
            (Reason.PRODUCT, ~right.any(axis=1), kind, kind),
            (Reason.TOO_SLOW, ~quick.any(axis=1), kind, kind),
            (Reason.TOO_SMALL, ~holds(need, size, several), size.max(axis=1, initial=0), size.sum(axis=1)),
            (Reason.CLOSED, ~holds(need, np.where(state.closed[rows], 0, size), several), kind, kind),
            (Reason.NO_ROOM, ~holds(need, np.where(quick, state.room[rows], 0), several), most, all_),
            (Reason.TENANT, ~holds(need, room, several), most, all_),
        )
        found = np.full((4, len(rows)), -1, np.int64)
        for reason, bad, one, two in reversed(stages):
            found[0, bad] = CODE[reason]
            found[2, bad], found[3, bad] = one[bad], two[bad]
        found[1, found[0] >= 0] = index
        return found

    def _say(self, state: State, code: int, index: int, one: int, two: int) -> Refusal:
        reason = REASONS[code]
        if reason in (Reason.CPU, Reason.MEMORY):
            return Refusal(reason, self._of_node(reason))
        need = self._needs[index]
        if reason in (Reason.TOO_SMALL, Reason.NO_ROOM, Reason.TENANT):
            return Refusal(reason, _of_numbers(reason, need, one, two))
        return Refusal(reason, self._of_kind(reason, need, state.kinds[one]))

    def _of_node(self, reason: Reason) -> str:
        if reason is Reason.CPU:
            return f"too little CPU is free: {self._want.cpu_milli}m is asked for"
        return f"too little memory is free: {self._want.memory_mib} MiB is asked for"

    def _of_kind(self, reason: Reason, need: Need, kind: tuple[Device, ...]) -> str:
        ours = [device for device in kind if device.resource == need.resource and device.slots > 0]
        products = _listed(device.product or "unknown" for device in ours)
        if reason is Reason.NO_GPU:
            return f"no GPU is shared as {need.resource}"
        if reason is Reason.PRODUCT:
            return f"its GPUs are {products}; asked for is {_listed(self._want.products or (), ' or ')}"
        right = [device for device in ours if self._want.products is None or device.product in self._want.products]
        if reason is Reason.TOO_SLOW:
            unfit = dict(self._want.unfit)
            return "; ".join(
                f"{name}: {unfit[name]}" for name in sorted({device.product for device in right} & unfit.keys())
            )
        return f"its GPUs take nobody new: {_listed((device.closed for device in right if device.closed), '; ')}"


def _within(products: frozenset[str] | None, state: State) -> Bools:
    """(products,) for each product's code."""
    count = len(state.products)
    return np.fromiter((products is None or product in products for product in state.products), np.bool_, count)


def _of_numbers(reason: Reason, need: Need, most: int, total: int) -> str:
    asked = " + ".join(map(str, need.sizes))
    subject = f"no GPU has {asked} of {need.resource}"
    if len(need.sizes) > 1:
        subject = f"no room for {asked} of {need.resource}, each on one GPU"
    match reason:
        case Reason.TOO_SMALL:
            return f"{subject}, even empty: the most is {most} (of {total} in all)"
        case Reason.TENANT:
            return f"{subject} free for this namespace, others have theirs for themselves: the most is {most}"
        case _:
            return f"{subject}{' free' if len(need.sizes) == 1 else ''}: the most is {most} (of {total} free in all)"


def _listed(words: Iterable[str], between: str = ", ") -> str:
    return between.join(sorted(set(words)))
