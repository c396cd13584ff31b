"""The load generator's plan: what is sent and when is fixed before the first request."""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import aiohttp
import pytest

from meshctl.errors import InputError
from meshctl.sim.load import LoadConfig, arrivals, failure_kind, parse_mix

CONFIG = LoadConfig(("http://127.0.0.1:1",), 500.0, ((1, 0.8), (8, 0.15), (64, 0.05)), seconds=100.0)


def test_the_same_seed_sends_the_same_requests_at_the_same_times() -> None:
    """And another seed others."""
    assert list(arrivals(CONFIG)) == list(arrivals(CONFIG))
    assert list(arrivals(CONFIG)) != list(arrivals(replace(CONFIG, seed=2)))


def test_arrivals_are_poisson_with_the_rate_and_mix_asked_for() -> None:
    """Rate, the gaps' variation (1 for Poisson) and the shares agree within the error of 50,000 draws."""
    found = list(arrivals(CONFIG))
    gaps = [late - early for (early, _, _), (late, _, _) in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    sizes = Counter(size for _, size, _ in found)

    assert len(found) == pytest.approx(50_000, rel=0.03)
    assert variance / mean**2 == pytest.approx(1.0, abs=0.05)
    assert [sizes[i] / len(found) for i in range(3)] == pytest.approx([0.8, 0.15, 0.05], abs=0.01)


def test_arrivals_end_with_the_time() -> None:
    """Warm-up and seconds together; times increase."""
    times = [at for at, _, _ in arrivals(replace(CONFIG, warmup_s=5.0))]

    assert 104 < times[-1] < 105
    assert times == sorted(times)


def test_targets_follow_their_weights() -> None:
    """A URL of weight 0 gets nothing, the others their share."""
    config = replace(CONFIG, urls=CONFIG.urls * 3, weights=(3.0, 0.0, 1.0))
    targets = Counter(target for _, _, target in arrivals(config))

    assert targets[1] == 0
    assert targets[0] / targets.total() == pytest.approx(0.75, abs=0.02)


def test_a_run_without_end_goes_on() -> None:
    """Infinite seconds are what a live view asks for."""
    assert len(list(islice(arrivals(replace(CONFIG, seconds=float("inf"))), 100_000))) == 100_000


def test_a_mix_is_read_as_it_is_written() -> None:
    """BATCH:SHARE, with commas."""
    assert parse_mix("1:0.8,8:0.15,64:0.05") == ((1, 0.8), (8, 0.15), (64, 0.05))


@pytest.mark.parametrize("text", ["", "1", "1:0.5:3", "a:1", "1:x", "1:0.5,1:0.5", "1.5:1"])
def test_a_mix_that_says_nothing_is_refused(text: str) -> None:
    """The message repeats what was written."""
    with pytest.raises(InputError) as caught:
        parse_mix(text)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("rate_rps", 0.0, id="no-rate"),
        pytest.param("rate_rps", float("nan"), id="rate-nan"),
        pytest.param("rate_rps", float("inf"), id="rate-infinite"),
        pytest.param("seconds", -1.0, id="negative-time"),
        pytest.param("warmup_s", -1.0, id="negative-warm-up"),
        pytest.param("timeout_s", 0.0, id="no-time-out"),
        pytest.param("mix", ((1, 0.5),), id="shares-below-1"),
        pytest.param("mix", ((1, 1.5), (2, -0.5)), id="negative-share"),
        pytest.param("mix", ((0, 1.0),), id="batch-0"),
        pytest.param("mix", (), id="no-mix"),
        pytest.param("urls", (), id="no-url"),
        pytest.param("urls", ("127.0.0.1:80",), id="no-scheme"),
        pytest.param("urls", ("https://127.0.0.1",), id="https"),
        pytest.param("urls", ("http://",), id="no-host"),
        pytest.param("urls", ("http://h:99999",), id="no-such-port"),
        pytest.param("weights", (1.0, 2.0), id="weights-without-urls"),
        pytest.param("weights", (0.0,), id="weights-all-zero"),
    ],
)
def test_senseless_load_is_refused(field: str, value: Any) -> None:
    """Before anything is sent, as the caller's mistake."""
    with pytest.raises(InputError):
        replace(CONFIG, **{field: value})


def _subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(_subclasses(child) for child in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(_subclasses(aiohttp.ClientError), key=str))
def test_whatever_the_client_raises_has_a_name(kind: type[Exception]) -> None:
    """A new exception of the library below ends no run: it is a failure like the others."""
    assert failure_kind(kind.__new__(kind)) in {"refused", "disconnected", "timeout", "truncated", "reset", "protocol"}


def test_running_out_of_files_is_not_the_servers_fault() -> None:
    """A limit of the generator's own process is told apart from a refused connection."""
    assert failure_kind(OSError(errno.EMFILE, "too many open files")) == "own_limit"
    assert failure_kind(ConnectionResetError(errno.ECONNRESET, "reset")) == "reset"
    assert failure_kind(TimeoutError()) == "timeout"
