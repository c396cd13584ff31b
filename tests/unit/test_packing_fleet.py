"""What a fleet knows, whom it refuses in which words, and that it is the same however it came about."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.scoring import Floats, Ints, Table, Want
from meshctl.core.packing.state import State
from meshctl.core.packing.vocabulary import (
    Ask,
    Charge,
    Demand,
    Device,
    Node,
    Placement,
    Policy,
    Reason,
    Refusal,
)

GPU = "hpe.com/gpus"


def node(name: str, *devices: Device, cpu_milli: int = 8000, memory_mib: int = 1024) -> Node:
    return Node(name, cpu_milli, memory_mib, devices)


def gpus(name: str, count: int = 2, slots: int = 10, product: str = "") -> Node:
    return node(name, *(Device(f"{name}-{i}", slots, product) for i in range(count)))


def fleet(*nodes: Node) -> Fleet:
    made = Fleet()
    for one in nodes:
        made.put(one)
    return made


def share(slots: int, **more: Any) -> Demand:
    return Demand(asks=(Ask("server", slots),), **more)


# ------------------------------------------------------------------------------------------------------ what is known


def test_charges_and_what_is_held_are_taken_off() -> None:
    """A key's next charge replaces the last; a hold is replaced, too; free is never below 0."""
    made = fleet(gpus("n"))
    made.charge("a", Charge("n", gpus={"n-0": 3}, namespace="x"))
    made.charge("b", Charge("n", gpus={"n-0": 2, "n-1": 1}, namespace="y"))
    assert (made.free("n-0"), made.used_slots("n-0"), made.tenants("n-0")) == (5, 5, frozenset("xy"))
    assert made.charged("n") == {"a", "b"}
    made.charge("a", Charge("n", gpus={"n-1": 4}, namespace="x"))
    assert (made.free("n-0"), made.free("n-1"), made.tenants("n-0")) == (8, 5, frozenset("y"))
    made.hold("n-0", 9)
    assert (made.free("n-0"), made.used_slots("n-0")) == (0, 11)
    made.hold("n-0", 0)
    made.release("a")
    made.release("a")
    assert (made.free("n-0"), made.free("n-1"), [*made.charges]) == (8, 9, ["b"])


def test_a_node_that_comes_back_has_its_charges() -> None:
    """Also those that came, or went, while it was away."""
    made = fleet(gpus("n"))
    made.charge("a", Charge("n", 1000, gpus={"n-0": 3}))
    made.charge("b", Charge("n", 1000, gpus={"n-0": 4}))
    made.drop("n")
    assert (made.free("n-0"), made.used_slots("n-0"), dict(made.nodes)) == (0, 7, {})
    made.release("a")
    made.charge("c", Charge("n", 7000, gpus={"n-1": 1}))
    made.put(gpus("n"))
    assert (made.free("n-0"), made.free("n-1")) == (6, 9)
    assert isinstance(made.fit(share(6), "n"), Placement)
    assert made.fit(share(6, cpu_milli=1), "n") == Refusal(Reason.CPU, "too little CPU is free: 1m is asked for")


def test_a_node_may_change_its_gpus() -> None:
    """More of them, fewer slots, closed; charges stay, and answers follow."""
    made = fleet(gpus("n", 1), gpus("other", 1, 2))
    made.charge("a", Charge("n", gpus={"n-0": 8}))
    assert made.choose(share(3)).placement is None
    made.put(gpus("n", 3, 10))
    assert made.choose(share(3)).placement == Placement("n", {"server": {"n-1": 3}})
    made.put(gpus("n", 1, 4))
    assert (made.free("n-0"), made.used_slots("n-0")) == (0, 8)
    assert made.choose(share(3)).placement is None


def test_a_gpu_that_two_nodes_show_is_taken_on_both() -> None:
    """It was moved, and one of the two has not noticed yet."""
    made = fleet(node("n", Device("g", 4)), node("m", Device("g", 4)))
    made.charge("a", Charge("n", gpus={"g": 3}))
    assert {name: isinstance(made.fit(share(2), name), Refusal) for name in "nm"} == {"n": True, "m": True}
    made.drop("n")
    assert made.free("g") == 1
    made.release("a")
    assert made.choose(share(4)).placement == Placement("m", {"server": {"g": 4}})


def test_a_gpu_that_is_closed_in_ever_new_words_says_the_last() -> None:
    """And the words before are forgotten."""
    state = State()
    made = Fleet()
    for second in range(300):
        closed = node("n", Device("g", 4, closed=f"unhealthy for {second} s"))
        made.put(closed)
        answer = made.fit(share(1), "n")
        assert dict(made.choose(share(1)).refused) == {"n": answer}
        assert answer == Refusal(Reason.CLOSED, f"its GPUs take nobody new: unhealthy for {second} s")
        state.put(closed)
        state.settle()
        assert len(state.kinds) < 100


def test_many_nodes_are_refused_in_few_words() -> None:
    """An Event has 1024 characters, and the scheduler adds up equal words: of many nodes none tells its numbers."""
    made = fleet(*(gpus(f"n{number:02}", 4) for number in range(40)))
    for number in range(40):
        free = number % 10
        made.charge(f"p{number}", Charge(f"n{number:02}", gpus={f"n{number:02}-{gpu}": 10 - free for gpu in range(4)}))
    answers = dict(made.choose(share(10)).refused)
    assert {refusal.reason for refusal in answers.values()} == {Reason.NO_ROOM}
    assert {refusal.message for refusal in answers.values()} == {
        f"no GPU has 10 of {GPU} free, though the node has as many",
        f"no GPU has 10 of {GPU} free; the node has fewer in all",
    }
    assert all(made.fit(share(10), name) == refusal for name, refusal in answers.items())


def test_nobody_is_refused_cpu_that_he_does_not_ask_for() -> None:
    """As the scheduler has it: on a node with more taken than there is, a pod without requests is welcome."""
    made = fleet(gpus("n"))
    made.charge("a", Charge("n", 9000, 2000))
    assert isinstance(made.fit(share(1), "n"), Placement)
    assert isinstance(made.fit(Demand(cpu_milli=1), "n"), Refusal)
    assert isinstance(made.fit(Demand(memory_mib=1), "n"), Refusal)


def test_slots_in_use_by_nobody_known_keep_tenants_out() -> None:
    """They might be anybody's."""
    made = fleet(node("n", Device("g", 4, isolated=True)))
    made.charge("a", Charge("n", gpus={"g": 1}, namespace="x"))
    assert isinstance(made.fit(share(1, namespace="x"), "n"), Placement)
    made.hold("g", 1)
    answer = made.fit(share(1, namespace="x"), "n")
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.TENANT


def test_stranded_gpus_are_those_without_cpu() -> None:
    """Of what is free, by what pods ask for."""
    made = fleet(gpus("full", 4), gpus("idle", 4))
    for _ in range(100):
        made.observe(share(10, cpu_milli=2000))
    made.charge("cpu", Charge("full", 8000))
    assert made.stranded() == pytest.approx({"full": 4.0, "idle": 0.0}, abs=0.1)


# ------------------------------------------------------------------------------------------------------------ in words

REFUSALS: Sequence[tuple[Node, Demand, Refusal]] = (
    (node("n"), share(1), Refusal(Reason.NO_GPU, f"no GPU is shared as {GPU}")),
    (
        gpus("n", product="T4"),
        share(1, products=frozenset({"V100", "A10"})),
        Refusal(Reason.PRODUCT, "its GPUs are T4; asked for is A10 or V100"),
    ),
    (gpus("n", product="T4"), share(1, unfit={"T4": "900 ms"}), Refusal(Reason.TOO_SLOW, "T4: 900 ms")),
    (
        gpus("n"),
        share(11),
        Refusal(Reason.TOO_SMALL, f"no GPU has 11 of {GPU}, even empty: the most is 10 (of 20 in all)"),
    ),
    (
        gpus("n"),
        Demand(asks=tuple(Ask(name, 10) for name in "abc")),
        Refusal(
            Reason.TOO_SMALL,
            f"no room for 10 + 10 + 10 of {GPU}, each on one GPU, even empty: the most is 10 (of 20 in all)",
        ),
    ),
    (
        node("n", Device("g", 4, closed="unhealthy: Xid 79"), Device("h", 2)),
        share(3),
        Refusal(Reason.CLOSED, "its GPUs take nobody new: unhealthy: Xid 79"),
    ),
    (
        gpus("busy"),
        share(8),
        Refusal(Reason.NO_ROOM, f"no GPU has 8 of {GPU} free: the most is 7 (of 10 free in all)"),
    ),
    (
        gpus("busy"),
        Demand(asks=(Ask("a", 5), Ask("b", 4))),
        Refusal(Reason.NO_ROOM, f"no room for 5 + 4 of {GPU}, each on one GPU: the most is 7 (of 10 free in all)"),
    ),
    (gpus("n"), share(1, cpu_milli=9000), Refusal(Reason.CPU, "too little CPU is free: 9000m is asked for")),
    (gpus("n"), share(1, memory_mib=2048), Refusal(Reason.MEMORY, "too little memory is free: 2048 MiB is asked for")),
    (
        node("n", Device("busy-0", 10, isolated=True)),
        share(1, namespace="me"),
        Refusal(
            Reason.TENANT,
            f"no GPU has 1 of {GPU} free for this namespace, others have theirs for themselves: the most is 0",
        ),
    ),
)


@pytest.mark.parametrize(("node", "demand", "expected"), REFUSALS, ids=[refusal.reason for *_, refusal in REFUSALS])
def test_a_refusal_says_why_in_numbers(node: Node, demand: Demand, expected: Refusal) -> None:
    """The same by `fit` and by `choose`; the GPUs busy-0 and busy-1 have 7 and 3 slots free."""
    made = fleet(node)
    made.charge("a", Charge(node.name, gpus={"busy-0": 3}, namespace="other"))
    made.charge("b", Charge(node.name, gpus={"busy-1": 7}, namespace="other"))
    decision = made.choose(demand)
    assert (decision.placement, dict(decision.refused)) == (None, {node.name: expected})
    assert made.fit(demand, node.name) == expected


def test_resolvable_is_what_eviction_cures() -> None:
    """Of all reasons."""
    assert {reason for reason in Reason if reason.resolvable} == {
        Reason.TENANT,
        Reason.NO_ROOM,
        Reason.CPU,
        Reason.MEMORY,
    }


def test_only_the_nodes_asked_about_are_answered_for() -> None:
    """Those that are not known are refused as such; the chosen one is not refused."""
    made = fleet(*(gpus(f"n{i}") for i in range(4)))
    made.charge("a", Charge("n0", gpus={"n0-0": 6}))
    decision = made.choose(share(4), ["n3", "n1", "who?"])
    assert decision.placement == Placement("n1", {"server": {"n1-0": 4}})
    assert {name: refusal.reason for name, refusal in decision.refused.items()} == {
        "n3": Reason.WORSE,
        "who?": Reason.UNKNOWN_NODE,
    }
    assert made.choose(share(4)).placement == Placement("n0", {"server": {"n0-0": 4}})
    assert made.choose(share(4), []).placement is None
    assert dict(made.choose(share(4), ["who?"]).refused) == {"who?": made.fit(share(4), "who?")}


def test_names_in_another_order_are_the_same_question() -> None:
    """Also right after one another, and with some left out."""
    made = fleet(*(gpus(f"n{i}") for i in range(4)))
    names = [f"n{i}" for i in range(4)]
    for asked in (names, names, names[::-1], names[1:], names):
        decision = made.choose(share(4), asked)
        assert decision.placement is not None
        assert decision.placement.node == min(asked)
        assert decision.refused.keys() == {*asked} - {min(asked)}


def test_a_decision_says_why() -> None:
    """What is taken of which GPU; or how many nodes were refused for what."""
    made = fleet(gpus("n", 1), gpus("m", 1, 2), node("bare"))
    assert made.choose(share(4)).why == "4 of the 10 free slots of n-0"
    assert made.choose(share(11), ["n", "m", "bare", "who?"]).why == (
        "none of 4 nodes: 1 unknown, 1 without such a GPU, 2 with too small GPUs"
    )
    assert Fleet().choose(share(1)).why == "there are no nodes"


# ---------------------------------------------------------------------------------------------------------- the choice


def test_equal_places_go_by_name_whatever_came_first() -> None:
    """Nodes, then GPUs."""
    for seed in range(5):
        names = [f"n{i:02}" for i in range(12)]
        Random(seed).shuffle(names)  # noqa: S311 - an order
        made = fleet(*(node(name, Device(f"{name}-b", 10), Device(f"{name}-a", 10)) for name in names))
        assert made.choose(share(4)).placement == Placement("n00", {"server": {"n00-a": 4}})


def test_whole_gpus_of_one_pod_are_different_ones() -> None:
    """Of one node, though two nodes together have enough."""
    made = fleet(gpus("a", 2), gpus("b", 3))
    demand = Demand(asks=tuple(Ask(name, 10) for name in "xyz"))
    assert made.choose(demand).placement == Placement("b", {"x": {"b-0": 10}, "y": {"b-1": 10}, "z": {"b-2": 10}})


def test_containers_that_fit_only_one_way_are_placed_that_way() -> None:
    """First come, first served would put 3 beside 3 on the first GPU, and leave no room for the 4."""
    made = fleet(gpus("n", 2, 6))
    made.charge("a", Charge("n", gpus={"n-1": 1}))
    answer = made.fit(Demand(asks=(Ask("a", 3), Ask("b", 3), Ask("c", 4))), "n")
    assert answer == Placement("n", {"a": {"n-0": 3}, "b": {"n-0": 3}, "c": {"n-1": 4}})
    answer = made.fit(Demand(asks=(Ask("a", 3), Ask("b", 4), Ask("c", 3))), "n")
    assert answer == Placement("n", {"a": {"n-0": 3}, "b": {"n-1": 4}, "c": {"n-0": 3}})


def test_many_unequal_containers_that_do_not_fit_are_refused_at_once() -> None:
    """17 of more than half a GPU each, on 16 GPUs with room enough in sum: trying out would take for ever."""
    made = fleet(node("n", *(Device(f"g{i:02}", 100 - i) for i in range(16))))
    asks = tuple(Ask(f"c{i:02}", 51 + i) for i in range(17))
    answer = made.fit(Demand(asks=asks), "n")
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.TOO_SMALL
    assert isinstance(made.fit(Demand(asks=asks[:16]), "n"), Placement)


def test_a_container_may_ask_for_two_resources() -> None:
    """Each is of its own GPU."""
    made = fleet(node("n", Device("g", 10), Device("w", 1, resource="hpe.com/whole")))
    demand = Demand(asks=(Ask("c", 3), Ask("c", 1, "hpe.com/whole")))
    answer = made.fit(demand, "n")
    assert answer == Placement("n", {"c": {"g": 3, "w": 1}})
    assert isinstance(answer, Placement)
    assert answer.charge(demand).gpus == {"g": 3, "w": 1}


def test_a_sidecar_keeps_its_slots_while_init_containers_run() -> None:
    """init 4, sidecar 3 of them, init 4: one is left over, so seven in all."""
    demand = Demand(asks=(Ask("i", 4, init=True), Ask("s", 3), Ask("j", 4, init=True), Ask("c", 1)))
    for slots, fits in ((7, True), (6, False)):
        answer = fleet(gpus("n", 1, slots)).fit(demand, "n")
        assert isinstance(answer, Placement) == fits
        if isinstance(answer, Placement):
            assert answer.charge(demand).gpus == {"n-0": 7}


class Turning:
    """A policy that takes the last node by name, and after it has learned, the first."""

    epoch = 0
    spread = False

    def learn(self, want: Want, gpus: Sequence[float]) -> None:
        self.epoch += 1

    def cost(self, want: Want, table: Table, rows: Ints) -> Floats:
        sign = -1.0 if self.epoch == 0 else 1.0
        return np.asarray(sign * rows[:, None] + np.zeros_like(table.slots[rows]), np.float64)


def test_what_a_policy_learned_counts_for_demands_seen_before() -> None:
    """Their costs are asked for again."""
    made = Fleet(scorer=Turning())
    for name in "abc":
        made.put(gpus(name))
    first = made.choose(share(4)).placement
    made.observe(share(1))
    second = made.choose(share(4)).placement
    assert [first and first.node, second and second.node] == ["c", "a"]


def test_more_different_demands_than_are_kept_are_answered_alike() -> None:
    """What is kept of them has a limit of memory."""
    made = fleet(*(gpus(f"n{i:04}", 1) for i in range(2000)))
    demands = [share(1 + i % 10, cpu_milli=i) for i in range(500)]
    assert [made.choose(demand).placement for demand in demands] == [
        made.choose(demand).placement for demand in demands
    ]


@pytest.mark.parametrize("policy", Policy)
def test_every_policy_places_what_fits(policy: Policy) -> None:
    """And the same again with the same seed."""
    answers = []
    for _ in range(2):
        made = Fleet(policy, seed=3)
        for name in "abc":
            made.put(gpus(name))
        for number in range(15):
            demand = share(4, cpu_milli=1000)
            made.observe(demand)
            if (placement := made.choose(demand).placement) is not None:
                made.charge(str(number), placement.charge(demand))
        answers.append(dict(made.charges))
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12
