"""Which replica may write: one Lease object, held by one of them.

Invariant: never do two processes believe at once that they lead. A holder believes it for `renew_s` from the moment
BEFORE it sent the request that renewed the Lease; a candidate takes the Lease over when it has seen it unchanged for
the holder's `duration_s`, counted from AFTER it received it, which is later. Both count on monotonic clocks, of which
none must run faster than the other by more than duration/renew (13/9); the times written into the object are for
people. A write is begun by who leads, and is over within duration - renew seconds (`store.WRITE_S`), before another is.

Own, and not `kubernetes.aio.leaderelection` (37.0), which shares the protocol and the object but: counts on the wall
clock, which steps; renews by requests that may hang for 5 minutes while it goes on leading; ends on any error that is
not an ApiException (a refused connection); logs errors and drops them (a missing right looks like another leader);
writes local time as UTC; does not release the Lease on a clean stop; ends after the first loss.

`Election` is the protocol without I/O or clock; `Lease` drives it against an API server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

import structlog

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.faults import ChangedError, ExistsError, ForbiddenError
from meshctl.adapters.kubernetes.kinds import KINDS, Raw
from meshctl.errors import MeshctlError
from meshctl.model import Problem
from meshctl.ports import ObjectKey

log = structlog.get_logger(__name__)
_random = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a Lease is held. A killed holder is followed within `duration_s` + 1.2 x `retry_s` and two requests."""

    duration_s: int = 13
    """The holder's promise, in the object: whole seconds."""
    renew_s: float = 9.0
    """A holder that could not renew for this long leads no more."""
    retry_s: float = 1.0
    """Between two looks at, or renewals of, the Lease; jittered by a fifth."""
    request_s: float = 4.0
    """Longest one request may take."""

    def __post_init__(self) -> None:
        if not 0 < 2 * self.retry_s < self.renew_s < self.duration_s:
            raise ValueError(f"a Lease needs 0 < 2 x retry_s < renew_s < duration_s, not {self}")


class Move(StrEnum):
    """What to do with the Lease object now."""

    READ = "read"
    CREATE = "create"
    REPLACE = "replace"
    WAIT = "wait"


_NEVER_S = float("-inf")


@dataclass(slots=True)
class Election:
    """One candidate's view of the Lease. Times are seconds on its own monotonic clock."""

    identity: str
    """Of this process, never used by another."""
    terms: Terms
    lease: Raw | None = None
    """As it was last read or written; None when there is none (or it was not read yet)."""
    term: int = 0
    """Counts the claims to what somebody else had, or nobody: another number, another time of leading."""
    released: bool = False
    """The last such claim was to a Lease that its holder gave back: whatever he began is over."""
    _must_read: bool = True
    _free_s: float = _NEVER_S
    """From then on it may be taken."""
    _until_s: float = _NEVER_S
    """Until then this process leads."""

    def leads(self, now_s: float) -> bool:
        return now_s < self._until_s

    def left_s(self, now_s: float) -> float:
        """For how long this process leads at least; 0 when it does not."""
        return max(0.0, self._until_s - now_s)

    @property
    def holder(self) -> str:
        """Who holds it, as far as is known; "" when nobody."""
        return str(self._spec.get("holderIdentity") or "")

    @property
    def _spec(self) -> Raw:
        return (self.lease or {}).get("spec") or {}

    def move(self, now_s: float) -> Move:
        """What to do next. After a READ ask again at once; after anything else, in `retry_s`."""
        if self._must_read:
            return Move.READ
        if now_s < self._free_s:
            self._must_read = True  # the next time
            return Move.WAIT
        return Move.CREATE if self.lease is None else Move.REPLACE

    def wake_s(self, now_s: float, pause_s: float) -> float:
        """Seconds to sleep: `pause_s`, or less when the Lease comes free, or ours ends, before."""
        return min(pause_s, *(at_s - now_s if at_s > now_s else pause_s for at_s in (self._free_s, self._until_s)))

    def read(self, lease: Raw | None, now_s: float) -> None:
        """The object as it is (None: there is none), received at `now_s`. Any change of it is a sign of life."""
        if _version(self.lease) != _version(lease):
            # One that was deleted by hand may have been renewed just before: its holder is waited for all the same.
            spec = self._spec if lease is None else lease.get("spec") or {}
            promised_s = float(spec.get("leaseDurationSeconds") or self.terms.duration_s)
            held = spec.get("holderIdentity") not in (None, "", self.identity)
            self._free_s = now_s + promised_s if held else _NEVER_S
        self.lease, self._must_read = lease, False

    def claim(self, wall: datetime) -> Raw:
        """The spec that makes this process the holder; to be written only over what was read."""
        mine = self.holder == self.identity
        if not mine:  # before it is sent: of a claim whose answer is lost, the next one finds that it is ours
            self.term, self.released = self.term + 1, self.lease is not None and not self.holder
        stamp = wall.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self.terms.duration_s,
            "acquireTime": self._spec.get("acquireTime", stamp) if mine else stamp,
            "renewTime": stamp,
            "leaseTransitions": int(self._spec.get("leaseTransitions") or 0) + (0 if mine or not self.lease else 1),
        }

    def won(self, lease: Raw, asked_s: float) -> None:
        """The claim, sent at `asked_s`, is in the object."""
        self.lease, self._free_s = lease, _NEVER_S
        self._until_s = asked_s + self.terms.renew_s

    def failed(self) -> None:
        """The last request failed, or its answer was lost: what is known may be out of date."""
        self._must_read = True

    def resign(self) -> Raw | None:
        """Leads no more. The spec that tells the others at once, if the Lease was ours; None otherwise."""
        self._until_s = _NEVER_S
        if self.holder != self.identity:
            return None
        # The API server refuses an empty holder, and a duration of 0.
        return {**{k: v for k, v in self._spec.items() if k != "holderIdentity"}, "leaseDurationSeconds": 1}


def _version(lease: Raw | None) -> tuple[str, str] | None:
    return None if lease is None else (lease["metadata"]["uid"], lease["metadata"]["resourceVersion"])


def boot_s() -> float:
    """Monotonic seconds; unlike `time.monotonic`, it counts the time that the machine was suspended (Linux)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """Competes for ``namespace/name`` from `start` to `stop`. One consumer of `wait_changed`."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        name: str,
        *,
        identity: str = "",
        terms: Terms | None = None,
        clock_s: Callable[[], float] = boot_s,
    ) -> None:
        """`identity` is for people (default: the host's name); a random part is added, so that it is never reused."""
        self._client, self._key, self._clock_s = client, ObjectKey("Lease", namespace, name), clock_s
        self._terms = terms or Terms()
        self._election = Election(f"{identity or socket.gethostname()}_{secrets.token_hex(4)}", self._terms)
        self._problem = ""
        self._told = False
        self._changed, self._stopping = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def leading(self) -> bool:
        """Ends by itself when the Lease could not be renewed, before anybody else can lead."""
        return self._election.leads(self._clock_s())

    @property
    def left_s(self) -> float:
        """For how long this process leads at least; 0 when it does not."""
        return self._election.left_s(self._clock_s())

    @property
    def term(self) -> int:
        """Another number, another time of leading: somebody else may have led in between."""
        return self._election.term

    @property
    def released(self) -> bool:
        """Who led before this term gave the Lease back, so that nothing he began is under way; False also when that is
        not known."""
        return self._election.released

    @property
    def identity(self) -> str:
        return self._election.identity

    @property
    def holder(self) -> str:
        """Who leads, as far as is known; "" when nobody."""
        return self._election.holder

    def problems(self) -> tuple[Problem, ...]:
        return (Problem(f"{self._client.server} {self._key}", self._problem),) if self._problem else ()

    async def start(self) -> None:
        """Returns at once; whether the Lease was got shows in `leading`."""
        self._task = asyncio.create_task(self._run(), name=f"compete for {self._key}")
        self._task.add_done_callback(lambda _: self._changed.set())

    async def wait_changed(self) -> None:
        """Returns when `leading` is another than at the last return. Raises what ended the competition (our fault)."""
        await self._changed.wait()
        self._changed.clear()
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def stop(self, *, give_back: Callable[[], bool] = lambda: True) -> None:
        """Gives the Lease back, so that another replica leads a moment later. End all writing before. Never raises.

        `give_back` is asked when this process competes no more. False: not all writing is over; the Lease expires by
        itself, and the next one learns that it was not `released`."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=self._terms.request_s)
            self._task.cancel()
        spec = self._election.resign()
        self._publish()
        if spec is None or not give_back():
            return
        try:
            await self._write(spec, self._terms.request_s)
        except MeshctlError as error:
            log.warning("lease not given back; it expires by itself", lease=str(self._key), error=str(error))

    # ---------------------------------------------------------------------------------------------------- competing

    async def _run(self) -> None:
        while not self._stopping.is_set():
            await self._round()
            self._publish()
            pause_s = self._terms.retry_s * _random.uniform(0.8, 1.2)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._election.wake_s(self._clock_s(), pause_s)):
                    await self._stopping.wait()

    async def _round(self) -> None:
        election = self._election
        limit_s = min(self._terms.request_s, self.left_s) if self.leading else self._terms.request_s
        try:
            if election.move(self._clock_s()) is Move.READ:
                found = await self._client.get(self._key, deadline_s=limit_s, retry=False)
                election.read(found, self._clock_s())
            if election.move(asked_s := self._clock_s()) in (Move.CREATE, Move.REPLACE):
                election.won(await self._write(election.claim(datetime.now(UTC)), limit_s), asked_s)
        except (ChangedError, ExistsError):  # somebody was quicker
            election.failed()
        except MeshctlError as error:
            election.failed()
            advice = " (grant get, create and update on leases)" if isinstance(error, ForbiddenError) else ""
            self._say(f"{error}{advice}")
        else:
            self._say("")

    async def _write(self, spec: Raw, limit_s: float) -> Raw:
        if (lease := self._election.lease) is not None:
            return await self._client.replace({**lease, "spec": spec}, deadline_s=limit_s, retry=False)
        metadata = {"namespace": self._key.namespace, "name": self._key.name}
        wanted = {"apiVersion": KINDS["Lease"].api_version, "kind": "Lease", "metadata": metadata, "spec": spec}
        return await self._client.create(wanted, deadline_s=limit_s, retry=False)

    def _say(self, problem: str) -> None:
        if problem and problem != self._problem:
            log.warning("lease", lease=str(self._key), error=problem)
        self._problem = problem

    def _publish(self) -> None:
        if self.leading != self._told:
            self._told = not self._told
            log.info("leading" if self._told else "leads no more", lease=str(self._key), identity=self.identity)
            self._changed.set()
