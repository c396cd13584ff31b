"""A directory of manifests: per object, the last good version stays in force, whatever happens to the files.

Each test changes files and looks once (`read_directory`), so the order of events is the test's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshctl.adapters.manifests import Contents, list_manifests, read_directory
from meshctl.api.document import MAX_BYTES
from meshctl.model import RouteId
from tests.harness.manifests import ABSENT, changed, profile, route, text

A, B = RouteId("default/a"), RouteId("default/b")


def two() -> list[dict[str, object]]:
    """Routes a and b, hosts apart, and the profile they use."""
    return [route("a", hosts=["a.example.com"]), route("b", hosts=["b.example.com"]), profile()]


def look(root: Path, before: Contents | None = None) -> Contents:
    """One look; a second one right after it must change nothing at all."""
    found = read_directory(root, before or Contents())
    again = read_directory(root, found)
    assert (again.routes, again.faults) == (found.routes, found.faults)
    assert all(again.routes[key] is found.routes[key] for key in found.routes)
    return again


def latency_ms(contents: Contents) -> dict[str, float]:
    """SLO of each route in force, which the tests change to tell versions apart."""
    return {str(key): route.spec.slo_s * 1000 for key, route in contents.routes.items()}


def slo(name: str, latency: object) -> dict[str, object]:
    """Route `name` with another SLO."""
    return changed(route(name, hosts=[f"{name}.example.com"]), "spec.slo.latency", latency)


def test_objects_of_all_files_are_in_force(tmp_path: Path) -> None:
    """YAML and JSON, deep or not; other files, hidden ones and editors' leftovers are not read."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.yaml").write_text(text(two()[0]))
    (tmp_path / "b.json").write_text(text(two()[1]))
    (tmp_path / "p.yml").write_text(text(two()[2]))
    for ignored in ("README.md", ".hidden.yaml", "a.yaml~", "a.yaml.swp", "#a.yaml#"):
        (tmp_path / ignored).write_text("{{{ not yaml")
    found = look(tmp_path)
    assert list(found.routes) == [A, B]
    assert found.faults == ()
    assert list(found.routes[A].profiles) == ["V100"]
    assert found.routes[A].spec.generation == 1


def test_bad_object_keeps_its_last_good_version_and_others_move_on(tmp_path: Path) -> None:
    """In one file, b breaks while a changes: a is new, b is as it was, and the line of b's fault is told."""
    path = tmp_path / "all.yaml"
    path.write_text(text(*two()))
    before = look(tmp_path)
    path.write_text(text(slo("a", "200ms"), slo("b", 150), profile()))
    after = look(tmp_path, before)
    assert latency_ms(after) == {"default/a": 200.0, "default/b": 150.0}
    assert after.routes[B] is before.routes[B]
    assert (after.routes[A].spec.generation, after.routes[B].spec.generation) == (2, 1)
    (fault,) = after.faults
    assert '"latency": 150\n' in path.read_text().splitlines(keepends=True)[fault.place.line - 1]
    problem = fault.problem()
    assert problem.route == B
    assert problem.where == f"{path}:{fault.place.line}:{fault.place.column}"
    assert problem.message.startswith("ModelRoute default/b: spec.slo.latency: 150 has no unit")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"{{{", id="not YAML"),
        pytest.param(b"", id="truncated to nothing"),
        pytest.param(b"\xff\xfe\x00", id="not text"),
        pytest.param(b"<html><body>502</body></html>", id="an error page"),
        pytest.param(b"<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> x\n", id="a merge conflict"),
        pytest.param(b"#" * (MAX_BYTES + 1), id="huge"),
        pytest.param(text(route("a")).encode()[:150], id="half-written"),
    ],
)
def test_bad_file_keeps_all_its_objects(tmp_path: Path, content: bytes) -> None:
    """Nothing is lost by a file that can't be understood; when it is good again, it is in force again."""
    bad, other = tmp_path / "bad.yaml", tmp_path / "other.yaml"
    bad.write_text(text(two()[0], two()[2]))
    other.write_text(text(two()[1]))
    before = look(tmp_path)
    bad.write_bytes(content)
    other.write_text(text(slo("b", "300ms")))
    during = look(tmp_path, before)
    assert during.routes[A] is before.routes[A]
    assert latency_ms(during)["default/b"] == 300.0
    assert [fault.place.file for fault in during.faults] == [str(bad)]
    bad.write_text(text(slo("a", "1s"), two()[2]))
    after = look(tmp_path, during)
    assert latency_ms(after) == {"default/a": 1000.0, "default/b": 300.0}
    assert after.faults == ()


def test_start_with_a_bad_file_serves_the_others(tmp_path: Path) -> None:
    """A controller that starts with a bad file serves what is good, and reports the rest."""
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "good.yaml").write_text(text(slo("a", 5), two()[1], two()[2]))
    found = look(tmp_path)
    assert list(found.routes) == [B]
    assert [Path(fault.place.file).name for fault in found.faults] == ["bad.yaml", "good.yaml"]


def test_object_removed_from_a_good_file_is_gone(tmp_path: Path) -> None:
    """Removing is done by removing; the rest of the file stays the same object."""
    path = tmp_path / "all.yaml"
    path.write_text(text(*two()))
    before = look(tmp_path)
    path.write_text(text(two()[0], two()[2]))
    after = look(tmp_path, before)
    assert list(after.routes) == [A]
    assert after.routes[A] is before.routes[A]


def test_nothing_is_removed_while_a_document_cannot_be_named(tmp_path: Path) -> None:
    """A document without a readable name may be the object that seems to be missing."""
    path = tmp_path / "all.yaml"
    path.write_text(text(*two()))
    before = look(tmp_path)
    path.write_text(text(two()[0], changed(two()[1], "kind", "ModelRout"), two()[2]))
    after = look(tmp_path, before)
    assert after.routes[B] is before.routes[B]
    assert [fault.field for fault in after.faults] == ["kind"]


def test_deleted_file_removes_its_objects(tmp_path: Path) -> None:
    """Also when its objects were only kept because the file was bad."""
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text(text(two()[0]))
    other.write_text(text(two()[1], two()[2]))
    before = look(tmp_path)
    one.write_text("{{{")
    during = look(tmp_path, before)
    one.unlink()
    after = look(tmp_path, during)
    assert list(after.routes) == [B]
    assert after.routes[B] is before.routes[B]
    assert after.faults == ()


def test_object_that_moves_to_another_file_is_the_same(tmp_path: Path) -> None:
    """A file renamed or split changes no route, not even when the object is broken on its way."""
    (tmp_path / "all.yaml").write_text(text(*two()))
    before = look(tmp_path)
    (tmp_path / "all.yaml").rename(tmp_path / "renamed.yaml")
    renamed = look(tmp_path, before)
    assert renamed.routes[A] is before.routes[A]
    (tmp_path / "renamed.yaml").unlink()
    (tmp_path / "a.yaml").write_text(text(slo("a", 5)))
    (tmp_path / "b.yaml").write_text(text(two()[1], two()[2]))
    split = look(tmp_path, renamed)
    assert split.routes[A] is before.routes[A]
    assert split.routes[B] is before.routes[B]
    assert [fault.field for fault in split.faults] == ["spec.slo.latency"]


def test_vanished_directory_keeps_everything(tmp_path: Path) -> None:
    """A directory that is gone (an unmounted volume) removes nothing; when it is back, it counts again."""
    root = tmp_path / "manifests"
    root.mkdir()
    (root / "all.yaml").write_text(text(*two()))
    before = look(root)
    root.rename(tmp_path / "elsewhere")
    during = look(root, before)
    assert during.identity is None
    assert dict(during.routes) == dict(before.routes)
    assert during.routes[A] is before.routes[A]
    assert [str(fault.place.file) for fault in during.faults] == [str(root)]
    root.mkdir()
    (root / "a.yaml").write_text(text(two()[0], two()[2]))
    after = look(root, during)
    assert list(after.routes) == [A]
    assert after.faults == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what nobody may read")
@pytest.mark.parametrize("name", ["deep", "deep/a.yaml"])
def test_unreadable_file_or_folder_keeps_its_objects(tmp_path: Path, name: str) -> None:
    """Permissions that are taken away are reported, and remove nothing."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.yaml").write_text(text(two()[0], two()[2]))
    before = look(tmp_path)
    (tmp_path / name).chmod(0)
    try:
        after = look(tmp_path, before)
    finally:
        (tmp_path / name).chmod(0o700)
    assert after.routes[A] is before.routes[A]
    assert "Permission denied" in after.faults[0].message


def test_pipe_named_like_a_manifest_is_not_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for its writer, for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "b.yaml").write_text(text(*two()[1:]))
    found = look(tmp_path)
    assert list(found.routes) == [B]
    assert [fault.message for fault in found.faults] == ["is not a regular file; move it away"]


def test_dangling_link_keeps_its_objects(tmp_path: Path) -> None:
    """A link whose target is being replaced loses nothing."""
    (tmp_path / "target").write_text(text(two()[0], two()[2]))
    (tmp_path / "a.yaml").symlink_to("target")
    before = look(tmp_path)
    (tmp_path / "target").unlink()
    after = look(tmp_path, before)
    assert after.routes[A] is before.routes[A]
    assert "cannot be read: No such file" in after.faults[0].message


def test_configmap_swap_is_one_change(tmp_path: Path) -> None:
    """A mounted ConfigMap: files link to ..data, which links to a hidden directory; nothing is read twice."""
    write_configmap(tmp_path, "..2026_01_01", slo("a", "100ms"))
    (tmp_path / "all.yaml").symlink_to("..data/all.yaml")
    before = look(tmp_path)
    assert before.faults == ()
    write_configmap(tmp_path, "..2026_01_02", slo("a", "200ms"))
    after = look(tmp_path, before)
    assert latency_ms(after) == {"default/a": 200.0}
    assert after.faults == ()


def write_configmap(root: Path, version: str, *objects: object) -> None:
    """Write a version and swap ``..data`` to it, as the kubelet does."""
    (root / version).mkdir()
    (root / version / "all.yaml").write_text(text(*objects, profile()))
    (root / "..data_tmp").symlink_to(version)
    (root / "..data_tmp").rename(root / "..data")


def test_change_that_leaves_size_and_time_alone_is_seen(tmp_path: Path) -> None:
    """Two writes within one tick of the file system's clock, of the same length."""
    path = tmp_path / "a.yaml"
    path.write_text(text(slo("a", "100ms"), profile()))
    before = look(tmp_path)
    times = path.stat()
    path.write_text(text(slo("a", "200ms"), profile()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert latency_ms(look(tmp_path, before)) == {"default/a": 200.0}


def test_only_spec_changes_count_as_generation(tmp_path: Path) -> None:
    """Comments and labels change nothing, a profile changes the route but not its generation."""
    path = tmp_path / "all.yaml"
    path.write_text(text(*two()))
    before = look(tmp_path)
    path.write_text("# a comment\n" + text(changed(two()[0], "metadata.labels", {"a": "b"}), *two()[1:]))
    same = look(tmp_path, before)
    assert same.routes[A] is before.routes[A]
    path.write_text(text(*two()[:2], profile(service={"base": "6ms", "perItem": "1ms"})))
    other = look(tmp_path, same)
    assert other.routes[A] is not before.routes[A]
    assert other.routes[A].spec is not None
    assert other.routes[A].spec.generation == 1
    assert other.routes[A].profiles != before.routes[A].profiles


def _same_name(root: Path) -> None:
    (root / "a.yaml").write_text(text(slo("a", "100ms"), profile()))
    (root / "b.yaml").write_text(text(slo("a", "200ms")))


def _same_name_in_one_file(root: Path) -> None:
    (root / "a.yaml").write_text(text(slo("a", "100ms"), slo("a", "200ms"), profile()))


def _same_host(root: Path) -> None:
    (root / "a.yaml").write_text(text(route("z"), profile()))
    (root / "b.yaml").write_text(text(changed(route("a"), "spec.slo.latency", "100ms")))


def _same_profile(root: Path) -> None:
    (root / "a.yaml").write_text(text(slo("a", "100ms"), profile("z"), profile("a")))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(_same_name, "ModelRoute default/a stands in {root}/a.yaml:", id="route in two files"),
        pytest.param(_same_name_in_one_file, "ModelRoute default/a stands twice", id="route twice in a file"),
        pytest.param(_same_host, "'*' is served by ModelRoute default/a, which comes first", id="host of two routes"),
        pytest.param(_same_profile, "ModelProfile default/a ({root}/a.yaml:", id="two profiles for one GPU"),
    ],
)
def test_conflict_is_told_and_the_first_is_used(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    """Two objects that want the same: the first by name (or path) is used, the second is named, the order of writing
    does not count."""
    write(tmp_path)
    found = look(tmp_path)
    assert latency_ms(found) == {"default/a": 100.0}
    (fault,) = found.faults
    assert message.format(root=tmp_path) in fault.message


def test_route_loses_only_the_hosts_another_has(tmp_path: Path) -> None:
    """A route with one host of its own is served there."""
    hosts = ["a.example.com", "b.example.com"]
    (tmp_path / "a.yaml").write_text(text(two()[0], changed(two()[1], "spec.hosts", hosts), profile()))
    found = look(tmp_path)
    assert found.routes[B].spec.hosts == ("b.example.com",)
    assert [fault.field for fault in found.faults] == ["spec.hosts[0]"]


def test_gpu_without_profile_is_a_warning(tmp_path: Path) -> None:
    """The route is in force without it; a profile of another namespace does not count."""
    elsewhere = changed(profile(), "metadata.namespace", "other")
    (tmp_path / "a.yaml").write_text(text(two()[0], elsewhere))
    found = look(tmp_path)
    assert list(found.routes) == [A]
    assert dict(found.routes[A].profiles) == {}
    assert [(fault.severity, fault.field) for fault in found.faults] == [("warning", "spec.backend.endpoints")]


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("apiVersion", "meshctl.io/v1", "apiVersion"),
        ("apiVersion", ABSENT, "apiVersion"),
        ("kind", "Deployment", "kind"),
        ("kind", ["ModelRoute"], "kind"),
        ("metadata", ABSENT, "metadata"),
        ("metadata", "a", "metadata"),
        ("metadata.name", ABSENT, "metadata.name"),
        ("metadata.name", "Resnet_50", "metadata.name"),
        ("metadata.name", 5, "metadata.name"),
        ("metadata.name", "../../etc", "metadata.name"),
        ("metadata.namespace", "a/b", "metadata.namespace"),
    ],
)
def test_document_that_is_no_object_is_named(tmp_path: Path, path: str, value: object, field: str) -> None:
    """Other kinds, other versions and bad names are refused one by one; the rest of the file is in force."""
    (tmp_path / "a.yaml").write_text(text(changed(two()[0], path, value), *two()[1:]))
    found = look(tmp_path)
    assert list(found.routes) == [B]
    assert [fault.field for fault in found.faults] == [field]
    assert "must be" in found.faults[0].message


def test_listing_is_sorted(tmp_path: Path) -> None:
    """The order of files does not depend on the file system."""
    for name in ("b.yaml", "a.yaml", "c.yml"):
        (tmp_path / name).touch()
    assert [path.name for path in list_manifests(tmp_path).files] == ["a.yaml", "b.yaml", "c.yml"]
