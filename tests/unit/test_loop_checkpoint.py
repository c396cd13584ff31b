"""The state file: whole or refused, at every step of writing it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import orjson
import pytest

from meshctl.controller.checkpoint import VERSION, Checkpoint, Saved, default_path
from meshctl.core.decide import Memory, decide
from meshctl.errors import InputError
from meshctl.model import Snapshot
from tests.harness.controller import desired_route, routes


def _saved(endpoints: int = 3) -> Saved:
    desired = routes(desired_route(endpoints=endpoints))
    _, memory = decide(Snapshot(desired, {}), Memory(), 100.0)
    return Saved(memory, desired, gateways=2)


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    """Routes and the number of proxies survive exactly."""
    checkpoint = Checkpoint(tmp_path / "deep" / "state.json", wall_s=lambda: 5000.0)
    checkpoint.save(_saved(), 100.0)
    loaded = checkpoint.load(7.0)
    assert loaded is not None
    assert loaded.routes == _saved().routes
    assert loaded.gateways == 2


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    """No order of a set, no time of day but the one given."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        Checkpoint(path, wall_s=lambda: 5000.0).save(_saved(), 100.0)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_no_file_is_a_first_start(tmp_path: Path) -> None:
    """Nothing saved is not an error."""
    assert Checkpoint(tmp_path / "state.json").load(0.0) is None


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _flip(raw: bytes) -> bytes:
    return raw.replace(b'"gateways":2', b'"gateways":3')


def _newer(raw: bytes) -> bytes:
    return raw.replace(b'"version":%d' % VERSION, b'"version":99')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda raw: b"", "", id="empty"),
        pytest.param(_cut, "", id="cut short"),
        pytest.param(_flip, "checksum", id="one value changed"),
        pytest.param(_newer, "version is 99", id="of a newer meshctl"),
        pytest.param(lambda raw: b"[1, 2]", "", id="not an object"),
        pytest.param(lambda raw: b'{"hello": "world"}', "version", id="of another program"),
        pytest.param(lambda raw: os.urandom(64), "", id="random bytes"),
    ],
)
def test_a_file_that_is_not_whole_stops_the_start_and_stays(tmp_path: Path, spoil: object, said: str) -> None:
    """It is never taken for an empty one, never overwritten, and the message says what to do."""
    path = tmp_path / "state.json"
    checkpoint = Checkpoint(path)
    checkpoint.save(_saved(), 100.0)
    assert callable(spoil)
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match=f"state file {path} can't be used: .*{said}.*--state"):
        checkpoint.load(0.0)
    assert path.read_bytes() == spoilt


def test_a_checksum_that_fits_does_not_excuse_a_wrong_shape(tmp_path: Path) -> None:
    """A body of the wrong shape, however well written, is refused like a broken one."""
    checkpoint = Checkpoint(tmp_path / "state.json")
    checkpoint.save(Saved(routes={}), 100.0)
    body = orjson.dumps({"saved_at_unix_s": 1.0, "gateways": 1, "memory": {}, "routes": {"a/b": {"spec": 1}}})
    document = {"version": VERSION, "sha256": hashlib.sha256(body).hexdigest(), "body": orjson.loads(body)}
    checkpoint.path.write_bytes(orjson.dumps(document))
    with pytest.raises(InputError, match="can't be used"):
        checkpoint.load(0.0)


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_last_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The operating system may refuse each step; the old state stays readable and nothing is left behind."""
    path = tmp_path / "state.json"
    checkpoint = Checkpoint(path)
    checkpoint.save(_saved(endpoints=3), 100.0)
    before = path.read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = {"open": (Path, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace")}[step]
    with monkeypatch.context() as patched:
        patched.setattr(*place, refuse)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(_saved(endpoints=5), 101.0)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_temporary_file_of_a_killed_run_is_ignored(tmp_path: Path) -> None:
    """A kill between write and rename leaves a temporary file, which no later start reads."""
    path = tmp_path / "state.json"
    Checkpoint(path).save(_saved(), 100.0)
    (tmp_path / ".state.json.1.tmp").write_bytes(b"half a st")
    loaded = Checkpoint(path).load(0.0)
    assert loaded is not None
    assert loaded.routes == _saved().routes


@pytest.mark.parametrize("wall_s", [0.0, 4999.0, 5000.0, 1e12])
def test_a_wall_clock_that_jumps_is_survived(tmp_path: Path, wall_s: float) -> None:
    """The time in between is taken for at least 0, however the wall clock was set meanwhile."""
    path = tmp_path / "state.json"
    Checkpoint(path, wall_s=lambda: 5000.0).save(_saved(), 100.0)
    loaded = Checkpoint(path, wall_s=lambda: wall_s).load(10.0)
    assert loaded is not None
    assert loaded.gateways == 2


def test_each_manifests_directory_has_its_own_state_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under XDG_STATE_HOME, by the directory's real path."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path(tmp_path / "a") != default_path(tmp_path / "b")
    assert default_path(tmp_path / "a") == default_path(tmp_path / "b" / ".." / "a")
    assert default_path(tmp_path / "a").parent == tmp_path / "meshctl"
