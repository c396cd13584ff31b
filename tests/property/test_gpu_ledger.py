"""A model kubelet plays against what the agent decides: nothing is given twice, nothing leaks, no tenant meets another.

The agent here is its pure parts alone: tickets from the pods that it was told of, a ledger from listings, and the
answers of `prefer` and `check`.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deviceplugin.allocate import Shared, check, prefer
from deviceplugin.ledger import PENDING_S, Ledger
from deviceplugin.tickets import candidates, hidden, tickets_of
from meshctl.ports import KubeObject
from meshctl.sharing import RESOURCE, Gpu, Isolation, Mode, Owner, Packing, Sharing, Slot, Ticket
from tests.harness.model_kubelet import Call, Container, Kind, ModelKubelet, Pod, Preferred, answered

UUIDS = ("GPU-a", "GPU-b", "GPU-c")
OTHER = "hpe.com/whole"
RESOURCES = (RESOURCE, OTHER)

sharings = st.builds(
    Sharing,
    policy=st.just("p"),
    resource=st.sampled_from((RESOURCE, RESOURCE, RESOURCE, RESOURCE, OTHER)),
    replicas=st.sampled_from((1, 3, 4, 6, 8)),
    isolation=st.sampled_from((Isolation.TENANT, Isolation.TENANT, Isolation.NONE)),
    packing=st.sampled_from(Packing),
    several_gpus=st.booleans(),
    mode=st.just(Mode.TIME_SLICING),
)
containers = st.builds(
    lambda asks, kind, uuid, resource: Container("", asks, kind, ((uuid, asks),) if uuid and asks else (), resource),
    st.sampled_from((1, 2, 0, 3, 4)),
    st.sampled_from(Kind),
    st.sampled_from((None, None, None, None, *UUIDS, "GPU-of-another-node")),
    st.sampled_from((RESOURCE, RESOURCE, RESOURCE, RESOURCE, OTHER)),
)


one_in_four = st.sampled_from((False, False, False, True))


class Node(RuleBasedStateMachine):
    """One node: its kubelet, and the agent's knowledge of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kubelet = ModelKubelet()
        self.ledger = Ledger()
        self.gpus: dict[str, Shared] = {}
        self.now_s = 0.0
        self.names = 0
        self.waiting: list[Pod] = []
        self.truth: dict[Pod, KubeObject] = {}
        self.mirror: dict[Pod, KubeObject] = {}
        """What the agent has been told of the pods; behind the truth, but it knows of each pod that is bound."""
        self.asked: tuple[dict[Slot, Owner], float] | None = None
        """A listing that is on its way, and when it was asked for."""

    @initialize(ways=st.lists(sharings, min_size=1, max_size=3))
    def shared(self, ways: list[Sharing]) -> None:
        for uuid, sharing in zip(UUIDS, ways, strict=False):
            self.gpus[uuid] = Shared(Gpu(uuid, "V100", 16 << 30, (7, 0)), sharing)
        self.healthy_told()

    # --------------------------------------------------------------------------------------------------- what happens

    @rule(namespace=st.sampled_from("xy"), asked=st.lists(containers, min_size=1, max_size=3))
    def bound(self, namespace: str, asked: list[Container]) -> None:
        """A pod comes to the node."""
        self.names += 1
        inits_first = sorted(asked, key=lambda one: one.kind is Kind.APP)
        made = tuple(one._replace(name=f"c{place}") for place, one in enumerate(inits_first))
        pod = Pod(namespace, f"p{self.names}", made, f"2026-01-01T00:{self.names // 2:04}Z")
        self.truth[pod] = self.mirror[pod] = pod.object()
        self.waiting.append(pod)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 3), fresh=st.booleans(), falls=one_in_four, dice=st.randoms(use_true_random=False))
    def admitted(self, which: int, fresh: bool, falls: bool, dice: Random) -> None:
        """The kubelet admits a pod. `fresh`: the agent lists before each answer; `falls`: something else refuses it."""
        pod = self.waiting.pop(which % len(self.waiting))
        self.kubelet.pick = lambda ids, count: dice.sample(ids, min(count, len(ids)))
        refused = answered(self.kubelet.admit(pod), lambda call: self.answer(call, fresh=fresh))
        if falls and not refused:
            self.kubelet.ended(pod)
        self.truth[pod] = pod.object(phase="Failed" if refused or falls else "Running", started=True)

    @rule(
        namespace=st.sampled_from("xy"), asked=containers, fresh=st.booleans(), dice=st.randoms(use_true_random=False)
    )
    def ran(self, namespace: str, asked: Container, fresh: bool, dice: Random) -> None:
        """A small pod comes and is admitted at once."""
        self.bound(namespace, [asked])
        self.admitted(len(self.waiting) - 1, fresh, False, dice)

    @precondition(lambda self: self.kubelet.pods)
    @rule(which=st.integers(0, 9))
    def ended(self, which: int) -> None:
        pods = list(self.kubelet.pods)
        pod = pods[which % len(pods)]
        self.kubelet.ended(pod)
        self.truth[pod] = pod.object(phase="Succeeded", started=True)

    @rule()
    def pods_told(self) -> None:
        """The watch of the pods comes up to the truth."""
        self.mirror = dict(self.truth)

    @rule()
    def listed(self) -> None:
        self.listing_asked()
        self.listing_came()

    @rule()
    def listing_asked(self) -> None:
        self.now_s += 0.01
        self.asked = self.kubelet.listing(), self.now_s

    @precondition(lambda self: self.asked is not None)
    @rule()
    def listing_came(self) -> None:
        assert self.asked is not None
        held, at_s = self.asked
        before, self.asked = self.ledger, None
        self.ledger = before.observed(held, at_s, hidden(self.tickets()))
        assert Ledger(pending=before.pending).observed(held, at_s, hidden(self.tickets())) == self.ledger, "rebuilt"

    @rule(passed_s=st.sampled_from((1.0, PENDING_S / 2, 2 * PENDING_S)))
    def time_passed(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule()
    def restarted(self) -> None:
        """The agent keeps what is pending; what is held it asks for."""
        self.ledger, self.asked = Ledger(pending=self.ledger.pending), None
        self.listed()

    @rule(uuid=st.sampled_from(UUIDS))
    def opened_or_closed(self, uuid: str) -> None:
        if (shared := self.gpus.get(uuid)) is not None:
            self.gpus[uuid] = replace(shared, open=not shared.open, why_closed="XID 79")

    @rule()
    def healthy_told(self) -> None:
        """The kubelet hears which slots there are."""
        self.kubelet.healthy = {
            resource: frozenset(
                str(Slot(uuid, number))
                for uuid, shared in self.gpus.items()
                if shared.sharing.resource == resource and shared.open
                for number in range(shared.sharing.replicas)
            )
            for resource in RESOURCES
        }

    @rule(uuid=st.sampled_from(UUIDS), sharing=sharings)
    def shared_otherwise(self, uuid: str, sharing: Sharing) -> None:
        """A GPU that the ledger says is empty: so it is."""
        if uuid in self.gpus and not self.ledger.busy(uuid):
            assert not self.kubelet.users(uuid)
            self.gpus[uuid] = replace(self.gpus[uuid], sharing=sharing)

    # ------------------------------------------------------------------------------------------------------ the agent

    def tickets(self) -> list[Ticket]:
        return [ticket for pod in self.mirror.values() for ticket in tickets_of(pod, RESOURCES).tickets]

    def answer(self, call: Call, *, fresh: bool) -> list[str]:
        if fresh:
            self.listed()
        self.now_s += 0.01
        if isinstance(call, Preferred):
            asking = candidates(self.tickets(), call.resource, call.size, self.ledger)
            ids = prefer(call.resource, self.gpus, call.available, call.must, call.size, self.ledger, asking)
            assert len(set(ids)) == len(ids) == call.size
            assert set(call.must) <= set(ids) <= set(call.available)
            assert check(call.resource, self.gpus, [ids], self.ledger, asking), "what is preferred is granted"
            return ids
        asking = candidates(self.tickets(), call.resource, len(call.ids), self.ledger)
        grants = check(call.resource, self.gpus, [call.ids], self.ledger, asking)
        uuids = {Slot.parse(one).uuid for one in call.ids}
        assert len(uuids) == 1 or all(self.gpus[uuid].sharing.several_gpus for uuid in uuids)
        self.ledger = self.ledger.granted(grants, self.now_s)
        return []

    # ------------------------------------------------------------------------------------------------ what always holds

    @invariant()
    def nothing_in_use_is_free(self) -> None:
        used = {str(slot) for slot in self.ledger.held.keys() | self.ledger.pending.keys()}
        assert self.kubelet.used <= used

    @invariant()
    def no_tenant_meets_another(self) -> None:
        for uuid, shared in self.gpus.items():
            if shared.sharing.isolation is Isolation.TENANT:
                assert len({pod.namespace for pod in self.kubelet.users(uuid)}) <= 1, uuid

    def teardown(self) -> None:
        """When everybody has ended, nothing is left."""
        for pod in list(self.kubelet.pods):
            self.kubelet.ended(pod)
        self.mirror = {}
        self.now_s += 2 * PENDING_S
        self.listed()
        assert self.ledger == Ledger()


def test_no_slot_is_given_twice_none_leaks_and_no_tenant_meets_another() -> None:
    """Whatever comes, ends, fails, falls ill, lags or restarts, in any order: 1000 sequences."""
    run_state_machine_as_test(Node, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))
