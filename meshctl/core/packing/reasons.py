"""Why a node is refused, in words: for people who read `kubectl describe pod`, where equal words of many nodes add up.

Looked at from what lasts to what passes: GPUs of another resource or product or too small, closed ones, other tenants,
no room on a single GPU, CPU, memory. So an earlier reason is one that evicting pods would not cure. How much room there
is stands in the words of a small cluster only: an Event is cut after 1024 characters, and each number adds a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from meshctl.core.packing.fit import Need, arrange, divisible, holds, usable
from meshctl.core.packing.scoring import Ints, Want
from meshctl.core.packing.state import State
from meshctl.core.packing.vocabulary import Device, Reason, Refusal

REASONS = tuple(Reason)
"""A reason's code is its position."""
CODE: Mapping[Reason, int] = {reason: code for code, reason in enumerate(REASONS)}
_FEW_NODES = 8
"""With more of them the slots that each has free are not said: with thirty their words would be cut."""
_UNSAID = -1
_PASSING = -1
"""Code of no reason that lasts."""
UNKNOWN = Refusal(Reason.UNKNOWN_NODE, "nothing is known of this node (yet)")
WORSE = Refusal(Reason.WORSE, "the pod would fit, but another node is better")
BRIEF: Mapping[Reason, str] = {
    Reason.UNKNOWN_NODE: "unknown",
    Reason.NO_GPU: "without such a GPU",
    Reason.PRODUCT: "with GPUs of other products",
    Reason.TOO_SLOW: "with GPUs too slow for the model",
    Reason.TOO_SMALL: "with too small GPUs",
    Reason.CLOSED: "with GPUs that take nobody new",
    Reason.TENANT: "with GPUs of other namespaces",
    Reason.NO_ROOM: "without room on a single GPU",
    Reason.CPU: "short of CPU",
    Reason.MEMORY: "short of memory",
}
"""What is said of nodes that are only counted."""


class Found(NamedTuple):
    """What rows are refused for; (R,) each."""

    codes: Ints
    """Of reasons."""
    needs: Ints
    """Index of the need that finds no room."""
    most: Ints
    """Slots that it could have of one GPU; `_UNSAID` in a cluster of many nodes."""
    total: Ints
    """Of all of them; there whether they are as many as are asked for, 0 or 1."""


class Speaker:
    """The refusals of one demand. What lasts is said once for each kind of node, what passes for each row."""

    def __init__(self, want: Want, needs: Sequence[Need]) -> None:
        self._want = want
        self._needs = needs
        self._lasting: list[Refusal | None] = []
        """By `State.kinds`: why such a node is refused even when it is empty."""
        self._said: dict[tuple[int, int, int, int], Refusal] = {}
        """By what is found."""

    def found(self, state: State, rows: Ints) -> Found:
        """Why each of `rows` (R,), none of which fits, does not."""
        self._lasting += (self._of_kind(kind) for kind in state.kinds[len(self._lasting) :])
        lasting = np.array([_PASSING if refusal is None else CODE[refusal.reason] for refusal in self._lasting])
        short = (self._want.cpu_milli > 0) & (state.cpu_free[rows] < self._want.cpu_milli)
        nothing = np.zeros(len(rows), np.int64)
        found = Found(np.where(short, CODE[Reason.CPU], CODE[Reason.MEMORY]), nothing, nothing, nothing)
        for index in reversed(range(len(self._needs))):
            found = self._of_room(state, rows, index, found)
        lasts = lasting[state.kind[rows]]
        return found._replace(codes=np.where(lasts == _PASSING, found.codes, lasts))

    def refusals(self, state: State, rows: Ints) -> list[Refusal]:
        """The same in words."""
        found = self.found(state, rows)
        keys = zip(*(numbers.tolist() for numbers in found), strict=True)
        lasting = map(self._lasting.__getitem__, state.kind[rows].tolist())
        return [refusal or self._say(key) for refusal, key in zip(lasting, keys, strict=True)]

    def _of_room(self, state: State, rows: Ints, index: int, other: Found) -> Found:
        """What the GPUs of one resource are refused for now; `other` where for nothing."""
        need, several = self._needs[index], divisible(state, rows)
        room = usable(self._want, need, state, rows)
        fits = holds(need, room, several)
        reason = np.full(len(rows), CODE[Reason.NO_ROOM])
        if state.isolation:
            reason[holds(need, usable(self._want, need, state, rows, anybody=True), several)] = CODE[Reason.TENANT]
        most, total = room.max(axis=1), room.sum(axis=1)
        if len(state.names) > _FEW_NODES:
            most, total = np.full(len(rows), _UNSAID), (total >= need.total).astype(np.int64)
        mine = Found(reason, np.full(len(rows), index), most, total)
        return Found(*(np.where(fits, others, ours) for others, ours in zip(other, mine, strict=True)))

    def _say(self, key: tuple[int, int, int, int]) -> Refusal:
        if (said := self._said.get(key)) is None:
            said = self._said[key] = self._of_numbers(REASONS[key[0]], *key[1:])
        return said

    def _of_numbers(self, reason: Reason, need: int, most: int, total: int) -> Refusal:
        if reason is Reason.CPU:
            return Refusal(reason, f"too little CPU is free: {self._want.cpu_milli}m is asked for")
        if reason is Reason.MEMORY:
            return Refusal(reason, f"too little memory is free: {self._want.memory_mib} MiB is asked for")
        return Refusal(reason, _numbers(reason, self._needs[need], most, total))

    def _of_kind(self, kind: tuple[Device, ...]) -> Refusal | None:
        """Why a node with such GPUs is refused even when it is empty."""
        return next(filter(None, (self._of_devices(need, kind) for need in self._needs)), None)

    def _of_devices(self, need: Need, kind: tuple[Device, ...]) -> Refusal | None:
        products, unfit = self._want.products, dict(self._want.unfit)
        ours = [device for device in kind if device.resource == need.resource and device.slots > 0]
        if not ours:
            return Refusal(Reason.NO_GPU, f"no GPU is shared as {need.resource}")
        right = [device for device in ours if products is None or device.product in products]
        if not right:
            has = _listed((device.product or "unknown" for device in ours), ", ")
            return Refusal(Reason.PRODUCT, f"its GPUs are {has}; asked for is {_listed(products or ('none',), ' or ')}")
        quick = [device for device in right if device.product not in unfit]
        if not quick:
            return Refusal(Reason.TOO_SLOW, _listed((f"{d.product}: {unfit[d.product]}" for d in right), "; "))
        if not _suffice(need, quick):
            slots = [device.slots for device in quick]
            return Refusal(Reason.TOO_SMALL, _numbers(Reason.TOO_SMALL, need, max(slots), sum(slots)))
        if not _suffice(need, [device for device in quick if not device.closed]):
            closed = _listed((device.closed for device in quick if device.closed), "; ")
            return Refusal(Reason.CLOSED, f"its GPUs take nobody new: {closed}")
        return None


def _suffice(need: Need, devices: Sequence[Device]) -> bool:
    """The items find place on these, when they are empty."""
    room = tuple(device.slots for device in devices)
    return arrange(need.sizes, room, tuple(device.several for device in devices)) is not None


def _numbers(reason: Reason, need: Need, most: int, total: int) -> str:
    asked = " + ".join(map(str, need.sizes))
    subject = f"no GPU has {asked} of {need.resource}"
    if len(need.sizes) > 1:
        subject = f"no room for {asked} of {need.resource}, each on one GPU"
    if reason is Reason.TOO_SMALL:
        return f"{subject}, even empty: the most is {most} (of {total} in all)"
    if reason is Reason.TENANT:
        subject = f"{subject} free for this namespace, others have theirs for themselves"
        return subject if most == _UNSAID else f"{subject}: the most is {most}"
    if len(need.sizes) == 1:
        subject += " free"
    if most == _UNSAID:
        return subject + (", though the node has as many" if total else "; the node has fewer in all")
    return f"{subject}: the most is {most} (of {total} free in all)"


def _listed(words: Iterable[str], between: str) -> str:
    return between.join(sorted(set(words)))
