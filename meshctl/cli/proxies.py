"""`meshctl proxy-status` and `meshctl proxy-config`: the clients of meshctl's own xDS server, and what they hold.

Named like istioctl's, and say the same of other proxies: those of the mesh get their configuration from istiod.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.markup import escape

from meshctl.cli.client import DEFAULT_ADMIN, AdminOption, fetch, unknown
from meshctl.cli.output import Output, OutputOption, emit

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from meshctl.controller.proxies import ConfigView, ResourceView, StreamView, TypeView

SHOWN_VERSION = 12
"""Characters, enough to compare by eye; -o json has all."""


class Kind(StrEnum):
    """A resource type, as it is written on the command line."""

    CDS = "cds"
    EDS = "eds"
    LDS = "lds"
    RDS = "rds"


NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Node id, as `meshctl proxy-status` shows it.")]
KindArgument = Annotated[Kind | None, typer.Argument(metavar="[TYPE]", help="cds, eds, lds or rds; all without.")]
NodeOption = Annotated[str, typer.Option("--node", help="Only this node id, in full.", metavar="ID")]
NameOption = Annotated[str, typer.Option("--name", help="Only resources of this name; * for any characters.")]


def proxy_status(
    admin: AdminOption = DEFAULT_ADMIN, node: NodeOption = "", output: OutputOption = Output.TABLE
) -> None:
    """Show who is connected to meshctl's own xDS server, and how far each is.

    SYNCED: acknowledged what it should have. STALE: sent and not acknowledged yet, or newer is due. NACKED: refused the
    newest, has what was before. NOT SENT: there is nothing of what it asked for. -: did not ask for this type.
    Proxies of the mesh are not among them: they are istiod's (istioctl proxy-status).
    """
    from pydantic import TypeAdapter

    from meshctl.controller.proxies import StreamView

    found = fetch(admin, "proxies", tuple[StreamView, ...])
    if node:
        nodes = sorted({stream.node for stream in found})
        found = tuple(stream for stream in found if stream.node == node)
        if not found:
            raise unknown(f"no proxy {node}", "proxies", nodes)
    draw = _details if node else _overview
    emit(TypeAdapter(tuple[StreamView, ...]).dump_python(found, mode="json"), output, lambda: draw(found))


def proxy_config(
    node: NodeArgument,
    kind: KindArgument = None,
    name: NameOption = "*",
    admin: AdminOption = DEFAULT_ADMIN,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a client of meshctl's own xDS server acknowledged; with -o json or yaml, the resources in full.

    In full is slow, a second for 150 of them: TYPE and --name make them fewer.
    """
    from pydantic import TypeAdapter

    from meshctl.controller.proxies import ConfigView

    full = output is not Output.TABLE
    query = urlencode({"name": name, "type": kind.value if kind else "", "full": int(full)})
    view = fetch(admin, f"proxies/{quote(node, safe='')}/config?{query}", ConfigView)
    said = TypeAdapter(ConfigView).dump_python(view, mode="json")
    emit(_decoded(said) if full else said, output, lambda: _config(view))


def _decoded(view: dict[str, Any]) -> dict[str, Any]:
    """With each resource's content in place of its bytes."""
    from xds.inspect import decode

    for resource in view["resources"]:
        resource["resource"] = decode(b64decode(resource.pop("packed")))
    return view


# ------------------------------------------------------------------------------------------------------------- drawing


def _overview(streams: Sequence[StreamView]) -> RenderableType:
    from rich.console import Group
    from rich.table import Column, Table

    if not streams:
        return "[yellow]no proxy is connected[/]; `meshctl envoy bootstrap` prints what one needs"
    whole = Column("Proxy", no_wrap=True)  # proxy-config takes it as an argument
    table = Table(whole, "Group", "Client", "Stream", "CDS", "EDS", "LDS", "RDS", "Connected")
    for stream in streams:
        by_type = {status.type: status for status in stream.types}
        table.add_row(
            escape(stream.node),
            escape(stream.group),
            stream.flavour,
            f"{stream.service} {stream.protocol}",
            *(_state(by_type.get(kind.name)) for kind in Kind),
            _age(stream.connected_s),
        )
    return Group(table, *_errors(streams))


def _details(streams: Iterable[StreamView]) -> Group:
    from rich.console import Group
    from rich.table import Table

    parts: list[RenderableType] = []
    for stream in streams:
        identity = f" as {stream.identity}" if stream.identity else ""
        said = (
            f"{stream.flavour}, group {stream.group}, {stream.service} {stream.protocol}, from {stream.peer}{identity}"
        )
        parts.append(f"[bold]{escape(stream.node)}[/]  {escape(said)}, connected {_age(stream.connected_s)}")
        table = Table("Type", "State", "Resources", "Version", "Sent", "Acknowledged")
        for status in stream.types:
            version = escape(status.version[:SHOWN_VERSION]) or "-"
            sent, acked = _age(status.sent_age_s, " ago"), _age(status.acked_age_s, " ago")
            table.add_row(status.type, _state(status), f"{status.resources}", version, sent, acked)
        parts += [table, *_errors([stream])]
    return Group(*parts)


def _errors(streams: Iterable[StreamView]) -> list[str]:
    """A line for each refusal, word for word."""
    return [
        f"[red]{escape(stream.node)} {status.type}[/] refused: {escape(status.error)}"
        for stream in streams
        for status in stream.types
        if status.error
    ]


def _state(status: TypeView | None) -> str:
    if status is None or status.state == "NOT ASKED":
        return "-"
    colour = {"SYNCED": "green", "NACKED": "red"}.get(status.state, "yellow")
    since = f" {_age(status.sent_age_s)}" if status.state == "STALE" and status.sent_age_s is not None else ""
    return f"[{colour}]{status.state}[/]{since}"


def _age(seconds: float | None, ago: str = "") -> str:
    """In the largest unit that it has at least two of: 3.2 s, 95 s, 45 min, 30 h."""
    if seconds is None:
        return "-"
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}{ago}"
    return f"{seconds:.1f} s{ago}" if seconds < 10 else f"{seconds:.0f} s{ago}"


def _config(view: ConfigView) -> Table:
    from rich.table import Column, Table

    table = Table("Type", Column("Name", no_wrap=True), "Route", "Version", Column("Bytes", justify="right"))
    for found in view.resources:
        table.add_row(*_row(found))
    return table


def _row(found: ResourceView) -> tuple[str, ...]:
    name, route = escape(found.name), escape(found.route) or "-"
    return found.type, name, route, found.version[:SHOWN_VERSION], f"{found.size_bytes}"
