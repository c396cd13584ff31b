"""A whole agent, its kubelet and its cluster, through whatever comes: nothing is given twice, nothing leaks.

The agent is the real one, with its disk; its edges and all that breaks are `tests.harness.agent_edges`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from deviceplugin.agent import Agent
from deviceplugin.containers import response
from deviceplugin.ledger import PENDING_S, Ledger
from deviceplugin.node import HARD, Card, Node
from deviceplugin.policies import Policy
from deviceplugin.tickets import tickets_of
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec
from meshctl.sharing import RESOURCE, Gpu, Isolation, Mode, OnChange, Packing, Slot
from tests.harness.agent_edges import TICK_S, AgentRun, Site
from tests.harness.model_kubelet import Container, Kind, Pod
from tests.harness.virtual_time import VirtualLoop

SEQUENCES, PARTS = 1000, 4
"""In all; each part has its own, and may run beside the others."""
OTHER = "hpe.com/whole"
GPUS = {
    gpu.uuid: gpu
    for gpu in (
        Gpu("GPU-a", "Tesla V100", 16 << 30, (7, 0), 0, 0),
        Gpu("GPU-b", "Tesla V100", 16 << 30, (7, 0), 1, 1),
        Gpu("GPU-old", "Tesla P100", 16 << 30, (6, 0), 2, 2),
    )
}
UUIDS = tuple(GPUS)
PRODUCTS = ((), (), ("Tesla V100",), ("Tesla P100",))
RECOVER_S = 30.0
"""Of every policy; without one it is longer."""
SETTLED_S = 20.0
"""Long enough for every watcher of the agent to have looked, and for a container that was not ready to ask again."""


def _spec(
    mode: Mode,
    replicas: int,
    isolation: Isolation,
    packing: Packing,
    several: bool,
    on_change: OnChange,
    resource: str,
    products: tuple[str, ...],
) -> GPUSharingPolicySpec:
    more: dict[str, Any] = {} if mode is Mode.EXCLUSIVE else {"replicas": replicas}
    return GPUSharingPolicySpec.model_validate(
        {
            "mode": mode,
            "isolation": isolation,
            "packing": packing,
            "severalGPUs": several and mode is not Mode.MPS,
            "onChange": on_change,
            "resourceName": resource,
            "products": products,
            "health": {"recoverAfter": f"{RECOVER_S:g}s"},
            **more,
        }
    )


specs = st.builds(
    _spec,
    st.sampled_from((Mode.MPS, Mode.MPS, Mode.TIME_SLICING, Mode.EXCLUSIVE)),
    st.sampled_from((4, 3, 6)),
    st.sampled_from(Isolation),
    st.sampled_from(Packing),
    st.booleans(),
    st.sampled_from(OnChange),
    st.sampled_from((RESOURCE,) * 15 + (OTHER,)),
    st.sampled_from(PRODUCTS),
)
containers = st.builds(
    lambda asks, kind, uuid, resource: Container("", asks, kind, ((uuid, asks),) if uuid and asks else (), resource),
    st.sampled_from((1, 1, 2, 2, 3, 0)),
    st.sampled_from((Kind.APP, Kind.APP, Kind.INIT, Kind.SIDECAR)),
    st.sampled_from((None,) * 8 + UUIDS + ("GPU-of-another-node",)),
    st.sampled_from((RESOURCE,) * 15 + (OTHER,)),
)
seldom = st.sampled_from((False, False, False, True))
faults = st.sampled_from(("cluster_away", "watch_lags", "nvml_hangs", "disk_full", "mps_stuck"))
IGNORED_XID = 13
downtimes_s = st.sampled_from((TICK_S, 1.0, 20.0, 2 * PENDING_S))


class End(StrEnum):
    """Who, and how."""

    AGENT_IN_CALL = "agent in call"
    AGENT_KILLED = "agent killed"
    AGENT_TERMINATED = "agent terminated"
    KUBELET = "kubelet"
    BOTH = "both"


class AgentMachine(RuleBasedStateMachine):
    """One node with an agent; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.directory = tempfile.TemporaryDirectory(prefix="meshctl-")
        self.names = 0
        self.struck: dict[str, tuple[float, AgentRun]] = {}
        """GPU -> when its last critical XID came, and who heard of it."""

    @initialize(
        seed=st.integers(0, 2**16), slow=st.booleans(), counts=st.booleans(), first=specs, second=st.none() | specs
    )
    def begun(
        self, seed: int, slow: bool, counts: bool, first: GPUSharingPolicySpec, second: GPUSharingPolicySpec | None
    ) -> None:
        self.site = Site(
            self.loop,
            Path(self.directory.name),
            GPUS,
            Random(seed),  # noqa: S311 (nothing here is a secret)
            (0.0, 0.0, TICK_S, 4 * TICK_S) if slow else (0.0,),
            counts,
        )
        self.site.kubelet.pick = lambda ids, count: self.site.dice.sample(ids, min(count, len(ids)))
        for name, spec in (("one", first), ("two", second)):
            if spec is not None:
                self.site.policies[name] = Policy(name, spec, 1, name)
        self.site.start_agent()
        self.go(self.site.delay())
        self.passes(1.0)

    def go(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(work)

    async def moment(self) -> None:
        """Some time, or none."""
        await self.site.delay()

    # --------------------------------------------------------------------------------------------------- what happens

    @rule(passed_s=st.sampled_from((TICK_S, 0.25, 1.0, 5.0, SETTLED_S, SETTLED_S, 2 * PENDING_S)))
    def passes(self, passed_s: float) -> None:
        self.go(_sleep(passed_s))
        if passed_s >= SETTLED_S:
            self.what_is_settled(passed_s)

    @precondition(lambda self: not self.site.cluster_away)
    @rule(namespace=st.sampled_from("xxy"), asked=st.lists(containers, min_size=1, max_size=3))
    def bound(self, namespace: str, asked: list[Container]) -> None:
        """A pod comes to the node."""
        self.names += 1
        inits_first = sorted(asked, key=lambda one: one.kind is Kind.APP)
        made = tuple(one._replace(name=f"c{place}") for place, one in enumerate(inits_first))
        pod = Pod(namespace, f"p{self.names}", made, f"2026-01-01T00:{self.names // 2:04}Z")
        self.site.pods[pod] = pod.object()
        self.site.waiting.append(pod)
        self.site.hear()

    @precondition(lambda self: self.site.waiting and self.site.knows_pods and not self.site.admitting)
    @rule(which=st.integers(0, 3), falls=seldom, wait=st.booleans())
    def admitted(self, which: int, falls: bool, wait: bool) -> None:
        """The kubelet begins to admit a pod; other things may happen before it is done."""
        self.site.begin(self.site.waiting[which % len(self.site.waiting)], falls=falls)
        if wait:
            self.go(self.site.idle())

    @precondition(lambda self: not self.site.cluster_away)
    @rule(namespace=st.sampled_from("xxy"), asked=containers, falls=seldom)
    def ran_too(self, namespace: str, asked: Container, falls: bool) -> None:
        """Twice as often as anything else."""
        self.ran(namespace, asked, falls)

    @precondition(lambda self: not self.site.cluster_away)
    @rule(namespace=st.sampled_from("xxy"), asked=containers, falls=seldom)
    def ran(self, namespace: str, asked: Container, falls: bool) -> None:
        """A small pod comes, and is admitted as soon as everybody is there."""
        self.go(self.site.until_up())
        self.bound(namespace, [asked])
        if self.site.knows_pods and not self.site.admitting:
            self.admitted(len(self.site.waiting) - 1, falls, True)

    @precondition(lambda self: self.site.knows_pods and self.site.settled_pods())
    @rule(which=st.integers(0, 9), gone=st.booleans())
    def ended(self, which: int, gone: bool) -> None:
        """A pod ends; `gone`: it is deleted, too."""
        pods = self.site.settled_pods()
        pod = pods[which % len(pods)]
        self.site.end_pod(pod)
        if gone and not self.site.cluster_away:
            del self.site.pods[pod]
            self.site.hear()

    @rule(end=st.sampled_from(End), down_s=downtimes_s, steps=st.integers(0, 24), away=seldom)
    def somebody_ends(self, end: End, down_s: float, steps: int, away: bool) -> None:
        """The agent or the kubelet, and starts again. `steps` into the agent's next call: before it knows the pods,
        before the disk, between the disk and the answer. `away`: the API server goes, too."""
        self.site.cluster_away |= away
        match end:
            case End.AGENT_IN_CALL:
                self.site.crash_in = steps
            case End.AGENT_KILLED:
                self.go(self.site.crash(down_s=down_s))
            case End.AGENT_TERMINATED:
                self.go(self.site.stop_agent(down_s))
            case End.KUBELET if self.site.kubelet_up:
                self.go(self.site.kill_kubelet(down_s))
            case End.BOTH if self.site.kubelet_up:
                self.go(self.site.kill_kubelet(down_s))
                self.go(self.site.crash(down_s=TICK_S))

    @rule(fault=faults, there=seldom)
    def fault_comes_or_goes(self, fault: str, there: bool) -> None:
        setattr(self.site, fault, there)
        self.site.hear()

    @rule(uuid=st.sampled_from((*UUIDS, None)), code=st.sampled_from((79, 48, 13)))
    def xid(self, uuid: str | None, code: int) -> None:
        self.site.xid(code, uuid)
        self.go(_sleep(TICK_S))
        run = self.site.run
        if code != IGNORED_XID and run is not None and run.agent is not None:
            known = run.agent.node.cards  # of others no event comes: NVML watches what it was told to
            self.struck |= {one: (self.loop.time(), run) for one in UUIDS if uuid in (None, one) and one in known}

    @rule(uuid=st.sampled_from(UUIDS), there=seldom)
    def lost_or_back(self, uuid: str, there: bool) -> None:
        self.site.lost = self.site.lost | {uuid} if there else self.site.lost - {uuid}

    @precondition(lambda self: not self.site.cluster_away)
    @rule(name=st.sampled_from(("one", "one", "two")), spec=specs | specs | specs | specs | st.none())
    def policy(self, name: str, spec: GPUSharingPolicySpec | None) -> None:
        """Another one, or none."""
        old = self.site.policies.pop(name, None)
        if spec is not None:
            self.site.policies[name] = Policy(name, spec, 1 + (old.generation if old else 0), name)
        self.site.hear()

    @precondition(lambda self: self.site.daemons)
    @rule(which=st.integers(0, 2))
    def daemon_died(self, which: int) -> None:
        daemons = sorted(self.site.daemons)
        self.site.kill_daemon(daemons[which % len(daemons)])

    # ------------------------------------------------------------------------------------------------ what always holds

    @property
    def agent(self) -> Agent | None:
        """One that knows who holds what: every pod that the API server says is running was shown once."""
        run = self.site.run
        return (
            run.agent if run is not None and run.agent is not None and run.agent.node.unshown == frozenset() else None
        )

    @invariant()
    def everything_holds(self) -> None:
        self.nothing_went_wrong()
        self.what_is_in_use_is_known()
        self.a_promise_is_kept()
        self.shares_are_whole()
        self.no_tenant_meets_another()
        self.the_rebuilt_ledger_is_the_live_one()
        self.slots_of_a_gpu_are_well_or_ill_together()
        self.an_xid_counts()

    def nothing_went_wrong(self) -> None:
        assert self.site.violations == [], self.site.violations
        assert self.loop.unhandled == [], self.loop.unhandled

    def what_is_in_use_is_known(self) -> None:
        """No slot that somebody has is free to the agent; and no agent takes a GPU for empty that is not."""
        if (run := self.site.run) is not None and run.agent is not None:
            assert not [uuid for uuid in run.agent.node.cards if run.agent.node.empty(uuid) and self.site.users(uuid)]
        if (agent := self.agent) is not None:
            known = {str(slot) for slot in agent.node.ledger.held.keys() | agent.node.ledger.pending.keys()}
            unknown = sorted(self.site.kubelet.used - known)
            assert not unknown, (unknown, agent.node.ledger, agent.parts.world.pods())

    def a_promise_is_kept(self) -> None:
        """Nothing that a container was told changes while it is there: not its limits, not how its GPU is shared."""
        if (agent := self.agent) is None:
            return
        shared = agent.node.shared(0.0)
        for pod, container, ids in self.site.holders():
            if container.kind is Kind.INIT:
                continue  # its slots are another container's by now
            answer, sharings = self.site.promised[min(ids)]
            now = response(list(map(Slot.parse, ids)), shared, agent.parts.mps.pipe_directory)
            assert now == answer, (pod.name, container.name)
            for uuid, sharing in sharings.items():
                card = agent.node.cards[uuid]
                assert _hard(card.sharing) == _hard(sharing), (pod.name, uuid)

    def shares_are_whole(self) -> None:
        """The containers of a GPU have no more of its threads together than there are."""
        threads = dict.fromkeys(UUIDS, 0)
        for _, container, ids in self.site.holders():
            envs = self.site.promised[min(ids)][0].envs
            if container.kind is not Kind.INIT and "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" in envs:
                threads[Slot.parse(min(ids)).uuid] += int(envs["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"])
        assert max(threads.values()) <= 100, threads

    def no_tenant_meets_another(self) -> None:
        """By what the GPU's first container was promised."""
        tenants: dict[str, set[str]] = {}
        for pod, _, ids in self.site.holders():
            for uuid, sharing in self.site.promised[min(ids)][1].items():
                if sharing is not None and sharing.isolation is Isolation.TENANT:
                    tenants.setdefault(uuid, set()).add(pod.namespace)
        assert all(len(names) == 1 for names in tenants.values()), tenants

    def the_rebuilt_ledger_is_the_live_one(self) -> None:
        """After a crash now, and the kubelet's next listing, when the API server has heard from the kubelet."""
        agent, site = self.agent, self.site
        if agent is None or not site.knows_pods or site.saved is None:
            return
        now_s = agent.parts.clock.now_s()
        if site.saved != agent.node.saved(now_s):
            return
        again = Node.restored(agent.parts.checkpoint.load(now_s))
        pods = {*site.kubelet.pods, *site.waiting}
        tickets = [ticket for pod in pods for ticket in tickets_of(site.pods[pod], agent.node.resources()).tickets]
        again.found([card.gpu for card in agent.node.cards.values() if card.present])
        live = Node(agent.node.cards, agent.node.ledger)
        for node in (live, again):
            node.listed(site.kubelet.listing(), now_s, tickets)
        assert again.ledger.held == live.ledger.held
        assert again.ledger.pending.items() >= live.ledger.pending.items()
        alive = {ticket.owner for ticket in tickets}  # what was promised to others, a new run may free a minute later
        for slot in again.ledger.pending.keys() - live.ledger.pending.keys():
            assert not again.ledger.pending[slot].owners & alive, slot
        assert {uuid: card.sharing for uuid, card in again.cards.items()} == {
            uuid: card.sharing for uuid, card in live.cards.items()
        }

    def slots_of_a_gpu_are_well_or_ill_together(self) -> None:
        """But for one that drains: what is free of it is withdrawn."""
        agent, run = self.agent, self.site.run
        if agent is None or run is None or not self.site.kubelet_up:
            return
        for uuid, card in agent.node.cards.items():
            if any(run.telling.get(resource) != agent.devices(resource) for resource in agent.node.offered()):
                continue  # it hears of a change in a moment
            healthy, every = self.offered(uuid), _slots(card)
            drained = every & {str(Slot(uuid, number)) for number in agent.node.ledger.used(uuid)}
            assert healthy in (frozenset(), every, drained if card.drains else every), uuid

    def an_xid_counts(self) -> None:
        """A GPU with a critical XID has no slots to give until it has recovered."""
        for uuid, (at_s, run) in self.struck.items():
            if self.site.run is run and self.loop.time() < at_s + RECOVER_S - 1.0:
                assert not self.offered(uuid), uuid

    def offered(self, uuid: str) -> frozenset[str]:
        """What the kubelet may give of the GPU."""
        every = frozenset().union(*self.site.kubelet.healthy.values())
        return frozenset(text for text in every if Slot.parse(text).uuid == uuid)

    def what_is_settled(self, passed_s: float) -> None:
        """Nothing but time has passed for a while."""
        run, now_s = self.site.run, self.loop.time()
        if run is None or run.agent is None or now_s - run.began_s < SETTLED_S:
            return
        for uuid in UUIDS:
            if uuid in self.site.lost or self.site.nvml_hangs:
                assert not self.offered(uuid), uuid

    def teardown(self) -> None:
        """When everything is well again and everybody has ended, nothing is left, and all slots are there."""
        try:
            if hasattr(self, "site"):
                self.go(self.well_again())
                self.nothing_is_left()
        finally:
            if hasattr(self, "site"):
                self.go(self.site.end())
            self.loop.close()
            self.directory.cleanup()

    async def well_again(self) -> None:
        site = self.site
        site.cluster_away = site.watch_lags = site.nvml_hangs = site.disk_full = site.mps_stuck = False
        site.crash_in = None
        site.lost.clear()
        site.hear()
        await site.until_up()
        await site.idle()
        await _sleep(SETTLED_S)  # what was about to happen happens
        await site.until_up()
        await site.idle()
        for pod in site.waiting:
            del site.pods[pod]
        for pod in site.settled_pods():
            site.end_pod(pod)
        site.hear()
        await _sleep(2 * PENDING_S)

    def nothing_is_left(self) -> None:
        agent, site = self.agent, self.site
        assert agent is not None
        assert agent.node.ledger == Ledger()
        assert site.violations == []
        assert self.loop.unhandled == [], self.loop.unhandled
        assert site.saved == agent.node.saved(agent.parts.clock.now_s())
        assert agent.problems() == (), agent.problems()
        by_mps = set()
        for uuid, card in agent.node.cards.items():
            assert _hard(card.sharing) == _hard(card.wanted.sharing), uuid
            assert self.offered(uuid) == _slots(card), uuid
            if card.by_mps:
                by_mps.add(uuid)
        assert site.daemons == by_mps


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _hard(sharing: Any) -> object:
    return None if sharing is None else [getattr(sharing, name) for name in HARD]


def _slots(card: Card) -> frozenset[str]:
    count = card.sharing.replicas if card.sharing is not None else 0
    return frozenset(str(Slot(card.gpu.uuid, number)) for number in range(count))


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_comes_nothing_is_given_twice_and_nothing_leaks(part: int) -> None:
    """Pods, policies, crashes, XIDs, lost GPUs, daemons that die, a disk that is full, an API server that is away.

    The same sequences in every run, so that it fails for nobody by chance; MESHCTL_SEED draws others.
    """
    machine = seed(int(os.environ.get("MESHCTL_SEED", "0")) * PARTS + part)(type("Part", (AgentMachine,), {}))
    with capture_logs():
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=SEQUENCES // PARTS, stateful_step_count=30, deadline=None),
        )


def test_a_watch_of_the_pods_that_hangs_frees_nothing() -> None:
    """A silent watch is broken off after 90 s only: what an init container was given meanwhile stays its pod's."""
    machine = AgentMachine()
    spec = _spec(Mode.TIME_SLICING, 4, Isolation.NONE, Packing.PACKED, False, OnChange.WAIT, RESOURCE, ())
    with capture_logs():
        machine.begun(0, False, False, spec, None)
        machine.site.watch_lags, machine.site.lag_s = True, 80.0
        machine.ran("x", Container("", 2, Kind.INIT), False)
        try:
            machine.passes(SETTLED_S)
            machine.everything_holds()
        finally:
            machine.teardown()


def test_a_disk_that_has_room_again_is_no_problem_any_more() -> None:
    """Though what could not be written, an XID that has passed, need not be written any more."""
    machine = AgentMachine()
    spec = _spec(Mode.TIME_SLICING, 4, Isolation.NONE, Packing.PACKED, False, OnChange.WAIT, RESOURCE, ())
    with capture_logs():
        machine.begun(0, False, True, spec, None)
        try:
            machine.site.disk_full = True
            machine.xid("GPU-a", 79)
            machine.passes(2 * PENDING_S)
            assert machine.agent is not None
            assert [problem.where for problem in machine.agent.problems()] == ["checkpoint"]
            machine.site.disk_full = False
            machine.passes(SETTLED_S)
            assert machine.agent.problems() == ()
        finally:
            machine.teardown()
