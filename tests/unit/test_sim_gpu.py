"""The simulated GPU's queue: exact times whatever the event loop does, and faults in mid-service."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshctl.sim.faults import Faults
from meshctl.sim.gpu import Counters, Gpu, Job

HEALTHY = Faults()


def gpu(concurrency: int = 1) -> Gpu:
    """A batch of n takes n seconds."""
    return Gpu(service_s=float, concurrency=concurrency)


def submit(at: Gpu, now_s: float, batch: int) -> Job:
    job = Job(batch, now_s, done=lambda _: None)
    at.advance(now_s)
    at.submit(job)
    return job


Arrivals = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), min_size=1, max_size=30)


def run(arrivals: list[tuple[float, int]], looks: list[float], concurrency: int) -> list[tuple[float, float]]:
    """(start, finish) of each request, the gaps between arrivals given, looked at `looks` besides."""
    server, jobs, now_s = gpu(concurrency), [], 0.0
    events = []
    for gap_s, batch in arrivals:
        now_s += gap_s
        events.append((now_s, batch))
    for at_s, batch in sorted([*events, *((look, 0) for look in looks)], key=lambda event: event[0]):
        if batch:
            jobs.append(submit(server, at_s, batch))
        else:
            server.advance(at_s)
    server.advance(1e9)
    return [(job.start_s, job.finish_s) for job in jobs]


@given(Arrivals)
def test_one_server_follows_lindleys_recursion(arrivals: list[tuple[float, int]]) -> None:
    """Each request starts at its arrival or its predecessor's end, whichever is later."""
    now_s, free_s = 0.0, 0.0
    expected = []
    for gap_s, batch in arrivals:
        now_s += gap_s
        start_s = max(now_s, free_s)
        free_s = start_s + batch
        expected.append((start_s, free_s))

    assert run(arrivals, [], 1) == expected


@given(Arrivals, st.lists(st.floats(0, 100), max_size=10), st.integers(1, 3))
def test_when_somebody_looks_changes_nothing(
    arrivals: list[tuple[float, int]], looks: list[float], concurrency: int
) -> None:
    """A late or an eager event loop computes the same starts and ends, so lateness never adds up."""
    assert run(arrivals, looks, concurrency) == run(arrivals, [], concurrency)


@given(Arrivals, st.integers(1, 4))
def test_requests_start_in_the_order_of_arrival(arrivals: list[tuple[float, int]], concurrency: int) -> None:
    """First in, first out, with any number of servers."""
    starts = [start for start, _ in run(arrivals, [], concurrency)]

    assert all(early <= late for early, late in pairwise(starts))


def test_two_at_once_run_side_by_side_and_the_third_waits() -> None:
    """Concurrency 2 is two servers behind one queue."""
    server = gpu(concurrency=2)
    jobs = [submit(server, 0.0, batch) for batch in (3, 1, 1)]

    assert (server.running, server.pending) == (2, 1)
    assert [job.batch for job in server.advance(10.0)] == [1, 1, 3]
    assert [job.finish_s for job in jobs] == [3.0, 1.0, 2.0]


def test_counters_are_credited_on_completion_only() -> None:
    """A request under way counts nowhere but in the gauges."""
    server = gpu()
    submit(server, 0.0, 2)
    submit(server, 1.0, 3)

    assert server.counters == Counters()
    server.advance(2.0)
    assert server.counters == Counters(1, 0, 2, 1, request_s=2.0, queue_s=0.0, compute_s=2.0)
    server.advance(5.0)
    assert server.counters == Counters(2, 0, 5, 2, request_s=6.0, queue_s=1.0, compute_s=5.0)


def test_slowing_down_in_mid_service_stretches_only_what_is_left() -> None:
    """Half of 4 s is done when the GPU becomes twice as slow: 2 s + 2 * 2 s."""
    server = gpu()
    job = submit(server, 0.0, 4)
    server.advance(2.0)
    server.set_faults(2.0, Faults(slow=2.0))

    assert server.next_s() == 6.0
    server.advance(6.0)
    assert job.finish_s == 6.0


def test_a_queue_feels_a_fault_that_comes_after_its_arrival() -> None:
    """What waits is served at the speed of the time at which it starts."""
    server = gpu()
    submit(server, 0.0, 1)
    waiting = submit(server, 0.0, 1)
    server.advance(1.0)
    server.set_faults(1.0, Faults(foreign_ratio=0.5))
    server.advance(3.0)

    assert (waiting.start_s, waiting.finish_s) == (1.0, 3.0)


def test_a_hang_stops_time_and_clearing_it_goes_on_where_it_stopped() -> None:
    """Nothing completes while hung; what was under way needs what was left, what came meanwhile all of it."""
    server = gpu(concurrency=2)
    first = submit(server, 0.0, 4)
    server.advance(1.0)
    server.set_faults(1.0, Faults(hang=True))
    second = submit(server, 5.0, 2)

    assert server.next_s() is None
    assert server.advance(100.0) == []
    assert (server.running, server.utilization_ratio(100.0)) == (2, 0.0)
    server.set_faults(100.0, HEALTHY)
    assert (first.finish_s, second.finish_s) == (103.0, 102.0)


def test_speed_changed_during_a_hang_counts_for_what_is_left() -> None:
    """3 s were left, and now take twice as long from the end of the hang on."""
    server = gpu()
    job = submit(server, 0.0, 4)
    server.advance(1.0)
    server.set_faults(1.0, Faults(hang=True))
    server.set_faults(50.0, Faults(hang=True, slow=2.0))
    server.set_faults(60.0, Faults(slow=2.0))

    assert job.finish_s == 66.0


def test_losing_the_process_loses_queue_and_counters() -> None:
    """Everything at the server is returned as lost, and the counters start anew."""
    server = gpu()
    submit(server, 0.0, 1)
    jobs = [submit(server, 1.0, batch) for batch in (5, 1)]

    assert server.lose_all(2.0) == jobs
    assert (server.running, server.pending, server.next_s()) == (0, 0, None)
    assert server.counters == Counters()


@pytest.mark.parametrize(
    ("foreign_ratio", "now_s", "expected"),
    [
        pytest.param(0.0, 2.0, 0.0, id="idle"),
        pytest.param(0.3, 2.0, 0.3, id="others-alone"),
        pytest.param(0.0, 10.5, 0.5, id="half-a-window-of-work"),
        pytest.param(0.0, 11.5, 1.0, id="work-all-the-time"),
        pytest.param(0.4, 11.5, 1.0, id="both-never-exceed-one"),
        pytest.param(0.4, 10.5, 0.4 + 0.6 * 0.5, id="both"),
    ],
)
def test_utilization_is_the_busy_share_of_all_tenants(foreign_ratio: float, now_s: float, expected: float) -> None:
    """Over the last second; the other tenant's part is there from the start."""
    server = gpu()
    server.set_faults(0.0, Faults(foreign_ratio=foreign_ratio))
    if now_s > 10:
        submit(server, 10.0, 5)
    server.advance(now_s)

    assert server.utilization_ratio(now_s) == pytest.approx(expected)


def test_another_tenant_adds_to_the_utilization_at_once() -> None:
    """At the moment it comes, before our latency has changed, utilisation is its share and what we did before."""
    server = gpu()
    submit(server, 0.0, 1)
    server.advance(1.5)

    assert server.utilization_ratio(1.5) == pytest.approx(0.5)
    server.set_faults(1.5, Faults(foreign_ratio=0.3))
    assert server.utilization_ratio(1.5) == pytest.approx(0.8)


def test_utilization_falls_to_nothing_after_the_window() -> None:
    """Work is forgotten a second after it ended, in memory too."""
    server = gpu()
    for second in range(100):
        submit(server, 2.0 * second, 1)
    server.advance(1000.0)

    assert server.utilization_ratio(1000.0) == 0.0
    assert len(server._busy) < 3  # noqa: SLF001 - that it is bounded is not visible from outside
