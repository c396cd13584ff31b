"""Pods that fit nowhere: whom the scheduler is made to try again, and how often."""

from __future__ import annotations

from itertools import pairwise

from meshctl.extender.ports import PodId
from meshctl.extender.waiting import FIRST_S, LONGEST_S, LOOKS, MOST_NAMES, WAKES, Names, Waiting

A, B, C = (PodId("team", name, f"uid-{name}") for name in "abc")


def refused(*pods: PodId) -> Waiting:
    """At 0 s."""
    waiting = Waiting()
    for pod in pods:
        waiting.refused(pod, 0.0)
    return waiting


def test_who_has_room_now_is_woken_and_nobody_else() -> None:
    """Not before the scheduler had time to try it again by itself."""
    waiting = refused(A, B)
    assert waiting.wake(FIRST_S / 2, lambda *_: True) == []
    assert waiting.wake(FIRST_S, lambda pod, _: pod == B) == [B]
    assert len(waiting) == 2


def test_who_waits_no_more_is_forgotten() -> None:
    """It is on a node, or gone: nothing is written to it, and nothing kept of it."""
    waiting = refused(A, B)
    assert waiting.wake(FIRST_S, lambda pod, _: None if pod == A else False) == []
    assert len(waiting) == 1


def test_who_is_woken_in_vain_is_woken_half_as_often_each_time() -> None:
    """The scheduler has reasons of its own against all nodes now, and asks about none."""
    waiting = refused(A)
    woken = [now_s for now_s in range(3000) if waiting.wake(now_s, lambda *_: True)]
    pauses = [later - before for before, later in pairwise(woken)]
    assert pauses[:4] == [2, 4, 8, 16]
    assert set(pauses[8:]) == {LONGEST_S}


def test_who_was_not_quick_enough_for_a_place_is_woken_for_the_next_one() -> None:
    """It was refused again, as another pod had the place: that is no reason to wait for five minutes."""
    waiting = refused(A)
    for now_s in range(1, 100):
        assert waiting.wake(now_s, lambda *_: True) == [A]
        waiting.refused(A, now_s)


def test_a_pod_waits_for_the_nodes_that_the_scheduler_asked_about() -> None:
    """Room elsewhere, which its node selector excludes, would wake it in vain. Others are kept apart."""
    waiting, asked = Waiting(), dict[PodId, list[str] | None]()

    def note(pod: PodId, names: Names) -> bool:
        found = names()
        asked[pod] = None if found is None else sorted(found)
        return False

    for pod, names in ((A, ["n2", "n1"]), (B, ["n3"]), (C, None)):
        waiting.refused(pod, 0.0, names)
    waiting.wake(FIRST_S, note)
    assert asked == {A: ["n1", "n2"], B: ["n3"], C: None}
    assert waiting.wake(FIRST_S, lambda *_: None) == []
    waiting.refused(A, 1.0, ["n4"])
    waiting.wake(1.0 + FIRST_S, note)
    assert asked[A] == ["n4"]


def test_names_of_nodes_that_are_no_more_are_forgotten_some_time() -> None:
    """One pod may wait for months while nodes come and go; then any node will do for it until it is refused again."""
    waiting, asked = Waiting(), list[int | None]()

    def note(_: PodId, names: Names) -> bool:
        found = names()
        asked.append(None if found is None else len(found))
        return False

    for part in range(3):
        waiting.refused(A, part * FIRST_S, [f"n{part}-{at}" for at in range(MOST_NAMES // 2)])
        waiting.wake(FIRST_S * (part + 1), note)
    waiting.wake(FIRST_S * 4, note)
    assert asked == [MOST_NAMES // 2] * 3 + [None]


def test_few_are_woken_at_a_time() -> None:
    """Of a thousand pods nearly all come too late for one place; who was not woken is next."""
    pods = [PodId("team", str(index), str(index)) for index in range(2 * WAKES)]
    waiting = refused(*pods)
    assert [waiting.wake(FIRST_S, lambda *_: True) for _ in range(3)] == [pods[:WAKES], pods[WAKES:], []]


def test_a_round_looks_at_few_and_comes_to_all() -> None:
    """Those that were not looked at come first the next time."""
    pods = [PodId("team", str(index), str(index)) for index in range(2 * LOOKS + 1)]
    waiting, looked = refused(*pods), []

    def no(pod: PodId, _: Names) -> bool:
        looked.append(pod)
        return False

    for rounds in range(1, 4):
        waiting.wake(FIRST_S, no)
        assert len(looked) == rounds * LOOKS
    assert set(looked) == set(pods)
