"""How the API writes times and shares, and how they become the numbers of the core.

A duration is a string with a unit, as Go and Kubernetes write it (``150ms``, ``1m30s``); it becomes seconds. A bare
number is refused: whether 150 means seconds or milliseconds is the most expensive thing to guess wrong. A ratio is a
number 0..1 and never a percentage; the one percentage of the API (``percentile``) is named so and is 0..100.

Rejected: pydantic's own timedelta (reads ISO 8601 and bare numbers, rounds to microseconds).
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$"
DURATION_LENGTH = 32
"""Characters of a duration: more than any sensible one has, few enough for the cost estimate of a CEL rule."""
LONGEST_S = 24 * 3600.0
"""Nothing here waits longer than a day; up to there nanoseconds survive the way through a float."""

_DURATION = re.compile(DURATION_PATTERN)
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s|m|h)")
_UNIT_NS = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_EXAMPLE = "write a number with a unit, e.g. 150ms or 1m30s"


def parse_duration(text: object) -> float:
    """Seconds of a Kubernetes-style duration, whole nanoseconds as in Go (a fraction of one is cut off).

    Raises ValueError that says what to write instead.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise ValueError(f"must be a duration; {_EXAMPLE}")  # noqa: TRY004 - one exception type: pydantic maps it
    if not isinstance(text, str):
        raise ValueError(f"has no unit; {_EXAMPLE}")  # noqa: TRY004 - as above
    if text.startswith("-"):
        raise ValueError(f"must not be negative; {_EXAMPLE}")
    if len(text) > DURATION_LENGTH or not _DURATION.fullmatch(text):
        bare = re.fullmatch(r"[0-9.]+", text)
        raise ValueError(f"has no unit; {_EXAMPLE}" if bare else f"is not a duration; {_EXAMPLE}")
    seconds = sum(int(Decimal(number) * _UNIT_NS[unit]) for number, unit in _PART.findall(text)) / 1e9
    if seconds > LONGEST_S:
        raise ValueError("is longer than a day; write at most 24h")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest usual form: ``parse_duration(format_duration(s)) == s`` for every whole number of nanoseconds."""
    ns = round(seconds * 1e9)
    for unit, size_ns in (("ns", 1), ("us", 1_000), ("ms", 1_000_000)):
        if 0 < ns < size_ns * 1_000:
            return _decimal(ns, size_ns) + unit
    minutes, rest_ns = divmod(ns, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else ""]
    parts.append(_decimal(rest_ns, 1_000_000_000) + "s" if rest_ns or ns == 0 else "")
    return "".join(parts)


def _decimal(value: int, scale: int) -> str:
    text = f"{Decimal(value) / Decimal(scale):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _duration_s(value: Any) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise PydanticCustomError("duration", "{reason}", {"reason": str(error)}) from error


def _positive_s(value: Any) -> float:
    seconds = _duration_s(value)
    if seconds == 0:
        raise PydanticCustomError("duration", "must be longer than zero")
    return seconds


_IN_A_DAY = "duration(self) <= duration('24h')"
ZERO_ALLOWED = {"rule": _IN_A_DAY, "message": "must be at most 24h"}
_NOT_ZERO = {
    "rule": f"duration(self) > duration('0s') && {_IN_A_DAY}",
    "message": "must be longer than zero, and at most 24h",
}


def _schema(rule: dict[str, str]) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "type": "string",
            "pattern": DURATION_PATTERN,
            "maxLength": DURATION_LENGTH,
            "x-kubernetes-validations": [rule],
        }
    )


DurationOrZero = Annotated[
    float,
    BeforeValidator(_duration_s),
    PlainSerializer(format_duration, return_type=str),
    _schema(ZERO_ALLOWED),
]
"""Seconds, at least 0; written as a duration."""
Duration = Annotated[
    float,
    BeforeValidator(_positive_s),
    PlainSerializer(format_duration, return_type=str),
    _schema(_NOT_ZERO),
]
"""Seconds, more than 0; written as a duration."""
Ratio = Annotated[float, Field(ge=0, le=1)]
"""A share, 0..1."""
