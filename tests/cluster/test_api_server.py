"""The CRDs on a real API server: it judges, defaults and shows our objects as `meshctl validate` and the models say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshctl.api.crd import RESOURCES
from meshctl.api.objects import read_object
from tests.cluster.cluster import OUR_CRDS, Cluster
from tests.cluster.verdicts import asking, both_read, edges, judged_otherwise, spec_fields, verdicts
from tests.harness.manifests import ABSENT, changed, profile, route, text
from tests.unit.test_api_modelroute import BAD as BAD_FIELDS
from tests.unit.test_api_modelroute import FULL, SERVICE

pytestmark = pytest.mark.cluster
E = "spec.backend.endpoints.0"
MESHED: dict[str, Any] = {"gateways": ["gw"], "hosts": ["a.example.com"]}


def with_line(line: str) -> str:
    """The smallest route as somebody writes it, with a line of YAML in its spec."""
    return (
        "apiVersion: meshctl.io/v1alpha1\nkind: ModelRoute\nmetadata: {name: a}\nspec:\n  model: m\n"
        "  backend: {endpoints: [{address: 10.0.0.1, port: 80, gpu: T4}]}\n  slo: {latency: 1s}\n"
        f"  {line}\n"
    )


def with_metadata(metadata: str) -> str:
    return with_line("suspend: false").replace("{name: a}", metadata)


def with_service(fields: str) -> str:
    return with_line("suspend: false").replace(
        "endpoints: [{address: 10.0.0.1, port: 80, gpu: T4}]", f"service: {{{fields}}}"
    )


def with_times(service: str) -> str:
    """A profile with these service times."""
    return (
        "apiVersion: meshctl.io/v1alpha1\nkind: ModelProfile\nmetadata: {name: a}\n"
        f"spec:\n  model: m\n  gpu: T4\n  service: {service}\n"
    )


def classes(*written: str) -> str:
    return f"requestSize: {{classes: [{', '.join(f'{{{c}}}' for c in written)}]}}"


GOOD_LINES = [
    "policy: ~",
    "policy:",
    "gateways:",
    "retry:",
    "retry: {attempts: 0, perTryTimeout: 30s, idempotent: true}",
    "retry: {attempts: 2.0}",
    "retry: {attempts: 1e0}",
    "warmUp: 0s",
    "warmUp: 24h",
    "timeout: 1s",
    "guard: {dwell: 0s, deadBand: 0, headroom: 0}",
    "guard: {smoothing: 0.5ns1ns}",
    "suspend: yes",
    "suspend: off",
    "suspend: y",
    "expectedLoad: 010",
    "expectedLoad: 0x10",
    "expectedLoad: 1_000",
    "expectedLoad: 1.5e3",
    "expectedLoad: +5",
    "expectedLoad: 1e9",
    "hosts: ['*.example.com', a.b:80]",
    "gateways: [gw, n/gw, n/g.w]\n  hosts: [a]",
    "gateways: [mesh]\n  hosts: [a]",
    "delegate: true",
    "mechanism: Subsets\n  policy: RoundRobin",
    classes("name: a, min: 1, max: 2, share: 0.999"),
    classes("name: a, min: 1, max: 2, batch: 1.5", "name: b, min: 3, max: 3"),
    classes("name: b, min: 3, max: 3, share: 1", "name: a, min: 1, max: 2, share: 0"),
    "requestSize: {headers: [x_y, x-y]}",
    "proxyGroups: []",
    "proxyGroups: [edge, batch-2]",
]
BAD_LINES = [
    "unknown: 1",
    "hosts: [~]",
    "hosts: [yes]",
    "hosts: ['*', '*']",
    "proxyGroups: [a, a]",
    "proxyGroups: [a.b]",
    "proxyGroups: ['']",
    "hosts: [a]\n  hosts: [b]",
    "expectedLoad: .inf",
    "expectedLoad: 1e999",
    "expectedLoad: 1000000001",
    "retry: {attempts: 2.5}",
    "retry: {attempts: 99999999999999999999999}",
    "retry: {perTryTimeout: 31s}",
    "guard: {smoothing: 0.1ns}",
    "guard: {smoothing: 0.5ns0.5ns}",
    "guard: {dwell: 24h1ns}",
    "guard: {dwell: 99999999999999999999h}",
    "warmUp: 0",
    "warmUp: '0'",
    "timeout: 999ms",
    "delegate: true\n  gateways: [gw]",
    "delegate: true\n  hosts: [a]",
    "gateways: [mesh]",
    "gateways: [gw]\n  hosts: ['a:80']",
    "requestSize: {headers: [X, x]}",
    classes("name: a, min: 1, max: 2, share: 0"),
    classes("name: a, min: 1, max: 2, share: 0.9"),
    classes("name: a, min: 1, max: 2, share: 0.998"),
    classes("name: a, min: 1, max: 5", "name: b, min: 7, max: 9", "name: c, min: 2, max: 3"),
    classes(*(f"name: c{i}, min: {i}, max: {i}" for i in range(1, 18))),
]
GOOD_METADATA = [
    f"{{name: {'a' * 63}}}",
    "{name: a.b}",
    "{name: '1'}",
    "{name: a, labels: null, creationTimestamp: null}",
    "{name: a, labels: {a: b, c.d/e: ''}}",
    "{name: a, annotations: {A.b/c: x, d: ~}}",
    "{name: a, generation: 3, uid: x, finalizers: [x/y]}",
]
BAD_METADATA = [
    f"{{name: {'a' * 64}}}",
    "{name: a_b}",
    "{name: A}",
    "{name: -a}",
    "{name: 1}",
    "{name: true}",
    "{name: a, labels: {a: 1}}",
    "{name: a, labels: {a: 'b c'}}",
    "{name: a, labels: {a b: b}}",
    "{name: a, annotations: {a: yes}}",
    "{name: a, annotations: {a/b/c: x}}",
    "{name: a, annotations: []}",
    "{name: a, nmae: x}",
]
GOOD_ADDRESSES = ["10.0.0.1", "::1", "0.0.0.0", "2001:db8:0:1:1:1:1:1", "fd00::1"]  # noqa: S104 (nothing listens)
BAD_ADDRESSES = ["10.0.0.01", "FD00::1", "::ffff:1.2.3.4", "fe80::1%eth0", "1::2:0:0:0:3", "2001:db8::1:1:1:1:1", ""]
GOOD_SERVICES = [
    "name: a, port: 80",
    "name: a, port: http",
    "name: a, port: 80.0",
    "name: a, port: 8-a--b, metricsPort: 8e3",
    "name: '1', port: 65535, metricsPort: null, concurrency: 1024",
]
BAD_SERVICES = [
    "name: a",
    "name: a, port: 0",
    "name: a, port: 65536",
    "name: a, port: '80'",
    "name: a, port: ''",
    "name: a, port: true",
    "name: a, port: [1]",
    "name: a, port: -a",
    "name: a, port: A",
    f"name: a, port: {'a' * 64}",
    "name: a.b, port: 1",
    "name: A, port: 1",
    "name: a, port: 80, concurrency: 0",
    "name: a, port: 80, metricsPort: 0",
]
GOOD_TIMES = [
    "{base: 1ms, perItem: 0s}",
    "{points: {1: 1ms}}",
    "{points: {'1': 1ms, '2': 1ms}}",
    "{points: {1: 1s, 2: null}}",
    "{points: null, base: 1s, perItem: 1s}",
    "{points: {1000000: 24h}}",
    f"{{points: {{{', '.join(f'{i}: {i}s' for i in range(1, 33))}}}}}",
]
BAD_TIMES = [
    "{}",
    "{base: 1ms}",
    "{base: 0s, perItem: 0s}",
    "{base: 0s, perItem: 0.1ns}",
    "{base: 1ms, perItem: 1ms, points: {1: 1ms}}",
    "{points: {}}",
    "{points: {1: null}}",
    "{points: {0: 1ms}}",
    "{points: {-1: 1ms}}",
    "{points: {1.5: 1ms}}",
    "{points: {a: 1ms}}",
    "{points: {1000001: 1s}}",
    "{points: {99999999: 1s}}",
    "{points: {1: 25h}}",
    "{points: {'1': 0s}}",
    "{points: {'1': 1ms, '2': 0.9ms}}",
    "{points: {'1': 1s, '1': 2s}}",
    f"{{points: {{{', '.join(f'{i}: {i}s' for i in range(1, 34))}}}}}",
]


def good() -> Iterator[str]:
    """Documents that both take."""
    yield text(route())
    yield text(profile())
    yield text(FULL)
    yield text(route(backend={"service": SERVICE}, **MESHED))
    yield text(route() | {"status": {"conditions": [], "observedGeneration": 3}})
    yield from map(with_line, GOOD_LINES)
    yield from map(with_metadata, GOOD_METADATA)
    yield from (text(changed(FULL, f"{E}.address", address)) for address in GOOD_ADDRESSES)
    yield from map(with_service, GOOD_SERVICES)
    yield from map(with_times, GOOD_TIMES)


def bad() -> Iterator[str]:
    """Documents that both refuse."""
    yield from (text(changed(FULL, path, value)) for _, path, value, *_ in BAD_FIELDS)
    yield from (text(changed(profile(), field, ABSENT)) for field in ("spec.model", "spec.gpu", "spec.service"))
    yield from map(with_line, BAD_LINES)
    yield from map(with_metadata, BAD_METADATA)
    yield from (text(changed(FULL, f"{E}.address", address)) for address in BAD_ADDRESSES)
    yield from map(with_service, BAD_SERVICES)
    yield from map(with_times, BAD_TIMES)


ALL_FIELDS = {
    "ModelRoute": changed(
        route(
            backend={"service": SERVICE},
            requestSize={"headers": ["a"], "classes": [{"name": "a", "min": 1, "max": 2, "batch": 1.5, "share": 1}]},
            retry={"perTryTimeout": "1s"},
            expectedLoad=5,
            **MESHED,
        ),
        "spec.guard",
        {},
    ),
    "ModelProfile": profile(service={"points": {"1": "1ms"}}),
}
STATIC = route()


def at_edges() -> Iterator[str]:
    """Each field of each kind at its edges, whatever the verdict."""
    for kind, every in ALL_FIELDS.items():
        for path, schema in spec_fields(kind):
            base = STATIC if path.startswith("spec.backend.endpoints") else every
            yield from (text(changed(base, path, value)) for value in edges(schema))


EXCEPTIONS: list[tuple[str, str, bool, bool]] = [
    # why, document, whether the API server takes it, whether `meshctl validate` does
    (
        "two objects are needed to see it; in a cluster the later route's condition Resolved says it",
        text(route("a", hosts=["h"]), profile(), route("b", hosts=["h"])),
        True,
        False,
    ),
    ("the API server makes a name, a file must have one", with_metadata("{generateName: a-}"), True, False),
    (
        "the status is the controller's; a file's is not read",
        with_line("suspend: false\nstatus: {foo: 1}"),
        False,
        True,
    ),
    ("01 is the key 1 to YAML 1.1; whoever writes it may mean another", with_times("{points: {01: 1ms}}"), True, False),
    ("one key twice in two spellings: the last would win", with_times("{points: {1: 1s, '1': 2s}}"), True, False),
]


async def test_good_and_bad_documents_are_judged_the_same(cluster: Cluster, tmp_path: Path) -> None:
    """The API server and `meshctl validate` take and refuse the same texts; only EXCEPTIONS may be judged otherwise."""
    async with asking(cluster) as server:
        assert await judged_otherwise(server, tmp_path, good=good(), bad=bad(), any_=at_edges()) == []
        apart = await verdicts(server, tmp_path, [document for _, document, *_ in EXCEPTIONS])
    assert [(api, ours) for api, ours, _ in apart] == [(api, ours) for _, _, api, ours in EXCEPTIONS]


async def test_stored_object_is_what_the_file_says(cluster: Cluster) -> None:
    """What the API server makes of a text, defaults and all, is read as the very value that the text is read as."""
    async with asking(cluster) as server:
        for document in good():
            live, written = await both_read(server, document)
            assert live.value.spec == written.value.spec, document


async def test_defaults_are_the_models_own(cluster: Cluster) -> None:
    """`kubectl get -o yaml` shows every default, as the models have them."""
    service = route(backend={"service": SERVICE})
    async with asking(cluster) as server:
        for smallest in (route(), service, profile(), FULL):
            _, stored = await server.answer(text(smallest))
            _, written = await both_read(server, text(smallest))
            models = written.value.model_dump(mode="json", by_alias=True, exclude_none=True)
            assert stored["spec"] == models["spec"]


async def test_definitions_apply_as_they_are(cluster: Cluster) -> None:
    """kubectl takes crds/ without a warning, and the API server finds the schemas structural and the names free."""
    said = await cluster.kubectl("apply", "--dry-run=server", "--server-side", f"--filename={OUR_CRDS}")
    assert len(said.splitlines()) == len(RESOURCES)
    for resource in RESOURCES:
        found = await cluster.get("crd", f"{resource.plural}.meshctl.io")
        conditions = {condition["type"]: condition["status"] for condition in found["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}


STATUS: dict[str, Any] = {
    "observedGeneration": 1,
    "attainment": "99.4%",
    "worstClass": "large",
    "endpoints": 4,
    "readyEndpoints": 3,
    "weights": [{"size": "large", "gpu": "V100", "share": "62.5%"}, {"size": "large", "gpu": "T4", "share": "37.5%"}],
    "conditions": [
        {
            "type": kind,
            "status": "True",
            "reason": "Ok",
            "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": 1,
        }
        for kind in ("Ready", "Resolved", "MetricsFresh", "SLOFeasible", "Programmed", "Conflict")
    ],
}


async def test_status_is_a_subresource_and_shows_in_columns(cluster: Cluster) -> None:
    """A status write changes no spec and a spec write no status; `kubectl get mr` shows both."""
    namespace = await cluster.namespace("api")
    await cluster.apply(changed(route(**MESHED), "metadata.namespace", namespace))
    before = await cluster.get("mr", "resnet", "--namespace", namespace)
    both = {"status": STATUS, "spec": {"suspend": True}}
    for arguments in (("--subresource=status",), ()):
        patch = orjson.dumps(both if arguments else {"status": {"attainment": "0%"}}).decode()
        await cluster.kubectl(
            "patch", "mr", "resnet", "--namespace", namespace, "--type=merge", f"--patch={patch}", *arguments
        )
    after = await cluster.get("mr", "resnet", "--namespace", namespace)
    assert (after["spec"], after["metadata"]["generation"]) == (before["spec"], before["metadata"]["generation"])
    assert after["status"] == STATUS
    (live,) = read_object(after, "cluster").objects.values()
    assert live.value.spec == read_object(before, "cluster").objects[live.key].value.spec

    header, row = (await cluster.kubectl("get", "mr", "--namespace", namespace)).splitlines()
    assert header.split() == ["NAME", "POLICY", "MECHANISM", "SLO", "ATTAINMENT", "READY", "AGE"]
    assert row.split()[:-1] == ["resnet", "Balanced", "Endpoints", "150ms", "99.4%", "True"]
    header, row = (await cluster.kubectl("get", "meshctl", "--namespace", namespace, "--output=wide")).splitlines()
    assert header.split()[7:] == ["MODEL", "PROGRAMMED", "CONFLICT", "SUSPENDED"]
    assert row.split()[7:] == ["resnet50", "True", "True", "false"]
