"""`meshctl gpu map`: who holds which slots of which GPU, from the API server or from one node's agent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshctl.cli.output import Output, OutputOption, console, emit, live
from meshctl.errors import InputError, MeshctlError, UnavailableError

if TYPE_CHECKING:
    from meshctl.api.gpu import GPU
    from meshctl.ports import KubeObject

Kubeconfig = Annotated[Path | None, typer.Option(help="Default: $KUBECONFIG, ~/.kube/config, or the pod's own.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; its current one by default.")]
Node = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only GPUs of this node; repeatable.")]
Agent = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Ask this agent (`meshctl agent --admin`) instead of the API server."),
]
WatchOption = Annotated[bool, typer.Option("-w", "--watch", help="Keep showing it, until Ctrl-C.")]
REFRESH_S = 2.0
NOTHING = "no GPU objects: no agent has written one. Is `meshctl agent` running on the nodes with GPUs?"

app = typer.Typer(help="GPUs that pods share.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Keeps `map` a command of its own: typer folds a group of one."""


@app.command("map")
def map_command(
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    node: Node = None,
    agent: Agent = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Draw the GPUs: a cell per slot, a letter per container, and how many slots are free where."""
    from meshctl.cli.gpu_map import GpuMap

    if agent and (kubeconfig or context):
        raise InputError("--agent asks one agent, --kubeconfig and --context an API server: give one of them")
    if watch and output is not Output.TABLE:
        raise InputError(f"--watch draws: leave it out for -o {output}, or use `kubectl get gpus --watch`")
    nodes = frozenset(node or ())

    def found() -> list[KubeObject]:
        return _of_nodes(_from_agent(agent) if agent else asyncio.run(_from_cluster(kubeconfig, context)), nodes)

    def drawn(objects: list[KubeObject]) -> GpuMap | str:
        return GpuMap(_read(objects), datetime.now(UTC)) if objects else NOTHING

    if watch:
        live(lambda: drawn(found()), REFRESH_S)
        return
    objects = found()
    emit(objects, output, lambda: drawn(objects))


def _of_nodes(objects: Iterable[KubeObject], nodes: frozenset[str]) -> list[KubeObject]:
    """In order of node and UUID. Raises InputError for a node that has none, where others do."""
    found = sorted(objects, key=lambda one: (one["spec"]["node"], one["spec"]["uuid"]))
    known = sorted({one["spec"]["node"] for one in found})
    if unknown := sorted(nodes - {*known}):
        there = f"nodes that have some: {', '.join(known[:20])}" if known else NOTHING
        raise InputError(f"no GPU objects of node {', '.join(unknown)}; {there}")
    return [one for one in found if not nodes or one["spec"]["node"] in nodes]


def _from_agent(agent: str) -> list[KubeObject]:
    from pydantic import AfterValidator

    from meshctl.cli.client import AGENT, fetch

    listed: Any = list[Annotated[dict[str, Any], AfterValidator(_placed)]]
    url = agent if "://" in agent else f"http://{agent}"
    found: list[KubeObject] = fetch(url, "gpus", listed, AGENT)
    return found


def _placed(one: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what is no GPU object."""
    spec = one.get("spec")
    if not (isinstance(spec, dict) and isinstance(spec.get("node"), str) and isinstance(spec.get("uuid"), str)):
        raise ValueError("no spec.node and spec.uuid")  # noqa: TRY004 (what pydantic maps)
    return one


async def _from_cluster(kubeconfig: Path | None, context: str | None) -> list[KubeObject]:
    from meshctl.adapters.kubernetes.client import connect
    from meshctl.adapters.kubernetes.faults import AbsentError
    from meshctl.adapters.kubernetes.kinds import KINDS

    async with connect(kubeconfig, context) as client:
        try:
            listed = await client.list("GPU", retry=False)  # whoever looks is told at once, and looks again
            return [KINDS["GPU"].kept(item) for item in listed.items]
        except AbsentError as error:
            raise MeshctlError(f"{client.server} knows no GPU objects; install meshctl's CRDs there (crds/)") from error
        except UnavailableError as error:
            raise UnavailableError(f"{error}; an agent answers without it: --agent HOST:18002") from error


def _read(objects: Iterable[KubeObject]) -> list[GPU]:
    """Those that this version understands; of the others standard error has a line each."""
    import orjson
    from pydantic import ValidationError
    from rich.markup import escape

    from meshctl.api.gpu import GPU

    gpus = []
    for one in objects:
        try:
            gpus.append(GPU.model_validate_json(orjson.dumps(_timed(one))))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            uuid = one["spec"]["uuid"]
            words = f"GPU {uuid} is not drawn: {where}: {first['msg']}; is its agent of another version?"
            console(stderr=True).print(f"[yellow]{escape(words)}[/]")
    return gpus


def _timed(one: KubeObject) -> KubeObject:
    """With a time for each condition: an agent without a cluster has none, and the map shows none."""
    status = one.get("status") or {}
    conditions = [{"lastTransitionTime": "", **condition} for condition in status.get("conditions") or ()]
    return {**one, "status": {**status, "conditions": conditions}} if conditions else one
