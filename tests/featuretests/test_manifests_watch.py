"""FileSource notices what happens to a real directory, and only what matters wakes the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshctl.adapters.files import FileSource
from meshctl.errors import InputError
from meshctl.model import RouteId
from meshctl.ports import Desired, Source
from tests.featuretests.test_manifests_directory import slo, two, write_configmap
from tests.harness.manifests import profile, text

A, B = RouteId("default/a"), RouteId("default/b")
DEADLINE_S = 60.0
"""Generous: a change is seen within about a second on an idle machine."""


@asynccontextmanager
async def watching(root: Path) -> AsyncIterator[FileSource]:
    """A started source, stopped at the end."""
    source = FileSource(root)
    await source.start()
    try:
        yield source
    finally:
        await source.stop()


async def until(source: Source, condition: Callable[[Desired], bool]) -> Desired:
    """`desired`, as soon as it fulfils `condition`, woken only by `wait_changed`."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition(source.desired()):
            await source.wait_changed()
    return source.desired()


def slo_s(desired: Desired) -> dict[str, float]:
    return {str(key): route.spec.slo_s for key, route in desired.routes.items()}


async def test_changes_of_a_directory_arrive(tmp_path: Path) -> None:
    """Write, break, repair, replace by rename, add below, delete: each arrives, and unchanged routes stay identical."""
    path = tmp_path / "all.yaml"
    path.write_text(text(*two()))
    async with watching(tmp_path) as source:
        start = source.desired()
        assert list(start.routes) == [A, B]
        path.write_text(text(slo("a", "200ms"), *two()[1:]))
        found = await until(source, lambda d: slo_s(d)["default/a"] == 0.2)
        assert found.routes[B] is start.routes[B]

        path.write_text(text(slo("a", "300 ms"), *two()[1:]))
        broken = await until(source, lambda d: len(d.problems) == 1)
        assert dict(broken.routes) == dict(found.routes)
        assert broken.problems[0].where.startswith(f"{path}:")

        new = tmp_path / ".all.yaml.tmp"
        new.write_text(text(slo("a", "300ms"), *two()[1:]))
        new.rename(path)
        repaired = await until(source, lambda d: slo_s(d)["default/a"] == 0.3)
        assert repaired.problems == ()
        assert repaired.routes[B] is start.routes[B]
        assert repaired.routes[A].spec.generation == 3

        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "c.yaml").write_text(text(slo("c", "1s")))
        await until(source, lambda d: "default/c" in slo_s(d))
        path.unlink()
        left = await until(source, lambda d: "default/a" not in slo_s(d))
        assert list(slo_s(left)) == ["default/c"]


async def test_directory_swapped_as_a_whole_is_followed(tmp_path: Path) -> None:
    """The name is what is watched: a directory replaced by another, by none, and by one again."""
    root = tmp_path / "manifests"
    root.mkdir()
    (root / "a.yaml").write_text(text(slo("a", "100ms"), profile()))
    async with watching(root) as source:
        start = source.desired()
        root.rename(tmp_path / "old")
        gone = await until(source, lambda d: bool(d.problems))
        assert gone.routes[A] is start.routes[A]
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "a.yaml").write_text(text(slo("a", "200ms"), profile()))
        (tmp_path / "new").rename(root)
        back = await until(source, lambda d: slo_s(d)["default/a"] == 0.2)
        assert back.problems == ()
        (root / "a.yaml").write_text(text(slo("a", "300ms"), profile()))
        await until(source, lambda d: slo_s(d)["default/a"] == 0.3)


async def test_configmap_update_arrives(tmp_path: Path) -> None:
    """The kubelet's swap of ``..data`` is seen."""
    write_configmap(tmp_path, "..2026_01_01", slo("a", "100ms"))
    (tmp_path / "all.yaml").symlink_to("..data/all.yaml")
    async with watching(tmp_path) as source:
        write_configmap(tmp_path, "..2026_01_02", slo("a", "200ms"))
        found = await until(source, lambda d: slo_s(d)["default/a"] == 0.2)
        assert found.problems == ()


async def test_linked_directory_is_followed(tmp_path: Path) -> None:
    """The directory itself is a link that is swapped, as git-sync does."""
    for version, latency in (("v1", "100ms"), ("v2", "200ms")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "a.yaml").write_text(text(slo("a", latency), profile()))
    (tmp_path / "current").symlink_to("v1")
    async with watching(tmp_path / "current") as source:
        (tmp_path / "next").symlink_to("v2")
        (tmp_path / "next").rename(tmp_path / "current")
        await until(source, lambda d: slo_s(d)["default/a"] == 0.2)
        (tmp_path / "v2" / "a.yaml").write_text(text(slo("a", "300ms"), profile()))
        await until(source, lambda d: slo_s(d)["default/a"] == 0.3)


async def test_what_changes_nothing_wakes_nobody(tmp_path: Path) -> None:
    """A comment, a touched file and foreign files leave the very same Desired; the next real change does wake."""
    path = tmp_path / "all.yaml"
    path.write_text(text(*two()))
    async with watching(tmp_path) as source:
        start = source.desired()
        waiting = asyncio.create_task(source.wait_changed())
        path.write_text("# a comment\n" + text(*two()))
        (tmp_path / "notes.txt").write_text("x")
        (tmp_path / "c.yaml").write_text(text(slo("c", "1s")))
        async with asyncio.timeout(DEADLINE_S):
            await waiting
        assert [str(key) for key in source.desired().routes] == ["default/a", "default/b", "default/c"]
        assert all(source.desired().routes[key] is start.routes[key] for key in start.routes)


@pytest.mark.parametrize("kind", ["missing", "file"])
async def test_start_needs_a_directory(tmp_path: Path, kind: str) -> None:
    """A directory that is not there at the start is the caller's mistake, not an empty fleet."""
    root = tmp_path / "manifests"
    if kind == "file":
        root.write_text(text(*two()))
    with pytest.raises(InputError, match="manifests: is not a directory that can be read"):
        await FileSource(root).start()


async def test_stop_ends_the_watch_and_keeps_the_last_state(tmp_path: Path) -> None:
    """Stopping twice, or before the start, is harmless."""
    (tmp_path / "all.yaml").write_text(text(*two()))
    source = FileSource(tmp_path)
    await source.stop()
    async with watching(tmp_path) as source:
        await source.stop()
    assert list(source.desired().routes) == [A, B]
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("watch ")]
