"""Who must go so that a pod fits on a node's physical GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.preempt import Evictable, victims
from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Node

HIGH = 1000


def demand(slots: int, *more: int, cpu_milli: int = 0) -> Demand:
    asks = tuple(Ask(f"c{number}", count) for number, count in enumerate((slots, *more)))
    return Demand(cpu_milli=cpu_milli, asks=asks, namespace="team")


def fleet(charges: Mapping[str, Mapping[str, int]], *, gpus: int = 2, cpu_milli: int = 64_000) -> Fleet:
    """Node n: GPUs g0, g1 ... of 10 slots; a pod of 1000 millicores for each of `charges`."""
    found = Fleet()
    found.put(Node("n", cpu_milli, 64_000, tuple(Device(f"g{number}", 10) for number in range(gpus))))
    for key, taken in charges.items():
        found.charge(key, Charge("n", 1000, 1000, taken, "team"))
    return found


def gone(*asked: Any) -> str | None:
    """Who goes, in alphabetical order."""
    found = victims(*asked)
    return None if found is None else " ".join(sorted(found))


def pods(**priorities: int) -> list[Evictable]:
    return [Evictable(key, priority) for key, priority in priorities.items()]


def test_the_schedulers_victims_are_enough_when_they_free_one_gpu() -> None:
    """Nobody else goes."""
    full = fleet({"a": {"g0": 10}, "b": {"g1": 10}})
    assert gone(full, demand(6), "n", HIGH, ["a"], pods(a=0, b=0)) == "a"


def test_slots_on_two_gpus_are_not_enough() -> None:
    """5 + 5 free slots are the scheduler's 10; on one GPU somebody else has to go as well."""
    full = fleet({"a": {"g0": 5}, "b": {"g0": 5}, "c": {"g1": 5}, "d": {"g1": 5}})
    assert gone(full, demand(10), "n", HIGH, ["a", "c"], pods(a=3, b=2, c=1, d=1)) == "a c d"


def test_nobody_of_equal_or_higher_priority_goes() -> None:
    """Not even where nobody else is left: then the node does not help."""
    full = fleet({"a": {"g0": 5}, "b": {"g0": 5}, "c": {"g1": 5}, "d": {"g1": 5}})
    asked = full, demand(10), "n", HIGH, ["a", "c"]
    assert gone(*asked, pods(a=0, b=HIGH, c=0, d=HIGH + 1)) is None
    assert gone(*asked, pods(a=0, b=HIGH - 1, c=0, d=HIGH)) == "a b c"


def test_the_most_important_victim_comes_first() -> None:
    """The scheduler compares nodes by it, and takes it for the first."""
    full = fleet({"a": {"g0": 5}, "b": {"g0": 5}, "c": {"g1": 5}, "d": {"g1": 5}})
    priorities = pods(a=1, b=3, c=2, d=5)
    assert victims(full, demand(10), "n", HIGH, ["a", "c"], priorities) == ("b", "c", "a")


def test_lower_priorities_go_before_fewer_pods() -> None:
    """As the scheduler compares nodes: the highest priority that has to go comes first."""
    full = fleet({"a": {"g0": 1}, "big": {"g0": 9}, "x": {"g1": 5}, "y": {"g1": 4}, "v": {"g1": 1}})
    asked = full, demand(10), "n", HIGH, ["a", "v"]
    assert gone(*asked, pods(a=0, v=0, big=5, x=1, y=1)) == "a v x y"
    assert gone(*asked, pods(a=0, v=0, big=1, x=1, y=1)) == "a big v"


def test_few_with_many_slots_go_before_many_with_few() -> None:
    """Of one GPU: 4 slots are needed, one pod has them."""
    full = fleet({"v": {"g1": 1}, "a": {"g0": 2}, "b": {"g0": 2}, "c": {"g0": 4}, "d": {"g0": 2}}, gpus=2)
    full.hold("g1", 9)
    assert gone(full, demand(4), "n", HIGH, ["v"], pods(v=0, a=0, b=0, c=0, d=0)) == "c v"


def test_of_equals_the_younger_goes() -> None:
    """It has the least to lose; who has not started has nothing."""
    full = fleet({"v": {"g1": 1}, "old": {"g0": 5}, "young": {"g0": 5}})
    full.hold("g1", 9)
    old = Evictable("old", 0, "2026-01-01T00:00:00Z")
    started = [Evictable("v", 0), old, Evictable("young", 0, "2026-01-02T00:00:00Z")]
    assert gone(full, demand(5), "n", HIGH, ["v"], started) == "v young"
    new = [Evictable("v", 0), old, Evictable("young", 0)]
    assert gone(full, demand(5), "n", HIGH, ["v"], new) == "v young"


def test_slots_that_nobody_known_uses_stay_used() -> None:
    """To evict everybody frees 9 of 10."""
    full = fleet({"a": {"g0": 9}}, gpus=1)
    full.hold("g0", 1)
    assert gone(full, demand(10), "n", HIGH, ["a"], pods(a=0)) is None
    assert gone(full, demand(9), "n", HIGH, ["a"], pods(a=0)) == "a"


def test_slots_that_are_used_beyond_what_there_are_stay_used() -> None:
    """A GPU whose slots are charged and held twice over is not free when those who are charged have gone."""
    full = fleet({"a": {"g0": 10}}, gpus=1)
    full.hold("g0", 2)
    assert gone(full, demand(9), "n", HIGH, ["a"], pods(a=0)) is None
    assert gone(full, demand(8), "n", HIGH, ["a"], pods(a=0)) == "a"


def test_two_whole_gpus_take_the_pods_of_two() -> None:
    """Those two that the fewest have to leave."""
    charges = {"a": {"g0": 10}, "b": {"g1": 5}, "c": {"g1": 5}, "d": {"g2": 10}}
    full = fleet(charges, gpus=3)
    assert gone(full, demand(10, 10), "n", HIGH, ["a"], pods(a=0, b=0, c=0, d=0)) == "a d"


def test_cpu_is_freed_too() -> None:
    """A pod without a GPU may hold the CPU that is missing."""
    full = fleet({"a": {"g0": 10}, "idle": {}}, gpus=1, cpu_milli=2000)
    assert gone(full, demand(10, cpu_milli=2000), "n", HIGH, ["a"], pods(a=0, idle=0)) == "a idle"


def test_a_node_without_victims_or_unknown_is_no_candidate() -> None:
    """The scheduler takes an empty list for an error."""
    full = fleet({"a": {"g0": 5}})
    assert gone(full, demand(5), "n", HIGH, [], pods(a=0)) is None
    assert gone(full, demand(5), "elsewhere", HIGH, ["a"], pods(a=0)) is None


def test_a_victim_that_is_not_known_here_stays_one() -> None:
    """The scheduler saw it on the node before we did; what it frees does not count."""
    full = fleet({"a": {"g0": 10}}, gpus=1)
    assert gone(full, demand(10), "n", HIGH, ["new"], pods(a=0)) == "a new"


def test_the_fleet_is_left_as_it_was() -> None:
    """Nobody is evicted by a question."""
    full = fleet({"a": {"g0": 5}, "b": {"g0": 5}, "c": {"g1": 5}, "d": {"g1": 5}})
    before = dict(full.charges)
    victims(full, demand(10), "n", HIGH, ["a", "c"], pods(a=0, b=0, c=0, d=0))
    assert dict(full.charges) == before
    assert (full.free("g0"), full.free("g1")) == (0, 0)
