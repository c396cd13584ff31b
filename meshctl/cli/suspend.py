"""`meshctl pause` and `meshctl resume`: hold a route's weights, and let them go again, through the API server.

Both change the ModelRoute and nothing else; the controller does the rest. Resuming also sets the annotation
`meshctl.io/resumed-at`: only that makes the controller take back, once, what others changed in its objects.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from istio.names import RESUMED_AT
from meshctl.errors import InputError, MeshctlError
from meshctl.ports import KubeObject, ObjectKey

if TYPE_CHECKING:
    from meshctl.adapters.kubernetes.client import Client

FIELD_MANAGER = "meshctl-cli"
"""Not the controller's: who reads managedFields sees that a person did it."""
GITOPS = ("argocd.argoproj.io/", "kustomize.toolkit.fluxcd.io/", "helm.toolkit.fluxcd.io/")
"""Labels and annotations of an object that a tool keeps as it is in Git."""

Route = Annotated[str, typer.Argument(help="NAME or NAMESPACE/NAME of the ModelRoute.", show_default=False)]
Namespace = Annotated[str | None, typer.Option("-n", "--namespace", help="Default: that of the kubeconfig's context.")]
Kubeconfig = Annotated[Path | None, typer.Option(help="Default: $KUBECONFIG, ~/.kube/config, or the pod's own.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; its current one by default.")]


def pause(route: Route, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Hold the weights of a route as they are, until it is resumed."""
    found = _patched(route, namespace, kubeconfig, context, _paused)
    name = f"{found['metadata']['namespace']}/{found['metadata']['name']}"
    typer.echo(f"ModelRoute {name} is paused: its weights stay as they are, whatever is measured.")
    _git(found, "`suspend: true`")
    typer.echo(f"`meshctl resume {name}` lets them follow the load again.")


def resume(route: Route, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None) -> None:
    """Let the weights of a route follow the load again; take back what others changed in its Istio objects."""
    found = _patched(route, namespace, kubeconfig, context, _resumed)
    name = f"{found['metadata']['namespace']}/{found['metadata']['name']}"
    typer.echo(f"ModelRoute {name} is resumed: its weights follow the load again.")
    typer.echo("What others changed in its Istio objects is taken back, once.")
    _git(found, "`suspend`")


def _paused(found: KubeObject) -> KubeObject | None:
    return None if found["spec"].get("suspend") else {"spec": {"suspend": True}}


def _resumed(_: KubeObject) -> KubeObject:
    """Also where it is not suspended: a conflict is resolved by it."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"metadata": {"annotations": {RESUMED_AT: now}}, "spec": {"suspend": False}}


def _git(found: KubeObject, what: str) -> None:
    metadata = found["metadata"]
    keys = (*(metadata.get("labels") or ()), *(metadata.get("annotations") or ()))
    if any(key.startswith(GITOPS) for key in keys):
        typer.echo(f"It is kept as it is in Git: change {what} there too, or the next sync undoes this.")


def _patched(
    route: str,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
    patch_of: Callable[[KubeObject], KubeObject | None],
) -> KubeObject:
    """The route as it then is. Nothing is written where `patch_of` the route gives None."""
    within, slash, name = route.partition("/")
    if not slash:
        within, name = "", route
    if not name or "/" in name or (slash and not within):
        raise InputError(f"{route!r} is not a route; write NAME or NAMESPACE/NAME")
    if within and namespace and within != namespace:
        raise InputError(f"{route!r} is not in namespace {namespace!r}; give one of the two")
    return asyncio.run(_patch(name, within or namespace or "", kubeconfig, context, patch_of))


async def _patch(
    name: str,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
    patch_of: Callable[[KubeObject], KubeObject | None],
) -> KubeObject:
    from meshctl.adapters.kubernetes.client import connect

    async with connect(kubeconfig, context) as client:
        key = ObjectKey("ModelRoute", namespace or _context_namespace(kubeconfig, context), name)
        found = await client.get(key)
        if found is None:
            raise await _not_found(client, key)
        patch = patch_of(found)
        return found if patch is None else await client.merge_patch(key, patch, manager=FIELD_MANAGER)


def _context_namespace(kubeconfig: Path | None, context: str | None) -> str:
    """What kubectl takes without -n. The file has been read before, and is good, unless we are in a pod."""
    from kubernetes.aio.config import kube_config

    loose: Any = kube_config  # the package gives its functions no types
    files = str(kubeconfig or loose.KUBE_CONFIG_DEFAULT_LOCATION)
    if not any(Path(file).expanduser().is_file() for file in files.split(os.pathsep)):
        return "default"
    loader = loose.KubeConfigLoader(config_dict=loose.KubeConfigMerger(files).config, active_context=context)
    return str(loader.current_context["context"].get("namespace") or "default")


async def _not_found(client: Client, key: ObjectKey) -> MeshctlError:
    """What to do about it, as far as one may see what there is."""
    from meshctl.adapters.kubernetes.faults import AbsentError, ForbiddenError

    try:
        others = sorted(item["metadata"]["name"] for item in (await client.list(key.kind, key.namespace)).items)
    except AbsentError:
        return MeshctlError(f"{client.server} has no ModelRoutes at all; install meshctl's CRDs there (crds/)")
    except ForbiddenError:
        others = []
    known = f"there are: {', '.join(others[:20])}" if others else "see `kubectl get modelroutes -A`"
    return InputError(f"no ModelRoute {key.name} in namespace {key.namespace}; {known}")
