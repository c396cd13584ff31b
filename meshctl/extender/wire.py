"""What kube-scheduler asks and is told: bytes to typed requests, answers to bytes. Pure; no decision is made here.

The fields are those of k8s.io/kube-scheduler/extender/v1, which Go writes with their own names. What the scheduler does
with an answer (pkg/scheduler/extender.go, schedule_one.go, framework/preemption) decides what stands in it:

- `Error` ends the scheduling of the pod, and is its Event. Preempt and Prioritize have none: there no node helps, and
  every node scores 0.
- With nodeCacheCapable NodeNames come and go; without, whole Nodes do.
- FailedNodes are tried by preemption, FailedAndUnresolvableNodes are not. But to preempt, the scheduler evicts until
  its own filters pass, and we are asked only about nodes that they let pass: it would evict nobody, and call that an
  error ("expected at least one victim pod"). So a node goes to FailedNodes only if the pod is nominated to it and its
  victims are still ending there: while FailedNodes has it the scheduler waits for them instead of evicting others.
  When they are gone and there is no room all the same, that error would leave the pod nominated there for ever.
- Where a node fits it throws the reasons of the others away. Then they are FailedNodes, for people who ask by hand; but
  of more than `TOLD` nodes they are left out: 5000 are 0.3 MB, which costs the scheduler and us more than the decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import orjson

from meshctl.core.packing.vocabulary import Decision, Reason
from meshctl.errors import InputError
from meshctl.extender.ports import PodId, Victims

BEST, WORSE = 10, 1
"""Scores, of 0..10; a node that is refused has 0."""
TOLD = 100
"""Nodes of which each that was not chosen is told why."""


class Candidates(NamedTuple):
    """A Filter or Prioritize request: which of these nodes, for this pod."""

    pod: Mapping[str, Any]
    names: Sequence[str]
    nodes: Mapping[str, Mapping[str, Any]] | None
    """The nodes as they were sent; None: by name only (nodeCacheCapable)."""


class Binding(NamedTuple):
    """A Bind request."""

    pod: PodId
    node: str


class Preemption(NamedTuple):
    """A Preempt request: the scheduler would evict these to make room for the pod."""

    pod: Mapping[str, Any]
    victims: Mapping[str, Victims]
    """By node."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back, and what it comes to."""

    body: bytes
    outcome: str


def read_candidates(body: bytes | bytearray) -> Candidates:
    """Raises InputError that says what is wrong with the request."""
    request = _object(body)
    pod = _pod(request)
    names = request.get("NodeNames")
    if names is not None:
        if not isinstance(names, list) or set(map(type, names)) - {str}:
            raise InputError("NodeNames is no list of names")
        return Candidates(pod, names, None)
    nodes = request.get("Nodes")
    if nodes is None:
        raise InputError("the request has neither NodeNames nor Nodes")
    items = nodes.get("items") if isinstance(nodes, dict) else nodes
    if not isinstance(nodes, dict) or not isinstance(items or [], list):
        raise InputError("Nodes is no list of nodes")
    try:
        by_name = {node["metadata"]["name"]: node for node in items or ()}
    except (TypeError, KeyError) as error:
        raise InputError("a node in Nodes.items has no metadata.name") from error
    if set(map(type, by_name)) - {str}:
        raise InputError("a node in Nodes.items has a name that is no text")
    return Candidates(pod, list(by_name), by_name)


def read_binding(body: bytes | bytearray) -> Binding:
    """Raises InputError that says what is wrong with the request."""
    request = _object(body)
    pod = PodId(_text(request, "PodNamespace"), _text(request, "PodName"), _text(request, "PodUID"))
    return Binding(pod, _text(request, "Node"))


def read_preemption(body: bytes | bytearray) -> Preemption:
    """Raises InputError that says what is wrong with the request."""
    request = _object(body)
    by_uid, whole = request.get("NodeNameToMetaVictims"), request.get("NodeNameToVictims")
    field = "NodeNameToVictims" if by_uid is None else "NodeNameToMetaVictims"
    found = whole if by_uid is None else by_uid
    if not isinstance(found or {}, dict):
        raise InputError(f"{field} is no object of nodes")
    return Preemption(_pod(request), {node: _victims(one, f"{field}[{node}]") for node, one in (found or {}).items()})


def _victims(value: Any, where: str) -> Victims:
    pods = value.get("Pods") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(pods or [], list):
        raise InputError(f"{where} has no list of Pods")
    violations = value.get("NumPDBViolations") or 0
    if not isinstance(violations, int):
        raise InputError(f"{where}.NumPDBViolations is no number")
    return Victims(tuple(_uid(pod, where) for pod in pods or ()), violations)


def _uid(pod: Any, where: str) -> str:
    """Of a MetaPod (UID), or of a whole pod."""
    if isinstance(pod, dict) and "UID" in pod:
        return _text(pod, "UID", f"{where}.Pods.")
    return _text(_mapping(pod, "metadata", where=f"{where}.Pods"), "uid", f"{where}.Pods.metadata.")


def filtered(asked: Candidates, decision: Decision, awaited: str = "") -> Answer:
    """The chosen node, or all that nothing speaks against (the pod asks for no GPU); why not, for each other one. On
    the node `awaited` pods are ending so that this one has room."""
    refused = decision.refused
    chosen = decision.placement
    passed = [chosen.node] if chosen is not None else [name for name in asked.names if name not in refused]
    later, never = _unplaced(decision, awaited) if not passed else ({}, {})
    if passed and len(asked.names) <= TOLD:
        later = _messages(refused)
    result: dict[str, Any] = {
        "Nodes": None if asked.nodes is None else {"items": [asked.nodes[name] for name in passed]},
        "NodeNames": passed if asked.nodes is None else None,
        "FailedNodes": later,
        "FailedAndUnresolvableNodes": never,
        "Error": "",
    }
    return Answer(orjson.dumps(result), "placed" if chosen is not None else "passed" if passed else "unplaced")


def _messages(refused: Mapping[str, Any]) -> dict[str, str]:
    """Node -> why not. Thousands, for each pod: no loop of Python's own (0.2 of 0.5 ms)."""
    return dict(zip(refused, map(itemgetter(1), refused.values()), strict=True))


def _unplaced(decision: Decision, awaited: str) -> tuple[dict[str, str], dict[str, str]]:
    """FailedNodes and FailedAndUnresolvableNodes, where no node fits."""
    never = _messages(decision.refused)
    if awaited in never and decision.refused[awaited].reason.resolvable:
        return {awaited: never.pop(awaited)}, never
    return {}, never


def prioritized(asked: Candidates, decision: Decision) -> Answer:
    """The chosen node has 10, others where the pod would fit 1."""
    refused = decision.refused
    worse = {name for name, refusal in refused.items() if refusal.reason is Reason.WORSE}
    scores = dict.fromkeys(asked.names, 0) | dict.fromkeys(worse, WORSE)
    if decision.placement is not None:
        scores[decision.placement.node] = BEST
    return Answer(orjson.dumps([{"Host": name, "Score": score} for name, score in scores.items()]), "scored")


def bound() -> Answer:
    return Answer(orjson.dumps({"Error": ""}), "bound")


def preempted(victims: Mapping[str, Victims]) -> Answer:
    """Nodes that nobody has to leave are no answer to the scheduler's question: they would be an error."""
    nodes = {
        node: {"Pods": [{"UID": uid} for uid in found.uids], "NumPDBViolations": found.pdb_violations}
        for node, found in victims.items()
        if found.uids
    }
    return Answer(orjson.dumps({"NodeNameToMetaVictims": nodes}), "possible" if nodes else "impossible")


def failed(verb: str, message: str, outcome: str) -> Answer:
    """The answer of `verb` (filter, prioritize, bind, preempt) when there is none."""
    bodies: Mapping[str, Any] = {"prioritize": [], "preempt": {"NodeNameToMetaVictims": {}, "Error": message}}
    return Answer(orjson.dumps(bodies.get(verb, {"Error": message})), outcome)


def _object(body: bytes | bytearray) -> Mapping[str, Any]:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the request of {len(body)} bytes is no JSON: {error}") from error
    if not isinstance(request, dict):
        raise InputError("the request is no JSON object")
    return request


def _pod(request: Mapping[str, Any]) -> Mapping[str, Any]:
    pod = request.get("Pod")
    metadata = _mapping(pod, "metadata", where="Pod")
    for field in ("namespace", "name", "uid"):
        _text(metadata, field, "Pod.metadata.")
    for field in ("spec", "status"):
        _mapping(pod, field, where="Pod", needed=field == "spec")
    found: Mapping[str, Any] = request["Pod"]
    return found


def _mapping(value: Any, field: str, *, where: str, needed: bool = True) -> Mapping[str, Any]:
    found = value.get(field) if isinstance(value, dict) else None
    if found is None and isinstance(value, dict) and not needed:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{where} has no {field}")
    return found


def _text(value: Mapping[str, Any], field: str, where: str = "") -> str:
    found = value.get(field)
    if not isinstance(found, str) or not found:
        raise InputError(f"{where}{field} is missing" if not found else f"{where}{field} is no text")
    return found
