"""What holds of every GPU object, whatever the agent knows; and of the choice of a policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deviceplugin.ledger import Ledger, Pending
from deviceplugin.objects import Seen, acted_on, gpu_object, notices, said, stamped
from deviceplugin.policies import Policy, Refusal, Wanted, wanted
from meshctl.api.gpu import GPU
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec
from meshctl.sharing import Gpu, Health, Isolation, Mode, MpsPhase, MpsStatus, Owner, Sharing, Slot

UUID = "GPU-1"
words = st.text(max_size=1500)
reasons = st.sampled_from(["Xid", "ProbeFailed", "Lost", "MpsFailed", "Recovering"])
sharings = st.builds(
    Sharing,
    st.sampled_from(["one", "two"]),
    st.integers(0, 3),
    mode=st.sampled_from(Mode),
    replicas=st.integers(1, 100),
    isolation=st.sampled_from(Isolation),
)
policies = st.builds(
    Policy,
    st.sampled_from("abcdef"),
    st.builds(
        GPUSharingPolicySpec,
        nodeSelector=st.dictionaries(st.sampled_from(["pool", "zone"]), st.sampled_from("xy"), max_size=2),
        products=st.lists(st.sampled_from(["T4", "V100"]), max_size=2, unique=True),
        priority=st.integers(-1, 1),
        replicas=st.sampled_from([None, 1, 48, 49, 60]),
    ),
    st.integers(0, 3),
    st.sampled_from(["", "2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z"]),
)


def _wanted(sharing: Sharing | None, refusal: Refusal | None, message: str) -> Wanted:
    if refusal is not None:
        return Wanted(None, "one", 1, refusal, message, ("two",))
    return Wanted() if sharing is None else Wanted(sharing, sharing.policy, sharing.generation, None, message)


gpus = st.builds(
    Gpu, st.just(UUID), st.text(max_size=200), st.integers(0, 1 << 40), st.tuples(st.integers(3, 12), st.integers(0, 9))
)
seen_gpus = st.builds(
    Seen,
    gpu=gpus,
    driver=st.text(max_size=100),
    sharing=st.none() | sharings,
    wanted=st.builds(_wanted, st.none() | sharings, st.none() | st.sampled_from(Refusal), words),
    withdrawn=st.booleans(),
    health=st.just(Health()) | st.builds(Health, st.just(False), reasons, words),
    mps=st.builds(MpsStatus, st.sampled_from(MpsPhase), clients=st.none() | st.integers(0, 60), message=words),
    over=st.none() | words,
)
owners = st.builds(Owner, st.sampled_from(["a", "b"]), st.sampled_from(["p", "q"]), st.just("c"))


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Slots 0 .. 99 of the GPU; other GPUs' are there too."""
    slots = draw(st.dictionaries(st.integers(0, 99), st.none() | owners, max_size=12))
    held = {Slot(UUID, number): owner for number, owner in slots.items() if owner is not None}
    promised = Pending(0.0, draw(st.frozensets(st.sampled_from(["a", "b"]))))
    pending = {Slot(UUID, number): promised for number, owner in slots.items() if owner is None}
    return Ledger({Slot("GPU-2", 0): Owner("z", "z", "z"), **held}, pending)


@given(seen_gpus, ledgers())
def test_a_gpu_object_is_valid_and_its_slots_add_up(seen: Seen, ledger: Ledger) -> None:
    """By the API's model, which is the CRD's; every slot in use counts, and none is given that is not there."""
    value = stamped(gpu_object("node", "", seen, ledger), {}, "2026-01-01T00:00:00Z")
    status = GPU.model_validate(value).status
    assert status is not None
    used = len(ledger.used(UUID))
    slots = status.slots
    assert (slots is None) == (seen.sharing is None and not used)
    if slots is not None:
        assert slots.used == used
        assert slots.total == used + slots.free + slots.unavailable
        assert slots.free == 0 or (seen.health.healthy and not seen.withdrawn and seen.sharing is not None)
    assert {owner.namespace for owner in status.holders or ()} <= {"a", "b"}


@given(seen_gpus, ledgers(), seen_gpus, ledgers())
def test_what_is_not_written_is_not_told(one: Seen, first: Ledger, two: Seen, then: Ledger) -> None:
    """Two statuses that say the same have no Event between them, and each step has at most one per condition."""
    old = stamped(gpu_object("node", "", one, first), {}, "2026-01-01T00:00:00Z")["status"]
    same: dict[str, Any] = stamped(gpu_object("node", "", one, first), old, "2027-01-01T00:00:00Z")["status"]
    assert said(old) == said(same)
    assert notices(old, same) == ()
    new = stamped(gpu_object("node", "", two, then), old, "2027-01-01T00:00:00Z")["status"]
    if acted_on(old) == acted_on(new):
        assert notices(old, new) == ()
    assert len(notices(old, new)) <= 3


@given(st.lists(policies, max_size=6), gpus, st.permutations(range(6)))
def test_one_policy_wins_whatever_their_order(found: list[Policy], gpu: Gpu, order: list[int]) -> None:
    """It is one that selects the GPU, and no other that does has a higher priority."""
    labels = {"pool": "x", "zone": "y"}
    gpu = replace(gpu, product="K80")
    won = wanted(gpu, "node", labels, found)
    assert wanted(gpu, "node", labels, [found[i] for i in order if i < len(found)]).policy == won.policy
    for_it = [p for p in found if p.spec.node_selector.items() <= labels.items() and not p.spec.products]
    assert bool(won.policy) == bool(for_it)
    if for_it:
        assert len(won.others) == len(for_it) - 1
        assert max(p.spec.priority for p in for_it) in {p.spec.priority for p in for_it if p.name == won.policy}
