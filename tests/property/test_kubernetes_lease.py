"""The Lease's protocol under every delay, loss, crash and clock that a seed can think of: never two leaders."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.adapters.kubernetes.lease import Election, Move, Terms
from meshctl.adapters.kubernetes.store import WRITE_S

TERMS = Terms()
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
Raw = dict[str, Any]


class Server:
    """One Lease object, with versions."""

    def __init__(self) -> None:
        self.lease: Raw | None = None
        self._versions = count(1)

    def write(self, before: Raw | None, spec: Raw) -> Raw | None:
        """The object as it then is; None when it is not as it was in `before`."""
        if (before is None) != (self.lease is None):
            return None
        if before is not None and self.lease is not None and _version(before) != _version(self.lease):
            return None
        uid = self.lease["metadata"]["uid"] if self.lease else f"uid-{next(self._versions)}"
        self.lease = {"metadata": {"uid": uid, "resourceVersion": str(next(self._versions))}, "spec": spec}
        return self.lease


def _version(lease: Raw) -> str:
    return str(lease["metadata"]["resourceVersion"])


@dataclass
class Candidate:
    """`rate`: how fast its clock runs; `dead`: it was killed, or stopped in good order."""

    election: Election
    rate: float
    offset_s: float
    dead: bool = False
    busy: bool = False
    """A request is under way."""

    def clock_s(self, now_s: float) -> float:
        return now_s * self.rate + self.offset_s

    def leads(self, now_s: float) -> bool:
        return not self.dead and self.election.leads(self.clock_s(now_s))


class World:
    """Real time passes from event to event; every request takes its time both ways, or is lost on either."""

    def __init__(self, seed: int, candidates: int, loss: float = 0.0, slowest_s: float = 0.02) -> None:
        self.random = random.Random(seed)  # noqa: S311  # a repeatable simulation, nothing secret
        self.server = Server()
        self.now_s = 0.0
        self.loss, self.slowest_s = loss, slowest_s
        self.pauses_s: tuple[float, ...] = (0.0,)
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.candidates = [
            Candidate(Election(f"c{index}", TERMS), self.random.uniform(0.85, 1.2), self.random.uniform(0, 1e6))
            for index in range(candidates)
        ]
        self.leaders: list[str] = []
        self.resigned: set[str] = set()
        for candidate in self.candidates:
            self.after(self.random.uniform(0, 3), partial(self.round, candidate))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), event))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
            leading = [candidate.election for candidate in self.candidates if candidate.leads(self.now_s)]
            leaders = [election.identity for election in leading]
            assert len(leaders) <= 1, f"at {self.now_s:.3f} s {leaders} lead at once"
            if leaders and leaders != self.leaders[-1:]:
                assert not leading[0].released or self.leaders[-1] in self.resigned, (leaders, self.leaders)
                self.leaders += leaders
        self.now_s = until_s

    def request(self, candidate: Candidate, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """`do` happens at the server, `then` at the candidate, unless the time-out comes first (then it `failed`)."""
        there_s, back_s = (self.random.uniform(0, self.slowest_s) for _ in range(2))
        lost = [self.random.random() < self.loss for _ in range(2)]
        answered = there_s + back_s < TERMS.request_s and not any(lost)

        def arrive() -> None:
            answer = do()
            if answered:
                self.after(back_s, lambda: None if candidate.dead else then(answer))

        if not lost[0]:
            self.after(there_s, arrive)
        if not answered:
            self.after(TERMS.request_s, lambda: self.fail(candidate))

    def fail(self, candidate: Candidate) -> None:
        """A dead one does nothing any more."""
        candidate.election.failed()
        self.pause(candidate)

    def pause(self, candidate: Candidate) -> None:
        candidate.busy = False
        pause_s = TERMS.retry_s * self.random.uniform(0.8, 1.2)
        wake_s = candidate.election.wake_s(candidate.clock_s(self.now_s), pause_s) / candidate.rate
        self.after(wake_s + self.random.choice(self.pauses_s), lambda: self.round(candidate))

    def round(self, candidate: Candidate) -> None:
        if candidate.dead:
            return
        candidate.busy = True
        election, asked_s = candidate.election, candidate.clock_s(self.now_s)
        move = election.move(asked_s)
        if move is Move.READ:

            def got(lease: Raw | None) -> None:
                election.read(lease, candidate.clock_s(self.now_s))
                self.round(candidate)

            self.request(candidate, lambda: self.server.lease, got)
        elif move is Move.WAIT:
            self.pause(candidate)
        else:
            before, spec = election.lease, election.claim(EPOCH + timedelta(seconds=self.now_s))

            def written(lease: Raw | None) -> None:
                if lease is None:
                    self.fail(candidate)
                else:
                    election.won(lease, asked_s)
                    self.pause(candidate)

            self.request(candidate, lambda: self.server.write(before, spec), written)

    def kill(self) -> None:
        for candidate in self.candidates:
            candidate.dead = candidate.dead or candidate.leads(self.now_s)

    def delete(self) -> None:
        self.server.lease = None

    def resign(self) -> None:
        """The leader ends in good order; its last request may be lost."""
        for candidate in self.candidates:
            if candidate.busy and candidate.leads(self.now_s):
                self.after(0.01, self.resign)
            elif candidate.leads(self.now_s):
                before, spec = candidate.election.lease, candidate.election.resign()
                candidate.dead = True
                self.resigned.add(candidate.election.identity)
                if spec is not None:
                    self.request(candidate, partial(self.server.write, before, spec), lambda _: None)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    candidates=st.integers(2, 4),
    loss=st.sampled_from((0.0, 0.05, 0.4)),
    slowest_s=st.sampled_from((0.01, 1.0, 6.0)),
    events=st.lists(st.tuples(st.floats(0, 200), st.sampled_from(("kill", "resign"))), max_size=3),
)
def test_two_never_lead_at_once(
    seed: int, candidates: int, loss: float, slowest_s: float, events: list[tuple[float, str]]
) -> None:
    """Whatever is slow, lost, killed, paused for 15 s, or counts time 40 % faster than another. And `released` is said
    only of one who ended in good order."""
    world = World(seed, candidates, loss, slowest_s)
    world.pauses_s = (0.0, 0.0, 0.0, 15.0)
    for at_s, event in events:
        world.after(at_s, getattr(world, event))
    world.run(240)


@pytest.mark.parametrize(("event", "limit_s"), [("kill", 15.0), ("resign", 1.5), ("delete", 15.0)])
def test_the_next_one_leads_in_time(event: str, limit_s: float) -> None:
    """15 s after a kill (and a deletion by hand), at once after a stop in good order, where answers are quick."""
    for seed in range(50):
        world = World(seed, 2)
        for candidate in world.candidates:
            candidate.rate = 1.0
        world.run(60 + seed / 50)
        first = world.leaders[-1]
        getattr(world, event)()
        if event == "delete":
            world.kill()
        world.run(world.now_s + limit_s)
        assert world.leaders[-1] != first, f"seed {seed}: {world.leaders}"
        (leading,) = [candidate.election for candidate in world.candidates if candidate.leads(world.now_s)]
        assert leading.released == (event == "resign"), f"seed {seed}"


def test_a_leader_stays_while_nothing_happens() -> None:
    """Its Lease is renewed, never taken; the object says since when, and by how many holders."""
    world = World(7, 3)
    world.run(600)
    assert len(world.leaders) == 1
    assert world.server.lease is not None
    spec = world.server.lease["spec"]
    assert spec["leaseTransitions"] == 0
    assert spec["acquireTime"] < spec["renewTime"]


def test_terms_that_cannot_be_safe_are_refused() -> None:
    """A holder must stop before its promise ends, and try more than once before that."""
    for renew_s, retry_s in ((13.0, 1.0), (9.0, 5.0), (9.0, 0.0)):
        with pytest.raises(ValueError, match="needs 0 < 2 x retry_s"):
            Terms(renew_s=renew_s, retry_s=retry_s)


def test_a_write_of_a_former_leader_is_over_before_another_leads() -> None:
    """Begun at the last moment, it ends when the Lease can be taken at the earliest: retries included."""
    assert TERMS.duration_s - TERMS.renew_s >= WRITE_S
