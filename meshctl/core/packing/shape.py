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
        self._seen = self._seen_words = -1
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

    def words(self, state: State, scorer: Scorer) -> tuple[dict[str, Refusal], Ints]:
        """Node -> why it is refused (WORSE where it would do), of all; and (N,) the reasons' codes. Not to be changed:
        who wants to, copies it."""
        costs = self.costs(state, scorer)
        if self._seen_words == state.seq:
            return self._words, self._codes
        if self._seen_words < 0:
            rows = np.arange(len(costs))
            self._words = dict.fromkeys(state.names, WORSE)
            self._codes = np.zeros(len(costs), np.int64)
        else:
            rows = np.flatnonzero(state.stamp > self._seen_words)
        self._seen_words = state.seq
        good = costs[rows] < np.inf
        self._codes[rows[good]] = CODE[Reason.WORSE]
        self._words.update(dict.fromkeys((state.names[row] for row in rows[good].tolist()), WORSE))
        bad = rows[~good]
        words = self._speaker.refusals(state, bad) if bad.size else []
        self._codes[bad] = [CODE[refusal.reason] for refusal in words]
        self._words.update(zip((state.names[row] for row in bad.tolist()), words, strict=True))
        return self._words, self._codes
