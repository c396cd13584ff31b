"""One connected client, as the server keeps it: its gRPC call, its subscription, and when it last said what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from xds.channel import Channel
from xds.inspect import SHORT, StreamStatus, SyncState, TypeStatus
from xds.snapshot import Snapshot
from xds.subscription import Subscription
from xds.table import Table
from xds.wire import TypeUrl


class Stream:
    """Belongs to the event loop of its server. Equal only to itself."""

    __slots__ = (
        "_acked_s",
        "_opened_s",
        "_sent_s",
        "_task",
        "admitted",
        "context",
        "differs",
        "ended",
        "identity",
        "known",
        "peer",
        "reason",
        "snapshot",
        "subscription",
        "synced",
        "timer",
        "writer",
    )

    def __init__(
        self, context: Any, task: asyncio.Task[Any] | None, *, delta: bool = False, only: TypeUrl | None = None
    ) -> None:
        self.context = context
        self.peer: str = context.peer()
        self.subscription = Subscription(delta=delta, only=only)
        self.snapshot: Snapshot | None = None
        """The newest that its group has, as of the last look."""
        self.writer: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.identity = ""
        self.reason = ""
        """Why the server ends it; "" unless it does."""
        self.known = False
        """It said who it is, and may be."""
        self.admitted = False
        """It may be sent something."""
        self.synced = False
        self.differs = False
        """It refused what other proxies accept, and is not in sync since: what it refuses says nothing about that."""
        self.ended = False
        """By us."""
        self._task = task
        self._opened_s = time.monotonic()
        self._sent_s: dict[str, float] = {}
        self._acked_s: dict[str, float] = {}

    @property
    def name(self) -> str:
        return self.subscription.node.id or f"unnamed at {self.peer}"

    @property
    def host(self) -> str:
        """Where it comes from, without the port: ``ipv4:10.0.0.1:40000`` -> ``ipv4:10.0.0.1``."""
        return self.peer.rpartition(":")[0]

    @property
    def protocol(self) -> str:
        return "delta" if self.subscription.delta else "sotw"

    def end(self) -> None:
        """Ends the stream from our side. The client is told so in order, not cut off."""
        if not self.ended and self._task is not None:
            self._task.cancel()
        self.ended = True

    async def settle(self) -> None:
        """Returns when nothing is being written any more: gRPC can't end a call in the middle of a message, and one
        that is given up there stays open for the client, who hears nothing any more. A client that never reads is
        waited for until its connection is too old (`Limits.connection_age_s`), and its stream counts until then."""
        self.ended = True
        if self.writer is not None:
            await asyncio.wait([self.writer])

    def close(self) -> None:
        """It has ended: nothing of it goes on."""
        self.cancel_timer()
        if self.writer is not None:
            self.writer.cancel()

    def time_out(self, after_s: float, then: Callable[[Stream], None]) -> None:
        """Calls `then` after this long, instead of what was to be called before."""
        self.cancel_timer()
        self.timer = asyncio.get_running_loop().call_later(after_s, then, self)

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def written(self) -> TypeUrl:
        """A response is being written; its type."""
        kind = self.subscription.newest
        self._sent_s[kind] = time.monotonic()
        return kind

    def acknowledged(self, kind: TypeUrl) -> float:
        """The response of `kind` was accepted; how long after it was written, in seconds."""
        now_s = self._acked_s[kind] = time.monotonic()
        return now_s - self._sent_s[kind]

    def status(self, snapshot: Snapshot | None) -> StreamStatus:
        """What there is to know of it."""
        node, only = self.subscription.node, self.subscription.only
        targets = {} if snapshot is None else {c.type_url: t for c, t in self.subscription.targets(snapshot)}
        return StreamStatus(
            node=self.name,
            group=node.group,
            flavour=node.flavour.lower(),
            peer=self.peer,
            identity=self.identity,
            protocol=self.protocol,
            service="ADS" if only is None else SHORT[only],
            connected_s=time.monotonic() - self._opened_s,
            types=tuple(self._type(c, targets.get(c.type_url)) for c in self.subscription.channels),
        )

    def _type(self, channel: Channel, target: Table | None) -> TypeStatus:
        kind = channel.type_url
        return TypeStatus(
            type=SHORT[kind],
            state=_state(channel, target),
            resources=len(channel.accepted),
            version=channel.version,
            sent_at_s=self._sent_s.get(kind),
            acked_at_s=self._acked_s.get(kind),
            error=channel.error,
        )


def _state(channel: Channel, target: Table | None) -> SyncState:
    if not channel.asked:
        return SyncState.NOT_ASKED
    if channel.error:
        return SyncState.NACKED
    if target is None or not (channel.nonce or channel.accepted or channel.due(target)):
        return SyncState.NOT_SENT
    return SyncState.SYNCED if channel.settled(target) else SyncState.STALE
