"""The table of commands, each loaded when it is used.

`meshctl version` must not pay for scipy, grpc and aiohttp (a second on a small machine), so the group imports the
module of the one command that runs; only `--help` imports them all. Each module keeps its own imports light for that.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS: dict[str, str] = {
    "run": "meshctl.cli.run:run",
    "agent": "meshctl.cli.agent:agent",
    "extender": "meshctl.cli.extender:extender",
    "demo": "meshctl.cli.demo:demo",
    "status": "meshctl.cli.status:status",
    "routes": "meshctl.cli.routes:routes",
    "explain": "meshctl.cli.explain:explain",
    "proxy-status": "meshctl.cli.proxies:proxy_status",
    "proxy-config": "meshctl.cli.proxies:proxy_config",
    "pause": "meshctl.cli.suspend:pause",
    "resume": "meshctl.cli.suspend:resume",
    "solve": "meshctl.cli.solve:solve",
    "validate": "meshctl.cli.validate:validate",
    "analyze": "meshctl.cli.analyze:analyze_command",
    "gpu": "meshctl.cli.gpu:app",
    "place": "meshctl.cli.place:place",
    "envoy": "meshctl.cli.envoy:app",
    "grpc": "meshctl.cli.grpcclients:app",
    "sim": "meshctl.cli.sim:app",
    "version": "meshctl.cli.version:version",
}
"""Name -> ``module:attribute``, a command function or a typer application; in the order of --help."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        target = COMMANDS.get(cmd_name)
        return None if target is None else _load(cmd_name, target)


def _load(name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: typer.Typer | Callable[..., None] = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_command(found)
        group.name = name
        return _reflowed(group)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(found)
    return _reflowed(typer.main.get_command(single))


def _reflowed(command: Any) -> Any:
    """With help whose lines end where the terminal does, not the docstring; but for paragraphs after a \\b."""
    paragraphs = (command.help or "").split("\n\n")
    command.help = "\n\n".join(text if text.startswith("\b") else text.replace("\n", " ") for text in paragraphs)
    for inner in getattr(command, "commands", {}).values():
        _reflowed(inner)
    return command


app = typer.Typer(
    cls=LazyGroup,
    name="meshctl",
    help="Sends every inference request, by its batch size, to the GPU that answers it within the SLO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
) -> None:
    if debug:
        os.environ["MESHCTL_DEBUG"] = "1"
