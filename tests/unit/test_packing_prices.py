"""What a GPU's free remainder is worth."""

import numpy as np
import pytest

from meshctl.core.packing.prices import LEVELS, prices


def _levels(**counts: float) -> np.ndarray:
    """`_levels(l53=2)`: two at level 53, none elsewhere."""
    found = np.zeros(LEVELS + 1)
    for name, count in counts.items():
        found[int(name[1:])] = count
    return found


def test_nothing_is_known_before_anybody_has_arrived() -> None:
    """No arrivals, or no GPU: no prices, and not an error."""
    assert not prices(_levels(l100=8), _levels()).any()
    assert not prices(_levels(), _levels(s50=8)).any()


def test_a_piece_that_nobody_asks_for_is_worth_nothing() -> None:
    """Halves alone: 0.5 to 0.99 of a GPU is one half, what is less is nothing, a whole GPU is two."""
    worth = prices(_levels(l100=100), _levels(s50=10))
    assert worth[[0, 49, 50, 99, 100]] == pytest.approx([0, 0, 50, 50, 100], abs=0.01)


def test_what_will_never_be_filled_is_no_part_of_a_gpus_worth() -> None:
    """Where 0.81 alone is asked for, 0.19 of each GPU is lost, and a GPU is worth 0.81 of one."""
    worth = prices(_levels(l100=100), _levels(s81=10))
    assert worth[[19, 80, 81, 100]] == pytest.approx([0, 0, 81, 81], abs=0.01)


def test_scarce_pieces_are_worth_their_best_use_and_plenty_the_last() -> None:
    """0.53 is kept for 0.47 while few such pieces are there; once they are many, 0.32 may have them."""
    arrived = _levels(s47=30, s32=10, s100=60)
    scarce = prices(_levels(l100=100, l53=5), arrived)
    plenty = prices(_levels(l100=10, l53=200), arrived)
    assert scarce[53] > scarce[21] + 32
    assert plenty[53] <= plenty[21] + 32 + 0.01


def test_levels_that_no_gpu_has_get_the_least_price() -> None:
    """Their price is bounded by what could come into them, not arbitrary: it decides what happens when one appears."""
    worth = prices(_levels(l100=3), _levels(s90=5, s5=1))
    assert np.all(worth <= np.arange(LEVELS + 1) + 0.01)
    assert np.all(np.diff(worth) >= 0)
