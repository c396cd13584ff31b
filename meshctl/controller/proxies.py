"""What the admin API says of the xDS server's clients, as types: made from what the server says, read back by the CLI.

Like `views`: plain values, a time is an age in seconds, unknown is null. A resource is named with its version and size,
and for who asks with its bytes, which the asker decodes: that takes 7 ms each, half a minute for 1000 routes, in which
this process would serve its proxies late. Pure.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from xds.inspect import SHORT, StreamStatus, SyncState, TypeStatus

if TYPE_CHECKING:
    from xds.translate import Resource  # with it come the libraries of the data plane, which no reader of a view needs


class Inspected(Protocol):
    """An xDS server, as far as one looks into it. Neither method blocks or fails."""

    def streams(self) -> tuple[StreamStatus, ...]:
        """All that are open."""
        ...

    def config(self, node: str) -> Mapping[str, Sequence[Resource]] | None:
        """By short name of the type, what the client of this node id acknowledged; None when it is not connected."""
        ...


@dataclass(frozen=True, slots=True)
class TypeView:
    type: str
    """CDS, EDS, LDS or RDS."""
    state: SyncState
    resources: int
    version: str
    sent_age_s: float | None
    acked_age_s: float | None
    error: str


@dataclass(frozen=True, slots=True)
class StreamView:
    node: str
    group: str
    flavour: str
    peer: str
    identity: str
    protocol: str
    service: str
    connected_s: float
    types: tuple[TypeView, ...]


@dataclass(frozen=True, slots=True)
class ResourceView:
    type: str
    name: str
    route: str
    version: str
    size_bytes: int
    packed: str | None
    """Its bytes in base64, where they were asked for: `xds.inspect.decode` reads them."""


@dataclass(frozen=True, slots=True)
class ConfigView:
    """What the streams of one node id hold."""

    node: str
    streams: tuple[StreamView, ...]
    resources: tuple[ResourceView, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which resources are asked for."""

    type: str = ""
    """A short name; "" for all types."""
    name: str = "*"
    """With ``*`` for any characters."""
    full: bool = False
    """With their bytes."""

    def takes(self, kind: str, name: str) -> bool:
        return self.type in ("", kind) and fnmatchcase(name, self.name)


def stream_views(streams: Iterable[StreamStatus], now_s: float) -> tuple[StreamView, ...]:
    """In order of the node id; `now_s` is of the clock that the streams' times are of."""
    ordered = sorted(streams, key=lambda s: (s.node, s.service, s.protocol, s.peer))
    return tuple(_stream(stream, now_s) for stream in ordered)


def config_view(
    node: str,
    streams: Iterable[StreamStatus],
    held: Mapping[str, Sequence[Resource]],
    wanted: Wanted,
    now_s: float,
) -> ConfigView:
    """What `node` holds of what is `wanted`."""
    resources = [
        ResourceView(
            kind,
            resource.name,
            resource.route,
            f"{resource.digest:032x}",
            len(resource.packed),
            b64encode(resource.packed).decode() if wanted.full else None,
        )
        for kind in SHORT.values()
        for resource in sorted(held.get(kind, ()), key=lambda r: r.name)
        if wanted.takes(kind, resource.name)
    ]
    return ConfigView(node, stream_views((s for s in streams if s.node == node), now_s), tuple(resources))


def _stream(stream: StreamStatus, now_s: float) -> StreamView:
    return StreamView(
        node=stream.node,
        group=stream.group,
        flavour=stream.flavour,
        peer=stream.peer,
        identity=stream.identity,
        protocol=stream.protocol,
        service=stream.service,
        connected_s=stream.connected_s,
        types=tuple(_type(status, now_s) for status in stream.types),
    )


def _type(status: TypeStatus, now_s: float) -> TypeView:
    return TypeView(
        type=status.type,
        state=status.state,
        resources=status.resources,
        version=status.version,
        sent_age_s=_age_s(status.sent_at_s, now_s),
        acked_age_s=_age_s(status.acked_at_s, now_s),
        error=status.error,
    )


def _age_s(at_s: float | None, now_s: float) -> float | None:
    return None if at_s is None else max(0.0, now_s - at_s)
