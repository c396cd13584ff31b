"""One type of one stream: what a refusal is about, and what is kept of it."""

from __future__ import annotations

import tracemalloc

import pytest

from meshctl.model import RouteId
from xds.channel import DeltaChannel, meant
from xds.table import EMPTY
from xds.translate import Resource
from xds.wire import DeltaRequest, TypeUrl


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("Error adding/updating cluster(s) n/a-2: bad", ["n/a-2"]),
        ("Error adding/updating cluster(s) n/a: bad, n/a/large: worse", ["n/a", "n/a/large"]),
        ("'n/a' is odd.", ["n/a"]),
        ("bn/a", ["n/a"]),
        ("no", ["n/a", "n/a-2", "n/a/large"]),
    ],
)
def test_a_refusal_is_about_what_it_names(error: str, expected: list[str]) -> None:
    """Not about what has a name that begins alike; about everything when it names nothing."""
    resources = [Resource(name, RouteId("n/a"), b"", 1) for name in ("n/a", "n/a-2", "n/a/large")]
    assert [r.name for r in meant(error, resources)] == expected


def test_refusing_what_does_not_exist_takes_no_memory() -> None:
    """A client that subscribes to ever other names, refuses to hear that there is none, and unsubscribes."""
    channel = DeltaChannel(TypeUrl.ENDPOINT)
    tracemalloc.start()
    try:
        for turn in range(12):
            names = tuple(f"none-{turn}-{number}" for number in range(1000))
            channel.receive(DeltaRequest(TypeUrl.ENDPOINT, subscribe=names))
            assert channel.offer(EMPTY, str(turn))
            answer = channel.receive(DeltaRequest(TypeUrl.ENDPOINT, str(turn), unsubscribe=names, error="no"))
            assert answer is not None
            del names, answer
            if turn == 1:
                before, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < before + 100_000
