"""Preemption on physical GPUs, against all subsets of the pods that may go."""

from __future__ import annotations

from itertools import chain, combinations
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.preempt import Evictable, victims
from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Node

SLOTS, GPUS, PRIORITY = 4, 3, 2


class Pod(NamedTuple):
    gpu: int
    slots: int
    priority: int


pods = st.lists(
    st.builds(Pod, st.integers(0, GPUS - 1), st.integers(1, SLOTS), st.integers(0, PRIORITY)), min_size=1, max_size=7
)


def fleet(there: dict[str, Pod]) -> Fleet:
    found = Fleet()
    found.put(Node("n", 64_000, 64_000, tuple(Device(f"g{gpu}", SLOTS) for gpu in range(GPUS))))
    for key, pod in there.items():
        found.charge(key, Charge("n", gpus={f"g{pod.gpu}": pod.slots}))
    return found


def best(there: dict[str, Pod], chosen: str, slots: int) -> tuple[int, int] | None:
    """The lowest highest priority and then the fewest that go besides `chosen`; None when nobody's going helps."""
    lower = sorted(key for key, pod in there.items() if key != chosen and pod.priority < PRIORITY)
    subsets = chain.from_iterable(combinations(lower, count) for count in range(len(lower) + 1))
    enough = [subset for subset in subsets if _fits(there, {chosen, *subset}, slots)]
    return min(((_highest(there, subset), len(subset)) for subset in enough), default=None)


def _fits(there: dict[str, Pod], gone: set[str], slots: int) -> bool:
    left = [SLOTS] * GPUS
    for key, pod in there.items():
        left[pod.gpu] -= 0 if key in gone else pod.slots
    return max(left) >= slots


def _highest(there: dict[str, Pod], keys: tuple[str, ...]) -> int:
    return max((there[key].priority for key in keys), default=-1)


@given(given_pods=pods, slots=st.integers(1, SLOTS))
def test_no_other_victims_would_be_less_important_or_fewer(given_pods: list[Pod], slots: int) -> None:
    """For a pod with slots of one GPU; and the fleet is as it was."""
    there: dict[str, Pod] = {}
    left = [SLOTS] * GPUS
    for number, pod in enumerate(given_pods):  # no GPU has more pods than it can
        if pod.slots <= left[pod.gpu]:
            left[pod.gpu] -= pod.slots
            there[f"p{number}"] = pod
    chosen = min(there)
    full = fleet(there)
    before = dict(full.charges)
    evictable = [Evictable(key, pod.priority) for key, pod in there.items()]
    found = victims(full, Demand(asks=(Ask("c", slots),)), "n", PRIORITY, [chosen], evictable)
    assert dict(full.charges) == before
    expected = best(there, chosen, slots)
    if found is None or expected is None:
        assert found is None
        assert expected is None
        return
    others = tuple(key for key in found if key != chosen)
    assert (chosen in found, _fits(there, set(found), slots)) == (True, True)
    assert (_highest(there, others), len(others)) == expected
    assert [there[key].priority for key in found] == sorted((there[key].priority for key in found), reverse=True)
