"""How every command prints: one value, as a table for people or as JSON/YAML for programs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console, RenderableType
from ruamel.yaml import YAML

from meshctl.errors import InputError, MeshctlError


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[Output, typer.Option("-o", "--output", help="Output format.")]


PIPE_COLUMNS = 200
"""Width where no terminal has one: what is read by `grep` or a file is not cut to 80 columns."""


def console(*, stderr: bool = False) -> Console:
    """A console that honours NO_COLOR, COLUMNS and plain pipes."""
    plain = not (sys.stderr if stderr else sys.stdout).isatty() and "COLUMNS" not in os.environ
    width = PIPE_COLUMNS if plain else None
    return Console(stderr=stderr, no_color="NO_COLOR" in os.environ or None, highlight=False, width=width)


def emit(data: Any, output: Output, table: Callable[[], RenderableType]) -> None:
    """Print `data` (plain dicts, lists, strings, numbers) as asked; `table` is built only when needed."""
    match output:
        case Output.JSON:
            sys.stdout.write(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode() + "\n")
        case Output.YAML:
            yaml = YAML()
            yaml.default_flow_style = False
            yaml.dump(data, sys.stdout)
        case Output.TABLE:
            console().print(table())


def live(draw: Callable[[], RenderableType], refresh_s: float) -> None:
    """What `draw` gives, again and again until Ctrl-C.

    Who can't be asked is waited for, and the absence shown; what is the caller's fault, or fails at first, is raised.
    """
    from rich.live import Live
    from rich.markup import escape

    with Live(draw(), console=console(), auto_refresh=False, vertical_overflow="visible") as screen:
        while True:
            time.sleep(refresh_s)
            try:
                screen.update(draw(), refresh=True)
            except InputError:
                raise
            except MeshctlError as error:
                screen.update(f"[red]{escape(str(error))}[/]", refresh=True)
