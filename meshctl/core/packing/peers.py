"""Other policies, to compare with."""

from __future__ import annotations

from meshctl.core.packing.scoring import Scorer
from meshctl.core.packing.vocabulary import Policy


def peer(policy: Policy, seed: int) -> Scorer:
    """The policy of that name."""
    raise NotImplementedError(f"{policy} with seed {seed}")
