"""What is kept for demands that are equal: the cost of every node and, once asked for, why each is refused.

A row is looked at again when its node has changed since the last look; all, when the policy has learned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshctl.core.packing.fit import fitting, needs_of
from meshctl.core.packing.reasons import CODE, WORSE, Speaker
from meshctl.core.packing.scoring import Floats, Ints, Scorer, Want, at_rows
from meshctl.core.packing.state import State
from meshctl.core.packing.vocabulary import Reason, Refusal

Columns = NDArray[np.int16]
NO_COLUMN = -1
SPLIT = 1e12
"""Cost of a node where a container's slots can only be of several GPUs: behind all others."""


class Shape:
    """Of one `Want`, in one layout of the rows."""

    __slots__ = (
        "_codes",
        "_columns",
        "_costs",
        "_epoch",
        "_seen",
        "_seen_codes",
        "_seen_words",
        "_speaker",
        "_words",
        "needs",
        "want",
    )

    def __init__(self, want: Want) -> None:
        self.want = want
        self.needs = needs_of(want)
        self._costs: Floats = np.zeros(0)
        self._columns: Columns = np.zeros(0, np.int16)
        self._seen = self._seen_codes = self._seen_words = -1
        self._epoch = 0
        self._speaker = Speaker(want, self.needs)
        self._codes: Ints = np.zeros(0, np.int64)
        self._words: dict[str, Refusal] = {}

    def costs(self, state: State, scorer: Scorer) -> Floats:
        """(N,) inf where the demand does not fit."""
        if self._seen < 0 or self._epoch != scorer.epoch:
            self._costs, self._columns = self.look(state, scorer, np.arange(len(state.names)))
            self._epoch = scorer.epoch
        elif self._seen != state.seq:
            rows = np.flatnonzero(state.stamp > self._seen)
            self._costs[rows], self._columns[rows] = self.look(state, scorer, rows)
        self._seen = state.seq
        return self._costs

    def column(self, row: int) -> int:
        """Of the GPU for the only item; NO_COLUMN: it, or there are several, must be arranged. After `costs`."""
        return int(self._columns[row])

    def look(self, state: State, scorer: Scorer, rows: Ints) -> tuple[Floats, Columns]:
        """(R,) costs of nodes, and the GPU for the only item in each."""
        costs, columns = np.full(len(rows), np.inf), np.full(len(rows), NO_COLUMN, np.int16)
        fits, room = fitting(self.want, self.needs, state, rows)
        good = np.flatnonzero(fits)
        if not good.size:
            return costs, columns
        given = scorer.cost(self.want, state, rows[good])
        if len(self.want.items) == 1:
            given = np.where(at_rows(room, good) >= self.want.items[0].slots, given, np.inf)
            best = given.argmin(axis=1)
            costs[good] = np.minimum(given[np.arange(len(good)), best], SPLIT)
            columns[good] = np.where(costs[good] < SPLIT, best, NO_COLUMN)
        else:
            costs[good] = given[:, 0]
        return costs, columns

    def codes(self, state: State, scorer: Scorer) -> Ints:
        """(N,) why each node is refused, as `reasons.CODE` has it: WORSE where it would do."""
        rows, bad = self._to_say(state, scorer, self._seen_codes)
        if self._seen_codes < 0:
            self._codes = np.zeros(len(state.names), np.int64)
        self._seen_codes = state.seq
        self._codes[rows] = CODE[Reason.WORSE]
        if bad.size:
            self._codes[bad] = self._speaker.found(state, bad).codes
        return self._codes

    def words(self, state: State, scorer: Scorer) -> dict[str, Refusal]:
        """Node, by name -> why it is refused, in words. Not to be changed: who wants to, copies it."""
        rows, bad = self._to_say(state, scorer, self._seen_words)
        names = state.names
        if self._seen_words < 0:
            self._words = dict.fromkeys(names, WORSE)
        else:
            self._words.update(dict.fromkeys(map(names.__getitem__, rows.tolist()), WORSE))
        self._seen_words = state.seq
        if bad.size:
            self._words.update(
                zip(map(names.__getitem__, bad.tolist()), self._speaker.refusals(state, bad), strict=True)
            )
        return self._words

    def _to_say(self, state: State, scorer: Scorer, seen: int) -> tuple[Ints, Ints]:
        """Rows that changed since, and those of them where the demand does not fit."""
        costs = self.costs(state, scorer)
        rows = np.flatnonzero(state.stamp > seen)
        return rows, rows[costs[rows] == np.inf]
