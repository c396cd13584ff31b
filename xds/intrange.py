"""A range of integers as a regular expression, for matchers that know no numbers.

Invariant: `fullmatch(range_pattern(a, b), str(n))` exactly when a <= n <= b, for canonical decimals (no sign, no
leading zeros; who accepts those puts ``\\+?0*`` in front, as `INTEGER_PREFIX` does, which is what Envoy's own integer
range match accepts).

The range is cut into pieces in which the last k digits are free: at most two per digit, so the pattern grows with the
number of digits and not with the range (RE2 programs and Istio's 1024 characters are both limited). Listing every
number was rejected for that reason. Only what RE2 knows is used.
"""

from __future__ import annotations

INTEGER_PREFIX = r"\+?0*"
"""A plus sign and leading zeros change no number."""


def range_pattern(low: int, high: int) -> str:
    """A pattern for the integers in [low, high], both inclusive, 0 <= low <= high; ValueError otherwise."""
    if not 0 <= low <= high:
        raise ValueError(f"a range of sizes needs 0 <= low <= high, not [{low}, {high}]")
    return "(" + "|".join(_piece(start, end) for start, end in _pieces(low, high)) + ")"


def _pieces(low: int, high: int) -> list[tuple[int, int]]:
    """[low, high] cut so that in each piece both ends have the same number of digits and differ in one leading digit
    position followed only by 0s below and 9s above."""
    pieces: list[tuple[int, int]] = []
    while low <= high:
        free = 1
        # As many free trailing digits as fit: low ends in that many zeros and the block stays within [low, high].
        while low > 0 and low % (free * 10) == 0 and low + free * 10 - 1 <= high:
            free *= 10
        digit = low // free % 10
        # Then as many values of the digit before them as fit.
        end = low + free * min(10 - digit, (high - low + 1) // free) - 1
        pieces.append((low, end))
        low = end + 1
    return pieces


def _piece(start: int, end: int) -> str:
    first, last = str(start), str(end)
    same = 0
    while same < len(first) and first[same] == last[same]:
        same += 1
    if same == len(first):
        return first
    free = len(first) - same - 1
    return first[:same] + _digits(first[same], last[same]) + (f"[0-9]{{{free}}}" if free > 1 else "[0-9]" * free)


def _digits(low: str, high: str) -> str:
    return low if low == high else f"[{low}-{high}]"
