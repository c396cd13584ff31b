"""The ledger under arbitrary sequences of what the API server tells and what the binder does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from meshctl.core.packing.vocabulary import Charge
from meshctl.errors import InputError
from meshctl.extender.pods import ended, node_of
from meshctl.extender.ports import BindError, PodId
from meshctl.extender.views import VIEWS
from meshctl.ports import ObjectKey
from tests.harness.extender_objects import Told, container, node, pod
from tests.harness.gpus import gpu_object

NODES = ("m", "n")
GPUS = {f"GPU-{name}-{number}": name for name in NODES for number in range(2)}
PODS = ("a", "b", "c", "d")
SLOTS = 4

some_slots = st.integers(1, SLOTS)
some_pods = st.sampled_from(PODS)
some_nodes = st.sampled_from(NODES)
some_gpus = st.sampled_from(sorted(GPUS))
plans = st.none() | st.dictionaries(
    st.sampled_from(["server", "warm", "x"]),
    st.dictionaries(some_gpus | st.just("GPU-nowhere"), some_slots, min_size=1, max_size=2),
    max_size=2,
)
holders = st.lists(
    st.tuples(st.just("team-a"), some_pods, st.sampled_from(["server", "x"]), st.lists(st.integers(0, 3), max_size=3)),
    max_size=3,
)


def everything(told: Told) -> Any:
    fleet = told.ledger.fleet
    free = {uuid: (fleet.free(uuid), fleet.used_slots(uuid), fleet.tenants(uuid)) for uuid in sorted(GPUS)}
    return dict(fleet.nodes), dict(fleet.charges), free, told.ledger.slots()


def promised(charges: Iterable[Charge]) -> dict[str, int]:
    found: dict[str, int] = {}
    for charge in charges:
        for uuid, slots in charge.gpus.items():
            found[uuid] = found.get(uuid, 0) + slots
    return found


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.told = Told()
        self.objects: dict[ObjectKey, tuple[str, dict[str, Any]]] = {}
        self.lives = 0
        self.free: dict[str, int] = {}

    def tell(self, kind: str, value: dict[str, Any]) -> None:
        self.objects[VIEWS[kind].key(value)] = kind, value
        self.told.tell(kind, value)

    def forget(self, kind: str, name: str, namespace: str = "") -> None:
        key = ObjectKey(kind, namespace, name)
        self.objects.pop(key, None)
        self.told.ledger.take(key, None)

    def seen(self, name: str) -> dict[str, Any] | None:
        return self.objects.get(ObjectKey("Pod", "team-a", name), (None, None))[1]

    @initialize()
    def two_nodes(self) -> None:
        for name in NODES:
            self.tell("Node", node(name, cpu="8"))
        for uuid, name in GPUS.items():
            self.tell("GPU", gpu_object(name, uuid, SLOTS))
        for number, name in enumerate(PODS):
            self.create(name, 1 + number, 0, 1)

    @rule(name=some_pods, slots=st.integers(0, SLOTS), warm=st.integers(0, SLOTS), cpu=st.integers(1, 5))
    def create(self, name: str, slots: int, warm: int, cpu: int) -> None:
        self.lives += 1
        init = [container("warm", warm)] if warm else []
        server = container("server", slots, cpu=str(cpu))
        self.tell("Pod", pod(name, server, init=init, uid=f"uid-{self.lives}"))

    @rule(name=some_pods, where=some_nodes, plan=plans)
    def bound_by_somebody(self, name: str, where: str, plan: Mapping[str, Mapping[str, int]] | None) -> None:
        value = self.seen(name)
        if value is not None and not node_of(value) and not ended(value):
            self.bind(value, where, plan)

    @rule(name=some_pods, what=st.sampled_from(["stays", "bound", "released", "bound elsewhere"]), where=some_nodes)
    def reserve(self, name: str, what: str, where: str) -> None:
        """As the binder does it; what is reserved is what was free, and what is bound is what was reserved."""
        value, fleet = self.seen(name), self.told.ledger.fleet
        if value is None or (placement := self.told.ledger.decide(value, None).placement) is None:
            return
        before = everything(self.told)
        free = {uuid: fleet.free(uuid) for uuid in GPUS}
        uid = value["metadata"]["uid"]
        try:
            reserved = self.told.ledger.reserve(PodId("team-a", name, uid), placement.node)
        except BindError:
            assert everything(self.told) == before
            return
        charge = fleet.charges[uid]
        assert charge == reserved.placement.charge(reserved.demand)
        assert all(fleet.free(uuid) == free[uuid] - slots >= 0 for uuid, slots in charge.gpus.items())
        match what:
            case "released":
                self.told.ledger.release(uid)
                assert everything(self.told) == before
            case "bound":
                self.bind(value, placement.node, reserved.placement.gpus)
                assert fleet.charges[uid] == charge
            case "bound elsewhere":
                self.bind(value, where, None)
                assert fleet.charges[uid].node == where

    def bind(self, value: dict[str, Any], where: str, plan: Mapping[str, Mapping[str, int]] | None) -> None:
        annotations = pod(plan=plan)["metadata"].get("annotations", {})
        metadata = {**value["metadata"], "annotations": annotations}
        self.tell("Pod", {**value, "metadata": metadata, "spec": {**value["spec"], "nodeName": where}})

    @rule(uid=st.integers(1, 20))
    def release(self, uid: int) -> None:
        self.told.ledger.release(f"uid-{uid}")

    @rule(name=some_pods, phase=st.sampled_from(["Pending", "Running", "Succeeded"]), going=st.booleans())
    def kubelet_says(self, name: str, phase: str, going: bool) -> None:
        value = self.seen(name)
        if value is not None and node_of(value) and not ended(value):
            metadata = value["metadata"] | ({"deletionTimestamp": "now"} if going else {})
            self.tell("Pod", {**value, "metadata": metadata, "status": {"phase": phase, "startTime": "now"}})

    @rule(name=some_pods)
    def delete(self, name: str) -> None:
        self.forget("Pod", name, "team-a")

    @rule(
        uuid=some_gpus,
        held=holders,
        more=st.integers(0, 2),
        amiss=st.booleans(),
        where=some_nodes,
        exclusive=st.booleans(),
    )
    def agent_says(self, uuid: str, held: list[Any], more: int, amiss: bool, where: str, exclusive: bool) -> None:
        used = min(SLOTS, len({slot for holder in held for slot in holder[3]}) + more)
        total = max(used, 1 if exclusive else SLOTS)
        slots = {"total": total, "used": used, "free": 0 if amiss else total - used, "unavailable": 0}
        slots["unavailable"] = total - used - slots["free"]
        self.tell("GPU", gpu_object(where, uuid, total, held, slots=slots, isolation="Tenant" if exclusive else "None"))

    @rule(uuid=some_gpus)
    def gpu_vanishes(self, uuid: str) -> None:
        self.forget("GPU", uuid.lower())

    @rule(name=some_nodes)
    def node_vanishes(self, name: str) -> None:
        self.forget("Node", name)

    @rule(name=some_nodes, cpu=st.integers(1, 8))
    def node_comes(self, name: str, cpu: int) -> None:
        self.tell("Node", node(name, cpu=str(cpu)))

    @rule(name=some_pods, slots=st.integers(0, SLOTS + 1))
    def decide(self, name: str, slots: int) -> None:
        before = everything(self.told)
        try:
            self.told.ledger.decide(pod(name, slots=slots), NODES)
        except InputError:
            raise AssertionError("a valid pod is decided") from None
        assert everything(self.told) == before

    @rule(order=st.randoms(use_true_random=False))
    def rebuilt(self, order: Any) -> None:
        """From the same objects, in any order; without reservations, which a restart loses."""
        ledger = self.told.ledger
        for uid in list(ledger.reserved):
            ledger.release(uid)
        other, objects = Told(), list(self.objects.values())
        order.shuffle(objects)
        for kind, value in objects:
            other.tell(kind, value)
        assert everything(other) == everything(self.told)

    @invariant()
    def reservations_fit_beside_each_other(self) -> None:
        """Together with nothing else they never need more than a GPU has, as long as it is shared as it was."""
        ledger = self.told.ledger
        charges = [ledger.fleet.charges[uid] for uid in ledger.reserved]
        assert all(slots <= SLOTS for slots in promised(charges).values())

    @invariant()
    def figures_add_up(self) -> None:
        """What is counted step by step is what a new count says."""
        fleet, slots = self.told.ledger.fleet, self.told.ledger.slots()
        devices = [device for each in fleet.nodes.values() for device in each.devices]
        free = sum(fleet.free(device.uuid) for device in devices if not device.closed)
        closed = sum(fleet.free(device.uuid) for device in devices if device.closed)
        total = sum(device.slots for device in devices)
        assert (slots["free"], slots["closed"], sum(slots.values())) == (free, closed, total)

    @invariant()
    def who_has_ended_has_nothing(self) -> None:
        """And who is on a node is charged."""
        live = {value["metadata"]["uid"] for kind, value in self.objects.values() if kind == "Pod" and not ended(value)}
        on = {
            value["metadata"]["uid"]
            for kind, value in self.objects.values()
            if kind == "Pod" and node_of(value) and not ended(value)
        }
        charges = self.told.ledger.fleet.charges.keys()
        assert on <= charges <= live
        assert charges - on == self.told.ledger.reserved.keys()


def test_the_ledger_whatever_is_told_and_bound() -> None:
    """Nothing is over-booked, nothing leaks, and it is what the same objects in another order make of it."""
    run_state_machine_as_test(LedgerMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
