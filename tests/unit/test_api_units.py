"""Durations are read as Kubernetes writes them, and nothing else is."""

from __future__ import annotations

import pytest

from meshctl.api.units import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("150ms", 0.15),
        ("1m30s", 90.0),
        ("1h", 3600.0),
        ("24h", 86400.0),
        ("0s", 0.0),
        ("11.8ms", 0.0118),
        ("800us", 0.0008),
        ("1ns", 1e-9),
        ("1.5h", 5400.0),
        ("1s500ms", 1.5),
        ("010ms", 0.01),
    ],
)
def test_duration_is_seconds(text: str, seconds: float) -> None:
    """Every unit, fractions and sums give exactly the nearest float."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("150", "has no unit"),
        (150, "has no unit"),
        (0.15, "has no unit"),
        (float("nan"), "has no unit"),
        ("150 ms", "is not a duration"),
        ("150 msec", "is not a duration"),
        ("150msec", "is not a duration"),
        ("150MS", "is not a duration"),
        ("1d", "is not a duration"),
        ("-5ms", "must not be negative"),
        ("+5ms", "is not a duration"),
        ("1e3ms", "is not a duration"),
        ("NaN", "is not a duration"),
        ("inf", "is not a duration"),
        ("", "is not a duration"),
        ("ms", "is not a duration"),
        ("1ms\n", "is not a duration"),
        ("\u0661ms", "is not a duration"),
        ("25h", "longer than a day"),
        ("9" * 40 + "h", "is not a duration"),
        (True, "must be a duration"),
        (None, "must be a duration"),
        (["1s"], "must be a duration"),
    ],
    ids=repr,
)
def test_anything_else_is_refused_with_what_to_write(value: object, message: str) -> None:
    """No unit is guessed: bare numbers, other spellings, signs and other types say what is wrong."""
    with pytest.raises(ValueError, match=message):
        parse_duration(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.15, "150ms"),
        (0.0118, "11.8ms"),
        (1.5, "1.5s"),
        (60.0, "1m"),
        (90.0, "1m30s"),
        (3600.0, "1h"),
        (3661.25, "1h1m1.25s"),
        (8e-7, "800ns"),
    ],
)
def test_duration_is_written_short(seconds: float, text: str) -> None:
    """The written form is the one people use."""
    assert format_duration(seconds) == text
