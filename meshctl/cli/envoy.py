"""`meshctl envoy`: what a real Envoy needs to be driven by meshctl."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from meshctl.cli.output import Output, emit

app = typer.Typer(help="Envoys that meshctl drives.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Keeps `bootstrap` a command of its own: typer folds a group of one."""


@app.command("bootstrap")
def bootstrap_command(
    xds: Annotated[str, typer.Option(metavar="HOST:PORT", help="The xDS server of `meshctl run`.")] = "127.0.0.1:18000",
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where requests come in.")] = "127.0.0.1:10000",
    admin: Annotated[str, typer.Option(metavar="HOST:PORT", help="Envoy's admin interface.")] = "127.0.0.1:9901",
    node_id: Annotated[str, typer.Option(help="Name of this Envoy; by default host name and port.")] = "",
    output: Annotated[Output, typer.Option("-o", "--output", help="yaml (also for table) or json.")] = Output.YAML,
) -> None:
    """Print the bootstrap of an Envoy that takes its routes from meshctl: `envoy -c FILE`."""
    # Imported here: the messages of the data plane take longer to import than the other commands take to run.
    from meshctl.address import Address
    from xds.bootstrap import bootstrap

    listening = Address.parse(listen, "--listen")
    data = bootstrap(
        xds=Address.parse(xds, "--xds"),
        listen=listening,
        admin=Address.parse(admin, "--admin"),
        node_id=node_id or f"{socket.gethostname()}-{listening.port}",
    )
    emit(data, Output.JSON if output is Output.JSON else Output.YAML, table=lambda: "")
