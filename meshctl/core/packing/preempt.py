"""Who must go so that a pod fits on a node's physical GPUs, when the scheduler would evict some pods for it there.

The scheduler counts a node's slots as one number, so with its victims gone they are enough, but may be on two GPUs.
Here a fleet is asked whether the pod fits, on a copy of the one node, and the victims become as many as that takes.

What kube-scheduler makes of it (pkg/scheduler/extender.go, framework/preemption/preemption.go) sets the rules:

- Its own victims stay victims: ports, volumes and affinities, which it knows and we do not, may need them.
- A node without victims is an error that ends the whole preemption, so it is left out; so is one that does not help.
- It compares nodes by the priority of the first victim, so they are in order of decreasing priority.
- It never asks about a node that its own filters let pass: a pod whom only the physical GPUs refuse evicts nobody.
- It looks up each victim among the pods of that node, so only pods that are charged there are added.

Invariant: whoever is added has a lower priority than the pod, and with any one of them left the pod would not fit, or
one of a lower rank would have to go. Rejected: the smallest set over all subsets (2^110 of them); one GPU after the
other, then several, is the same for a pod with slots of one GPU, and near it for others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Demand, Placement


class Evictable(NamedTuple):
    """A pod on the node that may have to go."""

    key: str
    """As the fleet has it: its UID."""
    priority: int
    started: str = ""
    """When, as the API server writes it (it sorts by time); "" not yet."""


def victims(
    fleet: Fleet, demand: Demand, node: str, priority: int, chosen: Collection[str], pods: Iterable[Evictable]
) -> tuple[str, ...] | None:
    """The keys of all who go so that `demand`, of `priority`, fits on `node`: `chosen` (the scheduler's) and as many
    more of `pods` as it takes; those of the highest priority first. None when it can't fit, or `chosen` is empty.

    Of what suffices: the lowest highest priority, then the fewest, then the lower priorities, then the younger."""
    known = {pod.key: pod for pod in pods}
    if not chosen or node not in fleet.nodes:
        return None
    trial = _Trial(fleet, demand, node)
    spare = [known[key] for key in trial.charged if key in known and key not in chosen]
    further = _further(trial, frozenset(chosen), [pod for pod in spare if pod.priority < priority])
    if further is None:
        return None
    everyone = [known.get(key, Evictable(key, priority - 1)) for key in sorted(chosen)]
    return tuple(pod.key for pod in sorted([*everyone, *further], key=_first_to_go, reverse=True))


def leavers(fleet: Fleet, demand: Demand, node: str, keys: Iterable[str]) -> tuple[str, ...] | None:
    """Of the pods `keys` those few without which `demand` fits on `node`; () when it fits as it is. None when it would
    not fit without any of them."""
    if node not in fleet.nodes:
        return None
    trial = _Trial(fleet, demand, node)
    found = _further(trial, frozenset(), [Evictable(key, 0) for key in sorted(keys) if key in trial.charged])
    return None if found is None else tuple(sorted(pod.key for pod in found))


class _Trial:
    """A copy of one node on which pods can be evicted to see what then fits."""

    def __init__(self, fleet: Fleet, demand: Demand, node: str) -> None:
        self._demand, self._node, self._fleet = demand, node, Fleet()
        self._fleet.put(fleet.nodes[node])
        self.charged = {key: fleet.charges[key] for key in sorted(fleet.charged(node))}
        for key, charge in self.charged.items():
            self._fleet.charge(key, charge)
        for device in fleet.nodes[node].devices:
            self._fleet.hold(device.uuid, fleet.used_slots(device.uuid) - self._fleet.used_slots(device.uuid))
        self._gone: frozenset[str] = frozenset()

    def fits(self, gone: Collection[str]) -> bool:
        """Whether the pod fits when these are gone, and nobody else is."""
        wanted = frozenset(gone) & self.charged.keys()
        for key in sorted(wanted - self._gone):
            self._fleet.release(key)
        for key in sorted(self._gone - wanted):
            self._fleet.charge(key, self.charged[key])
        self._gone = wanted
        return isinstance(self._fleet.fit(self._demand, self._node), Placement)

    def slots(self, key: str) -> Mapping[str, int]:
        """UUID -> slots that the pod has."""
        return self.charged[key].gpus


def _further(trial: _Trial, chosen: frozenset[str], lower: Sequence[Evictable]) -> Sequence[Evictable] | None:
    """Who else goes; None when all of `lower` would not be enough."""
    if trial.fits(chosen):
        return ()
    for highest in sorted({pod.priority for pod in lower}):
        candidates = sorted((pod for pod in lower if pod.priority <= highest), key=_first_to_go)
        if trial.fits(chosen | {pod.key for pod in candidates}):
            found = [_fewest(trial, chosen, scope) for scope in _scopes(trial, candidates)]
            return min((one for one in found if one is not None), key=_worth)
    return None


def _scopes(trial: _Trial, candidates: Sequence[Evictable]) -> Iterator[Sequence[Evictable]]:
    """Whom to look at together: the pods of each GPU, then of several GPUs, those with the fewest pods first; in the
    end all of them."""
    on: dict[str, list[Evictable]] = {}
    for pod in candidates:
        for uuid in trial.slots(pod.key):
            on.setdefault(uuid, []).append(pod)
    gpus = sorted(on, key=lambda uuid: (len(on[uuid]), uuid))
    yield from (on[uuid] for uuid in gpus)
    for count in range(2, len(gpus) + 1):
        several = {pod.key for uuid in gpus[:count] for pod in on[uuid]}
        yield [pod for pod in candidates if pod.key in several]
    yield candidates


def _fewest(trial: _Trial, chosen: frozenset[str], scope: Sequence[Evictable]) -> Sequence[Evictable] | None:
    """Who of `scope` goes: all, but those without whose eviction the pod fits as well; who has the fewest slots is
    spared first, so that few with many slots go. None when all of them are not enough."""
    gone = set(chosen) | {pod.key for pod in scope}
    if not trial.fits(gone):
        return None
    last_to_go = scope[::-1]
    for pod in sorted(last_to_go, key=lambda pod: sum(trial.slots(pod.key).values())):
        if trial.fits(gone - {pod.key}):
            gone.remove(pod.key)
    return [pod for pod in scope if pod.key in gone]


def _worth(gone: Sequence[Evictable]) -> tuple[int, Sequence[int], Sequence[str]]:
    """Less is better."""
    return len(gone), sorted((pod.priority for pod in gone), reverse=True), [pod.key for pod in gone]


def _first_to_go(pod: Evictable) -> tuple[int, tuple[int, ...], str]:
    """Sorts by priority, then the younger first; those that have not started are the youngest."""
    return pod.priority, tuple(-ord(character) for character in pod.started or "~"), pod.key
