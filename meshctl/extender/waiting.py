"""Pods that found no place, and whom to tell the scheduler of again, because now there is one. Pure.

kube-scheduler tries a pod again when something changes that it watches: pods, nodes, volumes. That a GPU has room is
said by its agent, in the GPU object, which the scheduler does not watch: a second after the pod that had the slots is
gone, or when a GPU is well again, or is shared otherwise. A pod that is refused just before that waits for whatever
happens next in the cluster, up to five minutes (its podMaxInUnschedulablePodsDuration). A write to the pod's own status
is something that it watches, and it tries the pod again at once (seen on Kubernetes 1.37).

A pod waits for room on the nodes that the scheduler asked about (all that it could want: percentageOfNodesToScore is
100); it has reasons of its own against the others, such as a node selector, and their room would wake the pod in vain.

Invariants: no more than `LOOKS` pods are looked at in a round, and no more than `WAKES` woken; a pod that is woken and
that nothing is asked about then (the scheduler has reasons against all nodes now) is woken half as often each time.
Rejected: to write to all that wait whenever a GPU changes (agents write every second); a shorter time in the scheduler
(a deprecated option, not ours to set where the scheduler is the cluster's own, and all pods are tried for nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from meshctl.extender.ports import PodId

EVERY_S = 1.0
"""Between two rounds: about as long as the agent needs to say that slots are free."""
LOOKS = 50
"""A decision takes 0.2 ms, and requests wait meanwhile."""
WAKES = 10
"""A write each; where one GPU has room and a thousand pods wait for it, nearly all of them are woken in vain."""
MOST_NAMES = 50_000
"""Of nodes that are kept: ten times a large cluster's. Where nodes come and go, theirs are more and more."""
FIRST_S, LONGEST_S = 1.0, 300.0
"""From a refusal until the pod is woken: at first; and at most, when the scheduler would try it again by itself."""


Names = Callable[[], Sequence[str] | None]
"""The nodes that the scheduler asked about; None: all, or it is not known which."""
Fits = Callable[[PodId, Names], bool | None]
"""Whether the pod fits on one of these nodes now; None: it waits no more, and is forgotten."""


class Nodes:
    """Sets of nodes, a bit for each name: 20,000 pods may wait for 5000 nodes each."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._last: tuple[Collection[str], bytes] = ((), b"")
        """Many pods are asked about the same names, one after the other."""

    def __len__(self) -> int:
        return len(self._number)

    def packed(self, names: Collection[str]) -> bytes:
        if names != self._last[0]:
            numbers = [self._number.setdefault(name, len(self._number)) for name in names]
            bits = np.zeros(len(self._number), np.bool_)
            bits[numbers] = True
            self._last = (names, np.packbits(bits).tobytes())
        return self._last[1]

    def names(self, packed: bytes) -> list[str]:
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=len(self._number))
        return [name for name, bit in zip(self._number, bits.tolist(), strict=True) if bit]

    def clear(self) -> None:
        """What was packed can't be read any more."""
        self._number, self._last = {}, ((), b"")


@dataclass(slots=True)
class _Refused:
    pod: PodId
    nodes: bytes | None
    """`Names`, packed."""
    pause_s: float
    from_s: float
    """It is not woken before that."""


class Waiting:
    """Times are seconds on one monotonic clock."""

    def __init__(self) -> None:
        self._refused: dict[str, _Refused] = {}
        """By UID; who was looked at last comes last."""
        self._nodes = Nodes()

    def __len__(self) -> int:
        return len(self._refused)

    def refused(self, pod: PodId, now_s: float, names: Collection[str] | None = None) -> None:
        """The scheduler was told that the pod fits on none of `names`."""
        nodes = None if names is None else self._nodes.packed(names)
        self._refused[pod.uid] = _Refused(pod, nodes, FIRST_S, now_s + FIRST_S)

    def wake(self, now_s: float, fits: Fits) -> list[PodId]:
        """Whom to wake now."""
        found: list[PodId] = []
        for uid in [uid for uid, one in self._refused.items() if one.from_s <= now_s][:LOOKS]:
            if len(found) == WAKES:
                break
            one = self._refused.pop(uid)
            fit = fits(one.pod, partial(self._names, one.nodes))
            if fit is None:
                continue
            if fit:
                found.append(one.pod)
                one.pause_s = min(2 * one.pause_s, LONGEST_S)
                one.from_s = now_s + one.pause_s
            self._refused[uid] = one
        if not self._refused or len(self._nodes) > MOST_NAMES:
            self._forget_names()
        return found

    def _forget_names(self) -> None:
        """Those who wait may be woken once in vain; then it is known again."""
        for one in self._refused.values():
            one.nodes = None
        self._nodes.clear()

    def _names(self, nodes: bytes | None) -> Sequence[str] | None:
        return None if nodes is None else self._nodes.names(nodes)
