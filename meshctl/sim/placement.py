"""The placement experiments: a trace's pods arrive at an empty cluster, and what a policy makes of the cluster's GPUs.

`fill` is the experiment of "Beware of Fragmentation" (USENIX ATC '23): the trace shuffled, then drawn uniformly with
replacement until a share of the GPU capacity has been asked for; nothing departs; a pod is placed at once or lost.
`churn` has departures: Poisson arrivals drawn from the trace, exponential lifetimes, an offered load; lost likewise.

Pure but for the seed and the clock that times decisions: the same arguments give the same placements, and every policy
meets the same pods in the same order, with the same lifetimes, so that two policies' difference is not the draw's.
Shares are of asked GPU (milli), not of slots: a policy gains nothing by how finely GPUs are cut.

FGD is given the trace's mix beforehand, as in its paper; what learns from arrivals learns from arrivals.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Decision, Demand, Policy, Reason
from meshctl.sim.openb import Pod, Trace

Clock = Callable[[], float]
"""Seconds, from whenever."""
STEP_PERCENT = 10
FULL_PERCENT = 100
LIFETIME = 1.0
"""Mean lifetime of a pod: the unit of time of `churn`."""
WARM_UP, MEASURED = 4.0, 4.0
"""Lifetimes. After four, 98 % of the pods that filled the empty cluster are gone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy made of one draw."""

    allocated: Mapping[int, float]
    """Arrived, per cent of the GPU capacity -> allocated share of it, 0..1."""
    rejected: Mapping[str, int]
    """Reason -> pods lost; of a pod's reasons, a node each, the most frequent counts."""
    decision_s: NDArray[np.float64]
    """How long each decision took, placing included; (decisions,)."""


@dataclass(slots=True)
class _Cluster:
    """A fleet under one policy, and what it cost to ask it."""

    fleet: Fleet
    clock: Clock
    rejected: Counter[str] = field(default_factory=Counter)
    decision_s: list[float] = field(default_factory=list)

    def place(self, key: str, demand: Demand) -> bool:
        """Whether the pod was placed. Timed is what an extender does for it, without the reasons of a refusal."""
        began_s = self.clock()
        self.fleet.observe(demand)
        decision = self.fleet.choose(demand)
        if decision.placement is not None:
            self.fleet.charge(key, decision.placement.charge(demand))
        self.decision_s.append(self.clock() - began_s)
        if decision.placement is None:
            self.rejected[main_reason(decision)] += 1
        return decision.placement is not None

    def outcome(self, allocated: Mapping[int, float]) -> Outcome:
        return Outcome(allocated, dict(sorted(self.rejected.items())), np.array(self.decision_s))


def fill(trace: Trace, policy: Policy, seed: int, arrivals: float, clock: Clock) -> Outcome:
    """Nothing departs. `arrivals`: asked for in the end, as a ratio of the GPU capacity, 1.3 in the paper."""
    cluster = _cluster(trace, policy, seed, clock)
    arrived = allocated = 0
    points: list[tuple[int, int]] = []
    for number, pod in enumerate(_drawn(trace, seed, arrivals)):
        arrived += pod.gpu_milli
        if cluster.place(str(number), pod.demand):
            allocated += pod.gpu_milli
        points.append((arrived, allocated))
    return cluster.outcome(_by_percent(np.array(points) / trace.gpu_milli, arrivals))


def churn(trace: Trace, policy: Policy, seed: int, load: float, clock: Clock) -> Outcome:
    """Pods depart. `load`: GPUs asked for at any time if none were lost, as a ratio of the capacity.

    `Outcome.allocated` has one entry: the share allocated on average over `MEASURED` lifetimes after `WARM_UP`.
    """
    cluster = _cluster(trace, policy, seed, clock)
    random = np.random.default_rng(seed)
    asked_milli = np.array([pod.gpu_milli for pod in trace.pods])
    rate = load * trace.gpu_milli / (float(asked_milli.mean()) * LIFETIME)
    end = (WARM_UP + MEASURED) * LIFETIME
    count = int(random.poisson(rate * end))
    arrivals = np.sort(random.uniform(0.0, end, count))
    leaves = arrivals + random.exponential(LIFETIME, count)
    drawn = random.integers(len(trace.pods), size=count)
    departures: list[tuple[float, int]] = []
    present = 0.0
    for number in range(count):
        while departures and departures[0][0] <= arrivals[number]:
            cluster.fleet.release(str(heapq.heappop(departures)[1]))
        pod = trace.pods[drawn[number]]
        if cluster.place(str(number), pod.demand):
            heapq.heappush(departures, (leaves[number], number))
            present += pod.gpu_milli * max(0.0, min(leaves[number], end) - max(arrivals[number], WARM_UP * LIFETIME))
    share = float(present / (MEASURED * LIFETIME * trace.gpu_milli))
    return cluster.outcome({round(FULL_PERCENT * load): share})


def main_reason(decision: Decision) -> str:
    """What most nodes refused the pod for; of equals, the first by name."""
    refusals = decision.refused.values()
    said = {
        refusal.message: refusal.reason for refusal in refusals
    }  # words: an enum's hash is Python, 1200 times a pod
    counts = Counter[Reason]()
    for words, count in Counter(refusal.message for refusal in refusals).items():
        counts[said[words]] += count
    return min(counts, key=lambda reason: (-counts[reason], reason)).value if counts else "NoNodes"


def _cluster(trace: Trace, policy: Policy, seed: int, clock: Clock) -> _Cluster:
    fleet = Fleet(policy, seed=seed)
    for node in trace.nodes:
        fleet.put(node)
    if policy is Policy.FGD:
        for pod in trace.pods:
            fleet.observe(pod.demand)
    return _Cluster(fleet, clock)


def _drawn(trace: Trace, seed: int, arrivals: float) -> Iterator[Pod]:
    """The trace in a random order, then pods drawn with replacement, until `arrivals` of the capacity is asked for."""
    random = np.random.default_rng(seed)
    missing_milli = arrivals * trace.gpu_milli
    order = random.permutation(len(trace.pods))
    while missing_milli > 0:
        for index in order:
            yield trace.pods[index]
            missing_milli -= trace.pods[index].gpu_milli
            if missing_milli <= 0:
                return
        order = random.integers(len(trace.pods), size=len(trace.pods))


def _by_percent(shares: NDArray[np.float64], arrivals: float) -> dict[int, float]:
    """`shares` (events, 2): arrived and allocated after each. Mean of the events whose arrived share rounds to each
    per cent asked about; where there are none, a small cluster's, what was allocated when it was passed."""
    rounded = np.round(FULL_PERCENT * shares[:, 0])
    last = round(FULL_PERCENT * arrivals)
    percents = sorted({*range(FULL_PERCENT, last + 1, STEP_PERCENT), last})
    found = {}
    for percent in percents:
        there = shares[rounded == percent, 1]
        before = shares[rounded <= percent, 1]
        found[percent] = float(there.mean() if len(there) else before[-1] if len(before) else 0.0)
    return found
