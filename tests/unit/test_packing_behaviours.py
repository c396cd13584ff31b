"""The behaviours of GPU sharing that people miss elsewhere, by their numbers: what the placement of pods makes of them.

Not here: 14 and 20 are the agent's, 15 to 19 the extender's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshctl.core.packing.fleet import Fleet
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


def node(slots: int = 4, *, gpus: int = 2, name: str = "node", **device: Any) -> Node:
    devices = tuple(Device(f"{name}-{i}", slots, **device) for i in range(gpus))
    return Node(name, 64_000, 65_536, devices)


def fleet(*nodes: Node, policy: Policy = Policy.STRANDING, used: Mapping[str, int] | None = None) -> Fleet:
    """`used`: UUID -> slots that a pod has."""
    made = Fleet(policy)
    for one in nodes:
        made.put(one)
    for uuid, slots in (used or {}).items():
        made.charge(f"on-{uuid}", Charge(uuid.rpartition("-")[0], gpus={uuid: slots}))
    return made


def ask(*slots: int, init: int = 0) -> Demand:
    """A container for each; the first `init` of them end before the next starts."""
    return Demand(asks=tuple(Ask(f"c{i}", count, init=i < init) for i, count in enumerate(slots)))


def placed(answer: Placement | Refusal) -> Mapping[str, Mapping[str, int]]:
    assert isinstance(answer, Placement), answer
    return answer.gpus


def refused(answer: Placement | Refusal) -> Reason:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def test_01_two_of_two_gpus_spread_are_one_and_one() -> None:
    """Two GPUs x 4 slots, ask 2: of both where a container may have several, and two containers on both anyhow."""
    assert placed(fleet(node(several=True), policy=Policy.SPREAD).fit(ask(2), "node")) == {
        "c0": {"node-0": 1, "node-1": 1}
    }
    assert placed(fleet(node(), policy=Policy.SPREAD).fit(ask(1, 1), "node")) == {
        "c0": {"node-0": 1},
        "c1": {"node-1": 1},
    }


def test_02_two_of_two_gpus_packed_are_on_one() -> None:
    """Two GPUs x 4 slots, ask 2, or 1 and 1."""
    assert placed(fleet(node(several=True)).fit(ask(2), "node")) == {"c0": {"node-0": 2}}
    assert placed(fleet(node()).fit(ask(1, 1), "node")) == {"c0": {"node-0": 1}, "c1": {"node-0": 1}}


def test_03_five_are_on_two_gpus_only_where_that_is_allowed() -> None:
    """Two GPUs x 4 slots, ask 5: refused, or 4 + 1."""
    assert refused(fleet(node()).fit(ask(5), "node")) is Reason.TOO_SMALL
    assert placed(fleet(node(several=True)).fit(ask(5), "node")) == {"c0": {"node-0": 4, "node-1": 1}}


def test_04_what_the_kubelet_insists_on_is_in_the_plan() -> None:
    """It gives the slots of an ended init container to the next container, which must then be on the same GPU."""
    full = fleet(node(), used={"node-0": 2})
    assert placed(full.fit(ask(2, 3, init=1), "node")) == {"c0": {"node-1": 2}, "c1": {"node-1": 3}}
    assert placed(full.fit(ask(3), "node")) == {"c0": {"node-1": 3}}


def test_05_too_few_is_refused_and_nothing_changes() -> None:
    """Also by asking again."""
    full = fleet(node(gpus=1), used={"node-0": 3})
    before = dict(full.charges), full.free("node-0")
    for _ in range(2):
        assert refused(full.fit(ask(2), "node")) is Reason.NO_ROOM
        assert full.choose(ask(2)).placement is None
        assert (dict(full.charges), full.free("node-0")) == before


def test_06_a_gpu_with_six_tenths_used_is_passed_over_for_five() -> None:
    """0.6 used, ask 0.5: another GPU."""
    assert placed(fleet(node(10), used={"node-0": 6}).fit(ask(5), "node")) == {"c0": {"node-1": 5}}


def test_07_two_and_two_free_are_no_three() -> None:
    """Four are free on the node, as the default scheduler counts; no GPU has three."""
    answer = fleet(node(), used={"node-0": 2, "node-1": 2}).fit(ask(3), "node")
    assert answer == Refusal(Reason.NO_ROOM, "no GPU has 3 of hpe.com/gpus free: the most is 2 (of 4 free in all)")


def test_08_ten_and_one_of_ten_are_on_different_gpus() -> None:
    """Whatever the order of the containers."""
    assert placed(fleet(node(10)).fit(ask(10, 1), "node")) == {"c0": {"node-0": 10}, "c1": {"node-1": 1}}
    assert placed(fleet(node(10)).fit(ask(1, 10), "node")) == {"c0": {"node-1": 1}, "c1": {"node-0": 10}}


def test_09_init_containers_are_a_peak() -> None:
    """3, then 2 and 2: four slots of one GPU, for the first two of which the init container's are used."""
    demand = ask(3, 2, 2, init=1)
    answer = fleet(node(gpus=1)).fit(demand, "node")
    assert isinstance(answer, Placement)
    assert answer.charge(demand).gpus == {"node-0": 4}
    assert refused(fleet(node(gpus=1), used={"node-0": 1}).fit(demand, "node")) is Reason.NO_ROOM


def test_10_a_plan_is_by_the_names_of_containers() -> None:
    """One without GPUs between them changes nothing: it is not named."""
    demand = Demand(asks=(Ask("first", 4), Ask("third", 3)))
    assert placed(fleet(node()).fit(demand, "node")) == {"first": {"node-0": 4}, "third": {"node-1": 3}}


def test_11_a_whole_gpu_is_no_used_one() -> None:
    """Exclusive: one slot. Whole GPUs for several containers are different ones."""
    used = fleet(node(1), used={"node-0": 1})
    assert placed(used.fit(ask(1), "node")) == {"c0": {"node-1": 1}}
    assert refused(used.fit(ask(1, 1), "node")) is Reason.NO_ROOM
    assert placed(fleet(node(1)).fit(ask(1, 1), "node")) == {"c0": {"node-0": 1}, "c1": {"node-1": 1}}


def test_12_another_product_has_its_own_reason() -> None:
    """And so has one that is too slow, and a resource that no GPU is shared as."""
    made = fleet(node(product="K80"))
    asks = (Ask("c", 1),)
    assert refused(made.fit(Demand(asks=asks, products=frozenset({"V100"})), "node")) is Reason.PRODUCT
    assert refused(made.fit(Demand(asks=asks, unfit={"K80": "900 ms"}), "node")) is Reason.TOO_SLOW
    assert refused(made.fit(Demand(asks=(Ask("c", 1, "hpe.com/whole"),)), "node")) is Reason.NO_GPU
    assert placed(made.fit(Demand(asks=asks, products=frozenset({"K80"}), unfit={"T4": "300 ms"}), "node"))


def test_13_an_unhealthy_gpu_takes_nobody_new() -> None:
    """All its slots; the GPU beside it does. Who is on it stays charged."""
    sick = Node("node", 64_000, 65_536, (Device("node-0", 4, closed="unhealthy: Xid 79"), Device("node-1", 4)))
    made = fleet(sick, used={"node-0": 1})
    assert placed(made.fit(ask(1), "node")) == {"c0": {"node-1": 1}}
    assert made.used_slots("node-0") == 1
    alone = fleet(Node("node", 64_000, 65_536, sick.devices[:1]))
    assert alone.fit(ask(1), "node") == Refusal(Reason.CLOSED, "its GPUs take nobody new: unhealthy: Xid 79")
