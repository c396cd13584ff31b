"""What a GPU's free remainder is worth, given what is free and what arrives: shadow prices of a linear program.

A piece of a GPU is worth what will still come into it. 0.19 of a GPU beside 0.81 is worth nothing when hardly anybody
asks for so little; 0.53 is worth 0.47 while those who ask for 0.47 are more than such pieces, and 0.32 once there are
more pieces than them. The program looks ahead until a little more is asked for than is free, as if what has arrived
went on arriving in the same proportions: GPUs free to level r, in hundredths, give an item of size s a place and are
then free to r - s; x[r, s] such steps place the most GPU:

    maximise sum s x[r, s]   with   for each r: sum_s x[r, s] <= free[r] + sum_s x[r + s, s]   (price V[r])
                                    for each s: sum_r x[r, s] <= coming[s]                      (price u[s])

Its dual is solved, which is smaller: minimise free V + coming u with V[r] - V[r - s] + u[s] >= s. Placing s at level r
costs V[r] - V[r - s] - s: what the piece was worth, less what it is worth afterwards, less what it now does. (Bid
prices: K. Talluri, G. van Ryzin, Management Science 44(11), 1998. The level graph: J. M. Valerio de Carvalho, Annals of
Operations Research 86, 1999.)

Rejected, with figures in docs/decisions/0007: the tightest fit; the expectation over the next k arrivals, whose best k
lies beside a cliff. CPU is looked at apart, by `stranding`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVELS = 100
"""Of one GPU: hundredths. Slots of 1/7 are rounded to 14 of them."""
_MORE = 1.02
"""GPUs asked for per free GPU: at 1 it may be either of them that is scarce, and prices all or nothing."""
_ANYWHERE = 1e-4
"""GPUs taken to be at each level: the price of a level where none is now is then the least possible, not any."""
_DIGITS = 2
"""Prices are rounded to so many: below is the solver's noise, which must not choose between equals."""


def prices(free: Floats, arrived: Floats) -> Floats:
    """(LEVELS + 1,) V: worth of a GPU that is free to each level, in hundredths of a GPU, rising from 0.

    free (LEVELS + 1,): GPUs that are free to each level. arrived (LEVELS + 1,): items of each size, in any proportion,
    at size 0 none. All finite, not negative. Nothing arrived or nothing is free: zeros, for nothing is known.
    3 ms for ten sizes, 5 for the twenty of the openb traces, 15 for a hundred.
    """
    levels = np.arange(LEVELS + 1)
    sizes = np.flatnonzero(arrived)
    asked, room = float(arrived @ levels), float(free @ levels)
    if not asked or not room:
        return np.zeros(LEVELS + 1)
    coming = arrived[sizes] * (_MORE * room / asked)
    before, item = np.nonzero(levels[:, None] >= sizes)
    worth = _minimum(np.append(free + _ANYWHERE, coming), before, before - sizes[item], item, sizes[item])
    return np.maximum.accumulate(np.round(worth - worth[0], _DIGITS))


def _minimum(
    weights: Floats, before: NDArray[np.intp], after: NDArray[np.intp], item: NDArray[np.intp], size: NDArray[np.intp]
) -> Floats:
    """(LEVELS + 1,) V, where weights @ (V, u) is least and V[before] - V[after] + u[item] >= size in each step."""
    from scipy.optimize import linprog  # see `weights.load_solver`
    from scipy.sparse import csr_array

    steps = len(size)
    columns = np.concatenate([before, after, LEVELS + 1 + item])
    signs = np.repeat([-1.0, 1.0, -1.0], steps)
    matrix = csr_array((signs, (np.tile(np.arange(steps), 3), columns)), shape=(steps, len(weights)))
    # presolve costs more than it saves: 5.9 ms with it, 4.5 without, 21 for the primal
    options: Any = {"presolve": False}
    limit = -size.astype(np.float64)
    result = linprog(weights, A_ub=matrix, b_ub=limit, method="highs-ds", options=options)  # type: ignore[call-overload]  # the stubs know no sparse arrays
    if not result.success or result.x is None:
        raise ArithmeticError(f"the program of GPU prices has no solution: {result.message}")
    worth: Floats = result.x[: LEVELS + 1]
    return worth
