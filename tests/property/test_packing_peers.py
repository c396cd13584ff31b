"""The peers' costs against their definitions, written out node by node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.peers import BestFit, DotProd, Fgd, Packing, Spread, peer
from meshctl.core.packing.scoring import Floats, Item, Scorer, Table, Want
from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Node, Policy

SLOTS = 10


@dataclass(frozen=True)
class Kind:
    """A pod: CPU, and so many GPUs with so many slots each."""

    cpu_milli: int
    gpus: int
    slots: int

    @property
    def want(self) -> Want:
        return Want(self.cpu_milli, 0, tuple(Item("r", self.slots, (at,)) for at in range(self.gpus)), None)


@dataclass(frozen=True)
class State:
    """A node: CPU and the slots that are free of each GPU."""

    cpu_milli: int
    free: tuple[int, ...]

    def takes(self, kind: Kind) -> bool:
        return self.cpu_milli >= kind.cpu_milli and sum(free >= kind.slots for free in self.free) >= kind.gpus


cpus = st.integers(0, 8).map(lambda cores: 1000 * cores)
shares = st.builds(Kind, cpus, st.just(1), st.integers(1, SLOTS))
several = st.builds(Kind, cpus, st.integers(2, 4), st.just(SLOTS))
kinds = st.one_of(st.builds(Kind, cpus, st.just(0), st.just(0)), shares, several)
states = st.builds(State, cpus, st.lists(st.integers(0, SLOTS), min_size=1, max_size=4).map(tuple))


def table(nodes: Sequence[State]) -> Table:
    width = max(len(node.free) for node in nodes)
    found = Table(len(nodes), width)
    found.names = [f"n{row}" for row in range(len(nodes))]
    found.products = ["T4"]
    for row, node in enumerate(nodes):
        found.cpu_free[row] = node.cpu_milli
        found.cpu_total[row] = 8000
        found.room[row, : len(node.free)] = node.free
        found.slots[row, : len(node.free)] = SLOTS
        found.gpus_free[row] = sum(node.free) / SLOTS
    return found


def costs(scorer: Scorer, kind: Kind, nodes: Sequence[State]) -> Floats:
    return scorer.cost(kind.want, table(nodes), np.arange(len(nodes)))


def fragments(node: State, workload: Sequence[Kind]) -> float:
    """GPUs that a pod drawn from `workload` can't use on the node, on the mean."""
    lost = 0.0
    for kind in workload:
        if kind.gpus and node.takes(kind):
            lost += sum(free for free in node.free if free < kind.slots) / SLOTS
        else:
            lost += sum(node.free) / SLOTS
    return lost / len(workload)


def less(node: State, kind: Kind, column: int | None) -> State:
    """The node with the pod on it: on the GPU `column`, or on whole ones."""
    free = list(node.free)
    whole = [at for at, slots in enumerate(free) if slots >= kind.slots]
    for at in whole[: kind.gpus] if column is None else [column]:
        free[at] -= kind.slots
    return State(node.cpu_milli - kind.cpu_milli, tuple(free))


@given(st.lists(kinds, min_size=1, max_size=12), kinds, st.lists(states, min_size=1, max_size=4))
def test_fgd_costs_what_its_definition_says(workload: list[Kind], kind: Kind, nodes: list[State]) -> None:
    """The growth of expected fragments, through a sigmoid, in whole hundredths: a second method, without tables."""
    fgd = Fgd()
    for pod in workload:
        fgd.learn(pod.want, [pod.slots / SLOTS] * pod.gpus)
    nodes = [node for node in nodes if node.takes(kind)]
    if not nodes:
        return
    found = costs(fgd, kind, nodes)
    for row, node in enumerate(nodes):
        places = [at for at, free in enumerate(node.free) if free >= kind.slots] if kind.gpus == 1 else [None]
        for at in places:
            growth = fragments(less(node, kind, at), workload) - fragments(node, workload)
            score = 100 / (1 + math.exp(growth))
            assert -found[row, at or 0] in {math.floor(score + 1e-6), math.floor(score - 1e-6)}


@given(st.sampled_from([BestFit, DotProd, Packing, Spread, Fgd]), kinds, st.lists(states, min_size=2, max_size=5))
def test_a_nodes_cost_is_its_own(policy: type[Scorer], kind: Kind, nodes: list[State]) -> None:
    """Asked for alone or together with others, in any order: the fleet keeps costs by node."""
    together = costs(policy(), kind, nodes)
    backwards = costs(policy(), kind, nodes[::-1])[::-1]
    assert np.array_equal(together, backwards)
    for row, node in enumerate(nodes):
        alone = costs(policy(), kind, [node])[0]
        assert np.array_equal(together[row, : len(alone)], alone)


@given(shares, states)
def test_the_tightest_gpu_of_a_node_is_taken(kind: Kind, node: State) -> None:
    """By best fit, dot product and packing; by Spread the emptiest."""
    fits = [at for at, free in enumerate(node.free) if free >= kind.slots]
    if not fits:
        return
    for policy in (BestFit(), DotProd(), Packing()):
        found = costs(policy, kind, [node])[0]
        assert min(fits, key=lambda at: (found[at], at)) == min(fits, key=lambda at: (node.free[at], at))
    found = costs(Spread(), kind, [node])[0]
    assert min(fits, key=lambda at: (found[at], at)) == max(fits, key=lambda at: (node.free[at], -at))


WHOLE, HALF, NONE = Kind(4000, 1, 10), Kind(4000, 1, 5), Kind(4000, 0, 0)


@pytest.mark.parametrize(
    ("policy", "kind", "best", "worse"),
    [
        # 1 - ((8000 - 4000) / 128000 + 1 / 8) / 2: the less is left, the better
        (BestFit(), WHOLE, State(8000, (10, 10)), State(64000, (10, 10))),
        (BestFit(), WHOLE, State(64000, (10, 10)), State(64000, (10,) * 4)),
        (DotProd(), WHOLE, State(64000, (10, 10)), State(64000, (10,) * 8)),
        (Packing(), HALF, State(8000, (5, 10)), State(8000, (3, 10))),
        (Packing(), HALF, State(8000, (3, 10)), State(8000, (10, 10))),
        (Packing(), WHOLE, State(8000, (3, 10)), State(8000, (10, 10))),
        (Packing(), WHOLE, State(8000, (10, 10)), State(8000, (10,) * 4)),
        (Spread(), HALF, State(8000, (10, 10)), State(8000, (5, 10))),
        (Spread(), NONE, State(8000, (10, 10)), State(5000, (10, 10))),
    ],
)
def test_each_peer_prefers_what_it_stands_for(policy: Scorer, kind: Kind, best: State, worse: State) -> None:
    """Little left; unlike the demand; used before idle, small before large; empty."""
    found = costs(policy, kind, [worse, best]).min(axis=1)
    assert found[1] < found[0]


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.STRANDING])
def test_a_fleet_chooses_by_every_peer(policy: Policy) -> None:
    """What they choose fits, several GPUs are distinct ones, and asking changes nothing."""
    fleet = Fleet(policy, seed=7)
    for number in range(3):
        name = f"n{number}"
        fleet.put(Node(name, 8000, 8000, tuple(Device(f"{name}-{gpu}", SLOTS, "T4") for gpu in range(2))))
    fleet.charge("other", Charge("n0", 1000, 1000, {"n0-0": 5}))
    demand = Demand(1000, 1000, (Ask("a", SLOTS), Ask("b", SLOTS)))
    fleet.observe(demand)
    chosen = fleet.choose(demand).placement
    assert chosen is not None
    assert chosen.node != "n0"
    assert chosen.charge(demand).gpus == {f"{chosen.node}-0": SLOTS, f"{chosen.node}-1": SLOTS}
    assert set(fleet.charges) == {"other"}


def test_fgd_gives_models_that_pods_insist_on_to_them() -> None:
    """A GPU that half the workload may not use is worth less to it: who does not mind goes there."""
    fleet = Fleet(Policy.FGD)
    for number, product in enumerate(("A", "B")):
        fleet.put(Node(f"n{number}", 8000, 8000, (Device(f"g{number}", SLOTS, product),)))
    picky, easy = Demand(1000, 0, (Ask("a", 5),), frozenset({"A"})), Demand(1000, 0, (Ask("a", 5),))
    for _ in range(4):
        fleet.observe(picky)
    chosen = fleet.choose(easy).placement
    assert chosen is not None
    assert chosen.node == "n1"


def test_gpus_without_memory_are_fragments_to_fgd() -> None:
    """A pod goes where the memory that it takes is not what others need for the GPU."""
    fleet = Fleet(Policy.FGD)
    fleet.put(Node("scarce", 8000, 1000, (Device("g0", SLOTS), Device("g1", SLOTS))))
    fleet.put(Node("spare", 8000, 9000, (Device("g2", SLOTS), Device("g3", SLOTS))))
    demand = Demand(1000, 600, (Ask("a", SLOTS),))
    for _ in range(4):
        fleet.observe(demand)
    chosen = fleet.choose(demand).placement
    assert chosen is not None
    assert chosen.node == "spare"


def test_random_draws_anew_for_every_pod_and_the_same_for_the_same_seed() -> None:
    """Over twenty pods it takes more than one of ten equal nodes; twice the same with one seed."""

    def chosen(seed: int) -> list[str]:
        scorer = peer(Policy.RANDOM, seed)
        nodes, names = [State(8000, (SLOTS,))] * 10, []
        for _ in range(20):
            scorer.learn(HALF.want, [0.5])
            names.append(f"n{int(costs(scorer, HALF, nodes).min(axis=1).argmin())}")
        return names

    assert len(set(chosen(1))) > 3
    assert chosen(1) == chosen(1) != chosen(2)


def test_random_answers_the_same_question_alike() -> None:
    """What is chosen is what fits there, and asking again changes nothing, until the next pod arrives."""
    fleet = Fleet(Policy.RANDOM, seed=3)
    for name in "abcd":
        fleet.put(Node(name, 8000, 8000, tuple(Device(f"{name}{gpu}", SLOTS) for gpu in range(4))))
    demand = Demand(asks=(Ask("a", 5),))
    for _ in range(10):
        fleet.observe(demand)
        chosen = fleet.choose(demand).placement
        assert chosen is not None
        assert chosen == fleet.fit(demand, chosen.node)
        fleet.charge("other", Charge("a" if chosen.node != "a" else "b", 1000))
        assert chosen == fleet.choose(demand).placement
