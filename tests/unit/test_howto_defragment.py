"""docs/howto/defragment.md shows what the tool prints, and names options that there are."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from meshctl.cli.gpu import app
from meshctl.extender.movable import SAFE_TO_EVICT
from tests.unit.test_gpu_plan import SHOWN

HOWTO = (Path(__file__).parents[2] / "docs" / "howto" / "defragment.md").read_text()


def test_picture_and_commands_are_what_the_tool_prints() -> None:
    """Of the same two GPUs as in the tests."""
    picture, _, how = SHOWN.partition("\nMoves are yours")
    assert picture in HOWTO
    for command in re.findall(r"^  (kubectl .*)$", how, re.MULTILINE):
        assert f"    {command}\n" in HOWTO


def test_options_are_there() -> None:
    """Each that it names, by its name."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    known = {option for parameter in group.commands["plan"].params for option in parameter.opts}
    named = {
        option for line in re.findall(r"meshctl gpu plan (.*)", HOWTO) for option in re.findall(r"--[a-z-]+", line)
    }
    assert named <= known
    assert SAFE_TO_EVICT in HOWTO
