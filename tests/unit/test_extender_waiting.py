"""Pods that fit nowhere: whom the scheduler is made to try again, and how often."""

from __future__ import annotations

from itertools import pairwise

from meshctl.extender.ports import PodId
from meshctl.extender.waiting import FIRST_S, LONGEST_S, LOOKS, Waiting

A, B = (PodId("team", name, f"uid-{name}") for name in "ab")


def refused(*pods: PodId) -> Waiting:
    """At 0 s."""
    waiting = Waiting()
    for pod in pods:
        waiting.refused(pod, 0.0)
    return waiting


def test_who_has_room_now_is_woken_and_nobody_else() -> None:
    """Not before the scheduler had time to try it again by itself."""
    waiting = refused(A, B)
    assert waiting.wake(FIRST_S / 2, lambda _: True) == []
    assert waiting.wake(FIRST_S, lambda pod: pod == B) == [B]
    assert len(waiting) == 2


def test_who_waits_no_more_is_forgotten() -> None:
    """It is on a node, or gone: nothing is written to it, and nothing kept of it."""
    waiting = refused(A, B)
    assert waiting.wake(FIRST_S, lambda pod: None if pod == A else False) == []
    assert len(waiting) == 1


def test_who_is_woken_in_vain_is_woken_half_as_often_each_time() -> None:
    """The scheduler may have reasons of its own against nodes with room. To be refused again makes no difference."""
    waiting, woken = refused(A), []
    for now_s in range(3000):
        if waiting.wake(now_s, lambda _: True):
            woken.append(now_s)
            waiting.refused(A, now_s)
    pauses = [later - before for before, later in pairwise(woken)]
    assert pauses[:4] == [2, 4, 8, 16]
    assert set(pauses[8:]) == {LONGEST_S}


def test_a_round_looks_at_few_and_comes_to_all() -> None:
    """Those that were not looked at come first the next time."""
    pods = [PodId("team", str(index), str(index)) for index in range(2 * LOOKS + 1)]
    waiting, looked = refused(*pods), []

    def no(pod: PodId) -> bool:
        looked.append(pod)
        return False

    for rounds in range(1, 4):
        waiting.wake(FIRST_S, no)
        assert len(looked) == rounds * LOOKS
    assert set(looked) == set(pods)
