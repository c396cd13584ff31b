"""From the table that is wanted to the weights that go out: bounded steps, integers that sum, nothing for a wobble.

Shares are mappings endpoint -> share (0..1), one per size class. The invariants of the result hold for every input:
each size class sums to WEIGHT_TOTAL (all zero when nothing may get traffic), every endpoint is named, none is negative.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshctl.model import WEIGHT_TOTAL, EndpointId

Shares = Mapping[EndpointId, float]
Table = Mapping[str, Shares]


def distance(a: Table, b: Table) -> float:
    """Largest part of a size class's traffic that differs between two tables, 0..1 (total variation)."""
    return max((_moved(a.get(name, {}), b.get(name, {})) for name in sorted({*a, *b})), default=0.0)


def _moved(a: Shares, b: Shares) -> float:
    # sorted: a sum of floats depends on the order, and a set of strings has another one in every process
    return sum(abs(a.get(e, 0.0) - b.get(e, 0.0)) for e in sorted({*a, *b})) / 2


def largest_change(a: Table, b: Table) -> float:
    """Largest change of one endpoint's share of one size class, 0..1."""
    pairs = ((a.get(n, {}), b.get(n, {})) for n in {*a, *b})
    return max((abs(x.get(e, 0.0) - y.get(e, 0.0)) for x, y in pairs for e in {*x, *y}), default=0.0)


def step(now: Table, target: Table, largest: float) -> tuple[Table, bool]:
    """`target`, or as far towards it as moves at most `largest` of any size class; and whether it was cut short.

    All size classes go the same part of the way: the utilisation in between is then between those of the two tables.
    One that were ahead would bring an endpoint its new work before another takes the old work away.
    """
    moved = max((_moved(now.get(name, {}), wanted) for name, wanted in target.items() if now.get(name)), default=0.0)
    if moved <= largest:
        return {name: normalised(shares) for name, shares in target.items()}, False
    part = largest / moved
    table = {
        name: {e: now[name].get(e, 0.0) + part * (share - now[name].get(e, 0.0)) for e, share in wanted.items()}
        if now.get(name)
        else wanted
        for name, wanted in target.items()
    }
    return {name: normalised(shares) for name, shares in table.items()}, True


def normalised(shares: Shares) -> Shares:
    """Non-negative and summing to 1; all zero when there is nothing to share."""
    total = sum(max(0.0, s) for s in shares.values())
    return {e: max(0.0, s) / total if total > 0 else 0.0 for e, s in shares.items()}


def restrict(table: Table, allowed: frozenset[EndpointId], everyone: tuple[EndpointId, ...]) -> Table:
    """Each size class over `allowed` only, in proportion, with zeros for the rest of `everyone`. A class that loses
    all its endpoints is spread evenly: a slow answer beats a refused one."""
    result: dict[str, Shares] = {}
    for name, shares in table.items():
        kept = {e: shares.get(e, 0.0) if e in allowed else 0.0 for e in everyone}
        if allowed and sum(kept.values()) <= 0:
            kept = {e: 1.0 if e in allowed else 0.0 for e in everyone}
        result[name] = normalised(kept)
    return result


def integers(shares: Shares, *, walk: bool) -> dict[EndpointId, int]:
    """Weights that sum to WEIGHT_TOTAL by largest remainder, ties by name.

    `walk`: never let all weights that are not zero be equal. Envoy then walks its weighted schedule instead of
    drawing two endpoints at random: at 80 % load and three equal GPUs, 99.7 % instead of 97.4 % of the large batches
    in time (event simulation).
    """
    if sum(shares.values()) <= 0:
        return dict.fromkeys(shares, 0)
    exact = {e: WEIGHT_TOTAL * s for e, s in shares.items()}
    weights = {e: int(x) for e, x in exact.items()}
    missing = WEIGHT_TOTAL - sum(weights.values())
    for e in sorted(exact, key=lambda e: (weights[e] - exact[e], e))[:missing]:
        weights[e] += 1
    used = sorted(e for e, w in weights.items() if w > 0)
    if walk and len(used) > 1 and len({weights[e] for e in used}) == 1 and weights[used[0]] > 1:
        weights[used[0]] += 1
        weights[used[-1]] -= 1
    return weights
