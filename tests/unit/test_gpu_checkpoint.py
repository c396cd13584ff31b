"""The agent's state file: what one run leaves to the next is what the next one reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from deviceplugin.checkpoint import Checkpoint
from deviceplugin.health import GpuHealth
from deviceplugin.ledger import Pending
from deviceplugin.node import Saved, SavedGpu
from meshctl.errors import InputError
from meshctl.sharing import Gpu, HealthRules, Isolation, Mode, Owner, Sharing, Slot

FETCH, TWIN = Owner("team-b", "a-pod", "main"), Owner("zeta", "pod", "alpha")
"""The parts of their names are not in alphabetical order."""
GPU = Gpu("GPU-a", "Tesla V100", 16 << 30, (7, 0), minor=3, index=1)
SHARING = Sharing(
    "p",
    4,
    mode=Mode.EXCLUSIVE,
    replicas=1,
    isolation=Isolation.TENANT,
    oversubscription_ratio=1.5,
    health=HealthRules(frozenset({99, 7}), frozenset({13}), 2.5),
)
SAVED = Saved(
    {"GPU-a": SavedGpu(GPU, SHARING, GpuHealth(xids=(48, 79))), "GPU-b": SavedGpu(GPU, None, GpuHealth())},
    {
        Slot("GPU-a", 0): Pending(100.0, frozenset({"zeta", "team-b"}), frozenset({FETCH, TWIN}), FETCH),
        Slot("GPU-a", 11): Pending(100.0),
    },
)


class Wall:
    """Unix time, which moves when it is told to."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def saved(path: Path, state: Saved, now_s: float = 100.0) -> Wall:
    wall = Wall(1_800_000_000.0)
    Checkpoint(path, wall).save(state, now_s)
    return wall


def test_what_was_promised_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Namespace, pod and container stay what they are: a promise to somebody else would be taken for void."""
    wall = saved(tmp_path / "agent.json", SAVED)
    found = Checkpoint(tmp_path / "agent.json", wall).load(100.0)
    assert found is not None
    assert found.pending == SAVED.pending


def test_how_a_gpu_is_shared_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every setting, by which it is known whether a policy is another one; and what ails the GPU."""
    wall = saved(tmp_path / "agent.json", Saved({"GPU-a": SAVED.gpus["GPU-a"]}))
    found = Checkpoint(tmp_path / "agent.json", wall).load(100.0)
    assert found is not None
    assert found.gpus == {"GPU-a": SAVED.gpus["GPU-a"]}


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order in which sets and mappings came to be."""
    turned = Saved(dict(reversed(list(SAVED.gpus.items()))), dict(reversed(list(SAVED.pending.items()))))
    saved(tmp_path / "one", SAVED)
    saved(tmp_path / "two", turned)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(("wall_later_s", "at_s"), [(30.0, -23.0), (-5000.0, 7.0)])
def test_a_promise_is_as_old_as_it_is_also_after_a_reboot(tmp_path: Path, wall_later_s: float, at_s: float) -> None:
    """The next run's clock starts anew (7 s here). Where the wall clock was set back it is not from the future."""
    wall = saved(tmp_path / "agent.json", Saved({}, {Slot("GPU-a", 0): Pending(100.0)}))
    wall.now_s += wall_later_s
    found = Checkpoint(tmp_path / "agent.json", wall).load(7.0)
    assert found is not None
    assert found.pending == {Slot("GPU-a", 0): Pending(at_s)}


def test_nothing_was_saved_yet(tmp_path: Path) -> None:
    """The first run on a node."""
    assert Checkpoint(tmp_path / "agent.json").load(0.0) is None


@pytest.mark.parametrize("damage", ["half", "changed", "empty"])
def test_a_file_that_is_not_whole_is_an_error_and_stays(tmp_path: Path, damage: str) -> None:
    """It says what the way out costs, and is not replaced by an empty one."""
    path = tmp_path / "agent.json"
    saved(path, SAVED)
    whole = path.read_bytes()
    broken = {"half": whole[: len(whole) // 2], "changed": whole.replace(b"GPU-a", b"GPU-x"), "empty": b""}[damage]
    path.write_bytes(broken)
    with pytest.raises(InputError, match=str(path)):
        Checkpoint(path).load(0.0)
    assert path.read_bytes() == broken
