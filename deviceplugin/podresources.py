"""Who holds which slot, in the kubelet's words: a client of its pod-resources API.

An answer is whole or it is none: what cannot be read raises, so that nobody takes silence for free slots. Only names
come with it (namespace, pod, container), never a UID.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import structlog
from grpc import aio

from deviceplugin.kubeletapi import LIST_PODS, Empty, ListPodResourcesResponse
from meshctl.errors import UnavailableError
from meshctl.sharing import Owner, Slot

log = structlog.get_logger(__name__)

DEADLINE_S = 2.0
CHANNEL = (
    ("grpc.default_authority", "localhost"),  # what kubelets' own clients say; Go refuses a path there
    ("grpc.max_receive_message_length", 16 * 2**20),  # kubelets' own limit
    # A kubelet that was away for a minute is asked again when it is back, not after gRPC's back-off of up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # another channel's failures are not ours
)
"""Of a channel to the kubelet."""


def address(socket: Path) -> str:
    """Of a unix socket, as gRPC wants it."""
    return f"unix:{quote(str(socket.absolute()))}"


class PodResources:
    """The kubelet's pod-resources API at `socket`, which need not be there yet. One channel, which reconnects."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel: aio.Channel | None = None
        self._strange: set[str] = set()
        """Resources of which an ID that is none of ours was told of already."""

    async def held(self, resources: Collection[str]) -> Mapping[Slot, Owner]:
        """Every slot of `resources` that a container holds, sorted.

        Raises UnavailableError when the kubelet does not say within `DEADLINE_S`.
        """
        if self._channel is None:
            self._channel = aio.insecure_channel(address(self._socket), options=CHANNEL)
        call = self._channel.unary_unary(LIST_PODS)
        try:
            answer = ListPodResourcesResponse.parse(await call(bytes(Empty()), timeout=DEADLINE_S))
        except (aio.AioRpcError, ValueError) as error:
            said = f"{error.code().name}: {error.details()}" if isinstance(error, aio.AioRpcError) else str(error)
            raise UnavailableError(
                f"the kubelet does not say who holds GPU slots: List at {self._socket}: {said}; "
                "is it the kubelet's pod-resources socket (--pod-resources)?"
            ) from error
        # Sorted: where two are shown with one slot (a pod that ended, and the next), the kubelet's order is random.
        return dict(sorted(self._holders(answer, resources)))

    async def close(self) -> None:
        """Harmless when it is closed; the next `held` opens it again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _holders(self, answer: ListPodResourcesResponse, resources: Collection[str]) -> Iterator[tuple[Slot, Owner]]:
        for pod in answer.pods:
            for container in pod.containers:
                owner = Owner(pod.namespace, pod.name, container.name)
                for devices in container.devices:
                    if devices.resource in resources:
                        yield from ((slot, owner) for slot in self._slots(devices.resource, devices.ids, owner))

    def _slots(self, resource: str, ids: Collection[str], owner: Owner) -> Iterator[Slot]:
        for text in ids:
            try:
                yield Slot.parse(text)
            except ValueError:
                if resource not in self._strange:
                    self._strange.add(resource)
                    log.warning("podresources.foreign_id", resource=resource, id=text, owner=str(owner))
