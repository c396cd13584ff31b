"""`ports.ObjectStatus` on a real API server: the status subresource, and Events."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.ports import KubeObject, ObjectKey

MANAGER = "meshctl-status"
CONTROLLER = "meshctl.io/controller"
_MOST_MESSAGE = 1024
"""The API server takes no more of an Event's note."""


class KubernetesStatus:
    """`instance` names this replica (or node) in Events, for people."""

    def __init__(self, client: Client, instance: str, *, controller: str = CONTROLLER) -> None:
        self._client, self._instance, self._controller = client, instance, controller

    async def apply_status(self, wanted: KubeObject) -> KubeObject:
        return await self._client.apply(wanted, subresource="status", manager=MANAGER, force=True)

    async def post_event(self, about: ObjectKey, uid: str, type_: str, reason: str, message: str, action: str) -> None:
        """Posted once: an answer that was lost is not asked for again, so that one event is not told twice.

        Events have a namespace; what is told of an object that has none is in `default`, where kubectl looks for it."""
        await self._client.create(
            {
                "apiVersion": KINDS["Event"].api_version,
                "kind": "Event",
                "metadata": {
                    "namespace": about.namespace or "default",
                    "name": f"{about.name[:200]}.{secrets.token_hex(8)}",
                },
                "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                "reportingController": self._controller,
                "reportingInstance": self._instance[:128],
                "type": type_,
                "reason": reason,
                "action": action,
                "note": message[:_MOST_MESSAGE],
                "regarding": {
                    "apiVersion": KINDS[about.kind].api_version,
                    "kind": about.kind,
                    "namespace": about.namespace,
                    "name": about.name,
                    "uid": uid,
                },
            }
        )
