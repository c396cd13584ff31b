"""What Envoy and Istio are both told of a request: whose it is, how it says its size, when it may be sent again. Pure.

Both get the same words from here, so that a route served by our xDS and through Istio reads the same headers.
"""

from __future__ import annotations

import re

from meshctl.model import Protocol, Retry, SizeClass
from xds.intrange import INTEGER_PREFIX, range_pattern

LEGACY_HEADER = "nv-inferrequest"
"""Its value holds the size among other words: ``request_id: 7 batch_size: 100 ...``."""


def bare_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Lower case, without ports (the port of a request's authority is ignored too), each once, in order."""
    return tuple(dict.fromkeys(re.sub(r"(?<=[^:]):[0-9]+$", "", host.lower()) for host in hosts))


def size_pattern(header: str, size: SizeClass) -> str:
    """What the whole value of `header` is like when it names a batch of `size`: RE2, far below Istio's 1024 characters.

    A decimal integer as a whole ("8", "+8", "008") and nothing else, as Envoy's own integer match reads it, so "abc",
    "1e9", "" and "8,64" are of no class. The legacy header has it after ``batch_size:``, between other words.
    """
    number = INTEGER_PREFIX + range_pattern(size.min_batch, size.max_batch)
    return rf"(.*[\s,;])?batch_size:\s*{number}([\s,;].*)?" if header == LEGACY_HEADER else number


def retry_on(retry: Retry, protocol: Protocol = Protocol.HTTP) -> str:
    """Which failures are sent again, to another endpoint.

    Only what no server can have begun: inference is expensive and need not be idempotent. Where the route says that it
    is, lost connections and a gateway's errors (502 to 504, a try's time-out among them) too; gRPC's servers say
    UNAVAILABLE, with status 200.
    """
    never_begun = "connect-failure,refused-stream,reset-before-request"
    if not retry.idempotent:
        return never_begun
    return f"{never_begun},reset,gateway-error" + (",unavailable" if protocol is Protocol.GRPC else "")
