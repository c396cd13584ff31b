"""Ranges of integers as regular expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xds.intrange import INTEGER_PREFIX, range_pattern


def test_every_small_range_exactly() -> None:
    """All ranges within 0..120, each number in and around it, and those that begin like its ends."""
    numbers = [*range(140), *range(198, 203), *range(989, 1012), *range(1190, 1212)]
    for low in range(121):
        for high in range(low, 121):
            pattern = re.compile(range_pattern(low, high))
            assert [n for n in numbers if pattern.fullmatch(str(n))] == list(range(low, high + 1))


BOUND = st.one_of(st.integers(0, 10**4), st.integers(0, 2**63 - 1), st.integers(0, 18).map(lambda k: 10**k))


@given(BOUND, BOUND, st.data())
def test_large_ranges_at_their_edges(one: int, two: int, data: st.DataObject) -> None:
    """The ends are in, their neighbours outside are not, and what is drawn follows the comparison."""
    low, high = sorted((one, two))
    pattern = re.compile(range_pattern(low, high))
    near = [low - 1, low, low + 1, high - 1, high, high + 1, low * 10, high * 10 + 9, high // 10]
    for n in [*near, data.draw(st.integers(0, 2**64)), data.draw(st.integers(low, high))]:
        assert bool(pattern.fullmatch(str(n))) == (low <= n <= high)


@given(BOUND, BOUND)
def test_patterns_stay_short(one: int, two: int) -> None:
    """Istio takes 1024 characters; sizes have at most 10 digits."""
    low, high = sorted((one % 10**10, two % 10**10))
    assert len(INTEGER_PREFIX + range_pattern(low, high)) < 400


def test_what_changes_no_number_is_accepted() -> None:
    """A plus sign and leading zeros, as Envoy's own range match has it; nothing else."""
    pattern = re.compile(INTEGER_PREFIX + range_pattern(8, 32))
    assert all(pattern.fullmatch(text) for text in ("8", "+8", "008", "+0032"))
    assert not any(pattern.fullmatch(text) for text in ("-8", "+-8", "8.0", "", "+", "7", "33", "80", "8 "))


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (4, 3)])
def test_what_is_no_range_is_refused(low: int, high: int) -> None:
    """An inverted range would match nothing, silently."""
    with pytest.raises(ValueError, match="low <= high"):
        range_pattern(low, high)
