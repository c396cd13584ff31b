"""`meshctl analyze`: will istiod and Envoy take these Istio objects, and do what they say? Files, a cluster, or both.

Files alone are taken for all there is of Istio, as `istioctl analyze --use-kube=false` does; the hosts of Services are
then not looked up. With a cluster, files are judged as if they were applied to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from istio.analyze import ISTIO_KINDS, POD, SERVICE, Finding, Severity, analyze, found
from istio.names import GATEWAY, key_of
from meshctl.cli.output import Output, OutputOption, emit
from meshctl.errors import InputError, MeshctlError
from meshctl.ports import KubeObject, ObjectKey

if TYPE_CHECKING:
    from meshctl.adapters.kubernetes.client import Client
    from meshctl.api.document import Document, FieldPath, Place

Files = Annotated[list[Path] | None, typer.Option("-f", "--filename", help="File, or directory of them; repeatable.")]
Namespace = Annotated[
    str | None,
    typer.Option("-n", "--namespace", help="What is in the cluster in this namespace; files' default namespace."),
]
All = Annotated[bool, typer.Option("-A", "--all-namespaces", help="What is in the cluster.")]
Kubeconfig = Annotated[Path | None, typer.Option(help="Default: $KUBECONFIG, ~/.kube/config, or the pod's own.")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; its current one by default.")]


@dataclass(slots=True)
class _Layer:
    """Objects that were read, no two of one name, and where each stands in a file."""

    objects: dict[ObjectKey, KubeObject] = field(default_factory=dict)
    places: dict[ObjectKey, tuple[Document, FieldPath]] = field(default_factory=dict)

    def place(self, finding: Finding) -> Place | None:
        if finding.key not in self.places:
            return None
        document, root = self.places[finding.key]
        return document.place((*root, *finding.path))


@dataclass(slots=True)
class _Live:
    """What a cluster has."""

    objects: list[KubeObject] = field(default_factory=list)
    complete: set[str] = field(default_factory=set)
    """The kinds of which all namespaces could be read."""


def analyze_command(
    filename: Files = None,
    namespace: Namespace = None,
    all_namespaces: All = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Find what is wrong with Istio objects; exit 0 without errors, 1 with some, 2 when the input can't be read.

    Give files (-f), a namespace of the cluster (-n), all of them (-A), or files and one of these: then the files are
    judged as if they were applied. docs/reference/analyze.md lists the findings; a warning alone is no error.
    """
    if namespace and all_namespaces:
        raise InputError("-n and -A exclude each other; give one of them")
    if not (filename or namespace or all_namespaces):
        raise InputError("nothing to analyze; give files (-f), a namespace (-n) or all of them (-A)")
    layers = _files(filename, namespace or "default") if filename else [_Layer()]
    live = _Live(complete=set(ISTIO_KINDS))
    if namespace or all_namespaces:
        live = asyncio.run(_cluster(kubeconfig, context, namespace or ""))
    if not filename:
        layers[0].objects = {key_of(value): value for value in live.objects if _within(value, namespace)}
    findings = [(finding, layer.place(finding)) for layer in layers for finding in _judged(layer, layers[0], live)]
    _print(findings, sum(key.kind in ISTIO_KINDS for layer in layers for key in layer.objects), output)
    if any(finding.severity is Severity.ERROR for finding, _ in findings):
        raise typer.Exit(1)


def _within(value: KubeObject, namespace: str | None) -> bool:
    return namespace is None or value["metadata"].get("namespace") == namespace


def _judged(layer: _Layer, first: _Layer, live: _Live) -> Iterator[Finding]:
    """Objects whose name is taken are judged in place of the first of that name, and one is too many."""
    beside = live.objects if layer is first else (*first.objects.values(), *live.objects)
    yield from analyze(layer.objects.values(), beside, live.complete)
    if layer is not first:
        yield from (
            found("DuplicateObject", key, (), f"the first is at {_first(first, key)}") for key in sorted(layer.objects)
        )


def _first(layer: _Layer, key: ObjectKey) -> Place:
    document, path = layer.places[key]
    return document.place(path)


def _files(paths: Sequence[Path], namespace: str) -> list[_Layer]:
    """Layers of objects with different names. Raises InputError with everything that can't be read."""
    from meshctl.adapters.manifests import list_manifests
    from meshctl.api.document import ManifestError, parse, read_bounded

    layers, faults = [_Layer()], []
    for named in paths:
        listing = list_manifests(named) if named.is_dir() else None
        faults += [f"{path}: cannot be listed: {why}" for path, why in (listing.unlisted if listing else {}).items()]
        for path in listing.files if listing else (named,):
            try:
                for document in parse(read_bounded(path), str(path)):
                    _collect(document, namespace, layers)
            except ManifestError as error:
                faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return layers


def _collect(document: Document, namespace: str, layers: list[_Layer]) -> None:
    for path, value in _values(document.data):
        metadata = value.get("metadata") if isinstance(value, dict) else None
        if not isinstance(metadata, dict) or not _matters(value):
            continue
        metadata.setdefault("namespace", namespace)
        key = ObjectKey(str(value.get("kind", "")), str(metadata["namespace"]), str(metadata.get("name", "")))
        layer = next((layer for layer in layers if key not in layer.objects), None)
        if layer is None:
            layers.append(layer := _Layer())
        layer.objects[key] = value
        layer.places[key] = (document, path)


def _matters(value: KubeObject) -> bool:
    """A Gateway of the Gateway API is another thing of the same name."""
    kind, version = str(value.get("kind", "")), str(value.get("apiVersion", ""))
    return (kind in ISTIO_KINDS and version.startswith("networking.istio.io/")) or (kind, version) == (SERVICE, "v1")


def _values(data: Any) -> Iterator[tuple[FieldPath, Any]]:
    """The object itself, or the items of a ``kind: List``."""
    items = data.get("items") if isinstance(data, dict) else None
    if isinstance(items, list) and str(data.get("kind", "")).endswith("List"):
        yield from ((("items", index), item) for index, item in enumerate(items))
    else:
        yield (), data


async def _cluster(kubeconfig: Path | None, context: str | None, namespace: str) -> _Live:
    """Everything of the kinds that matter; only that of `namespace` where no more may be read."""
    from meshctl.adapters.kubernetes.client import connect

    live = _Live()
    async with connect(kubeconfig, context) as client:
        for kind in sorted({*ISTIO_KINDS, SERVICE}):
            await _list(client, kind, namespace, live)
        await _gateway_pods(client, live)
    return live


async def _list(client: Client, kind: str, namespace: str, live: _Live) -> None:
    from meshctl.adapters.kubernetes.faults import AbsentError, ForbiddenError
    from meshctl.adapters.kubernetes.kinds import KINDS

    try:
        listing = await client.list(kind)
        live.complete.add(kind)
    except ForbiddenError:
        if not namespace:
            raise
        listing = await client.list(kind, namespace)
    except AbsentError as error:
        raise MeshctlError(f"{client.server} has no {kind}s: install Istio's CRDs there first") from error
    live.objects += (KINDS[kind].kept(item) for item in listing.items)


async def _gateway_pods(client: Client, live: _Live) -> None:
    """The pods that some gateway selects, not the thousands of others."""
    from meshctl.adapters.kubernetes.faults import ForbiddenError
    from meshctl.adapters.kubernetes.kinds import KINDS

    selectors = {_selector(value) for value in live.objects if value["kind"] == GATEWAY}
    try:
        for selector in sorted(selectors - {""}):
            listing = await client.list(POD, label_selector=selector)
            live.objects += (KINDS[POD].kept(item) for item in listing.items)
        live.complete.add(POD)
    except ForbiddenError:
        return  # then nothing is said of selectors


def _selector(value: KubeObject) -> str:
    labels = (value.get("spec") or {}).get("selector") or {}
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels))


def _print(findings: Sequence[tuple[Finding, Place | None]], count: int, output: Output) -> None:
    errors = sum(finding.severity is Severity.ERROR for finding, _ in findings)
    if output is Output.TABLE:  # plain lines, which an editor can jump to and no terminal width breaks
        for finding, place in findings:
            typer.echo(f"{place}: {finding}" if place else finding)
        typer.echo(f"{count} Istio objects, {errors} errors, {len(findings) - errors} warnings", err=True)
    else:
        records = [_record(finding, place) for finding, place in findings]
        emit({"clean": not errors, "objects": count, "findings": records}, output, str)


def _record(finding: Finding, place: Place | None) -> dict[str, object]:
    return {
        "severity": str(finding.severity),
        "code": finding.code,
        "kind": finding.key.kind,
        "namespace": finding.key.namespace,
        "name": finding.key.name,
        "field": finding.field,
        "message": finding.message,
        "file": place.file if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
    }
