"""The default policy: where the least GPU becomes useless."""

import numpy as np
import pytest

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.prices import LEVELS
from meshctl.core.packing.scoring import Want
from meshctl.core.packing.stranding import Stranding, _level
from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Node

_MEMORY = 10**6
_WANT = Want(1000, 1, (), None)


def _node(name: str, gpus: int, cpu_milli: int = 96_000, slots: int = 100) -> Node:
    return Node(name, cpu_milli, _MEMORY, tuple(Device(f"{name}-{index}", slots) for index in range(gpus)))


def _share(slots: int, cpu_milli: int = 1000) -> Demand:
    return Demand(cpu_milli, 1, (Ask("main", slots),))


def _fleet(*nodes: Node, used: dict[str, int] | None = None) -> Fleet:
    """With so many slots of GPUs taken."""
    fleet = Fleet()
    for node in nodes:
        fleet.put(node)
    for uuid, slots in (used or {}).items():
        fleet.charge(f"on {uuid}", Charge(uuid.rsplit("-", 1)[0], 0, 0, {uuid: slots}))
    return fleet


def _chosen(fleet: Fleet, demand: Demand) -> str:
    """The only GPU of the place; the node for a pod of no or several GPUs."""
    placement = fleet.choose(demand).placement
    assert placement is not None
    gpus = sorted({uuid for given in placement.gpus.values() for uuid in given})
    return gpus[0] if len(gpus) == 1 else placement.node


def _learned(fleet: Fleet, *demands: Demand, times: int = 64) -> Fleet:
    for _ in range(times):
        for demand in demands:
            fleet.observe(demand)
    return fleet


def test_tightest_gpu_before_anybody_has_arrived() -> None:
    """Nothing learned: best fit."""
    fleet = _fleet(_node("a", 3), used={"a-0": 20, "a-1": 60, "a-2": 40})
    assert _chosen(fleet, _share(30)) == "a-1"


def test_a_share_leaves_pieces_to_those_who_fill_them() -> None:
    """0.32 into 0.53 would leave 0.21 for nobody, and 0.47 is to come: an untouched GPU is cheaper, 0.65 comes too."""
    others = (_share(47), _share(65), _share(32))
    fleet = _fleet(_node("a", 8), _node("b", 8), used={"a-0": 47})
    assert _chosen(fleet, _share(32)) == "a-0"
    _learned(fleet, *others)
    assert _chosen(fleet, _share(47)) == "a-0"
    assert _chosen(fleet, _share(32)) != "a-0"


def test_a_share_takes_a_piece_that_nobody_else_fills() -> None:
    """The same place is right for the same share once nobody asks for 0.47."""
    fleet = _learned(_fleet(_node("a", 8), used={"a-0": 47}), _share(32))
    assert _chosen(fleet, _share(32)) == "a-0"


def test_gpus_cut_finer_cost_the_same() -> None:
    """10 slots or 100: hundredths of a GPU count. Three tenths go where they fill the GPU, whatever its slots are."""
    nodes = Node("a", 96_000, _MEMORY, (Device("a-0", 10, resource="x"), Device("a-1", 10, resource="x")))
    fleet = _fleet(nodes, _node("b", 2), used={"a-0": 7, "b-0": 60})
    _learned(fleet, Demand(1000, 1, (Ask("main", 3, "x"),)), _share(30))
    assert _chosen(fleet, Demand(1000, 1, (Ask("main", 3, "x"),))) == "a-0"
    assert fleet.choose(_share(30)).placement is not None


@pytest.mark.parametrize("slots", [1, 3, 7, 10, 64, 100, 128, 1000])
def test_levels_are_hundredths_from_none_to_all(slots: int) -> None:
    """Rounded, rising, 0 for nothing and 100 for all."""
    levels = _level(np.arange(slots + 1), slots)
    assert levels[0] == 0
    assert levels[-1] == LEVELS
    assert np.all(np.diff(levels) >= 0)


def test_cpu_goes_where_gpus_do_not_miss_it() -> None:
    """A pod without GPU takes CPU from the node that has more than its GPUs need."""
    fleet = _fleet(_node("a", 8, 88_000), _node("b", 2, 88_000))
    _learned(fleet, _share(100, 11_000))
    assert _chosen(fleet, Demand(20_000, 1)) == "b"


def test_a_pod_light_of_cpu_goes_where_cpu_is_short() -> None:
    """GPUs that nobody else could use cost nothing."""
    fleet = _fleet(_node("a", 2, 22_000), _node("b", 2, 8_000))
    _learned(fleet, _share(100, 11_000))
    assert _chosen(fleet, _share(100, 2_000)).startswith("b")


def test_pods_without_gpu_do_not_count_in_what_a_gpu_needs() -> None:
    """They ask for CPU of any node: no GPU is stranded on their account."""
    fleet = _learned(_fleet(_node("a", 8, 88_000)), _share(100, 11_000))
    before = fleet.stranded()
    assert before == {"a": pytest.approx(0.0)}
    assert _learned(fleet, Demand(64_000, 1), times=1000).stranded() == before


def test_a_whole_gpu_is_taken_beside_others_so_that_nodes_stay_whole() -> None:
    """A pod of eight GPUs finds a node, though ones came before it."""
    fleet = _learned(_fleet(_node("a", 8), _node("b", 8)), _share(100, 9_000))
    fleet.charge("one", Charge("b", 9_000, 1, {"b-0": 100}))
    assert _chosen(fleet, _share(100, 9_000)) == "b-1"
    eight = Demand(64_000, 1, tuple(Ask(f"c{index}", 100) for index in range(8)))
    assert _chosen(fleet, eight) == "a"


def test_the_last_places_for_pods_of_eight_are_not_broken() -> None:
    """CPU is lost rather than the only node of eight untouched GPUs, when pods of eight come; else CPU is kept."""
    eight = Demand(64_000, 1, tuple(Ask(f"c{index}", 100) for index in range(8)))
    heavy, usual = _share(100, 14_000), _share(100, 10_000)
    used = {"b-0": 100, "b-1": 100}
    nodes = _node("a", 8, 120_000), _node("b", 8, 60_000)
    assert _chosen(_learned(_fleet(*nodes, used=used), usual), heavy) == "a-0"
    assert _chosen(_learned(_fleet(*nodes, used=used), usual, eight), heavy) == "b-2"


def test_places_that_are_many_may_be_broken() -> None:
    """With nodes enough for the pods of eight that will come, nothing is kept for them."""
    eight = Demand(64_000, 1, tuple(Ask(f"c{index}", 100) for index in range(8)))
    heavy, usual = _share(100, 14_000), _share(100, 10_000)
    nodes = [_node("b", 8, 60_000), *(_node(f"a{index:02}", 8, 120_000) for index in range(40))]
    fleet = _fleet(*nodes, used={"b-0": 100, "b-1": 100})
    _learned(fleet, eight, times=1)
    assert _chosen(_learned(fleet, usual, times=255), heavy) == "a00-0"


def test_costs_are_asked_for_again_now_and_then_only() -> None:
    """What was learned comes into use at the first arrivals, each time twice as many, then every 256."""
    policy = Stranding()
    epochs = [policy.epoch]
    for _ in range(1024):
        policy.learn(_WANT, [0.5])
        epochs.append(policy.epoch)
    changes = [arrivals for arrivals in range(1, 1025) if epochs[arrivals] != epochs[arrivals - 1]]
    assert changes == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024]


def test_pods_without_gpu_teach_nothing() -> None:
    """No GPU asked for: no change, and no division by it."""
    policy = Stranding()
    policy.learn(_WANT, [])
    assert policy.epoch == 0
