"""Integers, steps and restrictions hold their sums for every table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshctl.core import guard
from meshctl.model import WEIGHT_TOTAL, EndpointId

NAMES = [EndpointId(f"10.0.0.{i}:8000") for i in range(12)]
raw = st.dictionaries(st.sampled_from(NAMES), st.floats(0, 1e6) | st.just(0.0), min_size=1)
shares = raw.filter(lambda row: sum(row.values()) > 1e-9).map(guard.normalised)
full = st.lists(st.floats(0, 1), min_size=12, max_size=12).filter(lambda x: sum(x) > 1e-6)
tables = st.tuples(full, full).map(
    lambda rows: {n: guard.normalised(dict(zip(NAMES, row, strict=True))) for n, row in zip("ab", rows, strict=True)}
)


@given(shares, st.booleans())
def test_integers_sum_and_stay_near_the_shares(row: guard.Shares, walk: bool) -> None:
    """Largest remainder: less than one from exact (one more where weights would be equal), zeros stay zeros."""
    weights = guard.integers(row, walk=walk)
    assert sum(weights.values()) == WEIGHT_TOTAL
    assert weights.keys() == row.keys()
    for e, share in row.items():
        assert abs(weights[e] - WEIGHT_TOTAL * share) < (2 if walk else 1)
        assert weights[e] >= 0
        assert share > 0 or weights[e] == 0, "who must get nothing gets nothing"
    assert weights == guard.integers(dict(reversed(list(row.items()))), walk=walk), "in whatever order"


@pytest.mark.parametrize("count", [2, 4, 5, 10, 500])
def test_equal_weights_are_told_apart_where_the_table_is_to_be_walked(count: int) -> None:
    """Envoy draws at random among equal weights; one more and one less make it walk."""
    row = {EndpointId(f"{i:04}"): 1 / count for i in range(count)}
    assert len(set(guard.integers(row, walk=False).values())) == 1
    walked = guard.integers(row, walk=True)
    assert len(set(walked.values())) > 1
    assert min(walked.values()) > 0


@pytest.mark.parametrize("count", [1, 1000])
def test_one_endpoint_and_a_thousand_get_whole_weights(count: int) -> None:
    """All of it, or one each."""
    row = {EndpointId(f"{i:04}"): 1 / count for i in range(count)}
    assert set(guard.integers(row, walk=True).values()) == {WEIGHT_TOTAL // count}


def test_nothing_to_share_is_all_zero() -> None:
    """No endpoint may get traffic."""
    assert guard.integers(dict.fromkeys(NAMES, 0.0), walk=True) == dict.fromkeys(NAMES, 0)
    assert guard.normalised(dict.fromkeys(NAMES, 0.0)) == dict.fromkeys(NAMES, 0.0)
    assert guard.integers({}, walk=True) == {}


@given(tables, tables, st.floats(0.01, 1))
def test_a_step_is_limited_and_ends_at_the_target(now: guard.Table, target: guard.Table, largest: float) -> None:
    """No size class moves more; all go the same part of the way; enough steps arrive exactly."""
    reached, cut = guard.step(now, target, largest)
    assert guard.distance(now, reached) <= largest + 1e-9
    assert cut == (guard.distance(now, target) > largest)
    whole, part = ({n: guard.distance({n: now[n]}, {n: t[n]}) for n in now} for t in (target, reached))
    ways = [part[n] / whole[n] for n in now if whole[n] > 1e-6]
    assert ways == pytest.approx([max(ways, default=1.0)] * len(ways))
    for _ in range(int(1 / largest) + 2):
        now, cut = guard.step(now, target, largest)
    assert not cut
    assert guard.distance(now, target) < 1e-9


@given(tables, st.sets(st.sampled_from(NAMES)))
def test_a_restriction_keeps_ratios_and_names_everyone(table: guard.Table, allowed: set[EndpointId]) -> None:
    """Only those allowed get anything; sums stay; ratios among them stay."""
    for name, row in guard.restrict(table, frozenset(allowed), tuple(NAMES)).items():
        assert set(row) == set(NAMES)
        assert {e for e, s in row.items() if s > 0} <= allowed
        assert sum(row.values()) == pytest.approx(1 if allowed else 0)
        kept = sum(table[name][e] for e in allowed)
        if kept > 0:
            assert [row[e] for e in sorted(allowed)] == pytest.approx([table[name][e] / kept for e in sorted(allowed)])
