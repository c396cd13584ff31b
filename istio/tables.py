"""Weights as Istio's objects can hold them: over the endpoints that are there, or over GPU classes. Pure.

Every function gives rows that sum to WEIGHT_TOTAL (or are all zero where nobody is there), and leaves a row alone that
already does: what was read back is rendered as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from meshctl.core.guard import integers, normalised
from meshctl.model import WEIGHT_TOTAL, Endpoint, EndpointId, Weights

Row = Mapping[EndpointId, int]
"""Weights of one size class."""


class Ref(NamedTuple):
    """Where a rule sends requests, all of a host or a subset of it; Envoy has a cluster for each."""

    host: str
    subset: str = ""


def row_over(row: Row, endpoints: Sequence[EndpointId]) -> dict[EndpointId, int]:
    """`row` over `endpoints` only, in proportion; evenly where it gives none of them anything."""
    kept = {e: row.get(e, 0) for e in endpoints}
    total = sum(kept.values())
    if total == WEIGHT_TOTAL:
        return kept
    return integers(normalised({e: float(w) if total > 0 else 1.0 for e, w in kept.items()}), walk=False)


def used(weights: Weights, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """The ready endpoints that some size class gives a weight; all ready ones where none has any."""
    ready = tuple(e for e in endpoints if e.ready)
    return tuple(e for e in ready if any(row.get(e.id, 0) > 0 for row in weights.values())) or ready


def class_row(row: Row, classes: Mapping[str, Sequence[EndpointId]]) -> dict[str, int]:
    """Weights of the GPU classes: the sums over their endpoints. Where nobody is there at all, an equal one each: Istio
    refuses zeros only."""
    over = row_over(row, [e for members in classes.values() for e in members])
    sums = {name: sum(over[e] for e in members) for name, members in classes.items()}
    return sums if any(sums.values()) else dict.fromkeys(sums, 1)


class Dealer:
    """Deals a class's weights out over its endpoints, evenly, one size class after the other.

    Each size class goes on where the one before ended, so that over all of them the endpoints differ by 1 at most: none
    is left with zeros only, which would read as drained, while there is enough for everyone.
    """

    def __init__(self, members: Mapping[Ref, Sequence[EndpointId]]) -> None:
        self._members = members
        self._next = dict.fromkeys(members, 0)

    def deal(self, subset: Ref, weight: int) -> dict[EndpointId, int]:
        """`weight` of `subset`; nothing where it has no endpoint."""
        members = self._members.get(subset, ())
        if not members:
            return {}
        first, count = self._next[subset], len(members)
        each, more = divmod(weight, count)
        self._next[subset] = (first + more) % count
        return {e: each + ((i - first) % count < more) for i, e in enumerate(members)}
