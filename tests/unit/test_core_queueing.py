"""The workload of an endpoint against the literature's formulas and against simulated queues."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest

from meshctl.core.queueing import RHO_MAX, Array, Workload, dispersion, erlang_c, mean_wait_s

DEADLINE_S = 0.150


def attained(rates: Array, service_s: Array, servers: Array, v: Array | None = None) -> tuple[Array, Array]:
    workload = Workload(service_s, servers, DEADLINE_S, np.ones_like(service_s) if v is None else v)
    ((f, df),) = workload.attainment(rates, (workload.deadline(DEADLINE_S),))
    return f, df


def md1_wait_cdf(rate: float, service: float, t: float) -> float:
    """P(W <= t) of M/D/1, A. K. Erlang 1909."""
    total = 0.0
    for k in range(int(t / service) + 1):
        x = rate * (k * service - t)
        total += x**k / math.factorial(k) * math.exp(-x)
    return (1 - rate * service) * total


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("service", [0.021, 0.037, 0.070])
def test_the_wait_of_a_constant_service_is_erlangs(rho: float, service: float) -> None:
    """M/D/1: P(W <= SLO - S) by the formula, to half a per cent of the requests."""
    f, _ = attained(np.array([[rho / service]]), np.array([[service]]), np.ones(1))
    assert f[0, 0] == pytest.approx(md1_wait_cdf(rho / service, service, DEADLINE_S - service), abs=5e-3)


def lindley(rates: Array, service_s: Array, requests: int, seed: int) -> tuple[Array, Array]:
    """Waits and services of `requests` in a simulated M/G/1 queue with one kind per rate."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rates.sum(), requests)
    services = service_s[rng.choice(len(rates), requests, p=rates / rates.sum())]
    walk = np.concatenate([[0.0], np.cumsum(services[:-1] - gaps[1:])])
    return walk - np.minimum.accumulate(walk), services


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_a_mix_of_sizes_waits_as_a_simulated_queue_does(rho: float) -> None:
    """M/G/1 with a V100's three sizes: distribution and mean against the Lindley recursion."""
    service, mix = np.array([0.0058, 0.0114, 0.0562]), np.array([0.8, 0.15, 0.05])
    rates = rho * mix / (mix @ service)
    waits, services = lindley(rates, service, 400_000, seed=3)
    f, _ = attained(rates[None], service[None], np.ones(1))
    for kind, s in enumerate(service):
        assert f[0, kind] == pytest.approx(np.mean(waits[services == s] + s <= DEADLINE_S), abs=0.01)
    mean = mean_wait_s(rates[None], service[None], np.ones(1), np.ones((1, 3)))
    assert mean[0] == pytest.approx(waits.mean(), rel=0.05)


def test_the_mean_wait_is_pollaczeks_and_khinchines() -> None:
    """l E[S^2] / (2 (1 - rho))."""
    rates, service = np.array([[20.0, 4.0]]), np.array([[0.01, 0.05]])
    expected = (20 * 0.01**2 + 4 * 0.05**2) / (2 * (1 - 0.4))
    assert mean_wait_s(rates, service, np.ones(1), np.ones((1, 2)))[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("servers", "offered", "waits"), [(1, 0.7, 0.7), (2, 1.0, 1 / 3), (5, 4.0, 0.5541), (10, 8.0, 0.4092), (3, 0.0, 0)]
)
def test_erlang_c_has_the_published_values(servers: int, offered: float, waits: float) -> None:
    """Probability to wait in M/M/c; tables in L. Kleinrock, Queueing Systems 1."""
    assert erlang_c(servers, offered) == pytest.approx(waits, abs=5e-5)


@pytest.mark.parametrize("offered", [-0.1, 2.0, 5.0])
def test_erlang_c_refuses_what_has_no_stationary_state(offered: float) -> None:
    """The message has both sides of the broken condition."""
    with pytest.raises(ValueError, match=r"offered load must lie in \[0, 2\)"):
        erlang_c(2, offered)


@pytest.mark.parametrize("servers", [2, 4])
def test_several_requests_at_once_wait_as_simulated(servers: int) -> None:
    """M/D/c by Lee and Longton's approximation: within 2 per cent of the requests."""
    service, rho = 0.060, 0.8
    rate = rho * servers / service
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(1 / rate, 100_000)).tolist()
    free, late = [0.0] * servers, 0
    for at in arrivals:
        start = max(at, free[0])
        heapq.heapreplace(free, start + service)
        late += start + service - at > DEADLINE_S
    f, _ = attained(np.array([[rate]]), np.array([[service]]), np.array([float(servers)]))
    assert f[0, 0] == pytest.approx(1 - late / len(arrivals), abs=0.02)


@pytest.mark.parametrize("load", [0.5, 0.9, 1.3], ids="load {}".format)
@pytest.mark.parametrize("servers", [1.0, 3.0])
def test_the_gradient_is_that_of_finite_differences(load: float, servers: float) -> None:
    """For every rate, below the cut utilisation and above it."""
    service = np.array([[0.0058, 0.0114, 0.0562], [0.030, 0.065, 0.345]])
    room = np.array([servers, 1.0])
    rates = load * np.array([[40.0, 8.0, 6.0], [12.0, 3.0, 0.5]]) * room[:, None]
    v = np.array([[0.4, 0.7, 1.0], [1.0, 0.9, 0.8]])
    _, slope = attained(rates, service, room, v)
    for i in range(2):
        for k in range(3):
            step = np.zeros_like(rates)
            step[i, k] = 1e-4 * rates[i, k]
            high, low = attained(rates + step, service, room, v)[0], attained(rates - step, service, room, v)[0]
            numeric = (high - low)[i] / (2 * step[i, k])
            assert slope[i, :, k] == pytest.approx(numeric, rel=2e-3, abs=2e-5)


def test_a_request_that_is_too_long_is_never_in_time() -> None:
    """A service longer than the deadline attains 0, whatever the load; a shorter one on an idle server attains 1."""
    f, df = attained(np.full((1, 2), 1e-9), np.array([[0.151, 0.149]]), np.ones(1))
    assert f[0].tolist() == pytest.approx([0, 1], abs=1e-6)
    assert (df[0, 0] == 0).all()


@pytest.mark.parametrize("rho", [0.0, RHO_MAX, 1.0, 50.0, 1e9])
def test_overload_stays_finite_and_falls(rho: float) -> None:
    """Beyond the stationary loads answers and slopes are finite, in range, and no better than at the cut."""
    service = np.array([[0.010, 0.050]])
    f, df = attained(rho * np.array([[50.0, 10.0]]), service, np.ones(1))
    assert np.isfinite(f).all()
    assert np.isfinite(df).all()
    assert ((f >= -1e-6) & (f <= 1 + 1e-6)).all()
    assert rho <= RHO_MAX or (f <= attained(RHO_MAX * np.array([[50.0, 10.0]]), service, np.ones(1))[0] + 1e-9).all()


def test_inputs_stay_as_they_are() -> None:
    """Read-only arrays work, and nothing is written to."""
    arrays = [np.array([[40.0, 5.0]]), np.array([[0.01, 0.05]]), np.array([2.0]), np.array([[0.5, 1.0]])]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.setflags(write=False)
    rates, service, servers, v = arrays
    attained(rates, service, servers, v)
    mean_wait_s(rates, service, servers, v)
    dispersion(np.array([[0.1, 0.2]]), rates, service, servers, DEADLINE_S, 4)
    for now, before in zip(arrays, copies, strict=True):
        assert (now == before).all()


def spread(gateways: int, share: float = 0.1) -> float:
    rates, service = np.array([[45.0]]), np.array([[0.018]])
    return float(dispersion(np.array([[share]]), rates, service, np.ones(1), DEADLINE_S, gateways)[0, 0])


def test_many_proxies_are_poisson_and_few_are_smoother() -> None:
    """The dispersion grows with the number of proxies to 1, and is far below it for one."""
    values = [spread(2**k) for k in range(20)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1, abs=1e-3)
    assert values[0] < 0.5


def test_an_endpoint_that_gets_everything_sees_poisson() -> None:
    """A share of 1 leaves nothing to smooth, with one proxy as with many."""
    assert spread(1, share=1.0) == pytest.approx(1)
    assert spread(64, share=1.0) == pytest.approx(1)
