"""What one program leaves to the next: older files are brought up to date, newer and broken ones refused, none lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from deviceplugin.checkpoint import VERSION, Checkpoint
from deviceplugin.health import GpuHealth
from deviceplugin.ledger import Pending
from deviceplugin.node import Saved, SavedGpu
from meshctl.errors import InputError
from meshctl.sharing import Gpu, HealthRules, Mode, Owner, Sharing, Slot
from meshctl.statefile import Body, StateFile

A = Owner("team", "a", "main")
V100 = Gpu("GPU-1", "Tesla V100-SXM2-16GB", 16 << 30, (7, 0), minor=0)
SHARED = Sharing("p", 3, mode=Mode.TIME_SLICING, health=HealthRules(frozenset({94}), recover_after_s=5.0))
AGENTS = Saved(
    {"GPU-1": SavedGpu(V100, SHARED, GpuHealth(xids=(48, 79)))},
    {Slot("GPU-1", 3): Pending(90.0, frozenset({"team"}), frozenset({A}), A)},
)


def _renamed(body: Body) -> Body:
    return {"cards": body["gpus"], "pending": body["pending"]}


def _counted(body: Body) -> Body:
    return {**body, "count": len(body["cards"])}


def _of_version_3(path: Path, **migrations: Any) -> StateFile:
    """A program two versions ahead; `migrations` replace its own."""
    return StateFile(
        path, 3, "nobody knows", {1: _renamed, 2: _counted, **{int(k[1:]): v for k, v in migrations.items()}}
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that an agent of today wrote."""
    path = tmp_path / "agent.json"
    Checkpoint(path, wall_s=lambda: 1000.0).save(AGENTS, 100.0)
    return path


def test_a_file_of_two_versions_ago_is_brought_up_step_by_step(path: Path) -> None:
    """Each migration gets what the one before made; the file stays what it was until something is saved."""
    before = path.read_bytes()
    body = _of_version_3(path).load(dict)
    assert body is not None
    assert [card["gpu"]["uuid"] for card in body["cards"]] == ["GPU-1"]
    assert body["count"] == 1
    assert body["pending"] == orjson.loads(before)["body"]["pending"]
    assert path.read_bytes() == before
    _of_version_3(path).save(orjson.dumps(body))
    assert orjson.loads(path.read_bytes())["version"] == 3
    assert _of_version_3(path).load(dict) == body


def test_a_newer_file_is_refused_by_the_older_program(path: Path) -> None:
    """A downgrade says so, names the file, and leaves it to the newer one."""
    _of_version_3(path).save(b"{}")
    before = path.read_bytes()
    with pytest.raises(InputError, match=rf"{path} can't be used: its version is 3, this meshctl reads {VERSION}\. No"):
        Checkpoint(path).load(0.0)
    assert path.read_bytes() == before


def _broken(body: Body) -> Body:
    return {"cards": body["cards"]["no such"]}


@pytest.mark.parametrize(
    ("spoil", "migrations"),
    [
        pytest.param(lambda raw: raw.replace(b'"xids":[48', b'"xids":[47'), {}, id="changed since it was written"),
        pytest.param(lambda raw: raw.replace(b'"version":1', b'"version":0'), {}, id="older than any migration"),
        pytest.param(lambda raw: raw.replace(b'"version":1', b'"version":"1"'), {}, id="a version that is no number"),
        pytest.param(lambda raw: raw, {"_2": _broken}, id="a migration that fails"),
    ],
)
def test_what_cannot_be_brought_up_is_refused_and_stays(path: Path, spoil: Any, migrations: dict[str, Any]) -> None:
    """The checksum counts before any migration; nothing is half migrated."""
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match=r"can't be used: .*Nothing was changed\. .*: nobody knows"):
        _of_version_3(path, **migrations).load(dict)
    assert path.read_bytes() == spoilt
