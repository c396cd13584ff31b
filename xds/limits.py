"""What the xDS server lets clients take of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Each is generous for what real fleets do, and keeps one client from being everybody's trouble."""

    streams: int = 10_000
    """Open at once; an idle one is 50 kB. Who comes later is refused with RESOURCE_EXHAUSTED, and comes again."""
    streams_per_peer: int = 2_500
    """Of these from one address: that of a node, or of a proxy in front of many clients. So one alone can't fill up."""
    starting: int = 64
    """Streams that are brought up to date at once; the others wait their turn. A thousand that come back together are
    served one after the other instead of all a little, and what is written to them never fills the memory."""
    starting_s: float = 2.0
    """A stream that is not up to date after this long holds up nobody else any more."""
    first_request_s: float = 30.0
    """A stream without a request is ended after this long, and a connection without a stream."""
    write_s: float = 60.0
    """A client that does not read for this long is disconnected. One that is slower than that but reads is waited for,
    with one response per type at most."""
    message_bytes: int = 8 * 2**20
    """The largest request: 65,536 names of clusters, which is what a stream may ask for."""
    connection_age_s: float = 1800.0
    """A connection is asked to come back after this long (give or take 10 %), so that new replicas get their share."""
    drain_s: float = 0.0
    """Time over which `stop` ends the streams, so that the other replicas do not get them all at once."""
