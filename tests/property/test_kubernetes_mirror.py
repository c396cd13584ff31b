"""A copy fed by lists, a watch that lags, and answers to our own writes never goes back, and ends up true."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.adapters.kubernetes.mirror import Mirror
from meshctl.ports import KubeObject, ObjectKey

KIND = KINDS["VirtualService"]
Raw = dict[str, Any]


class Server:
    """Every version of every object, in order; the watch and the answers to writes come from here, late."""

    def __init__(self) -> None:
        self.version = 10
        self.now: dict[str, Raw] = {}
        self.history: list[tuple[int, str, Raw]] = []

    def write(self, name: str) -> Raw:
        self.version += 1
        before = self.now.get(name)
        uid = before["metadata"]["uid"] if before else f"uid-{self.version}"
        value = {"metadata": {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(self.version)}}
        self.history.append((self.version, "MODIFIED" if before else "ADDED", value))
        self.now[name] = value
        return value

    def delete(self, name: str) -> None:
        if name in self.now:
            self.version += 1
            last = self.now.pop(name)
            gone = {"metadata": {**last["metadata"], "resourceVersion": str(self.version)}}
            self.history.append((self.version, "DELETED", gone))


actions = st.tuples(
    st.sampled_from(("write", "own", "answer", "delete", "watch", "bookmark", "ask", "list")), st.sampled_from("ab")
)


@given(st.lists(actions, max_size=40))
def test_the_copy_never_goes_back_and_ends_up_true(steps: list[tuple[str, str]]) -> None:
    """Whatever the watch, new lists and late answers do: no older version, no ghost, nothing forgotten."""
    server, held = Server(), dict[ObjectKey, KubeObject]()
    mirror = Mirror(KIND, held)
    mirror.listed((), str(server.version))
    answers: list[Raw] = []
    newest: dict[str, int] = {}
    told = 0
    listing: tuple[list[tuple[ObjectKey, KubeObject]], str] | None = None

    def listed_now() -> tuple[list[tuple[ObjectKey, KubeObject]], str]:
        return [(KIND.key(v), KIND.kept(v)) for v in server.now.values()], str(server.version)

    def watch(limit: int) -> None:
        nonlocal told
        for version, what, value in server.history[told:limit]:
            if version > int(mirror.version):
                mirror.happened(what, value)
        told = max(told, min(limit, len(server.history)))

    for what, name in steps:
        if what == "write":
            server.write(name)
        elif what == "own":
            answers.append(server.write(name))
        elif what == "answer" and answers:
            mirror.wrote(answers.pop(0 if name == "a" else -1))
        elif what == "delete":
            server.delete(name)
        elif what == "watch" and listing is None:
            watch(told + 1)
        elif what == "bookmark" and listing is None:
            watch(len(server.history))
            mirror.happened("BOOKMARK", {"metadata": {"resourceVersion": str(server.version)}})
        elif what == "ask":
            listing = listing or listed_now()
        elif what == "list":
            mirror.listed(*(listing or listed_now()))
            listing = None
        for key, value in held.items():
            version = int(value["metadata"]["resourceVersion"])
            assert version >= newest.get(key.name, 0)
            newest[key.name] = version
    if listing is not None:
        mirror.listed(*listing)
    watch(len(server.history))
    for answer in answers:
        mirror.wrote(answer)
    assert held == {KIND.key(value): KIND.kept(value) for value in server.now.values()}


def test_what_was_written_is_there_before_the_watch_tells() -> None:
    """And what the watch then says of an older version is not believed."""
    server, held = Server(), dict[ObjectKey, KubeObject]()
    mirror = Mirror(KIND, held)
    mirror.listed((), str(server.version))
    first, second = server.write("a"), server.write("a")
    key = KIND.key(second)
    assert mirror.wrote(second) == key
    assert mirror.happened("ADDED", first) is None
    assert held[key]["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    assert mirror.happened("MODIFIED", second) is None
    server.delete("a")
    assert mirror.happened("DELETED", server.history[-1][2]) == key
    assert mirror.wrote(second) is None
    assert not held


def test_versions_that_cannot_be_compared_are_not() -> None:
    """Our own write then shows when the watch tells of it."""
    held = dict[ObjectKey, KubeObject]()
    mirror = Mirror(KIND, held)
    mirror.listed((), "v-1")
    value = {"metadata": {"name": "a", "namespace": "ns", "resourceVersion": "v-2"}}
    assert mirror.wrote(value) is None
    assert mirror.happened("ADDED", value) == KIND.key(value)


def test_a_list_of_one_namespace_leaves_the_others() -> None:
    """Mirrors of several namespaces fill one table."""
    held = dict[ObjectKey, KubeObject]()
    one, other = Mirror(KIND, held, "one"), Mirror(KIND, held, "other")
    for mirror, namespace in ((one, "one"), (other, "other")):
        value = {"metadata": {"name": "a", "namespace": namespace, "resourceVersion": "5"}}
        assert mirror.listed([(KIND.key(value), KIND.kept(value))], "7") == (KIND.key(value),)
    assert one.listed((), "9") == (ObjectKey("VirtualService", "one", "a"),)
    assert set(held) == {ObjectKey("VirtualService", "other", "a")}
