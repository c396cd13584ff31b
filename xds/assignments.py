"""Load assignments, encoded in chunks: what did not change since the last time is joined, not encoded again. Pure.

A fleet of 10,000 endpoints is 330 kB per size class, and each step of a shift changes some weights. So the endpoints
that get requests are cut into chunks of `CHUNK`, and a chunk whose endpoints and weights are those of the assignment
before keeps its bytes and its digest.

Invariant: bytes and digest follow from the endpoints and weights alone. What was encoded before only saves work, so
replicas, and a controller before and after its restart, agree.

Rejected: splitting the message on the wire (Envoy takes an assignment whole), and a digest over all bytes (350 us of
the 1 ms that one changed weight of 10,000 may take).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import compress, repeat

from meshctl.model import Endpoint, EndpointId
from xds.wire import TypeUrl, integer, varint

CHUNK = 128
"""Endpoints encoded together: a smaller one costs more digests to join, a larger one more to encode for one weight."""


@dataclass(frozen=True, slots=True)
class Members:
    """The endpoints of a route that may get requests, for all its size classes."""

    of: tuple[Endpoint, ...]
    """All endpoints of the route."""
    ids: tuple[EndpointId, ...]
    heads: tuple[bytes, ...]
    """Each of `ids` as an LbEndpoint without its weight."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One encoded LocalityLbEndpoints."""

    heads: tuple[bytes, ...]
    """Of the endpoints that get requests."""
    weights: tuple[int, ...]
    """Theirs, each at least 1."""
    chunks: tuple[bytes, ...]
    """Repeated field lb_endpoints, cut after every `CHUNK` endpoints."""
    digests: tuple[bytes, ...]
    """Of each chunk, 128 bits."""


def members(endpoints: tuple[Endpoint, ...], before: Members | None = None) -> Members:
    """The members among `endpoints`: `before` itself where it is of the same ones."""
    if before is not None and before.of is endpoints:
        return before
    ready = [endpoint for endpoint in endpoints if endpoint.ready]
    heads = tuple(lb_endpoint(endpoint.address, endpoint.port) for endpoint in ready)
    return Members(endpoints, tuple(endpoint.id for endpoint in ready), heads)


def weights_of(members: Members, table: Mapping[EndpointId, int]) -> tuple[int, ...]:
    """The weight of each member, by `table`.

    When every member has weight 0 (the sum says "nothing can serve this"), all of them stay, equally: a request that
    may be late is better than a 503.
    """
    if len(table) == len(members.ids) and tuple(table) == members.ids:  # as `decide` makes them: 0.5 ms less for 10,000
        weights = tuple(table.values())
    else:
        weights = tuple(map(table.get, members.ids, repeat(0)))
    return weights if any(weights) else (1,) * len(weights)


def weighted(members: Members, table: Mapping[EndpointId, int]) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """Heads and weights of the members that get requests.

    Those of weight 0 are left out: Envoy's weights start at 1. With no member the assignment is empty and Envoy answers
    503.
    """
    weights = weights_of(members, table)
    if all(weights):
        return members.heads, weights
    return tuple(compress(members.heads, weights)), tuple(filter(None, weights))


def encode(heads: tuple[bytes, ...], weights: tuple[int, ...], before: Assignment | None = None) -> Assignment:
    """The endpoints of `heads` with `weights`."""
    chunks, digests = [], []
    same_heads = before is not None and before.heads is heads
    for start in range(0, len(heads), CHUNK):
        at, index = slice(start, start + CHUNK), start // CHUNK
        if before is not None and before.weights[at] == weights[at] and (same_heads or before.heads[at] == heads[at]):
            chunks.append(before.chunks[index])
            digests.append(before.digests[index])
        else:
            chunk = _chunk(heads[at], weights[at])
            chunks.append(chunk)
            digests.append(blake2b(chunk, digest_size=16).digest())
    return Assignment(heads, weights, tuple(chunks), tuple(digests))


def packed_assignment(name: str, assignment: Assignment) -> bytes:
    """The ClusterLoadAssignment `name` as it stands in a response: joined once, the lengths come first."""
    named, size = _field(1, name.encode()), sum(map(len, assignment.chunks))
    locality = lead(2, size) if size else b""
    resource = lead(2, len(named) + len(locality) + size)
    whole = lead(2, len(_TYPE) + len(resource) + len(named) + len(locality) + size)
    return b"".join((whole, _TYPE, resource, named, locality, *assignment.chunks))


@lru_cache(maxsize=4096)
def lead(number: int, size: int) -> bytes:
    """What stands before a length-delimited field of `size` bytes."""
    return varint(number << 3 | 2) + varint(size)


@lru_cache(maxsize=65536)
def lb_endpoint(address: str, port: int) -> bytes:
    """LbEndpoint.endpoint.address.socket_address, each the first field of its message; address = 2, port_value = 3.

    By hand, as this is done for each of 10,000 endpoints at the start: 1 s of CPU with the generated classes.
    """
    data = _field(2, address.encode()) + integer(3, port)
    for _ in range(3):
        data = _field(1, data)
    return data


def _field(number: int, payload: bytes) -> bytes:
    return lead(number, len(payload)) + payload


_TYPE = _field(1, TypeUrl.ENDPOINT.encode())


def _chunk(heads: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """Field lb_endpoints = 2 of a LocalityLbEndpoints, for each."""
    parts: list[bytes] = []
    for head, weight in zip(heads, weights, strict=True):
        tail = _lb_weight(weight)
        parts += (lead(2, len(head) + len(tail)), head, tail)
    return b"".join(parts)


@lru_cache(maxsize=4096)
def _lb_weight(weight: int) -> bytes:
    """LbEndpoint.load_balancing_weight = 4, a UInt32Value: value = 1."""
    return _field(4, integer(1, weight))
