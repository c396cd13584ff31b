"""How long a request waits at an endpoint: the stationary workload of a FIFO server, on a lattice, with its gradient.

What it computes: for every GPU class i and request kind k, F[i, k] = P(W_i <= deadline - S[i, k]), the probability
that a request of kind k that is sent to an endpoint of class i is answered in time, and dF/dl, how that changes with
the endpoint's arrival rates l.

Theory. With Poisson arrivals an endpoint is an M/G/1 queue, whose workload is a compound geometric sum: on a lattice
``w = (1 - rho) * delta0 + r (*) w``, where r is the sum over k of l[k] times the equilibrium residual of S[k]
integrated per cell. As power series, ``w(z) = (1 - rho) / (1 - r(z))``, and dw/dl[k] needs 1 / (1 - r(z))**2 only, so
value and gradient are two inverse FFTs for all classes at once (lattice-Poisson inversion: evaluated on a circle of
radius < 1, which pushes the aliasing error below 1e-8; J. Abate, W. Whitt, "Numerical inversion of probability
generating functions", Oper. Res. Lett. 12, 1992). The forward recursion in numpy is 20 times slower; a
Cramer-Lundberg exponent is as fast but wrong by several points below 80 % load, where most fleets are.

Two corrections, both by moment matching:
- Few proxies are smoother than Poisson. A proxy that walks its weights in order sends every m-th request to an
  endpoint, so the count in a time t has variance ``p*l*t`` plus, per proxy, at most (1 - p**2)/6, with p the
  endpoint's share (renewal theory: Erlang-m gaps; 1/6 is the stationary variance of their phase). `dispersion` gives
  the ratio v to Poisson's l*t over the time a queue needs to build up to the deadline; arrivals are then treated as
  Poisson with rate l/v and jumps v*S: same mean, same variance of the work. Late share of the worst size class, 80 %
  load, predicted and simulated: 1 proxy 0.8/0.5 %, 4 proxies 2.9/2.5, 16 8.7/8.5, 64 17/18; plain M/G/1 says 18 for
  all of them.
- c requests at once (instance groups, MPS shares): an M/G/c queue's wait is that of an M/G/1 with service S/c, times
  the ratio of the probabilities to wait at all, ErlangC(c)/rho (Lee and Longton, 1959). Exact for exponential service.

It knows nothing of weights, sizes' names, signals or time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CELLS = 75
"""Lattice cells up to the deadline: 2 ms each at 150 ms. 150 cells change attainments by < 0.001, and cost twice."""
_POINTS = 256
"""Points on the circle: more than twice the cells used, so that the aliasing is damped by _RADIUS**_POINTS."""
_RADIUS = 10.0 ** (-8 / _POINTS)
RHO_MAX = 0.99
"""Utilisation is cut here: beyond it there is no stationary workload, and `weights` pushes back with a penalty."""


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an arrival waits in M/M/c with `offered` = l*S < servers. By the Erlang-B recursion, O(c)."""
    if not 0 <= offered < servers:
        raise ValueError(f"offered load must lie in [0, {servers}), not {offered}")
    blocked = 1.0
    for c in range(1, servers + 1):
        blocked = offered * blocked / (c + offered * blocked)
    rho = offered / servers
    return blocked / (1 - rho + rho * blocked)


def dispersion(share: Array, rates: Array, service_s: Array, servers: Array, deadline_s: float, gateways: int) -> Array:
    """Variance of an endpoint's arrival counts over Poisson's, in (0, 1]; arrays (I, K), `servers` (I,).

    `share` is the part of all requests of kind k that one endpoint of class i gets, `rates` the rate of them in 1/s.
    The result includes the factor of `_arrival_average`.
    """
    used = service_s / servers[:, None]
    rho = np.minimum((rates * used).sum(axis=1), RHO_MAX)
    build_up_s = 0.5 * deadline_s / np.maximum(1 - rho, 0.05)
    phase = gateways * (1 - share**2) / (6 * np.maximum(rates * build_up_s[:, None], 1e-9))
    # the smaller of the two variances where they are far apart, half of each where they meet, smooth throughout
    v = np.clip(share + (1 - share) * phase / (1 - share + phase + 1e-12), 0.01, 1.0)
    return np.asarray(np.clip(v * _arrival_average(v, rates, used, rho)[:, None], 0.01, 1.0))


def _arrival_average(v: Array, rates: Array, used: Array, rho: Array) -> Array:
    """(I,) how much less work than the time average an arrival finds: regular arrivals avoid the peaks they make.

    The factor of W. Kraemer and M. Langenbach-Belz (8th Int. Teletraffic Congress, 1976) for GI/G/1 with less than
    Poisson's variance: exp(-2 (1 - rho) (1 - ca2)**2 / (3 rho (ca2 + cs2))).
    """
    work, square = (rates * used).sum(axis=1), (rates * used**2).sum(axis=1)
    ca2 = (rates * used**2 * v).sum(axis=1) / np.maximum(square, 1e-15)
    cs2 = np.maximum(square * rates.sum(axis=1) / np.maximum(work, 1e-12) ** 2 - 1, 0)
    exponent = -2 * (1 - rho) * (1 - ca2) ** 2 / (3 * np.maximum(rho, 0.05) * np.maximum(ca2 + cs2, 1e-3))
    return np.asarray(np.exp(exponent))


@dataclass(frozen=True, slots=True)
class Deadline:
    """Where on the lattice ``deadline - S`` lies; arrays (I, K). Not answerable in time at all: `possible` is 0."""

    possible: Array
    cell: NDArray[np.int64]
    fraction: Array


class Workload:
    """The lattice of one fleet: service times (I, K) in seconds, `servers` (I,) requests at once, deadline in seconds.

    `v` (I, K) is the dispersion. Cost of `attainment`: about 0.1 ms for 4 x 3, all in FFTs of length 256.
    """

    def __init__(self, service_s: Array, servers: Array, deadline_s: float, v: Array) -> None:
        self.service_s, self.servers, self._step_s = service_s, servers, deadline_s / CELLS
        damp = _RADIUS ** np.arange(_POINTS)
        self._undamp = 1 / damp[: CELLS + 2]
        # real series: half of the circle says it all
        circle = _RADIUS * np.exp(-2j * np.pi * np.arange(_POINTS // 2 + 1) / _POINTS)
        self._cumulate = 1 / (1 - circle)
        self._residual = np.fft.rfft(self._residual_cells(v) * damp, axis=-1)

    def _residual_cells(self, v: Array) -> Array:
        """(I, K, N): per unit of rate, the residual of a jump v*S/c at rate 1/v, split between a cell's two ends so
        that its mean is exact."""
        jump = (self.service_s / self.servers[:, None] * v)[..., None]
        inside = np.clip(jump - np.arange(_POINTS) * self._step_s, 0, self._step_s)
        mass, upper = inside / v[..., None], inside / (2 * self._step_s)
        cells = mass * (1 - upper)
        cells[..., 1:] += (mass * upper)[..., :-1]
        return cells

    def deadline(self, deadline_s: float) -> Deadline:
        """`deadline_s` may not pass the lattice's own."""
        left = (deadline_s - self.service_s) / self._step_s
        cell = np.clip(np.floor(left).astype(np.int64), 0, CELLS)
        return Deadline((left >= 0).astype(float), cell, np.clip(left - cell, 0, 1))

    def attainment(self, rates: Array, deadlines: tuple[Deadline, ...]) -> list[tuple[Array, Array]]:
        """For each deadline F (I, K) and dF/dl (I, K, K'): l is one endpoint's rate of kind k', in 1/s.

        Above RHO_MAX the rates are scaled down to it, gradient included: finite everywhere, right where it matters.
        """
        used = self.service_s / self.servers[:, None]
        rho_asked = (rates * used).sum(axis=1)
        scale = np.minimum(1, RHO_MAX / np.maximum(rho_asked, 1e-9))
        rates, rho = rates * scale[:, None], rho_asked * scale
        series = 1 / (1 - (rates[:, None, :] @ self._residual)[:, 0])
        sums = self._on_lattice(series * self._cumulate)
        slopes = self._on_lattice((series**2 * self._cumulate)[:, None] * self._residual)
        wait, wait_slope = self._wait_ratio(rho)
        results = []
        for d in deadlines:
            f, df = self._at(d, sums, slopes, rho, used)
            if wait is not None and wait_slope is not None:
                df = wait[:, None, None] * df - (wait_slope[:, None] * (1 - f))[..., None] * used[:, None, :]
                f = 1 - wait[:, None] * (1 - f)
                f, df = f * d.possible, df * d.possible[..., None]
            if (scale < 1).any():
                back = (df * rates[:, None, :]).sum(axis=2) / np.maximum(rho, 1e-9)[:, None]
                scaled = scale[:, None, None] * (df - back[..., None] * used[:, None, :])
                df = np.where((scale < 1)[:, None, None], scaled, df)
            results.append((f, df))
        return results

    def _on_lattice(self, transform: NDArray[np.complex128]) -> Array:
        """The coefficients up to the deadline, and the one after it, of what is given on the circle."""
        return np.asarray(np.fft.irfft(transform, n=_POINTS, axis=-1)[..., : CELLS + 2] * self._undamp)

    def _at(self, d: Deadline, sums: Array, slopes: Array, rho: Array, used: Array) -> tuple[Array, Array]:
        """Linear interpolation on the lattice; `sums` (I, N) and its slopes (I, K', N)."""
        rows = np.arange(len(rho))[:, None]
        low, high = (1 - d.fraction) * d.possible, d.fraction * d.possible
        g = sums[rows, d.cell] * low + sums[rows, d.cell + 1] * high
        kinds = np.arange(slopes.shape[1])[None, None, :]
        at = rows[..., None], kinds, d.cell[..., None]
        above = rows[..., None], kinds, d.cell[..., None] + 1
        dg = slopes[at] * low[..., None] + slopes[above] * high[..., None]
        idle = (1 - rho)[:, None]
        return idle * g, idle[..., None] * dg - used[:, None, :] * g[..., None]

    def _wait_ratio(self, rho: Array) -> tuple[Array | None, Array | None]:
        """ErlangC(c, c*rho)/rho and its slope in rho; None where every endpoint serves one request at a time."""
        if (self.servers == 1).all():
            return None, None

        def ratio(r: Array) -> Array:
            return np.array(
                [erlang_c(int(c), float(c * x)) / max(float(x), 1e-6) for c, x in zip(self.servers, r, strict=True)]
            )

        low, high = np.maximum(rho - 1e-4, 1e-6), np.maximum(rho + 1e-4, 2e-4)
        return ratio(np.maximum(rho, 1e-6)), (ratio(high) - ratio(low)) / (high - low)


def mean_wait_s(rates: Array, service_s: Array, servers: Array, v: Array) -> Array:
    """Mean wait (I,) by Pollaczek and Khinchine with the dispersion's variance and the c-server factor; rho is cut."""
    used = service_s / servers[:, None]
    rho = np.minimum((rates * used).sum(axis=1), RHO_MAX)
    one: Array = (rates * v * used**2).sum(axis=1) / (2 * (1 - rho))
    ratio = [erlang_c(int(c), float(c * x)) / max(float(x), 1e-9) for c, x in zip(servers, rho, strict=True)]
    wait_s: Array = one * np.array(ratio)
    return wait_s
