"""What is told of any object in its status and in Events: dated conditions, and Notices within a Budget. Pure.

Plain JSON values in and out; what a status says of routes or GPUs is decided elsewhere.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

StatusObject = Mapping[str, Any]
"""A `status` as its JSON says it."""

NORMAL, WARNING = "Normal", "Warning"
PER_MINUTE = 10
"""Events about one object: the API server's own limit for a client is 25 and then one per 5 minutes."""
REPEAT_S = 60.0
"""An Event that says the same is not sent again within this time."""
_MINUTE_S = 60.0
_VOLATILE = re.compile(r"\d+(\.\d+)?(?=%| requests/s\b| m?s\b)|(?<=worst size, )[^:]+")
"""What moves by itself in messages: percentages, rates, times, and which of many good size classes is the worst."""


# ------------------------------------------------------------------------------------------------------- conditions


def dated(new: Mapping[str, Any], old: StatusObject, now: str) -> dict[str, Any]:
    """`new` with lastTransitionTime in its conditions: `now` (RFC 3339) where the status flips, else as in `old`."""
    before = conditions_of(old)
    conditions = []
    for condition in new["conditions"]:
        was = before.get(condition["type"], {})
        since = was.get("lastTransitionTime") if was.get("status") == condition["status"] else None
        conditions.append({**condition, "lastTransitionTime": since or now})
    return {**new, "conditions": conditions}


def conditions_of(status: StatusObject) -> dict[str, Mapping[str, Any]]:
    """By type; a status that somebody else wrote may have anything in it."""
    found = status.get("conditions")
    listed = found if isinstance(found, list | tuple) else ()
    return {str(c["type"]): c for c in listed if isinstance(c, Mapping) and "type" in c}


# ------------------------------------------------------------------------------------------------------------ Events


@dataclass(frozen=True, slots=True)
class Notice:
    """An Event to be."""

    type: str
    reason: str
    message: str
    action: str


def words(message: str) -> str:
    """`message` without what moves by itself."""
    return _VOLATILE.sub("#", message)


@dataclass(slots=True)
class Budget:
    """What one object may still be told about: no repetition within `REPEAT_S`, `PER_MINUTE` in any minute."""

    _sent: deque[tuple[float, str, str]] = field(default_factory=deque)
    """When, reason, words; the last minute's."""

    def allows(self, notice: Notice, now_s: float) -> bool:
        """True once: the Notice is then counted as sent."""
        while self._sent and self._sent[0][0] <= now_s - max(_MINUTE_S, REPEAT_S):
            self._sent.popleft()
        said = words(notice.message)
        again = any((reason, message) == (notice.reason, said) for _, reason, message in self._sent)
        if again or len(self._sent) >= PER_MINUTE:
            return False
        self._sent.append((now_s, notice.reason, said))
        return True
