"""What is worth an Event: transitions, found by comparing two statuses or two plans. Pure.

An Event tells what happened; what holds is in the conditions. So a state that stays is told once, whoever leads and
however often it is restarted: the status before is the live object's, not this process's memory. Endpoints that are
drained are in no status; they are told from one plan to the next, and forgotten by a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meshctl.controller.conditions import DRAINED, ConditionType, Status
from meshctl.model import EndpointId, ReasonCode, RoutePlan
from meshctl.told import NORMAL, WARNING, Notice, StatusObject, conditions_of

TOLD = 5
"""Endpoints that change together and are told one by one; more are one Event."""


# ------------------------------------------------------------------------------------------------------ transitions

_Condition = Mapping[str, Any]


def of_statuses(old: StatusObject, new: StatusObject) -> tuple[Notice, ...]:
    """What the step from the live status `old` to `new` is worth telling, in the order of the conditions."""
    before = conditions_of(old)
    found = (_of_condition(type_, before.get(type_, {}), now) for type_, now in conditions_of(new).items())
    return tuple(notice for notice in found if notice is not None)


def _of_condition(type_: str, was: _Condition, now: _Condition) -> Notice | None:
    flipped = was.get("status") != now["status"]
    reason, message = str(now["reason"]), str(now["message"])
    match type_, now["status"]:
        case ConditionType.PROGRAMMED, Status.TRUE if flipped:
            return Notice(NORMAL, "Programmed", f"the weights are in force: acknowledged {message}", "Program")
        case ConditionType.PROGRAMMED, Status.FALSE if reason == ReasonCode.QUARANTINED != was.get("reason"):
            return Notice(WARNING, reason, message, "Program")
        case ConditionType.CONFLICT, Status.TRUE if flipped:
            return Notice(WARNING, "Conflict", message, "Program")
        case ConditionType.CONFLICT, Status.FALSE if was and flipped:
            return Notice(NORMAL, "ConflictEnded", message, "Program")
        case ConditionType.SLO_FEASIBLE, Status.FALSE if flipped:
            return Notice(WARNING, reason, message, "Decide")
        case ConditionType.SLO_FEASIBLE, Status.TRUE if was.get("status") == Status.FALSE:
            return Notice(NORMAL, reason, message, "Decide")
        case ((ConditionType.RESOLVED | "Accepted"), Status.FALSE) if flipped or _renewed(was, now):
            return Notice(WARNING, reason, message, "Resolve")
        case ((ConditionType.RESOLVED | "Accepted"), Status.TRUE) if was and flipped:
            return Notice(NORMAL, reason, message, "Resolve")
    return None


def _renewed(was: _Condition, now: _Condition) -> bool:
    """Another cause, or the same one in a newer version of the object."""
    return any(was.get(name) != now.get(name) for name in ("reason", "observedGeneration"))


def of_plans(before: RoutePlan, after: RoutePlan) -> tuple[Notice, ...]:
    """Endpoints drained and recovered, and a route suspended or resumed."""
    if before is after:
        return ()
    known = {endpoint.id: endpoint.gpu or "unknown GPU" for endpoint in after.route.endpoints}
    why = {r.subject: r.message for r in after.reasons if r.code in DRAINED}
    drained = sorted(after.drained - before.drained)
    recovered = sorted((before.drained - after.drained) & known.keys())
    down = [f"{id_} ({known.get(id_)}) gets no requests: {why.get(id_, 'drained')}" for id_ in drained]
    up = [f"{id_} ({known[id_]}) is tried again, with a small weight at first" for id_ in recovered]
    return (
        *_suspension(before.route.spec.suspend, after.route.spec.suspend),
        *_each(NORMAL, "EndpointRecovered", up, recovered, "Recover"),
        *_each(WARNING, "EndpointDrained", down, drained, "Drain"),
    )


def _suspension(before: bool, after: bool) -> Iterator[Notice]:
    if after and not before:
        yield Notice(NORMAL, "Suspended", "spec.suspend is true: the weights stay as they are", "Suspend")
    if before and not after:
        yield Notice(NORMAL, "Resumed", "spec.suspend is false: the weights follow the signals again", "Suspend")


def _each(
    type_: str, reason: str, messages: Sequence[str], endpoints: Sequence[EndpointId], action: str
) -> Iterator[Notice]:
    if len(messages) <= TOLD:
        yield from (Notice(type_, reason, message, action) for message in messages)
    else:
        named = ", ".join(endpoints[:TOLD])
        yield Notice(type_, reason, f"{len(endpoints)} endpoints at once: {named} ...", action)
