"""What changes on a GPU, in the agent's log: the same as its Events, for whoever has the node's log and no API server.

A line per state, not per look; a GPU that flaps has its lines within a `Budget`, as its Events have. Rejected: lines
where each thing happens (a probe, an XID, MPS, a policy): what becomes of them together is decided elsewhere, once.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from deviceplugin.objects import notices
from meshctl.ports import KubeObject
from meshctl.told import WARNING, Budget, StatusObject

log = structlog.get_logger(__name__)


class Journal:
    """Of one run of the agent; `follow` after each turn."""

    def __init__(self) -> None:
        self._last: dict[str, StatusObject] = {}
        self._budgets: dict[str, Budget] = {}

    def follow(self, objects: Mapping[str, KubeObject], now_s: float) -> None:
        """`objects`: the GPU objects as they are now, by UUID."""
        for uuid, one in sorted(objects.items()):
            status: StatusObject = one["status"]
            before, self._last[uuid] = self._last.get(uuid, {}), status
            budget = self._budgets.setdefault(uuid, Budget())
            for notice in notices(before, status):
                if budget.allows(notice, now_s):
                    write = log.warning if notice.type == WARNING else log.info
                    write(notice.reason, gpu=uuid, message=notice.message)
