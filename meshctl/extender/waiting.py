"""Pods that found no place, and whom to tell the scheduler of again, because now there is one. Pure.

kube-scheduler tries a pod again when something changes that it watches: pods, nodes, volumes. That a GPU has room is
said by its agent, in the GPU object, which the scheduler does not watch: a second after the pod that had the slots is
gone, or when a GPU is well again, or is shared otherwise. A pod that is refused just before that waits for whatever
happens next in the cluster, up to five minutes (its podMaxInUnschedulablePodsDuration). A write to the pod's own status
is something that it watches, and it tries the pod again at once (seen on Kubernetes 1.37).

Invariants: no more than `LOOKS` decisions are made in a round; a pod that is woken in vain (the scheduler has reasons
of its own against the nodes with room) is woken half as often each time.
Rejected: to write to all that wait whenever a GPU changes (agents write every second); a shorter time in the scheduler
(a deprecated option, not ours to set where the scheduler is the cluster's own, and all pods are tried for nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshctl.extender.ports import PodId

EVERY_S = 1.0
"""Between two rounds: about as long as the agent needs to say that slots are free."""
LOOKS = 50
"""A decision takes 0.2 ms, and requests wait meanwhile."""
FIRST_S, LONGEST_S = 1.0, 300.0
"""From a refusal until the pod is woken: at first; and at most, when the scheduler would try it again by itself."""


@dataclass(slots=True)
class _Refused:
    pod: PodId
    pause_s: float
    from_s: float
    """It is not woken before that."""


class Waiting:
    """Times are seconds on one monotonic clock."""

    def __init__(self) -> None:
        self._refused: dict[str, _Refused] = {}
        """By UID; who was looked at last comes last."""

    def __len__(self) -> int:
        return len(self._refused)

    def refused(self, pod: PodId, now_s: float) -> None:
        """The scheduler was told that the pod fits nowhere."""
        known = self._refused.get(pod.uid)
        pause_s = FIRST_S if known is None else known.pause_s
        self._refused[pod.uid] = _Refused(pod, pause_s, now_s + pause_s)

    def wake(self, now_s: float, fits: Callable[[PodId], bool | None]) -> list[PodId]:
        """Whom to wake now: those who fit. For one that waits no more `fits` is None, and it is forgotten."""
        found = []
        for uid in [uid for uid, one in self._refused.items() if one.from_s <= now_s][:LOOKS]:
            one = self._refused.pop(uid)
            fit = fits(one.pod)
            if fit is None:
                continue
            if fit:
                found.append(one.pod)
                one.pause_s = min(2 * one.pause_s, LONGEST_S)
                one.from_s = now_s + one.pause_s
            self._refused[uid] = one
        return found
