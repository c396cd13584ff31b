"""What is kept for demands that are equal: the cost of every node and, once asked for, why each is refused.

A row is looked at again when its node has changed since the last look; all, when the policy has learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshctl.core.packing.fit import fitting, needs_of, usable
from meshctl.core.packing.reasons import CODE, UNKNOWN, WORSE, Speaker
from meshctl.core.packing.scoring import Floats, Ints, Scorer, Want
from meshctl.core.packing.state import State
from meshctl.core.packing.vocabulary import Reason, Refusal

SPLIT = 1e12
"""Cost of a node where a container's slots can only be of several GPUs: behind all others."""


class Shape:
    """Of one `Want`, in one layout of the rows."""

    __slots__ = ("_codes", "_costs", "_epoch", "_seen", "_seen_words", "_speaker", "_words", "needs", "want")

    def __init__(self, want: Want) -> None:
        self.want = want
        self.needs = needs_of(want)
        self._costs: Floats = np.zeros(0)
        self._seen = self._seen_words = -1
        self._epoch = 0
        self._speaker = Speaker(want, self.needs)
        self._codes: Ints = np.zeros(0, np.int64)
        self._words: list[Refusal] = []

    def costs(self, state: State, scorer: Scorer) -> Floats:
        """(N,) inf where the demand does not fit."""
        if self._seen < 0 or self._epoch != scorer.epoch:
            self._costs = self._costs_of(state, scorer, np.arange(len(state.names)))
            self._epoch = scorer.epoch
        elif self._seen != state.seq:
            rows = np.flatnonzero(state.stamp > self._seen)
            self._costs[rows] = self._costs_of(state, scorer, rows)
        self._seen = state.seq
        return self._costs

    def places(self, state: State, scorer: Scorer, rows: Ints) -> Floats:
        """(R, D) what the only item costs on each GPU of `rows`, inf where it does not fit."""
        room = usable(self.want, self.needs[0], state, rows)
        return np.where(room >= self.want.items[0].slots, scorer.cost(self.want, state, rows), np.inf)

    def words(self, state: State, scorer: Scorer) -> tuple[Sequence[Refusal], Ints]:
        """(N + 1,) why each node is refused (WORSE where it would do), and (N,) the reasons' codes.

        The last is for nodes that nobody knows, whose row is -1."""
        costs = self.costs(state, scorer)
        if self._seen_words == state.seq:
            return self._words, self._codes
        if self._seen_words < 0:
            rows = np.arange(len(costs))
            self._words = [WORSE] * len(costs) + [UNKNOWN]
            self._codes = np.zeros(len(costs), np.int64)
        else:
            rows = np.flatnonzero(state.stamp > self._seen_words)
        self._seen_words = state.seq
        good = costs[rows] < np.inf
        self._codes[rows[good]] = CODE[Reason.WORSE]
        for row in rows[good].tolist():
            self._words[row] = WORSE
        bad = rows[~good]
        codes, words = self._speaker.refusals(state, bad)
        self._codes[bad] = codes
        for row, refusal in zip(bad.tolist(), words, strict=True):
            self._words[row] = refusal
        return self._words, self._codes

    def _costs_of(self, state: State, scorer: Scorer, rows: Ints) -> Floats:
        """(R,)"""
        costs = np.full(len(rows), np.inf)
        fits = fitting(self.want, self.needs, state, rows)
        good = rows[fits]
        if not good.size:
            return costs
        if len(self.want.items) == 1:
            least = self.places(state, scorer, good).min(axis=1)
            costs[fits] = np.where(least < np.inf, least, SPLIT)
        else:
            costs[fits] = scorer.cost(self.want, state, good)[:, 0]
        return costs
