"""`meshctl gpu map` and `plan`: who holds which slots of which GPU, and which pods could move so that more fits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshctl.cli.output import Output, OutputOption, console, emit, live
from meshctl.errors import InputError, MeshctlError, RefusedError, UnavailableError
from meshctl.sharing import RESOURCE

if TYPE_CHECKING:
    from meshctl.adapters.kubernetes.client import Client
    from meshctl.api.gpu import GPU
    from meshctl.cli.gpu_site import Site
    from meshctl.ports import KubeObject

Kubeconfig = Annotated[Path | None, typer.Option(help="Default: $KUBECONFIG, ~/.kube/config, or the pod's own.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; its current one by default.")]
Node = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only GPUs of this node; repeatable.")]
Agent = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Ask this agent (`meshctl agent --admin`) instead of the API server."),
]
WatchOption = Annotated[bool, typer.Option("-w", "--watch", help="Keep showing it, until Ctrl-C.")]
PlanNode = Annotated[
    list[str] | None, typer.Option("--node", metavar="NAME", help="Make room on this node; repeatable. Default: any.")
]
For = Annotated[
    int | None, typer.Option("--for", min=1, metavar="SLOTS", help="What is to fit: a container with so many slots.")
]
ResourceOption = Annotated[str, typer.Option(help="Of --for: what the slots are asked for as.")]
Cpu = Annotated[str, typer.Option(metavar="QUANTITY", help="Of --for: CPU that the pod needs beside.")]
Memory = Annotated[str, typer.Option(metavar="QUANTITY", help="Of --for: memory that the pod needs beside.")]
PodOption = Annotated[
    str | None, typer.Option(metavar="NAMESPACE/NAME", help="What is to fit: this pod, which waits for slots.")
]
MaxMoves = Annotated[int, typer.Option(min=1, max=100, help="Propose no more moves than this.")]
REFRESH_S = 2.0
NOTHING = "no GPU objects: no agent has written one. Is `meshctl agent` running on the nodes with GPUs?"

app = typer.Typer(help="GPUs that pods share.", no_args_is_help=True, add_completion=False)


@app.command("map")
def map_command(
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    node: Node = None,
    agent: Agent = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Draw the GPUs: a cell per slot, a letter per container, and how many slots are free where.

    Of free slots it says how many nobody can use: "in pieces below 3" are those on GPUs with fewer free than any
    container here has or waits for; "stranded" are GPUs whose node has no CPU left for them, going by the CPU that pods
    here ask for per GPU. For that, nodes and pods are read, too: not with --agent, and not with --watch.
    """
    from meshctl.cli.gpu_map import GpuMap

    if agent and (kubeconfig or context):
        raise InputError("--agent asks one agent, --kubeconfig and --context an API server: give one of them")
    if watch and output is not Output.TABLE:
        raise InputError(f"--watch draws: leave it out for -o {output}, or use `kubectl get gpus --watch`")
    nodes = frozenset(node or ())

    def found() -> list[KubeObject]:
        return _of_nodes(_from_agent(agent) if agent else asyncio.run(_from_cluster(kubeconfig, context)), nodes)

    def drawn(objects: list[KubeObject], site: Site | None = None) -> GpuMap | str:
        return GpuMap(_read(objects), datetime.now(UTC), site.beyond() if site else None) if objects else NOTHING

    if watch:
        live(lambda: drawn(found()), REFRESH_S)
        return
    if agent or output is not Output.TABLE:
        objects = found()
        emit(objects, output, lambda: drawn(objects))
        return
    objects, site = asyncio.run(_with_site(kubeconfig, context))
    objects = _of_nodes(objects, nodes)
    emit(objects, output, lambda: drawn(objects, site))


@app.command("plan")
def plan_command(
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    node: PlanNode = None,
    slots: For = None,
    resource: ResourceOption = RESOURCE,
    cpu: Cpu = "0",
    memory: Memory = "0",
    pod: PodOption = None,
    max_moves: MaxMoves = 10,
    output: OutputOption = Output.TABLE,
) -> None:
    """Propose which pods to move so that more fits; nothing is changed.

    With --for or --pod: the fewest moves with which that fits. With neither: GPUs become whole, and pods leave nodes
    whose free GPUs lack CPU, as far as each move gains a tenth of a GPU. Every move has room while the pod still has
    what it has. Pods that stay: those of DaemonSets, static ones, those that no controller would make anew, that are
    annotated cluster-autoscaler.kubernetes.io/safe-to-evict "false", or do not run yet. Node selectors, node affinity,
    taints and cordons are minded; volumes and what pods ask of each other are not.
    """
    from meshctl.cli.gpu_plan import Proposal, Wanted
    from meshctl.extender.pods import Requests, quantity

    if pod and slots:
        raise InputError("--pod and --for each say what is to fit: give one of them")
    requests = Requests(quantity(cpu, "--cpu"), quantity(memory, "--memory"))
    wanted = Wanted(
        slots, resource, requests.cpu_milli, requests.memory_mib, pod or "", frozenset(node or ()), max_moves
    )
    objects, site = asyncio.run(_with_site(kubeconfig, context, needed=True))
    if not objects or site is None:
        raise MeshctlError(NOTHING)
    proposal = Proposal(site, wanted)
    emit(proposal.data(), output, proposal.text)


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

    async with connect(kubeconfig, context) as client:
        return await _gpus(client)


async def _with_site(
    kubeconfig: Path | None, context: str | None, *, needed: bool = False
) -> tuple[list[KubeObject], Site | None]:
    """The GPU objects, and what nodes and pods add. Where these may not be read it is `needed` and RefusedError is
    raised, or standard error says so."""
    from rich.markup import escape

    from meshctl.adapters.kubernetes.client import connect
    from meshctl.cli.gpu_site import read_site

    async with connect(kubeconfig, context) as client:
        objects = await _gpus(client)
        try:
            return objects, await read_site(client, objects) if objects else None
        except RefusedError as error:
            if needed:
                raise
            console(stderr=True).print(f"[yellow]{escape(f'stranded GPUs are not shown: {error}')}[/]")
            return objects, None


async def _gpus(client: Client) -> list[KubeObject]:
    from meshctl.adapters.kubernetes.faults import AbsentError
    from meshctl.adapters.kubernetes.kinds import KINDS

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
