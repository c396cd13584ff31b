"""Prices of GPU pieces against the program that they are the dual of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from meshctl.core.packing.prices import LEVELS, Floats, prices

_levels = st.dictionaries(st.integers(1, LEVELS), st.integers(1, 50), min_size=1, max_size=6)


def _array(counts: dict[int, int]) -> Floats:
    found = np.zeros(LEVELS + 1)
    for level, count in counts.items():
        found[level] = count
    return found


def _most(free: Floats, coming: Floats) -> float:
    """The most hundredths that can be placed, by the primal, written out."""
    steps = [(r, s) for s in np.flatnonzero(coming).tolist() for r in range(s, LEVELS + 1)]
    uses = np.zeros((2 * (LEVELS + 1), len(steps)))
    for column, (level, size) in enumerate(steps):
        uses[level, column] += 1
        uses[level - size, column] -= 1
        uses[LEVELS + 1 + size, column] += 1
    result = linprog([-size for _, size in steps], A_ub=uses, b_ub=np.concatenate([free, coming]))
    assert result.fun is not None
    return float(-result.fun)


@given(_levels, _levels)
@settings(max_examples=30, deadline=None)
def test_prices_bound_what_can_be_placed_and_reach_it(gpus: dict[int, int], items: dict[int, int]) -> None:
    """Duality: all GPUs at their price, and each item at what its cheapest place leaves of it, add up to the most that
    can be placed. The rounding and the sliver of a GPU at each level are what they may differ by."""
    free, arrived = _array(gpus), _array(items)
    levels = np.arange(LEVELS + 1)
    coming = arrived * 1.02 * (free @ levels) / (arrived @ levels)
    worth = prices(free, arrived)
    surplus = np.zeros(LEVELS + 1)
    for size in np.flatnonzero(arrived).tolist():
        surplus[size] = max(0.0, *(size - worth[size:] + worth[: LEVELS + 1 - size]))
    bound = float(free @ worth + coming @ surplus)
    slack = 0.02 * (free.sum() + coming.sum()) + 1e-4 * LEVELS * (LEVELS + 1)
    assert _most(free, coming) == pytest.approx(bound, abs=slack)


@given(_levels, _levels)
@settings(max_examples=50, deadline=None)
def test_prices_rise_from_nothing_to_at_most_the_piece(gpus: dict[int, int], items: dict[int, int]) -> None:
    """More of a GPU is never worth less, nor any of it more than itself; the arguments stay as they are."""
    free, arrived = _array(gpus), _array(items)
    before = free.copy(), arrived.copy()
    worth = prices(free, arrived)
    assert worth[0] == 0
    assert np.all(np.diff(worth) >= 0)
    assert np.all(worth <= np.arange(LEVELS + 1) + 0.01)
    assert (before[0] == free).all()
    assert (before[1] == arrived).all()
