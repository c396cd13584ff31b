"""The GPU object of a GPU: what people, the operator and the placement of pods read; and what is worth an Event. Pure.

An object is made anew from what the agent knows, without times: those come with the write (`told.dated`, heartbeat),
so that the same knowledge is the same object, and is not written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deviceplugin.ledger import Ledger
from deviceplugin.policies import Refusal, Wanted, capability
from meshctl.api.base import API_VERSION
from meshctl.sharing import Gpu, Health, Isolation, Mode, MpsPhase, MpsStatus, Sharing
from meshctl.told import NORMAL, WARNING, Notice, StatusObject, conditions_of, dated

NODE_LABEL = "meshctl.io/node"
"""Of a GPU object: its node, so that an agent watches its own objects only."""
_LONGEST_LABEL = 63
_MESSAGE_CHARS = 1024
_NAMED = 3
"""Containers that a message names; of more it says how many."""
_UNITS = (("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10))
HEALTHY, SHARED, WITHIN_LIMITS = "Healthy", "Shared", "WithinLimits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the agent knows of one GPU, beside who holds its slots."""

    gpu: Gpu
    driver: str = ""
    sharing: Sharing | None = None
    """In force; None: it has no slots."""
    wanted: Wanted = field(default_factory=Wanted)
    withdrawn: bool = False
    """No new container is given a slot, for another cause than its health: it drains, or changes."""
    health: Health = field(default_factory=Health)
    mps: MpsStatus = field(default_factory=MpsStatus)
    obstacle: str = ""
    """Why it could not be shared otherwise when that was tried last, though nobody holds a slot."""
    over: str | None = None
    """Which container has more processes on it than its share allows for, in words; "": none; None: nobody knows."""


def object_name(uuid: str) -> str:
    return uuid.lower()


def node_label(node: str) -> str:
    """`node` as a label's value: of a longer name the beginning and a digest."""
    if len(node) <= _LONGEST_LABEL:
        return node
    digest = hashlib.sha256(node.encode()).hexdigest()[:8]
    return f"{node[: _LONGEST_LABEL - 9].rstrip('-.')}-{digest}"


def gpu_object(node: str, node_uid: str, seen: Seen, ledger: Ledger) -> dict[str, Any]:
    """As it is to be on the API server, without times. It goes with its node when the node's UID is known ("": not)."""
    metadata: dict[str, Any] = {"name": object_name(seen.gpu.uuid), "labels": {NODE_LABEL: node_label(node)}}
    if node_uid:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid}]
    return {
        "apiVersion": API_VERSION,
        "kind": "GPU",
        "metadata": metadata,
        "spec": {"node": node, "uuid": seen.gpu.uuid},
        "status": status_of(seen, ledger),
    }


def status_of(seen: Seen, ledger: Ledger) -> dict[str, Any]:
    """What holds of the GPU; what is not known or does not apply is left out."""
    gpu, sharing = seen.gpu, seen.sharing
    status: dict[str, Any] = {
        "product": gpu.product[:128],
        "memory": quantity(gpu.memory_bytes),
        "computeCapability": capability(gpu),
        "conditions": [_healthy(seen.health), _shared(seen, ledger), _within_limits(seen)],
    }
    if seen.driver:
        status["driver"] = seen.driver[:64]
    if policy := _policy(seen):
        status["policy"] = policy
    if sharing is not None:
        status |= {
            "resourceName": sharing.resource,
            "mode": str(sharing.mode),
            "isolation": str(sharing.isolation),
            "severalGPUs": sharing.several_gpus,
        }
    if holders := _holders(gpu.uuid, ledger):
        status["holders"] = holders
    if (counts := slots(seen, ledger))["total"]:
        status |= {"slots": counts, "summary": f"{counts['used']}/{counts['total']}"}
    if tenant := _tenant(sharing, ledger.tenants(gpu.uuid)):
        status["tenant"] = tenant
    if (sharing is not None and sharing.mode is Mode.MPS) or seen.mps.phase is not MpsPhase.OFF:
        status["mps"] = _mps(seen.mps)
    return status


def stamped(wanted: Mapping[str, Any], before: StatusObject, now: str) -> dict[str, Any]:
    """`wanted` with its times: `before` is the status that it had (empty: none), `now` is RFC 3339."""
    return {**wanted, "status": {**dated(wanted["status"], before, now), "heartbeat": now}}


def quantity(size_bytes: int) -> str:
    """The shortest exact Kubernetes quantity: ``16Gi``."""
    for unit, bytes_ in _UNITS:
        if size_bytes and size_bytes % bytes_ == 0:
            return f"{size_bytes // bytes_}{unit}"
    return str(size_bytes)


# ----------------------------------------------------------------------------------------------------- parts of status


def slots(seen: Seen, ledger: Ledger) -> dict[str, int]:
    """Slots that are held though the GPU has none (any more) count."""
    used = len(ledger.used(seen.gpu.uuid))
    total = max(seen.sharing.replicas if seen.sharing is not None else 0, used)
    given = seen.health.healthy and not seen.withdrawn
    return {
        "total": total,
        "used": used,
        "free": total - used if given else 0,
        "unavailable": 0 if given else total - used,
    }


def _holders(uuid: str, ledger: Ledger) -> list[dict[str, Any]]:
    return [
        {"namespace": owner.namespace, "pod": owner.pod, "container": owner.container, "slots": sorted(slots)}
        for owner, slots in sorted(ledger.holders(uuid).items())
    ]


def _tenant(sharing: Sharing | None, tenants: frozenset[str]) -> str:
    """Of several (they were there before the isolation) none is the one."""
    isolated = sharing is not None and sharing.isolation is Isolation.TENANT
    return next(iter(tenants)) if isolated and len(tenants) == 1 else ""


def _policy(seen: Seen) -> dict[str, Any]:
    now, then = seen.sharing, seen.wanted
    if now is None and not then.policy:
        return {}
    name, generation = (now.policy, now.generation) if now is not None else ("", 0)
    waits = bool(then.policy) and (name, generation) != (then.policy, then.generation)
    return {
        "name": name,
        "generation": generation,
        "wanted": then.policy if waits else "",
        "wantedGeneration": then.generation if waits else 0,
    }


def _mps(mps: MpsStatus) -> dict[str, Any]:
    clients = {} if mps.clients is None else {"clients": mps.clients}
    return {"state": str(mps.phase), **clients, "restarts": mps.restarts, "message": _cut(mps.message)}


# ---------------------------------------------------------------------------------------------------------- conditions


def _condition(type_: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "message": _cut(message)}


def _healthy(health: Health) -> dict[str, Any]:
    return _condition(HEALTHY, str(health.healthy), health.reason, health.message)


def _within_limits(seen: Seen) -> dict[str, Any]:
    if seen.over is None:
        return _condition(WITHIN_LIMITS, "Unknown", "NotKnown", "nobody says which processes compute on it")
    if seen.over:
        return _condition(WITHIN_LIMITS, "False", "TooManyProcesses", seen.over)
    return _condition(WITHIN_LIMITS, "True", WITHIN_LIMITS, "")


def _shared(seen: Seen, ledger: Ledger) -> dict[str, Any]:
    """True: new containers get slots as the policy that is for it says."""
    now, then = seen.sharing, seen.wanted
    if then.refusal is not None:
        stays = f"until then {_as_said(now)}" if now is not None else "until then it has no slots"
        whose = f"policy {then.policy}: " if then.policy else ""
        return _condition(SHARED, "False", str(then.refusal), f"{whose}{then.message}; {stays}")
    if then.sharing is None or now is None or now != then.sharing:
        return _condition(SHARED, "False", *_waits(seen, ledger))
    if now.mode is Mode.MPS and seen.mps.phase is not MpsPhase.RUNNING:
        why = seen.mps.message or "its control daemon is not up"
        return _condition(SHARED, "False", f"Mps{seen.mps.phase}", f"{_as_said(now)}, but MPS is not there: {why}")
    weaker = f"stronger than {_few(then.others)}, for it too" if then.others else ""
    return _condition(SHARED, "True", SHARED, "; ".join(filter(None, (_as_said(now), then.message, weaker))))


def _waits(seen: Seen, ledger: Ledger) -> tuple[str, str]:
    """Reason and words for a GPU that is not shared as the policies, which are valid for it, say."""
    now, then = seen.sharing, seen.wanted.sharing
    whom = _few([str(owner) for owner in ledger.holders(seen.gpu.uuid)]) or "a container that was just given slots"
    busy = ledger.busy(seen.gpu.uuid)
    if then is None:
        until = f"; {_as_said(now)}, for those who have slots: {whom}" if now is not None and busy else ""
        return "NoPolicy", f"no GPUSharingPolicy is for it{until}"
    if now is None or not busy:
        when = f"not yet ({seen.obstacle}), then" if seen.obstacle else "in a moment"
        return "Changing", f"{when}: {_as_said(then)}"
    goes_on = "no new container is given slots" if seen.withdrawn else _as_said(now)
    reason = "Draining" if seen.withdrawn else "WaitingForPods"
    return reason, f"waits for {whom} to end; until then {goes_on}, then {_as_said(then)}"


def _as_said(sharing: Sharing) -> str:
    """``MPS, 10 slots of hpe.com/gpus (policy default, generation 3)``."""
    slots = f"{sharing.replicas} slot{'s' if sharing.replicas > 1 else ''} of {sharing.resource}"
    return f"{sharing.mode}, {slots} (policy {sharing.policy}, generation {sharing.generation})"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _cut(text: str) -> str:
    return text if len(text) <= _MESSAGE_CHARS else f"{text[: _MESSAGE_CHARS - 1]}…"


# -------------------------------------------------------------------------------------------------------------- changes


def said(status: StatusObject) -> dict[str, Any]:
    """`status` without its times: what is equal here is not written again."""
    conditions = {
        type_: {name: value for name, value in condition.items() if name != "lastTransitionTime"}
        for type_, condition in conditions_of(status).items()
    }
    return {**{name: value for name, value in status.items() if name != "heartbeat"}, "conditions": conditions}


def acted_on(status: StatusObject) -> dict[str, Any]:
    """Likewise without what moves by itself, several times a second maybe: the number of MPS clients."""
    found = said(status)
    mps = found.get("mps")
    if isinstance(mps, Mapping):
        found["mps"] = {name: value for name, value in mps.items() if name != "clients"}
    return found


def notices(old: StatusObject, new: StatusObject) -> tuple[Notice, ...]:
    """What the step from `old` (empty: the object is new) to `new` is worth telling: each state once, not its words."""
    before, now = conditions_of(old), conditions_of(new)
    return (
        *_of_health(before.get(HEALTHY, {}), now[HEALTHY]),
        *_of_sharing(before.get(SHARED, {}), now[SHARED], renewed=_asked(old) != _asked(new)),
        *_of_limits(before.get(WITHIN_LIMITS, {}), now[WITHIN_LIMITS]),
    )


_Condition = Mapping[str, Any]
_UNKNOWN = frozenset({str(Refusal.NODE_UNKNOWN), str(Refusal.POLICIES_UNKNOWN)})
_TOLD_ELSEWHERE = frozenset({"Changing", "MpsStarting", "MpsFailed", "MpsOff", *_UNKNOWN})
"""Reasons of `SHARED` that pass in a moment, or that `HEALTHY` tells."""


def _asked(status: StatusObject) -> tuple[Any, ...]:
    """By whom and how: a policy in a file has always the same generation."""
    policy, slots = (found if isinstance(found := status.get(name), Mapping) else {} for name in ("policy", "slots"))
    of_policy = (policy.get(name) for name in ("name", "generation", "wanted", "wantedGeneration"))
    return (*of_policy, status.get("mode"), status.get("resourceName"), slots.get("total"))


def _of_health(was: _Condition, now: _Condition) -> Iterator[Notice]:
    flipped = was.get("status") != now["status"]
    if now["status"] == "False" and (flipped or now["reason"] not in (was.get("reason"), "Recovering")):
        yield Notice(WARNING, "GpuUnhealthy", f"{now['reason']}: {now['message']}", "Check")
    if now["status"] == "True" and flipped and was:
        yield Notice(NORMAL, "GpuHealthy", f"slots are given again; it was: {was.get('reason')}", "Check")


def _of_sharing(was: _Condition, now: _Condition, *, renewed: bool) -> Iterator[Notice]:
    reason, message = str(now["reason"]), str(now["message"])
    if (was.get("reason") == reason and not renewed) or reason in _TOLD_ELSEWHERE:
        return
    if now["status"] == "True":
        if renewed or was.get("reason") != "MpsFailed":
            yield Notice(NORMAL, "PolicyInForce", message, "Share")
    elif reason in set(Refusal):
        yield Notice(WARNING, reason, message, "Share")
    elif reason != "NoPolicy":
        yield Notice(NORMAL, "PolicyWaits", message, "Share")
    elif was:
        yield Notice(NORMAL, reason, message, "Share")


def _of_limits(was: _Condition, now: _Condition) -> Iterator[Notice]:
    if now["status"] == "False" and was.get("status") != "False":
        yield Notice(WARNING, "OverLimits", str(now["message"]), "Check")
