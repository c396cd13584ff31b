"""What is written is read back: durations, routes, profiles; and no text makes the reader fail in its own way."""

from __future__ import annotations

import itertools
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshctl.api.base import validated
from meshctl.api.document import parse
from meshctl.api.gpusharingpolicy import GPUSharingPolicy
from meshctl.api.modelprofile import ModelProfile
from meshctl.api.modelroute import ModelRoute
from meshctl.api.objects import Object, read_manifest
from meshctl.api.units import DURATION_LENGTH, DURATION_PATTERN, format_duration, parse_duration
from tests.harness.manifests import profile, route, sharing_policy, text

DAY_NS = 24 * 3600 * 10**9
nanoseconds = st.integers(0, DAY_NS)
durations = st.integers(1, DAY_NS).map(lambda ns: format_duration(ns / 1e9))
names = st.from_regex(r"[a-z]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True).filter(lambda name: name != "default")
ratios = st.floats(0, 1)


@st.composite
def size_classes(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Valid size classes in any order, some with gaps between them, with shares or without."""
    bounds = sorted(draw(st.lists(st.integers(1, 10_000), min_size=2, max_size=12, unique=True)))
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    labels = draw(st.lists(names, min_size=len(pairs), max_size=len(pairs), unique=True))
    classes: list[dict[str, Any]] = [
        {"name": name, "min": low, "max": high} for name, (low, high) in zip(labels, pairs, strict=True)
    ]
    if draw(st.booleans()):
        for each in classes:
            each["share"] = 1 / len(classes)
    return draw(st.permutations(classes))


gateways = st.lists(st.sampled_from(["gw", "istio-system/public", "a.b", "mesh"]), max_size=3, unique=True)
mesh: st.SearchStrategy[dict[str, Any]] = st.one_of(
    gateways.map(lambda names: {"gateways": names, "hosts": ["m.example.com"]}),
    st.just({"delegate": True}),
    st.just({}),
)


@st.composite
def routes(draw: st.DrawFn) -> dict[str, Any]:
    """Valid ModelRoutes, in a mesh and not, of Services and of static endpoints."""
    ports = draw(st.lists(st.integers(1, 65535), min_size=1, max_size=5, unique=True))
    static: dict[str, Any] = {"endpoints": [{"address": "10.0.0.1", "port": port, "gpu": "V100"} for port in ports]}
    service: dict[str, Any] = {"service": {"name": draw(names), "port": draw(st.sampled_from([ports[0], "http"]))}}
    latency_ns = draw(st.integers(1, DAY_NS))
    protocol = draw(st.sampled_from(["HTTP", "GRPC"]))
    return route(
        draw(names),
        backend=draw(st.sampled_from([static, service])) | {"protocol": protocol},
        proxyGroups=draw(st.lists(names, max_size=3, unique=True)),
        slo={"latency": format_duration(latency_ns / 1e9), "percentile": draw(st.floats(1, 99.99))},
        timeout=format_duration(draw(st.integers(latency_ns, DAY_NS)) / 1e9),
        requestSize={"classes": draw(size_classes())},
        guard={"smoothing": draw(durations), "headroom": draw(ratios)},
        suspend=draw(st.booleans()),
        retry={
            "attempts": draw(st.integers(0, 10)),
            "perTryTimeout": format_duration(draw(st.integers(1, latency_ns)) / 1e9),
        },
        warmUp=format_duration(draw(nanoseconds) / 1e9),
        **draw(mesh),
    )


@st.composite
def profiles(draw: st.DrawFn) -> dict[str, Any]:
    """Valid ModelProfiles, as lines and as points."""
    if draw(st.booleans()):
        return profile(service={"base": draw(durations), "perItem": draw(durations)})
    batches = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True))
    times = sorted(draw(st.lists(st.integers(1, 10**12), min_size=len(batches), max_size=len(batches))))
    points = {str(b): format_duration(ns / 1e9) for b, ns in zip(sorted(batches), times, strict=True)}
    return profile(service={"points": dict(draw(st.permutations(list(points.items()))))})


@st.composite
def sharing_policies(draw: st.DrawFn) -> dict[str, Any]:
    """Valid GPUSharingPolicies of the three modes."""
    mode = draw(st.sampled_from(["MPS", "TimeSlicing", "Exclusive"]))
    most = {"MPS": 60, "TimeSlicing": 100, "Exclusive": 1}[mode]
    xids = st.lists(st.integers(1, 1000), max_size=5, unique=True)
    return sharing_policy(
        draw(names),
        mode=mode,
        replicas=draw(st.integers(1, most)),
        nodeSelector=draw(st.dictionaries(names, names, max_size=3)),
        products=draw(st.lists(st.sampled_from(["T4", "Tesla V100-SXM2-16GB", "A100"]), max_size=3, unique=True)),
        resourceName=draw(st.sampled_from(["hpe.com/gpus", "a/B_c"])),
        isolation=draw(st.sampled_from(["None", "Tenant"])),
        severalGPUs=mode != "MPS" and draw(st.booleans()),
        mps={"oversubscription": draw(st.floats(1, 16))},
        health={"ignoredXIDs": draw(xids), "criticalXIDs": draw(xids), "recoverAfter": draw(durations)},
    )


@given(nanoseconds)
def test_duration_is_read_back_exactly(ns: int) -> None:
    """Every whole number of nanoseconds up to a day survives, in a form the CRD's pattern takes."""
    written = format_duration(ns / 1e9)
    assert parse_duration(written) == ns / 1e9
    assert re.fullmatch(DURATION_PATTERN, written)
    assert len(written) <= DURATION_LENGTH


@given(st.text(max_size=40))
def test_text_is_a_duration_or_an_explanation(value: str) -> None:
    """Whatever is written gives seconds in range, or a ValueError, never anything else."""
    try:
        seconds = parse_duration(value)
    except ValueError:
        return
    assert 0 <= seconds <= 24 * 3600


@given(
    st.one_of(
        routes().map(lambda r: (ModelRoute, r)),
        profiles().map(lambda p: (ModelProfile, p)),
        sharing_policies().map(lambda p: (GPUSharingPolicy, p)),
    )
)
def test_object_written_as_yaml_is_read_back(case: tuple[type[Object], dict[str, Any]]) -> None:
    """Model -> YAML -> model is the same model, defaults written out or not."""
    model, data = case
    first = validated(model, parse(text(data).encode(), "f.yaml")[0])
    for exclude_unset in (True, False):
        dumped = first.model_dump(mode="json", by_alias=True, exclude_unset=exclude_unset, exclude_none=True)
        written = text(dumped | {"apiVersion": data["apiVersion"], "kind": data["kind"]})
        assert validated(model, parse(written.encode(), "f.yaml")[0]) == first


@given(routes())
def test_sizes_of_a_valid_route_are_in_order_and_apart(data: dict[str, Any]) -> None:
    """The core gets classes ordered by batch, not overlapping, each with its batch inside, shares summing to 1."""
    sizes = validated(ModelRoute, parse(text(data).encode(), "f.yaml")[0]).route_spec().sizes
    assert all(a.max_batch < b.min_batch for a, b in itertools.pairwise(sizes))
    assert all(s.min_batch <= s.batch <= s.max_batch for s in sizes)
    assert abs(sum(s.share for s in sizes) - 1) < 1e-9


@given(st.binary(max_size=200))
def test_any_bytes_are_documents_or_a_fault_with_a_place(content: bytes) -> None:
    """The reader has one way to fail, which `read_manifest` turns into faults."""
    found = read_manifest(content, "f.yaml")
    assert all(fault.place.line >= 1 and fault.place.column >= 1 for fault in found.faults)


@given(routes(), st.data())
def test_half_written_file_never_fails(data: dict[str, Any], choose: st.DataObject) -> None:
    """Every prefix of a valid file is read as what it is: complete, or faults with places."""
    content = text(data).encode()
    cut = choose.draw(st.integers(0, len(content) - 2))
    found = read_manifest(content[:cut], "f.yaml")
    assert found.faults or not content[:cut].strip()
    assert not found.objects
