"""What a Kubernetes object's status says, and whether a newer one is worth a write. Pure: plain JSON values in and out.

Invariant: a status that says the same is never written again. What an operator acts on (a condition's status or reason,
the generation observed, how many endpoints serve) is worth a write at once; numbers are worth one when they have moved
far enough to matter, and then not often. Numbers inside messages count as no change at all.

Rejected: rounding the numbers until they stand still (one on the edge of two roundings flips for ever); comparing with
what was last decided rather than with what is live (a restart would write every status again).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice
from typing import Any

from meshctl.controller.conditions import INVALID_INPUT, PENDING, Condition, ConditionType, Status
from meshctl.model import Problem, RoutePlan
from meshctl.told import StatusObject, conditions_of, words

ATTAINMENT_POINTS = 1.0
"""Percentage points by which the expected attainment must differ to be written again."""
SHARE_POINTS = 2.0
"""The same of a GPU class's share of a size class."""
MESSAGE_CHARS = 2000
"""Longest message: enough for a person; the schema would take 32768."""
MOST_SHARES = 1024
"""As many as the schema takes."""
ACCEPTED = "Accepted"
"""A ModelProfile's only condition."""

_PROGRAMMED = str(ConditionType.PROGRAMMED)


class Worth(Enum):
    """What a difference between two statuses is worth."""

    NOW = "a write at once"
    LATER = "a write, but not often"
    NOTHING = "no write"


# ---------------------------------------------------------------------------------------------------------- statuses


def route_status(plan: RoutePlan, conditions: Sequence[Condition], generation: int) -> dict[str, Any]:
    """The status of a ModelRoute, its conditions not `dated` yet. Endpoints that are drained are not ready."""
    endpoints = plan.route.endpoints
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": [_condition(c.type, c.status, c.reason, c.message, generation) for c in conditions],
        "endpoints": len(endpoints),
        "readyEndpoints": sum(e.ready and e.id not in plan.drained for e in endpoints),
        "weights": list(islice(_shares(plan), MOST_SHARES)),
    }
    worst = min(plan.attainment.items(), key=lambda item: (item[1], item[0]), default=None)
    if worst is not None and endpoints:
        status |= {"worstClass": worst[0], "attainment": f"{worst[1]:.1%}"}
    return status


def unusable_status(conditions: Sequence[Condition], generation: int) -> dict[str, Any]:
    """The status of a ModelRoute that is not served, because no version of it was ever valid."""
    return {
        "observedGeneration": generation,
        "conditions": [_condition(c.type, c.status, c.reason, c.message, generation) for c in conditions],
    }


def profile_status(problems: Sequence[Problem], generation: int) -> dict[str, Any]:
    """The status of a ModelProfile; `problems` are its own."""
    said = "; ".join(problem.message for problem in problems)
    accepted = (Status.FALSE, INVALID_INPUT, said) if problems else (Status.TRUE, ACCEPTED, "the profile is used")
    return {"observedGeneration": generation, "conditions": [_condition(ACCEPTED, *accepted, generation)]}


def _condition(type_: str, status: Status, reason: str, message: str, generation: int) -> dict[str, Any]:
    return {
        "type": str(type_),
        "status": str(status),
        "reason": str(reason),
        "message": message if len(message) <= MESSAGE_CHARS else f"{message[: MESSAGE_CHARS - 1]}…",
        "observedGeneration": generation,
    }


def _shares(plan: RoutePlan) -> Iterator[dict[str, str]]:
    """Each GPU class's share of each size class, ordered by class, then GPU."""
    gpus = {endpoint.id: endpoint.gpu for endpoint in plan.route.endpoints}
    for size, weights in plan.weights.items():
        by_gpu = dict.fromkeys(sorted(gpus.values()), 0)
        for endpoint, weight in weights.items():
            by_gpu[gpus[endpoint]] += weight
        total = sum(by_gpu.values()) or 1
        for gpu, weight in by_gpu.items():
            yield {"size": size, "gpu": gpu, "share": f"{weight / total:.1%}"}


# -------------------------------------------------------------------------------------------------------- comparison


def worth_writing(old: StatusObject, new: StatusObject) -> Worth:
    """What it is worth to replace the live status `old` by `new`; times are not compared."""
    if _acted_on(old) != _acted_on(new):
        return Worth.NOW
    if _words(old) != _words(new) or _moved(_numbers(old), _numbers(new)):
        return Worth.LATER
    return Worth.NOTHING


def awaits_confirmation(old: StatusObject, new: StatusObject) -> bool:
    """The newest weights of a route that was served before are still on their way, as after each step."""
    was, now = conditions_of(old).get(_PROGRAMMED, {}), conditions_of(new).get(_PROGRAMMED, {})
    same = old.get("observedGeneration") == new.get("observedGeneration")
    return same and now.get("reason") == PENDING and was.get("status") not in (None, Status.FALSE)


def as_confirmed_before(old: StatusObject, new: Mapping[str, Any]) -> dict[str, Any]:
    """`new`, with `old`'s word on what the pending confirmation decides: each step would be four writes otherwise."""
    before = conditions_of(old)
    conditions = [before.get(c["type"], c) if c["reason"] == PENDING else c for c in new["conditions"]]
    return {**new, "conditions": conditions}


def _acted_on(status: StatusObject) -> tuple[Any, ...]:
    conditions = conditions_of(status)
    told = [(t, c.get("status"), c.get("reason"), c.get("observedGeneration")) for t, c in sorted(conditions.items())]
    counts = [status.get(name) for name in ("observedGeneration", "endpoints", "readyEndpoints")]
    return (*counts, _percent(status.get("attainment")) is None, told)


def _words(status: StatusObject) -> list[tuple[str, str]]:
    return sorted((type_, words(str(c.get("message", "")))) for type_, c in conditions_of(status).items())


def _numbers(status: StatusObject) -> dict[tuple[str, str], tuple[float | None, float]]:
    """Every number with how far it must move; shares by size class and GPU."""
    found = {("attainment", ""): (_percent(status.get("attainment")), ATTAINMENT_POINTS)}
    shares = status.get("weights")
    for share in shares if isinstance(shares, list | tuple) else ():
        if isinstance(share, Mapping):
            key = str(share.get("size")), str(share.get("gpu"))
            found[key] = _percent(share.get("share")), SHARE_POINTS
    return found


_Numbers = Mapping[tuple[str, str], tuple[float | None, float]]


def _moved(old: _Numbers, new: _Numbers) -> bool:
    if old.keys() != new.keys():
        return True
    for key, (after, points) in new.items():
        before = old[key][0]
        if (before is None) != (after is None):
            return True
        if before is not None and after is not None and round(abs(after - before), 6) >= points:
            return True
    return False


def _percent(text: object) -> float | None:
    """``"99.4%"`` -> 99.4; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text) if isinstance(text, str) else None
    return float(match[1]) if match else None
