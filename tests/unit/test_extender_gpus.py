"""A GPU object as placement sees it."""

from __future__ import annotations

from typing import Any

import pytest

from meshctl.core.packing.vocabulary import Device
from meshctl.extender.gpus import Holding, card_of
from meshctl.extender.views import VIEWS
from meshctl.ports import ObjectKey
from tests.harness.gpus import condition, gpu_object, unhealthy

DRAINS = condition("Shared", "False", "Draining", "waits for team-a/p[c] to end; until then no new container")
WAITS = condition("Shared", "False", "WaitingForPods", "waits for team-a/p[c] to end; until then MPS, 10 slots")
CHANGES = condition("Shared", "False", "Changing", "in a moment: Exclusive, 1 slot")
WELL = condition("Healthy", "True", "Healthy", "")
WITHDRAWN = {"total": 10, "used": 3, "free": 0, "unavailable": 7}
FULL = {"total": 3, "used": 3, "free": 0, "unavailable": 0}


def device(**status: Any) -> Device | None:
    """The same from the whole object and from what is kept of it."""
    raw = gpu_object("n", "GPU-A", **status)
    found = card_of(raw)
    assert card_of(VIEWS["GPU"].kept(raw)) == found
    assert (found.uuid, found.node) == ("GPU-A", "n")
    return found.device


def test_a_shared_gpu_is_a_device_named_as_gpu_discovery_names_it() -> None:
    """NVML writes spaces, ModelProfiles and labels hyphens."""
    assert device() == Device("GPU-A", 10, "Tesla-V100-SXM2-16GB")
    said = {"severalGPUs": True, "isolation": "Tenant", "resourceName": "example.com/large", "product": None}
    assert device(mode="TimeSlicing", **said) == Device(
        "GPU-A", 10, "", "example.com/large", isolated=True, several=True
    )


@pytest.mark.parametrize("status", [{"mode": None, "slots": None}, {"slots": None}, {"mode": None}])
def test_a_gpu_that_no_policy_is_for_has_no_slots(status: dict[str, Any]) -> None:
    """Even where a container still holds some."""
    assert device(**status) is None


def test_a_gpu_of_which_the_agent_said_nothing_yet_has_no_slots() -> None:
    """The object is written before its status."""
    raw = {name: value for name, value in gpu_object("n", "GPU-A").items() if name != "status"}
    assert card_of(raw).device is None
    assert card_of(VIEWS["GPU"].kept(raw)).device is None


@pytest.mark.parametrize(
    ("status", "closed"),
    [
        ({}, ""),
        ({"slots": FULL}, ""),
        ({"conditions": [WELL, WAITS]}, ""),
        (unhealthy(10, 3, "Xid", "Xid 79: gone"), "unhealthy: Xid: Xid 79: gone"),
        ({"slots": FULL, "conditions": unhealthy(3, 3, "Lost", "")["conditions"]}, "unhealthy: Lost"),
        ({"conditions": [WELL, DRAINS], "slots": FULL}, f"withdrawn: Draining: {DRAINS['message']}"),
        ({"conditions": [WELL, CHANGES], "slots": WITHDRAWN}, "withdrawn: Changing: in a moment: Exclusive, 1 slot"),
        ({"slots": WITHDRAWN}, "withdrawn for a moment"),
    ],
)
def test_a_gpu_that_gives_no_slots_says_why(status: dict[str, Any], closed: str) -> None:
    """Unhealthy, draining, changing; not one that waits for its pods and goes on as before, nor one that is full."""
    found = device(**status)
    assert found is not None
    assert found.closed == closed


def test_long_words_are_cut() -> None:
    """They are shown with each pod that waits."""
    found = device(**unhealthy(10, 0, "Xid", "x" * 1000))
    assert found is not None
    assert len(found.closed) < 250


def test_holders_are_pods_by_name_and_their_slots() -> None:
    """Two containers of one pod; what is promised is in `used` alone."""
    slots = {"total": 10, "used": 6, "free": 4, "unavailable": 0}
    raw = gpu_object("n", "GPU-A", 10, [("ns", "p", "a", [0, 1]), ("ns", "p", "b", [4])], slots=slots)
    card, pod = card_of(raw), ObjectKey("Pod", "ns", "p")
    assert card.holdings == (Holding(pod, "a", frozenset({0, 1})), Holding(pod, "b", frozenset({4})))
    assert card.used == 6
    assert card_of(VIEWS["GPU"].kept(raw)) == card
