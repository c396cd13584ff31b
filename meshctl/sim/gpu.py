"""One simulated GPU server as a value in time: a FIFO queue, its counters and the GPU's utilisation. No I/O, no clock.

Invariant: what happens depends on the arrival times alone, not on when `advance` is called. A request starts at the
later of its arrival and the moment a server became free, and that moment is the predecessor's computed end, not the
time at which somebody looked. So a late event loop delays an answer by its lateness once, and the queue behind it not
at all (a chain of sleeps would add the lateness up and lower the capacity).

Requests are credited to the counters when they complete, and only when they succeed: that is what Triton does, and why
a hung GPU looks idle. Rejected: computing the end of each request when it arrives, which would leave a queue of seconds
untouched by a fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from meshctl.sim.faults import Faults

COPY_RATIO = 0.005
"""Share of the service time that goes to copying the input in, and again to copying the output out."""
UTILIZATION_WINDOW_S = 1.0
"""Sampling window of the GPU's utilisation; NVML's is between 1/6 s and 1 s."""


@dataclass(slots=True, eq=False)
class Job:
    """One request at the server. `finish_s` moves while it runs if the GPU's speed changes."""

    batch: int
    arrived_s: float
    done: Callable[[bool], None]
    """Called once: True when answered, False when the server was lost."""
    start_s: float = 0.0
    finish_s: float = 0.0


@dataclass(slots=True)
class Counters:
    """Since the process started; times in seconds. Successes only, except `failed`."""

    succeeded: int = 0
    failed: int = 0
    items: int = 0
    executions: int = 0
    request_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0

    def credit(self, job: Job) -> None:
        self.succeeded += 1
        self.executions += 1
        self.items += job.batch
        self.request_s += job.finish_s - job.arrived_s
        self.queue_s += job.start_s - job.arrived_s
        self.compute_s += job.finish_s - job.start_s


@dataclass(slots=True, eq=False)
class Gpu:
    """The queue in front of one GPU. Times are seconds on any one monotonic clock, and never go back."""

    service_s: Callable[[int], float]
    """Batch -> seconds of service on a healthy GPU."""
    concurrency: int = 1
    faults: Faults = field(default_factory=Faults)
    counters: Counters = field(default_factory=Counters)
    _waiting: deque[Job] = field(default_factory=deque)
    _running: list[Job] = field(default_factory=list)
    _hung_at_s: float | None = None
    _busy_since_s: float | None = None
    _busy: deque[tuple[float, float, float]] = field(default_factory=deque)
    """(begin, end, share of the time slices) in which we ran, oldest first; those before the window are dropped."""

    @property
    def pending(self) -> int:
        """Requests that wait for execution; those in execution are not counted (as in Triton)."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Take in `job` at its arrival time; `advance` to that time must have been called."""
        if len(self._running) < self.concurrency:
            self._start(job, job.arrived_s)
        else:
            self._waiting.append(job)

    def advance(self, now_s: float) -> list[Job]:
        """Let time pass until `now_s`; returns what completed, in order of completion."""
        completed = []
        while self._running and self._hung_at_s is None:
            job = min(self._running, key=lambda j: j.finish_s)
            if job.finish_s > now_s:
                break
            self._running.remove(job)
            self.counters.credit(job)
            completed.append(job)
            if self._waiting:
                self._start(self._waiting.popleft(), job.finish_s)
            elif not self._running:
                self._end_busy(job.finish_s)
        return completed

    def next_s(self) -> float | None:
        """When the next request completes; None when none will."""
        if self._hung_at_s is not None or not self._running:
            return None
        return min(job.finish_s for job in self._running)

    def set_faults(self, now_s: float, faults: Faults) -> None:
        """Change speed or hang from `now_s` on; what runs keeps the part it has done. Call `advance` first."""
        self._end_busy(now_s)
        ratio = faults.slowdown / self.faults.slowdown
        for job in self._running:
            reached_s = self._reached_s(job, now_s)
            job.finish_s = reached_s + (job.finish_s - reached_s) * ratio
            if not faults.hang:
                job.finish_s += now_s - reached_s
        self.faults = faults
        if not faults.hang:
            self._hung_at_s = None
            self._busy_since_s = now_s if self._running else None
        elif self._hung_at_s is None:
            self._hung_at_s = now_s

    def lose_all(self, now_s: float) -> list[Job]:
        """The process dies: everything at the server is lost and returned, the counters start anew."""
        lost = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._end_busy(now_s)
        self.counters = Counters()
        return lost

    def utilization_ratio(self, now_s: float) -> float:
        """Busy share of the GPU over the last window, all tenants, 0..1.

        While we run beside another tenant, it has `foreign_ratio` of the time slices and our kernels have the rest;
        so the sum is its share and our work, before as after our queue has felt it.
        """
        start_s = now_s - UTILIZATION_WINDOW_S
        intervals = [*self._busy]
        if self._busy_since_s is not None:
            intervals.append((self._busy_since_s, now_s, 1.0 - self.faults.foreign_ratio))
        ours_s = sum(part * max(0.0, min(end, now_s) - max(begin, start_s)) for begin, end, part in intervals)
        return min(1.0, self.faults.foreign_ratio + ours_s / UTILIZATION_WINDOW_S)

    def _start(self, job: Job, at_s: float) -> None:
        job.start_s = at_s
        job.finish_s = at_s + self.service_s(job.batch) * self.faults.slowdown
        self._running.append(job)
        if self._busy_since_s is None and self._hung_at_s is None:
            self._busy_since_s = at_s

    def _reached_s(self, job: Job, now_s: float) -> float:
        """The moment up to which the work of `job` is done; one taken up while hung has done nothing."""
        return now_s if self._hung_at_s is None else max(self._hung_at_s, job.start_s)

    def _end_busy(self, at_s: float) -> None:
        if self._busy_since_s is not None:
            self._busy.append((self._busy_since_s, at_s, 1.0 - self.faults.foreign_ratio))
            self._busy_since_s = None
        while self._busy and self._busy[0][1] < at_s - UTILIZATION_WINDOW_S:
            self._busy.popleft()
