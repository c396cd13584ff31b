"""`meshctl grpc`: what a gRPC client needs to find its servers through meshctl, without a proxy."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from meshctl.cli.output import Output, emit
from meshctl.errors import InputError

app = typer.Typer(help="gRPC clients that meshctl steers without a proxy.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Keeps `bootstrap` a command of its own: typer folds a group of one."""


@app.command("bootstrap")
def bootstrap_command(
    xds: Annotated[str, typer.Option(metavar="HOST:PORT", help="The xDS server of `meshctl run`.")] = "127.0.0.1:18000",
    node_id: Annotated[str, typer.Option(help="Name of this client; by default the host's name.")] = "",
    group: Annotated[
        str, typer.Option(help="The group of proxies that it belongs to: one of a ModelRoute's spec.proxyGroups.")
    ] = "",
    xds_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CA of the xDS server's certificate (PEM): talk TLS to it.")
    ] = None,
    xds_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate that the client shows to it (PEM, with its chain).")
    ] = None,
    xds_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
) -> None:
    """Print the bootstrap of a gRPC client, as JSON: the file that GRPC_XDS_BOOTSTRAP names."""
    # Imported here: the messages of the data plane take longer to import than the other commands take to run.
    from meshctl.address import Address
    from xds.grpcbootstrap import ClientTls, grpc_bootstrap

    if (xds_cert is None) is not (xds_key is None) or (xds_ca is None and xds_cert is not None):
        raise InputError("--xds-ca, --xds-cert and --xds-key belong together: give all, the first alone, or none")
    tls = None
    if xds_ca is not None:
        tls = ClientTls(xds_ca.absolute(), xds_cert and xds_cert.absolute(), xds_key and xds_key.absolute())
    data = grpc_bootstrap(Address.parse(xds, "--xds"), node_id or socket.gethostname(), group=group, tls=tls)
    emit(data, Output.JSON, table=lambda: "")
