"""Random fleets against what the kubelet would do, and against fleets that are made anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import (
    Ask,
    Charge,
    Decision,
    Demand,
    Device,
    Node,
    Placement,
    Policy,
    Reason,
    Refusal,
)

RESOURCES = ("hpe.com/gpus", "hpe.com/gpus", "hpe.com/whole")
NODES = ("node-a", "node-b", "node-c")
CUTS = (1, 4, 10, 48)

devices = st.builds(
    Device,
    st.just(""),
    st.sampled_from((1, 2, 3, 4)),
    st.sampled_from(("K80", "V100")),
    st.sampled_from(RESOURCES),
    isolated=st.sampled_from((False, False, True)),
    closed=st.sampled_from(("", "", "", "unhealthy: Xid 79")),
)


def named(name: str, devices: Sequence[Device], cpu_milli: int = 10) -> Node:
    unique = (replace(device, uuid=f"{name}-{number}") for number, device in enumerate(devices))
    return Node(name, cpu_milli, 10, tuple(unique))


nodes = st.builds(named, st.sampled_from(NODES), st.lists(devices, max_size=3), st.integers(0, 10))
asks = st.builds(
    lambda gpus, resources, inits: tuple(
        Ask(f"c{at}", slots, resource, init=at < inits)
        for at, (slots, resource) in enumerate(zip(gpus, resources, strict=False))
    ),
    st.lists(st.integers(1, 4), max_size=4),
    st.lists(st.sampled_from(RESOURCES), min_size=4, max_size=4),
    st.integers(0, 2),
)
demands = st.builds(
    Demand,
    st.integers(0, 6),
    st.integers(0, 6),
    asks,
    st.sampled_from((None, None, None, frozenset({"V100"}))),
    st.sampled_from(({}, {}, {"K80": "900 ms"})),
    st.sampled_from(("a", "b")),
)
keys = st.sampled_from([f"pod-{i}" for i in range(6)])
charges = st.builds(
    Charge,
    st.sampled_from((*NODES, "node-that-nobody-knows")),
    st.integers(0, 4),
    st.integers(0, 4),
    st.dictionaries(
        st.sampled_from([f"{name}-{i}" for name in NODES for i in range(3)]), st.integers(0, 3), max_size=2
    ),
    st.sampled_from(("a", "b")),
)
steps = st.one_of(
    st.tuples(st.just("put"), nodes),
    st.tuples(st.just("drop"), st.sampled_from(NODES)),
    st.tuples(st.just("charge"), keys, charges),
    st.tuples(st.just("release"), keys),
    st.tuples(st.just("hold"), st.sampled_from([f"{name}-0" for name in NODES]), st.integers(0, 2)),
    st.tuples(st.just("choose"), demands),
)


# ------------------------------------------------------------------------------------------- the kubelet, by trying out


def admits(
    demand: Demand, devices: Sequence[Device], free: Mapping[str, int], tenants: Mapping[str, frozenset[str]]
) -> bool:
    """Whether some choice of one GPU for each container comes through a kubelet that gives a pod's next container the
    slots of its ended init containers before fresh ones."""

    def will_do(device: Device, ask: Ask) -> bool:
        return (
            device.resource == ask.resource
            and not device.closed
            and (demand.products is None or device.product in demand.products)
            and device.product not in demand.unfit
            and (not device.isolated or tenants[device.uuid] <= {demand.namespace})
        )

    def go(at: int, free: Mapping[str, int], spare: Mapping[str, tuple[str, int]]) -> bool:
        if at == len(demand.asks):
            return True
        ask = demand.asks[at]
        where, left = spare.get(ask.resource, ("", 0))
        for device in devices:
            if not will_do(device, ask) or (left and device.uuid != where):
                continue
            fresh = max(ask.slots - left, 0)
            rest = max(left, ask.slots) if ask.init else max(left - ask.slots, 0)
            if free[device.uuid] >= fresh:
                after = {**free, device.uuid: free[device.uuid] - fresh}
                if go(at + 1, after, {**spare, ask.resource: (device.uuid, rest)}):
                    return True
        return False

    return go(0, free, {})


def fits(fleet: Fleet, demand: Demand, node: Node) -> bool:
    taken = [fleet.charges[key] for key in fleet.charged(node.name)]
    if demand.cpu_milli and demand.cpu_milli + sum(charge.cpu_milli for charge in taken) > node.cpu_milli:
        return False
    if demand.memory_mib and demand.memory_mib + sum(charge.memory_mib for charge in taken) > node.memory_mib:
        return False
    free = {device.uuid: fleet.free(device.uuid) for device in node.devices}
    return admits(demand, node.devices, free, {uuid: fleet.tenants(uuid) for uuid in free})


def respected(demand: Demand, placement: Placement, node: Node) -> None:
    """Each container has what it asks for, of one GPU that will do."""
    by_uuid = {device.uuid: device for device in node.devices}
    assert set(placement.gpus) == {ask.container for ask in demand.asks}
    for ask in demand.asks:
        ((uuid, slots),) = placement.gpus[ask.container].items()
        assert (slots, by_uuid[uuid].resource) == (ask.slots, ask.resource)
        assert not by_uuid[uuid].closed


# --------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=200)
@given(
    st.lists(nodes, max_size=3),
    st.dictionaries(keys, charges, max_size=4),
    st.lists(demands, min_size=1, max_size=3),
    st.sampled_from(Policy),
)
def test_what_is_chosen_fits_and_what_is_refused_does_not(
    nodes: list[Node], charges: Mapping[str, Charge], demands: list[Demand], policy: Policy
) -> None:
    """On every node, by every policy; and asking changes nothing."""
    fleet = Fleet(policy)
    for node in nodes:
        fleet.put(node)
    for key, charge in charges.items():
        fleet.charge(key, charge)
    for demand in demands:
        decision = fleet.choose(demand)
        able = {name for name, node in fleet.nodes.items() if fits(fleet, demand, node)}
        answers = {name: fleet.fit(demand, name) for name in fleet.nodes}
        assert {name for name, answer in answers.items() if isinstance(answer, Placement)} == able
        assert (decision.placement is not None) == bool(able)
        assert decision.refused.keys() == fleet.nodes.keys() - (
            {decision.placement.node} if decision.placement else set()
        )
        for name, refusal in decision.refused.items():
            assert refusal == answers[name] if name not in able else refusal.reason is Reason.WORSE
        if decision.placement is not None:
            assert decision.placement == answers[decision.placement.node]
            respected(demand, decision.placement, fleet.nodes[decision.placement.node])
    assert dict(fleet.charges) == dict(charges)


@settings(max_examples=120)
@given(st.lists(steps, max_size=25), st.lists(demands, min_size=1, max_size=3), st.randoms())
def test_a_fleet_is_what_a_new_one_with_the_same_in_it_is(
    steps: list[tuple[object, ...]], demands: list[Demand], random: Random
) -> None:
    """Whatever came and went, in whatever order, and was asked meanwhile."""
    fleet, held = Fleet(), dict[str, int]()
    for verb, *args in steps:
        getattr(fleet, str(verb))(*args)
        if verb == "hold":
            held[str(args[0])] = int(str(args[1]))
    new = Fleet()
    known: list[tuple[str, tuple[object, ...]]] = [("put", (node,)) for node in fleet.nodes.values()]
    known += [("charge", pair) for pair in fleet.charges.items()] + [("hold", pair) for pair in held.items()]
    random.shuffle(known)
    for verb, values in known:
        getattr(new, verb)(*values)
    for uuid in (f"{name}-{i}" for name in NODES for i in range(3)):
        assert fleet.free(uuid) == new.free(uuid)
        assert (fleet.used_slots(uuid), fleet.tenants(uuid)) == (new.used_slots(uuid), new.tenants(uuid))
    assert {name: fleet.charged(name) for name in NODES} == {name: new.charged(name) for name in NODES}
    assert fleet.stranded() == new.stranded()
    for demand in demands:
        assert told(fleet.choose(demand)) == told(new.choose(demand))
        assert told(fleet.choose(demand, NODES[1:])) == told(new.choose(demand, NODES[1:]))


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.RANDOM])
@settings(max_examples=25)
@given(
    st.lists(steps, max_size=30),
    st.lists(demands, min_size=1, max_size=3),
    st.lists(st.sampled_from(NODES), unique=True),
)
def test_every_answer_is_that_of_a_fleet_that_keeps_nothing(
    policy: Policy, steps: list[tuple[object, ...]], demands: list[Demand], names: list[str]
) -> None:
    """The same few demands again and again, pods arriving between, GPUs cut anew: what is kept is never stale."""
    fleet, held = Fleet(policy), dict[str, int]()
    for number, (verb, *args) in enumerate(steps):
        if verb == "hold":
            held[str(args[0])] = int(str(args[1]))
        if verb == "put" and isinstance(node := args[0], Node):
            fleet.put(
                replace(node, devices=tuple(replace(gpu, slots=CUTS[number % 4] * gpu.slots) for gpu in node.devices))
            )
        else:
            getattr(fleet, "observe" if verb == "choose" else str(verb))(*args)
        new = Fleet(scorer=fleet._scorer)  # noqa: SLF001 - what it has learned follows from the fleet as it was then
        for known in list(fleet.nodes.values())[::-1]:
            new.put(known)
        for key in fleet.charges:
            new.charge(key, fleet.charges[key])
        for uuid, slots in held.items():
            new.hold(uuid, slots)
        demand = demands[number % len(demands)]
        assert told(fleet.choose(demand)) == told(new.choose(demand))
        assert told(fleet.choose(demand, names)) == told(new.choose(demand, names))
        if (placement := fleet.choose(demand).placement) is not None and number % 3 == 0:
            fleet.charge(f"pod-{number % 6}", placement.charge(demand))


def told(decision: Decision) -> tuple[Placement | None, str, dict[str, Refusal]]:
    return decision.placement, decision.why, dict(decision.refused)


@settings(max_examples=100)
@given(
    st.lists(nodes, min_size=1, max_size=3),
    st.lists(st.one_of(demands, st.integers(0, 30)), max_size=30),
    st.sampled_from(Policy),
)
def test_chosen_places_never_overbook(nodes: list[Node], story: list[Demand | int], policy: Policy) -> None:
    """No GPU has more slots taken than it has, no isolated one two tenants, no node too much CPU; pods come and go."""
    fleet = Fleet(policy)
    for node in nodes:
        fleet.put(node)
    for number, event in enumerate(story):
        if isinstance(event, int):
            fleet.release(f"pod-{event}")
            continue
        fleet.observe(event)
        if (placement := fleet.choose(event).placement) is None:
            continue
        charge = placement.charge(event)
        assert Counter(charge.gpus) == items_on(event, placement), "a charge is what the kubelet would take"
        fleet.charge(f"pod-{number}", charge)
        for node in fleet.nodes.values():
            on_it = [fleet.charges[key] for key in fleet.charged(node.name)]
            assert sum(charge.cpu_milli for charge in on_it if charge.cpu_milli) <= node.cpu_milli
            for device in node.devices:
                assert fleet.used_slots(device.uuid) <= device.slots
                assert not device.isolated or len(fleet.tenants(device.uuid)) <= 1


def items_on(demand: Demand, placement: Placement) -> Counter[str]:
    """UUID -> slots, counted as the kubelet gives them: of ended init containers first."""
    total, spare = Counter[str](), Counter[str]()
    for ask in demand.asks:
        for uuid, slots in placement.gpus[ask.container].items():
            reused = min(spare[uuid], slots)
            total[uuid] += slots - reused
            spare[uuid] = max(spare[uuid], slots) if ask.init else spare[uuid] - reused
    return total


@settings(max_examples=100)
@given(asks, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from((Policy.STRANDING, Policy.SPREAD)))
def test_where_several_gpus_are_allowed_only_the_sum_counts(
    asks: tuple[Ask, ...], sizes: list[int], policy: Policy
) -> None:
    """And each container has what it asks for, of no GPU more than there is."""
    fleet = Fleet(policy)
    fleet.put(Node("node", 1, 1, tuple(Device(f"GPU-{i}", size, several=True) for i, size in enumerate(sizes))))
    demand = Demand(asks=tuple(replace(ask, resource="hpe.com/gpus") for ask in asks))
    answer = fleet.fit(demand, "node")
    spare = total = 0
    for ask in asks:
        total += max(ask.slots - spare, 0)
        spare = max(spare, ask.slots) if ask.init else max(spare - ask.slots, 0)
    assert isinstance(answer, Placement) == (total <= sum(sizes))
    if isinstance(answer, Placement):
        assert {name: sum(parts.values()) for name, parts in answer.gpus.items()} == {
            a.container: a.slots for a in asks
        }
        fleet.charge("pod", answer.charge(demand))
        assert all(fleet.used_slots(f"GPU-{i}") <= size for i, size in enumerate(sizes))
        assert sum(answer.charge(demand).gpus.values()) == total
