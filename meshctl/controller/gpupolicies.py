"""What the operator says on each GPUSharingPolicy: conditions, progress by node, and Events. Pure.

| type | True | False | Unknown |
|------|------|-------|---------|
| Accepted | valid, and selects nodes | Invalid, NoNodes, NoGpus, or Overruled on all its GPUs | |
| Programmed | every GPU that it is for is shared so | some wait, or refuse it (their reason) | no GPU is known yet |
| Conflict | another policy took GPUs that it selects | none did | |

Texts name what a person can change, and hold no times that move by themselves: the same makes the same status.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

from deviceplugin.policies import Policy, Refusal, wanted
from meshctl.controller.conditions import Status
from meshctl.controller.gpuclaims import Card, Claim, Nodes, Read, condition
from meshctl.told import NORMAL, WARNING, Notice, StatusObject, conditions_of

ACCEPTED, PROGRAMMED, CONFLICT = "Accepted", "Programmed", "Conflict"
INVALID, NO_NODES, NO_GPUS, OVERRULED, WAITING = "Invalid", "NoNodes", "NoGpus", "Overruled", "Waiting"
SILENT_AFTER = timedelta(minutes=5)
"""Agents write a heartbeat once a minute."""
MOST_NODES = 1000
NODE_MESSAGE_CHARS = 1024
"""As much as the schema takes."""
MESSAGE_CHARS = 2000
NAMED = 5
"""Of many GPUs, pods or the like, this many are named."""


@dataclass(slots=True)
class _Claims:
    """Of one policy."""

    mine: list[Claim] = field(default_factory=list)
    lost: list[Claim] = field(default_factory=list)
    """GPUs that it selects and another policy has."""


def statuses(
    policies: Iterable[Read], claims: Sequence[Claim], nodes: Nodes, now: datetime
) -> dict[str, dict[str, Any]]:
    """Each policy's status by name, its conditions not `dated` yet. `claims` are ordered by node."""
    reads = {read.name: read for read in policies}
    by_policy = {name: _Claims() for name in reads}
    for claim in claims:
        if claim.wanted.policy in by_policy:
            by_policy[claim.wanted.policy].mine.append(claim)
        for name in claim.wanted.others:
            by_policy[name].lost.append(claim)
    valid = {name: read.policy for name, read in reads.items() if read.policy is not None}
    return {name: _status(read, by_policy[name], claims, nodes, valid, now) for name, read in reads.items()}


def _status(
    read: Read,
    its: _Claims,
    claims: Sequence[Claim],
    nodes: Nodes,
    valid: Mapping[str, Policy],
    now: datetime,
) -> dict[str, Any]:
    generation = int(read.raw["metadata"].get("generation", 0))
    accepted = _accepted(read, its, claims, nodes)
    progress = [_node(name, list(of_node), now) for name, of_node in groupby(its.mine, key=lambda c: c.card.node)]
    told = (
        (ACCEPTED, *accepted),
        (PROGRAMMED, *_programmed(accepted, its.mine, progress)),
        (CONFLICT, *_conflict(read.name, its.lost, valid)),
    )
    return {
        "observedGeneration": generation,
        "gpus": len(its.mine),
        "ready": sum(node["ready"] for node in progress),
        "nodes": sorted(progress, key=lambda node: (node["ready"] == node["gpus"], node["name"]))[:MOST_NODES],
        "conditions": [
            {
                "type": type_,
                "status": str(status),
                "reason": reason,
                "message": _short(message, MESSAGE_CHARS),
                "observedGeneration": generation,
            }
            for type_, status, reason, message in told
        ],
    }


_Told = tuple[Status, str, str]
"""Status, reason and message of a condition."""

# ------------------------------------------------------------------------------------------------------------- Accepted


def _accepted(read: Read, its: _Claims, claims: Sequence[Claim], nodes: Nodes) -> _Told:
    if read.policy is None:
        return Status.FALSE, INVALID, f"{read.fault}; an agent that knew a valid version goes by that"
    selector = read.policy.spec.node_selector
    selected = {name for name, labels in nodes.items() if selector.items() <= labels.items()}
    if not selected:
        wanted_labels = ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
        what = f"no node has the labels {wanted_labels}" if selector else "the cluster has no nodes"
        return Status.FALSE, NO_NODES, f"{what}: correct spec.nodeSelector, or label the nodes"
    if its.mine:
        where = len({claim.card.node for claim in its.mine})
        return Status.TRUE, ACCEPTED, f"it is for {_count(len(its.mine), 'GPU')} of {_count(where, 'node')}"
    if its.lost:
        return Status.FALSE, OVERRULED, "every GPU that it selects has another policy: see Conflict"
    there = {claim.card.gpu.product for claim in claims if claim.card.node in selected}
    if there and not any(_is_for(read.policy, claim, nodes) for claim in claims if claim.card.node in selected):
        asked = _some(list(read.policy.spec.products))
        what = f"{_count(len(selected), 'node')} selected, with no GPU of spec.products ({asked})"
        return Status.FALSE, NO_GPUS, f"{what}; the products there are: {_some(sorted(there))}"
    return Status.TRUE, ACCEPTED, f"no agent tells of GPUs on the {_count(len(selected), 'node')} that it selects yet"


def _is_for(policy: Policy, claim: Claim, nodes: Nodes) -> bool:
    card = claim.card
    return wanted(card.gpu, card.node, nodes.get(card.node), (policy,), card.driver).policy == policy.name


# ----------------------------------------------------------------------------------------------------------- Programmed


def _programmed(accepted: _Told, mine: Sequence[Claim], progress: Sequence[Mapping[str, Any]]) -> _Told:
    if accepted[0] is not Status.TRUE:
        return Status.FALSE, accepted[1], "see Accepted"
    if not mine:
        return Status.UNKNOWN, NO_GPUS, accepted[2]
    ready = sum(node["ready"] for node in progress)
    so_far = f"{ready} of {_count(len(mine), 'GPU')} shared so"
    said = [f"node {node['name']}: {node['message']}" for node in progress if node["message"]]
    words = "; ".join([so_far, *said[:NAMED]])
    if ready == len(mine):
        return Status.TRUE, PROGRAMMED, words
    refusals = {reason for claim in mine if not claim.done and (reason := _refusal(claim))}
    return Status.FALSE, min(refusals, default=WAITING), words


def _node(name: str, mine: Sequence[Claim], now: datetime) -> dict[str, Any]:
    """A PolicyNode. A refusal that several GPUs share is told once."""
    said = [f"the agent is silent since {since}" for since in [_silent_since(mine, now)] if since]
    waits = {claim.card.gpu.uuid: why for claim in mine if not claim.done and (why := _waits_for(claim))}
    same = {why: [uuid for uuid, other in waits.items() if other == why] for why in waits.values()}
    said += [f"{_some(gpus)}: {why}" for why, gpus in same.items()]
    ready = sum(claim.done for claim in mine)
    return {"name": name, "gpus": len(mine), "ready": ready, "message": _short("; ".join(said), NODE_MESSAGE_CHARS)}


def _waits_for(claim: Claim) -> str:
    """Why the GPU is not shared as its policy says."""
    if claim.wanted.refused:
        return claim.wanted.message
    if message := _said(claim).get("message"):
        return str(message)
    pods = sorted({f"{h['namespace']}/{h['pod']}" for h in claim.card.status.get("holders") or ()})
    return f"waits for {_some(pods)} to end" if pods else "the agent has not taken it up yet"


def _said(claim: Claim) -> Mapping[str, Any]:
    """The agent's condition Shared when that is about this version of the policy, and not well; else {}."""
    policy, shared = claim.card.status.get("policy") or {}, condition(claim.card, "Shared")
    about = (policy.get("wanted"), policy.get("wantedGeneration")) == (claim.wanted.policy, claim.wanted.generation)
    return shared if about and shared.get("status") == str(Status.FALSE) else {}


def _refusal(claim: Claim) -> str:
    """Its reason; "" when the GPU only waits. The agent knows more than its GPU object says: that MIG is on."""
    if claim.wanted.refusal is not None:
        return str(claim.wanted.refusal)
    reason = _said(claim).get("reason")
    return str(reason) if reason in set(Refusal) else ""


def _silent_since(mine: Sequence[Claim], now: datetime) -> str:
    """The agent's last heartbeat when that is long ago; "" when it is not, or none is known."""
    beats = [beat for claim in mine if (beat := _beat(claim.card)) is not None]
    last = max(beats, default=None)
    return last[1] if last is not None and now - last[0] > SILENT_AFTER else ""


def _beat(card: Card) -> tuple[datetime, str] | None:
    text = str(card.status.get("heartbeat") or "")
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (when, text) if when.tzinfo is not None else None


# ------------------------------------------------------------------------------------------------------------- Conflict


def _conflict(name: str, lost: Sequence[Claim], valid: Mapping[str, Policy]) -> _Told:
    if not lost:
        return Status.FALSE, "NoConflict", "no other policy has a GPU that it selects"
    by_winner: dict[str, list[str]] = {}
    for claim in lost:
        by_winner.setdefault(claim.wanted.policy, []).append(f"{claim.card.gpu.uuid} on {claim.card.node}")
    said = []
    for winner, gpus in sorted(by_winner.items()):
        what = f"{_count(len(gpus), 'GPU')} ({_some(gpus)}) shared by policy {winner} instead"
        said.append(f"{what}, {_why(valid[winner], valid[name])}")
    return Status.TRUE, OVERRULED, "; ".join(said)


def _why(winner: Policy, loser: Policy) -> str:
    """What of `Policy.rank` decided."""
    if winner.spec.priority != loser.spec.priority:
        return f"whose priority {winner.spec.priority} is higher than {loser.spec.priority}"
    if winner.created != loser.created:
        return f"which has the same priority and is older (since {winner.created})"
    return "which has the same priority and age, and comes first by name"


# --------------------------------------------------------------------------------------------------------------- Events


def notices(old: StatusObject, new: StatusObject) -> Iterator[Notice]:
    """What the step from the live status `old` to `new` is worth telling."""
    before = conditions_of(old)
    for type_, now in conditions_of(new).items():
        was = before.get(type_, {})
        if was.get("status") == now["status"] and was.get("reason") == now["reason"]:
            continue
        bad = str(Status.TRUE if type_ == CONFLICT else Status.FALSE)
        reason, message = str(now["reason"]), str(now["message"])
        match type_, now["status"] == bad:
            case "Programmed", True if reason == WAITING or message == "see Accepted":
                pass  # a change is under way, or Accepted says it
            case _, True:
                yield Notice(WARNING, type_ if type_ == CONFLICT else reason, message, "Share")
            case "Programmed", False if now["status"] == str(Status.TRUE):
                yield Notice(NORMAL, PROGRAMMED, message, "Share")
            case (("Accepted" | "Conflict"), False) if was.get("status") == bad:
                yield Notice(NORMAL, "ConflictEnded" if type_ == CONFLICT else reason, message, "Share")


# ---------------------------------------------------------------------------------------------------------------- texts


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _short(message: str, most: int) -> str:
    return message if len(message) <= most else f"{message[: most - 1]}…"
