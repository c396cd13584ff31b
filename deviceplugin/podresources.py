"""Who holds which slot, in the kubelet's words: a client of its pod-resources API.

An answer is whole or it is none: what cannot be read raises, so that nobody takes silence for free slots. Only names
come with it (namespace, pod, container), never a UID.

A kubelet that has just started answers, too, and shows no pods: it has not heard of them yet, for 0.8 s, or for as long
as the API server is away (measured, 1.37). What it gave away it reads from its checkpoint before anything else. So a
kubelet is believed from the first answer on that has all that stands there, or when it is not young any more: then what
is missing has ended (a checkpoint keeps it until the next pod comes), or nobody can tell.
Rejected: to take the checkpoint alone. It knows no names, and keeps pods that ended until the next one comes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from pathlib import Path
from time import time
from typing import NamedTuple
from urllib.parse import quote

import orjson
import structlog
from grpc import aio

from deviceplugin.kubeletapi import LIST_PODS, Empty, Shown, shown
from meshctl.errors import UnavailableError
from meshctl.sharing import Owner, Slot

log = structlog.get_logger(__name__)

DEADLINE_S = 2.0
YOUNG_S = 10.0
"""A kubelet that reaches the API server knows its pods long before."""
CHECKPOINT = "kubelet_internal_checkpoint"
"""The kubelet's own, in the directory of the plugins' sockets."""
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


class Identity(NamedTuple):
    """Tells a socket from the next one at its path: ext4 gives an inode out again at once."""

    device: int
    inode: int
    changed_ns: int

    @property
    def born_s(self) -> float:
        """Wall time; nobody changes a socket."""
        return self.changed_ns / 1e9


def identity(path: Path) -> Identity | None:
    """None: nothing is there."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Identity(found.st_dev, found.st_ino, found.st_ctime_ns)


class PodResources:
    """The kubelet's pod-resources API at `socket`, which need not be there yet. One channel, which reconnects."""

    def __init__(self, socket: Path, plugin_dir: Path, young_s: float = YOUNG_S) -> None:
        self._socket, self._checkpoint, self._young_s = socket, plugin_dir / CHECKPOINT, young_s
        self._channel: aio.Channel | None = None
        self._strange: set[str] = set()
        """Resources of which an ID that is none of ours was told of already."""
        self._believed: Identity | None = None
        """The kubelet that knows its pods."""

    async def held(self, resources: Collection[str]) -> Mapping[Slot, Owner]:
        """Every slot of `resources` that a container holds, sorted.

        Raises UnavailableError when the kubelet does not say within `DEADLINE_S`, or does not know its pods yet.
        """
        answer = await self._list()
        # Sorted: where two are shown with one slot (a pod that ended, and the next), the kubelet's order is random.
        held = dict(sorted(self._holders(answer, resources)))
        if identity(self._socket) != self._believed:
            self._believe(resources, {str(slot) for slot in held})
        return held

    async def _list(self) -> tuple[Shown, ...]:
        if self._channel is None:
            self._channel = aio.insecure_channel(address(self._socket), options=CHANNEL)
        call = self._channel.unary_unary(LIST_PODS)
        try:
            return tuple(shown(await call(bytes(Empty()), timeout=DEADLINE_S)))
        except (aio.AioRpcError, ValueError) as error:
            said = f"{error.code().name}: {error.details()}" if isinstance(error, aio.AioRpcError) else str(error)
            said = said if identity(self._socket) else "there is no such socket"  # gRPC says it in forty words
            raise UnavailableError(
                f"the kubelet does not say who holds GPU slots: List at {self._socket}: {said}; "
                "is it the kubelet's pod-resources socket (--pod-resources)?"
            ) from error

    async def close(self) -> None:
        """Harmless when it is closed; the next `held` opens it again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _holders(self, answer: Sequence[Shown], resources: Collection[str]) -> Iterator[tuple[Slot, Owner]]:
        for owner, resource, ids in answer:
            if resource in resources:
                yield from ((slot, owner) for slot in self._slots(resource, ids, owner))

    def _slots(self, resource: str, ids: Collection[str], owner: Owner) -> Iterator[Slot]:
        for text in ids:
            try:
                yield Slot.parse(text)
            except ValueError:
                if resource not in self._strange:
                    self._strange.add(resource)
                    log.warning("podresources.foreign_id", resource=resource, id=text, owner=str(owner))

    def _believe(self, resources: Collection[str], shown: Set[str]) -> None:
        """From now on, or not yet: UnavailableError."""
        kubelet = identity(self._socket)
        missing = sorted(self._given(resources) - shown)
        if kubelet is None or (missing and time() - kubelet.born_s < self._young_s):
            raise UnavailableError(
                f"the kubelet at {self._socket} started a moment ago and does not show its pods yet: of {len(missing)} "
                f"slots that it gave away ({self._checkpoint}) nobody is shown, {', '.join(missing[:1])} among them"
            )
        self._believed = kubelet

    def _given(self, resources: Collection[str]) -> set[str]:
        """IDs of `resources` that the kubelet's checkpoint says are a container's. Raises UnavailableError."""
        try:
            entries = orjson.loads(self._checkpoint.read_bytes())["Data"]["PodDeviceEntries"] or ()
            of_ours = [entry["DeviceIDs"].values() for entry in entries if entry["ResourceName"] in resources]
            return {text for numa_nodes in of_ours for ids in numa_nodes for text in ids}
        except FileNotFoundError:  # a kubelet that never gave anything away
            return set()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UnavailableError(f"{self._checkpoint} is no checkpoint of a kubelet's: {error!r}") from error
