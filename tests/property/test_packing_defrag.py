"""Whatever the fleet: a plan can be carried out move by move, and comes to what it says."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.core.packing.defrag import Plan, Settled, learned, plan
from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.measure import measure
from meshctl.core.packing.vocabulary import Ask, Demand, Device, Node, Placement

SLOTS = 6
NAMES = ("a", "b", "c")


def demands(most: int = 2) -> st.SearchStrategy[Demand]:
    slots = st.lists(st.integers(1, SLOTS), min_size=0, max_size=most)
    return st.builds(_demand, slots, st.integers(0, 3), st.sampled_from(["", "x"]))


def _demand(slots: list[int], cpu_milli: int, namespace: str) -> Demand:
    asks = tuple(Ask(f"c{at}", count) for at, count in enumerate(slots))
    return Demand(cpu_milli, cpu_milli, asks, namespace=namespace)


@st.composite
def sites(draw: st.DrawFn) -> tuple[Fleet, list[Settled]]:
    """A few small nodes, filled at random; some pods may not move, some not everywhere."""
    fleet, pods = Fleet(), []
    for name in NAMES[: draw(st.integers(1, 3))]:
        several, isolated = draw(st.booleans()), draw(st.booleans())
        devices = tuple(
            Device(
                f"{name}{at}", SLOTS, isolated=isolated, several=several, closed=draw(st.sampled_from(["", "", "ill"]))
            )
            for at in range(draw(st.integers(1, 3)))
        )
        fleet.put(Node(name, draw(st.integers(2, 12)), 12, devices))
    for at, demand in enumerate(draw(st.lists(demands(), max_size=8))):
        placement = fleet.fit(demand, draw(st.sampled_from(NAMES)))
        if isinstance(placement, Placement):
            fleet.charge(f"p{at}", placement.charge(demand))
            nodes = draw(st.none() | st.frozensets(st.sampled_from(NAMES)))
            if draw(st.integers(0, 5)):
                pods.append(Settled(f"p{at}", demand, draw(st.sampled_from(["", "", "", "told so"])), nodes))
    for name in sorted(fleet.nodes):
        fleet.hold(f"{name}0", draw(st.integers(0, 2)))
    return fleet, pods


def carried_out(fleet: Fleet, pods: list[Settled], found: Plan) -> None:
    """On the fleet itself: each has room while it still has what it had."""
    by_key = {pod.key: pod for pod in pods}
    for move in found.moves:
        pod = by_key[move.key]
        assert not pod.fixed
        assert pod.nodes is None or move.after.node in pod.nodes
        assert fleet.charges[move.key] == move.before
        assert move.after == move.placement.charge(pod.demand)
        taken = {uuid: fleet.used_slots(uuid) for uuid in move.after.gpus}
        fleet.charge("new", move.after)
        for uuid, slots in move.after.gpus.items():
            assert fleet.used_slots(uuid) == taken[uuid] + slots <= SLOTS
        _within(fleet, move.after.node)
        fleet.charge(move.key, move.after)
        fleet.release("new")


def _within(fleet: Fleet, name: str) -> None:
    node, charges = fleet.nodes[name], [fleet.charges[key] for key in fleet.charged(name)]
    assert sum(charge.cpu_milli for charge in charges) <= node.cpu_milli
    assert sum(charge.memory_mib for charge in charges) <= node.memory_mib
    for device in node.devices:
        namespaces = {charge.namespace for charge in charges if charge.gpus.get(device.uuid)}
        assert not device.isolated or len(namespaces) <= 1


@settings(max_examples=100, deadline=None)
@given(sites(), demands(), st.integers(0, 4), st.none() | st.sets(st.sampled_from(NAMES), min_size=1))
def test_plan_for_a_demand_holds(
    at: tuple[Fleet, list[Settled]], demand: Demand, most: int, nodes: set[str] | None
) -> None:
    """Every move is valid in its turn, there are no more than allowed, and then the demand fits where it says."""
    fleet, pods = at
    fits = fleet.choose(demand, nodes).placement is not None
    found = plan(fleet, pods, demand, nodes, most)
    assert len(found.moves) <= most
    assert len({move.key for move in found.moves}) == len(found.moves)
    assert bool(found.moves) == (found.placement is not None and not fits)
    assert bool(found.why) != bool(found.moves)
    after = learned(fleet, pods)
    carried_out(after, pods, found)
    assert measure(after, demand, nodes) == found.after
    if found.placement is not None:
        there = after.fit(demand, found.placement.node)
        assert isinstance(there, Placement)
        assert nodes is None or found.placement.node in nodes


@settings(max_examples=100, deadline=None)
@given(sites(), st.integers(0, 4))
def test_plan_without_a_demand_gains(at: tuple[Fleet, list[Settled]], most: int) -> None:
    """Every move is valid in its turn; more GPUs are whole or fewer stranded, and each move is worth it."""
    fleet, pods = at
    found = plan(fleet, pods, max_moves=most)
    assert len(found.moves) <= most
    assert len({move.key for move in found.moves}) == len(found.moves)
    there = learned(fleet, pods)
    carried_out(there, pods, found)
    before, after = found.before, found.after
    assert measure(there) == after
    gain = after.whole_gpus - before.whole_gpus - after.stranded_gpus + before.stranded_gpus
    assert gain >= 0.1 * len(found.moves) - 1e-5


@settings(max_examples=100, deadline=None)
@given(sites(), st.integers(1, SLOTS), st.integers(0, 3))
def test_where_one_move_is_enough_one_is_proposed(at: tuple[Fleet, list[Settled]], slots: int, cpu_milli: int) -> None:
    """Compared with every pod's every move."""
    fleet, pods = at
    demand = Demand(cpu_milli, 0, (Ask("c", slots),), namespace="x")
    found = plan(fleet, pods, demand)
    if found.placement is None or len(found.moves) > 1:
        for pod, name in product(pods, sorted(fleet.nodes)):
            assert not _one_is_enough(fleet, pod, name, demand), (pod.key, name)


def _one_is_enough(fleet: Fleet, pod: Settled, name: str, demand: Demand) -> bool:
    before = fleet.charges[pod.key]
    if pod.fixed or name == before.node or (pod.nodes is not None and name not in pod.nodes):
        return False
    placement = fleet.fit(pod.demand, name)
    if not isinstance(placement, Placement):
        return False
    fleet.charge(pod.key, placement.charge(pod.demand))
    enough = isinstance(fleet.fit(demand, before.node), Placement)
    fleet.charge(pod.key, before)
    return enough
