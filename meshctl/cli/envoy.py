"""`meshctl envoy`: what a real Envoy needs to be driven by meshctl."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from meshctl.cli.output import Output, emit
from meshctl.errors import InputError

if TYPE_CHECKING:
    from xds.envoytls import EnvoyTls

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
    group: Annotated[
        str, typer.Option(help="The group of proxies that it belongs to: one of a ModelRoute's spec.proxyGroups.")
    ] = "",
    delta: Annotated[
        bool, typer.Option("--delta", help="Incremental xDS: a change of one route costs the same among thousands.")
    ] = False,
    xds_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CA of the xDS server's certificate (PEM): talk TLS to it.")
    ] = None,
    xds_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate that Envoy shows to it (PEM, with its chain).")
    ] = None,
    xds_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
    xds_secrets: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where Envoy finds the files NODE.xds-*.json, which tell it of these certificates and are written to"
            " the current directory.",
        ),
    ] = Path(),
    output: Annotated[Output, typer.Option("-o", "--output", help="yaml (also for table) or json.")] = Output.YAML,
) -> None:
    """Print the bootstrap of an Envoy that takes its routes from meshctl: `envoy -c FILE`."""
    # Imported here: the messages of the data plane take longer to import than the other commands take to run.
    from meshctl.address import Address
    from xds.bootstrap import bootstrap
    from xds.envoytls import secret_files

    server, listening = Address.parse(xds, "--xds"), Address.parse(listen, "--listen")
    name = node_id or f"{socket.gethostname()}-{listening.port}"
    tls = _tls(xds_ca, xds_cert, xds_key, xds_secrets)
    data = bootstrap(server, listening, Address.parse(admin, "--admin"), name, group=group, tls=tls, delta=delta)
    if tls is not None:
        _write(secret_files(tls, server, name))
    emit(data, Output.JSON if output is Output.JSON else Output.YAML, table=lambda: "")


def _tls(ca: Path | None, cert: Path | None, key: Path | None, secrets: Path) -> EnvoyTls | None:
    """None: plain text. Raises InputError for options that belong together."""
    from xds.envoytls import EnvoyTls

    if (cert is None) is not (key is None) or (ca is None and cert is not None):
        raise InputError("--xds-ca, --xds-cert and --xds-key belong together: give all, the first alone, or none")
    if ca is None:
        return None
    return EnvoyTls(ca.absolute(), cert and cert.absolute(), key and key.absolute(), secrets.absolute())


def _write(files: Mapping[str, Any]) -> None:
    """To the current directory, as JSON."""
    for name, data in files.items():
        path = Path(name).absolute()
        try:
            path.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; run this where files can be written") from error
