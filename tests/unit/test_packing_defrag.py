"""Which pods could move so that more fits: the cases that people meet, each a few GPUs large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from meshctl.core.packing.defrag import Plan, Settled, plan
from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Node, Placement

Charges = Mapping[str, tuple[str, int]]
"""Pod -> GPU (``a0``: the first of node a) and slots."""


def demand(*slots: int, cpu_milli: int = 100, **fields: Any) -> Demand:
    return Demand(cpu_milli, 0, tuple(Ask(f"c{at}", count) for at, count in enumerate(slots)), **fields)


def site(charges: Charges, gpus: int = 1, nodes: str = "ab", cpu_milli: int = 32_000, **device: Any) -> Fleet:
    """Nodes of so many GPUs with 10 slots each; a pod takes 100 m CPU."""
    fleet = Fleet()
    for name in nodes:
        fleet.put(Node(name, cpu_milli, 1000, tuple(Device(f"{name}{at}", 10, **device) for at in range(gpus))))
    for key, (uuid, slots) in charges.items():
        fleet.charge(key, Charge(uuid[0], 100, 0, {uuid: slots} if slots else {}))
    return fleet


def settled(charges: Charges, fixed: str = "", **fields: Any) -> list[Settled]:
    """Of each that is charged; those in `fixed` may not move."""
    return [
        Settled(key, demand(*([slots] if slots else [])), fixed="told so" if key in fixed.split() else "", **fields)
        for key, (_, slots) in charges.items()
    ]


def moves(found: Plan) -> list[str]:
    return [f"{move.key}: {_there(move.before)} -> {_there(move.after)}" for move in found.moves]


def _there(charge: Charge) -> str:
    return "+".join(charge.gpus) or charge.node


def test_one_pod_moves_where_two_gpus_are_half_free() -> None:
    """5 of 10 free on each: 8 slots fit when one of them is left."""
    charges = {"p": ("a0", 5), "q": ("b0", 5)}
    found = plan(site(charges), settled(charges), demand(8))
    assert moves(found) == ["p: a0 -> b0"]
    assert found.moves[0].why == "makes room for 8 of hpe.com/gpus on a0 of a"
    assert found.placement == Placement("a", {"c0": {"a0": 8}})
    assert (found.before.usable_slots, found.after.usable_slots) == (0, 8)
    assert (found.before.largest_ask, found.after.largest_ask) == (5, 10)
    assert (found.before.free_slots, found.after.free_slots) == (10, 10)


def test_within_one_node_a_pod_moves_to_the_other_gpu() -> None:
    """There need be no second node."""
    charges = {"p": ("a0", 4), "q": ("a1", 5)}
    assert moves(plan(site(charges, 2, "a"), settled(charges), demand(8))) == ["p: a0 -> a1"]


def test_what_fits_needs_no_move() -> None:
    """The answer says where."""
    charges = {"p": ("a0", 5)}
    found = plan(site(charges), settled(charges), demand(8))
    assert (found.moves, found.placement and found.placement.node) == ((), "b")
    assert "nothing has to move" in found.why
    assert found.before == found.after


@pytest.mark.parametrize(
    ("charges", "asked", "fixed"),
    [
        ({"p": ("a0", 8), "q": ("b0", 8)}, 5, ""),
        ({"p": ("a0", 5), "q": ("b0", 5)}, 8, "p q"),
        ({"p": ("a0", 5), "q": ("b0", 5)}, 11, ""),
    ],
    ids=["full", "fixed", "larger than a GPU"],
)
def test_where_nothing_helps_nothing_is_proposed(charges: Charges, asked: int, fixed: str) -> None:
    """And the reason is that of the nodes."""
    found = plan(site(charges), settled(charges, fixed), demand(asked))
    assert (found.moves, found.placement) == ((), None)
    assert found.why.startswith("none of 2 nodes: 2 ")


def test_who_is_fixed_stays_and_another_goes() -> None:
    """Though more pods have to move for it."""
    charges = {"p": ("a0", 4), "q": ("b0", 2), "r": ("b0", 2)}
    free = plan(site(charges), settled(charges), demand(9))
    assert moves(free) == ["p: a0 -> b0"]
    assert sorted(moves(plan(site(charges), settled(charges, "p"), demand(9)))) == ["q: b0 -> a0", "r: b0 -> a0"]


def test_who_is_not_named_stays() -> None:
    """Somebody has it, and nothing more is known of him."""
    charges = {"p": ("a0", 5), "q": ("b0", 5)}
    pods = [pod for pod in settled(charges) if pod.key == "q"]
    assert moves(plan(site(charges), pods, demand(8))) == ["q: b0 -> a0"]


def test_fewest_pods_move() -> None:
    """One with 4 slots before two with 2."""
    charges = {"a": ("a0", 2), "b": ("a0", 2), "c": ("b0", 4)}
    assert moves(plan(site(charges), settled(charges), demand(10))) == ["c: b0 -> a0"]


def test_no_more_moves_than_allowed() -> None:
    """Two would do it; one may be made."""
    charges = {"p": ("a0", 4), "q": ("a0", 4), "r": ("b0", 6), "s": ("c0", 6)}
    fleet, pods = site(charges, nodes="abc"), settled(charges, "r s")
    assert len(plan(fleet, pods, demand(10), max_moves=2).moves) == 2
    assert plan(fleet, pods, demand(10), max_moves=1).moves == ()


def test_a_pod_that_finds_no_place_has_room_made_for_it() -> None:
    """Nodes of two products: p can only be where r is, and r can go where nobody is let in but by name."""
    charges = {"p": ("a0", 5), "q": ("b0", 5), "r": ("c0", 3)}
    fleet = site(charges, nodes="abcd")
    fleet.charge("x", Charge("c", 0, 0, {"c0": 4}))
    fleet.charge("y", Charge("d", 0, 0, {"d0": 7}))
    fleet.charge("z", Charge("b", 0, 0, {"b0": 4}))
    pods = [
        Settled("p", demand(5), nodes=frozenset("ac")),
        Settled("r", demand(3), nodes=frozenset("cd")),
    ]
    found = plan(fleet, pods, demand(10))
    assert moves(found) == ["r: c0 -> d0", "p: a0 -> c0"]
    assert [move.sake for move in found.moves] == ["p", ""]


def test_nobody_goes_where_his_node_selector_lets_him_not() -> None:
    """The fleet would have room."""
    charges = {"p": ("a0", 5), "q": ("b0", 5)}
    pods = [Settled("p", demand(5), nodes=frozenset("a")), Settled("q", demand(5), nodes=frozenset("ab"))]
    assert moves(plan(site(charges), pods, demand(8))) == ["q: b0 -> a0"]


def test_room_is_made_on_the_nodes_that_are_named() -> None:
    """Pods may go to all."""
    charges = {"p": ("a0", 5), "q": ("b0", 5)}
    found = plan(site(charges), settled(charges), demand(8), nodes={"b"})
    assert moves(found) == ["q: b0 -> a0"]
    assert found.before.free_slots == 5


def test_cpu_is_made_room_for_too() -> None:
    """Its GPU is free; who leaves has none, and does not go to the GPU's node again."""
    charges = {"p": ("a0", 0), "q": ("b0", 10)}
    fleet = site(charges, cpu_milli=1000)
    found = plan(fleet, settled(charges), demand(5, cpu_milli=1000))
    assert moves(found) == ["p: a -> b"]


def test_products_and_tenants_hold_for_who_moves() -> None:
    """Another namespace's GPU is no place, nor is one of a product that will not do."""
    charges = {"p": ("a0", 5), "q": ("b0", 5)}
    fleet = site(charges, isolated=True)
    fleet.charge("q", Charge("b", 0, 0, {"b0": 5}, "other"))
    tenants = [Settled("p", demand(5)), Settled("q", demand(5, namespace="other"))]
    assert plan(fleet, tenants, demand(8)).moves == ()
    pods = [Settled("p", demand(5, products=frozenset({"T4"}))), Settled("q", demand(5), fixed="told so")]
    assert plan(site(charges), pods, demand(8)).moves == ()


def test_two_gpus_at_once_are_freed() -> None:
    """Each container's slots are of one GPU."""
    charges = {"p": ("a0", 3), "q": ("a1", 4), "r": ("b0", 2), "s": ("b1", 2), "t": ("b1", 2)}
    found = plan(site(charges, 2), settled(charges), demand(10, 10))
    assert sorted(moves(found)) == ["p: a0 -> b0", "q: a1 -> b1"] or len(found.moves) == 2
    assert found.placement is not None
    assert found.moves[0].why.startswith("makes room for 2 x 10 of hpe.com/gpus on a0, a1")


def test_without_a_demand_gpus_become_whole() -> None:
    """The fewest slots move; nobody moves twice."""
    charges = {"p": ("a0", 3), "q": ("b0", 4), "r": ("b1", 10)}
    found = plan(site(charges, 2), settled(charges))
    assert moves(found) == ["p: a0 -> b0"]
    assert found.moves[0].why == "makes a0 of a whole"
    assert (found.before.whole_gpus, found.after.whole_gpus) == (1, 2)


def test_without_a_demand_stranded_gpus_are_used_again() -> None:
    """All of a's CPU has gone to a pod that needs no GPU of its own; b has CPU, and its GPU is taken."""
    fleet = site({}, cpu_milli=8000)
    fleet.charge("p", Charge("a", 8000))
    fleet.charge("q", Charge("b", 1000, 0, {"b0": 10}))
    pods = [Settled("p", demand(cpu_milli=7000)), Settled("q", demand(10, cpu_milli=1000))]
    fleet.charge("p", Charge("a", 7000))
    fleet.charge("w", Charge("a", 1000))
    found = plan(fleet, pods)
    assert moves(found) == ["p: a -> b"]
    assert found.moves[0].why == "leaves CPU to the free GPUs of a"
    assert (found.before.stranded_gpus, found.after.stranded_gpus) == (1.0, 0.0)
    assert (found.before.usable_slots, found.after.usable_slots) == (0, 10)


def test_slots_that_nobody_known_uses_are_no_reason_to_move() -> None:
    """The GPU would not be whole."""
    charges = {"p": ("a0", 3), "q": ("b0", 4)}
    fleet = site(charges)
    fleet.hold("a0", 1)
    fleet.hold("b0", 1)
    assert plan(fleet, settled(charges)).moves == ()
    assert plan(fleet, settled(charges), demand(10)).moves == ()
    assert moves(plan(fleet, settled(charges), demand(9))) == ["p: a0 -> b0"]


@pytest.mark.parametrize("asked", [None, demand(8)])
def test_the_fleet_is_left_as_it_was(asked: Demand | None) -> None:
    """And the order of the pods means nothing."""
    charges = {"p": ("a0", 5), "q": ("b0", 5)}
    fleet = site(charges)
    before: Sequence[Any] = dict(fleet.charges), dict(fleet.nodes), fleet.used_slots("a0")
    first = plan(fleet, settled(charges), asked)
    assert (dict(fleet.charges), dict(fleet.nodes), fleet.used_slots("a0")) == before
    assert plan(fleet, settled(charges)[::-1], asked) == first
