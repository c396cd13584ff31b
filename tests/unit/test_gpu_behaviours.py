"""The behaviours of GPU sharing that people miss elsewhere, by their numbers: a test each, of what is decided.

Not here: 15 and 16 of the scheduler extender (Filter, Bind), which come with it, and the refusal of 19, which is the
ValidatingAdmissionPolicy's and is tested on a real API server; here is what the agent makes of a forged annotation that
came through all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from deviceplugin.allocate import Reason, RefusedSlotsError, Shared, check, prefer
from deviceplugin.health import GpuHealth
from deviceplugin.ledger import PENDING_S, Ledger
from deviceplugin.policies import Policy, Refusal, wanted
from deviceplugin.tickets import candidates, hidden, tickets_of
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec
from meshctl.sharing import RESOURCE, Gpu, HealthRules, Mode, Owner, Packing, Sharing, Slot, Ticket
from tests.harness.model_kubelet import Container, Kind, ModelKubelet, Pod, Preferred, answered


def node(*uuids: str, replicas: int = 4, open_: bool = True, **sharing: Any) -> dict[str, Shared]:
    return {
        uuid: Shared(Gpu(uuid, "Tesla V100", 16 << 30, (7, 0)), Sharing("p", replicas=replicas, **sharing), open_)
        for uuid in uuids or ("GPU-a", "GPU-b")
    }


def slots(uuid: str, *numbers: int) -> list[str]:
    return [str(Slot(uuid, number)) for number in numbers]


def preferred(
    gpus: Mapping[str, Shared],
    size: int,
    available: Sequence[str] | None = None,
    *,
    must: Sequence[str] = (),
    tickets: Sequence[Ticket] = (),
) -> list[str]:
    """Of all slots, unless `available` says which are free."""
    every = [text for uuid, one in gpus.items() for text in slots(uuid, *range(one.sharing.replicas))]
    return prefer(RESOURCE, gpus, every if available is None else available, must, size, Ledger(), tickets)


def reason(*args: Any, **more: Any) -> Reason:
    with pytest.raises(RefusedSlotsError) as caught:
        preferred(*args, **more)
    return caught.value.reason


def test_01_two_of_two_gpus_spread_are_one_and_one() -> None:
    """Two GPUs x 4 slots, ask 2."""
    gpus = node(packing=Packing.SPREAD, several_gpus=True)
    assert preferred(gpus, 2) == [*slots("GPU-a", 0), *slots("GPU-b", 0)]


def test_02_two_packed_are_of_the_same_gpu() -> None:
    """Also where a container might have several."""
    assert preferred(node(), 2) == preferred(node(several_gpus=True), 2) == slots("GPU-a", 0, 1)


def test_03_five_packed_are_refused_when_a_gpu_has_four() -> None:
    """4 + 1 only where the policy allows several GPUs."""
    assert reason(node(), 5) is Reason.SEVERAL_GPUS
    assert preferred(node(several_gpus=True), 5) == [*slots("GPU-a", 0, 1, 2, 3), *slots("GPU-b", 0)]


def test_04_a_must_include_id_is_kept() -> None:
    """On the GPU that packing would not have taken, and not the lowest of it."""
    assert preferred(node(), 2, must=slots("GPU-b", 3)) == slots("GPU-b", 0, 3)


def test_05_too_few_is_an_error_and_changes_nothing() -> None:
    """What was asked with is as it was, and the next one gets what there is."""
    gpus, offer = node(), slots("GPU-a", 1)
    before = (dict(gpus), list(offer))
    assert reason(gpus, 2, offer) is Reason.TOO_FEW
    assert (gpus, offer) == before
    assert preferred(gpus, 1, offer) == offer


def test_06_half_a_gpu_goes_to_another_than_the_one_that_is_used_to_six_tenths() -> None:
    """Though the node would have room for it twice."""
    gpus = node(replicas=10)
    offer = [*slots("GPU-a", 6, 7, 8, 9), *slots("GPU-b", *range(10))]
    assert preferred(gpus, 5, offer) == slots("GPU-b", 0, 1, 2, 3, 4)


def test_07_three_of_two_and_two_are_refused() -> None:
    """Four are free, on two GPUs."""
    assert reason(node(), 3, [*slots("GPU-a", 0, 1), *slots("GPU-b", 2, 3)]) is Reason.NO_ROOM


def test_08_two_containers_that_need_different_cards_get_them() -> None:
    """10 GiB and 1 GiB on 10-GiB cards of 1 GiB slots: after the first its card is full."""
    kubelet, gpus, ledger = ModelKubelet(), node(replicas=10), Ledger()
    kubelet.healthy[RESOURCE] = frozenset(text for uuid in gpus for text in slots(uuid, *range(10)))

    def plugin(call: Any) -> list[str]:
        if isinstance(call, Preferred):
            return prefer(RESOURCE, gpus, call.available, call.must, call.size, ledger, ())
        check(RESOURCE, gpus, [call.ids], ledger, ())
        return []

    assert answered(kubelet.admit(Pod("x", "p", (Container("big", 10), Container("small", 1)))), plugin) == ""
    assert {owner.container: slot.uuid for slot, owner in kubelet.listing().items()} == {
        "big": "GPU-a",
        "small": "GPU-b",
    }


def test_09_the_demand_of_init_containers_is_a_peak() -> None:
    """3 for the init container, then 4 for the one behind it, on a GPU of 4: not 7; and it goes where 4 have room."""
    kubelet, gpus, ledger = ModelKubelet(), node(), Ledger()
    kubelet.healthy[RESOURCE] = frozenset([*slots("GPU-a", 0, 1, 2), *slots("GPU-b", 0, 1, 2, 3)])
    pod = Pod("x", "p", (Container("fetch", 3, Kind.INIT), Container("main", 4)))
    tickets = tickets_of(pod.object(), [RESOURCE]).tickets

    def plugin(call: Any) -> list[str]:
        nonlocal ledger
        asked = call.size if isinstance(call, Preferred) else len(call.ids)
        asking = candidates(tickets, RESOURCE, asked, ledger)
        if isinstance(call, Preferred):
            return prefer(RESOURCE, gpus, call.available, call.must, call.size, ledger, asking)
        ledger = ledger.granted(check(RESOURCE, gpus, [call.ids], ledger, asking), 1.0)
        return []

    assert answered(kubelet.admit(pod), plugin) == ""
    assert kubelet.listing() == dict.fromkeys(
        [Slot("GPU-b", number) for number in range(4)], pod.owner(pod.containers[1])
    )
    assert ledger.observed(kubelet.listing(), 2.0, hidden(tickets)).used("GPU-b") == {0, 1, 2, 3}


def test_10_containers_without_gpus_keep_their_position() -> None:
    """The plan is by name: what a container is given does not move to its neighbour."""
    pod = Pod("x", "p", (Container("proxy", 0), Container("main", 1, plan=(("GPU-b", 1),)), Container("log", 0)))
    (ticket,) = tickets_of(pod.object(), [RESOURCE]).tickets
    assert (ticket.owner.container, dict(ticket.gpus)) == ("main", {"GPU-b": 1})
    assert preferred(node(), 1, tickets=[ticket]) == slots("GPU-b", 0)


def test_11_an_exclusive_ask_refuses_a_used_card() -> None:
    """A card in use has no slot to offer, and its neighbour is taken."""
    gpus = node(replicas=1, mode=Mode.EXCLUSIVE)
    assert preferred(gpus, 1, slots("GPU-b", 0)) == slots("GPU-b", 0)
    assert reason(gpus, 1, []) is Reason.EXCLUSIVE_IN_USE
    ticket = Ticket(Owner("x", "p", "main"), {"GPU-a": 1}, asked=1)
    assert reason(gpus, 1, slots("GPU-b", 0), tickets=[ticket]) is Reason.EXCLUSIVE_IN_USE


def test_12_a_mismatch_of_uuid_or_model_has_its_own_reason() -> None:
    """A GPU of another node; a GPU that is shared as another kind."""
    gpus = node("GPU-a") | node("GPU-b", resource="hpe.com/t4")
    elsewhere, other = (Ticket(Owner("x", "p", "main"), {uuid: 1}, asked=1) for uuid in ("GPU-z", "GPU-b"))
    assert reason(gpus, 1, tickets=[elsewhere]) is Reason.WRONG_GPU
    assert reason(gpus, 1, tickets=[other]) is Reason.WRONG_PRODUCT


def test_13_unhealthy_gpus_are_left_out_and_an_xid_marks_all_slots() -> None:
    """Every slot of the GPU, free or not; its neighbour stays."""
    ill = GpuHealth().xid(79, 1.0, HealthRules()).health(1.0, HealthRules())
    assert not ill.healthy
    gpus = node("GPU-a", open_=ill.healthy) | node("GPU-b")
    assert preferred(gpus, 1) == slots("GPU-b", 0)
    for number in range(4):
        with pytest.raises(RefusedSlotsError) as caught:
            check(RESOURCE, gpus, [slots("GPU-a", number)], Ledger(), ())
        assert caught.value.reason is Reason.UNHEALTHY


def test_14_an_xid_that_is_listed_as_critical_wins_over_ignored() -> None:
    """Over the policy's own list, and over those that applications cause."""
    rules = HealthRules(ignored_xids=frozenset({79}), critical_xids=frozenset({79, 13}))
    for code, healthy in ((79, False), (13, False), (31, True)):
        assert GpuHealth().xid(code, 1.0, rules).health(1.0, rules).healthy is healthy


def test_15_a_simulated_allocation_changes_nothing() -> None:
    """Asked twice, the answer is the same; nothing it was asked with is another."""
    gpus, ledger = node(), Ledger({Slot("GPU-a", 0): Owner("x", "old", "main")})
    kept = Ledger(dict(ledger.held), dict(ledger.pending))
    grants = check(RESOURCE, gpus, [slots("GPU-a", 1)], ledger, ())
    assert preferred(gpus, 2) == preferred(gpus, 2)
    assert check(RESOURCE, gpus, [slots("GPU-a", 1)], ledger, ()) == grants
    assert ledger == kept


def test_16_a_failed_allocation_leaves_no_reservation() -> None:
    """Not when it is refused half way, nor when it can't be written down, nor when its pod is refused afterwards."""
    gpus, ledger = node(), Ledger()
    with pytest.raises(RefusedSlotsError):
        check(RESOURCE, gpus, [slots("GPU-a", 0), slots("GPU-a", 9)], ledger, ())
    assert ledger == Ledger()
    (grant,) = check(RESOURCE, gpus, [slots("GPU-a", 0)], ledger, ())
    promised = ledger.granted([grant], 10.0)
    assert promised.withdrawn(grant.slots) == ledger
    assert promised.observed({}, 11.0 + PENDING_S) == ledger


def test_17_a_terminating_pod_stays_charged_and_a_terminal_one_is_released_once() -> None:
    """As long as the kubelet shows it; a second listing without it changes nothing more."""
    held = {Slot("GPU-a", 0): Owner("x", "ends", "main"), Slot("GPU-b", 0): Owner("x", "stays", "main")}
    charged = Ledger(held).observed(held, 1.0)
    assert charged.busy("GPU-a")
    left = {slot: owner for slot, owner in held.items() if slot.uuid == "GPU-b"}
    once = charged.observed(left, 2.0)
    assert once == once.observed(left, 3.0) == Ledger(left)


def test_18_the_ledger_rebuilt_after_a_restart_equals_the_live_one() -> None:
    """From the kubelet's listing and what was pending."""
    gpus, held = node(), {Slot("GPU-a", 0): Owner("x", "p", "main")}
    live = Ledger(held).granted(check(RESOURCE, gpus, [slots("GPU-b", 0)], Ledger(), ()), 5.0)
    assert Ledger(pending=live.pending).observed(held, 6.0) == live == live.observed(held, 6.0)


def test_19_a_forged_allocation_annotation_gains_nothing() -> None:
    """More slots than the container asks for, or those of a container that asks for none."""
    pod = Pod("x", "p", (Container("main", 1, plan=(("GPU-a", 4),)), Container("side", 0, plan=(("GPU-b", 1),))))
    found = tickets_of(pod.object(), [RESOURCE])
    assert [(ticket.asked, dict(ticket.gpus)) for ticket in found.tickets] == [(1, {})]
    assert len(found.problems) == 2


def test_20_49_replicas_at_a_client_cap_of_48_are_refused() -> None:
    """48 are not."""
    gpu = Gpu("GPU-a", "Tesla V100", 16 << 30, (7, 0))
    ways = {count: Policy("p", GPUSharingPolicySpec.model_validate({"replicas": count})) for count in (48, 49)}
    assert wanted(gpu, "node", {}, [ways[49]], "470.57").refusal is Refusal.TOO_MANY_REPLICAS
    given = wanted(gpu, "node", {}, [ways[48]], "470.57").sharing
    assert given is not None
    assert given.replicas == 48
