"""A GPUSharingPolicy is strict in what it takes, and says where it is wrong; what it leaves out is the vocabulary's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from meshctl.api.base import validated
from meshctl.api.document import ManifestError
from meshctl.api.gpusharingpolicy import GPUSharingPolicy
from meshctl.api.objects import Key, read_manifest
from meshctl.sharing import HealthRules, Injection, Isolation, Mode, OnChange, Packing, Sharing
from tests.harness.manifests import changed, document, sharing_policy, text

FULL = sharing_policy(
    nodeSelector={"nvidia.com/gpu.product": "Tesla-V100", "pool": ""},
    products=["Tesla-V100", "NVIDIA A100 80GB PCIe"],
    priority=7,
    resourceName="example.com/slices",
    mode="TimeSlicing",
    replicas=4,
    isolation="Tenant",
    packing="Spread",
    severalGPUs=True,
    onChange="Drain",
    injection="CDI",
    mps={"oversubscription": 1.5, "memoryLimit": "None", "clientsPerContainer": 2},
    health={"ignoredXIDs": [79], "criticalXIDs": [13], "recoverAfter": "2m"},
)
S = "spec"
R = "spec.resourceName"

BAD: list[tuple[str, str, Any, str, str]] = [
    # test id, path, value, field that is named, message
    ("no spec", S, None, S, "is required; add it"),
    ("unknown field", f"{S}.replica", 2, f"{S}.replica", "did you mean replicas?"),
    ("unknown mode", f"{S}.mode", "MIG", f"{S}.mode", "must be 'MPS', 'TimeSlicing' or 'Exclusive', not 'MIG'"),
    ("replicas 0", f"{S}.replicas", 0, f"{S}.replicas", "must be greater than or equal to 1, not 0"),
    ("replicas 101", f"{S}.replicas", 101, f"{S}.replicas", "must be less than or equal to 100, not 101"),
    ("half a slot", f"{S}.replicas", 2.5, f"{S}.replicas", "not 2.5"),
    (
        "several on Exclusive",
        S,
        {"mode": "Exclusive", "replicas": 2},
        f"{S}.replicas",
        "2 is wrong: an Exclusive GPU has",
    ),
    ("61 clients of MPS", S, {"replicas": 61}, f"{S}.replicas", "61 slots with 1 client each are 61 clients; an MPS"),
    (
        "62 clients of MPS",
        S,
        {"replicas": 31, "mps": {"clientsPerContainer": 2}},
        f"{S}.mps.clientsPerContainer",
        "31 slots with 2 clients each are 62 clients; an MPS server has at most 60",
    ),
    (
        "70 clients of MPS, replicas left out",
        S,
        {"mps": {"clientsPerContainer": 7}},
        f"{S}.mps.clientsPerContainer",
        "10 slots with 7 clients each are 70 clients",
    ),
    ("several GPUs with MPS", S, {"severalGPUs": True}, f"{S}.severalGPUs", "a process has one MPS server"),
    ("resource without a domain", R, "gpus", R, "'gpus' needs a domain, as in hpe.com/gpus"),
    ("resource of Kubernetes", R, "kubernetes.io/gpu", R, "ends with kubernetes.io: the kubelet takes such"),
    ("resource of a part of Kubernetes", R, "node.kubernetes.io/gpu", R, "ends with kubernetes.io"),
    ("resource of another's domain that ends so", R, "notkubernetes.io/gpu", R, "ends with kubernetes.io"),
    ("resource of a quota", R, "requests.example.com/gpu", R, "must not begin with requests."),
    ("resource with two slashes", R, "a.com/b/c", R, "does not match"),
    ("resource with capitals", R, "HPE.com/gpus", R, "does not match"),
    ("resource that is too long", R, f"a.com/{'a' * 64}", R, "does not match"),
    ("resource of a domain that is too long", R, f"{'a.' * 120}com/gpus", R, "at most 244 characters"),
    ("product twice", f"{S}.products", ["T4", "V100", "T4"], f"{S}.products[2]", "T4 stands twice; keep one"),
    ("product empty", f"{S}.products", [""], f"{S}.products[0]", "does not match"),
    ("ignored XID twice", f"{S}.health.ignoredXIDs", [79, 79], f"{S}.health.ignoredXIDs[1]", "79 stands twice"),
    ("critical XID 0", f"{S}.health.criticalXIDs", [0], f"{S}.health.criticalXIDs[0]", "greater than or equal to 1"),
    ("recovery at once", f"{S}.health.recoverAfter", "0s", f"{S}.health.recoverAfter", "longer than zero"),
    ("undersubscribed", f"{S}.mps.oversubscription", 0.5, f"{S}.mps.oversubscription", "greater than or equal to 1"),
    ("label without a name", f"{S}.nodeSelector", {"a/": "b"}, f"{S}.nodeSelector.a/", "is not a label's key"),
    ("label with a blank", f"{S}.nodeSelector", {"a": "b c"}, f"{S}.nodeSelector.a", "does not match"),
    ("label that is a number", f"{S}.nodeSelector", {"a": 1}, f"{S}.nodeSelector.a", "must be a valid string, not 1"),
    ("name with capitals", "metadata.name", "Shared", "metadata.name", "must be a DNS-1123 name"),
]


def spec_of(data: dict[str, Any]) -> Any:
    return validated(GPUSharingPolicy, document(data)).spec


@pytest.mark.parametrize(("path", "value", "field", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_wrong_field_is_refused_by_name(path: str, value: Any, field: str, message: str) -> None:
    """Each mistake is one fault with the field, what is wrong, and (where it is not obvious) why."""
    manifest = read_manifest(text(changed(FULL, path, value)).encode(), "f.yaml")
    assert not manifest.objects
    (fault,) = manifest.faults
    assert fault.field == field
    assert message in fault.message


def test_what_is_left_out_is_the_vocabularys() -> None:
    """An empty spec comes to the defaults of `Sharing`, and only name and generation are told."""
    assert spec_of(sharing_policy()).sharing("shared", 3) == Sharing("shared", 3)


def test_every_field_reaches_the_sharing() -> None:
    """Nothing that is written is lost on the way, and nothing of `Sharing` is left at its default."""
    sharing = spec_of(FULL).sharing("p", 2)
    assert sharing == Sharing(
        policy="p",
        generation=2,
        resource="example.com/slices",
        mode=Mode.TIME_SLICING,
        replicas=4,
        isolation=Isolation.TENANT,
        packing=Packing.SPREAD,
        several_gpus=True,
        on_change=OnChange.DRAIN,
        injection=Injection.CDI,
        oversubscription_ratio=1.5,
        memory_limit=False,
        clients_per_container=2,
        health=HealthRules(frozenset({79}), frozenset({13}), 120.0),
    )
    default = Sharing("")
    assert not [f.name for f in dataclasses.fields(Sharing) if getattr(sharing, f.name) == getattr(default, f.name)]


@pytest.mark.parametrize(
    ("spec", "slots"),
    [({}, 10), ({"mode": "TimeSlicing"}, 10), ({"mode": "Exclusive"}, 1), ({"mode": "Exclusive", "replicas": 1}, 1)],
)
def test_slots_by_default(spec: dict[str, Any], slots: int) -> None:
    """10 where the GPU is shared, 1 where it is not."""
    assert spec_of(sharing_policy(**spec)).sharing("p", 1).replicas == slots


@pytest.mark.parametrize(
    "spec",
    [
        {"replicas": 60},
        {"replicas": 30, "mps": {"clientsPerContainer": 2}},
        {"mps": {"clientsPerContainer": 6}},
        {"mode": "TimeSlicing", "replicas": 100, "mps": {"clientsPerContainer": 16}},
        {"mode": "TimeSlicing", "severalGPUs": True},
        {"mode": "Exclusive", "severalGPUs": True},
    ],
    ids=str,
)
def test_limits_of_mps_are_for_mps_alone(spec: dict[str, Any]) -> None:
    """60 clients are taken (the agent knows what the GPU can), and what shares in time has no such limit."""
    assert spec_of(sharing_policy(**spec)).slots


def test_it_is_in_no_namespace() -> None:
    """One that is given means nothing, so the same name is the same object."""
    both = [sharing_policy("a"), changed(sharing_policy("a"), "metadata.namespace", "x")]
    manifest = read_manifest(text(*both).encode(), "f.yaml")
    assert list(manifest.objects) == [Key("GPUSharingPolicy", "", "a")]
    (fault,) = manifest.faults
    assert fault.message == "GPUSharingPolicy a stands twice; f.yaml:5:5 is used, remove one"


def test_a_gpu_comes_from_no_manifest() -> None:
    """Only its agent writes it: a file that has one is told so."""
    gpu = sharing_policy("gpu-1") | {"kind": "GPU", "spec": {"node": "n", "uuid": "GPU-1"}}
    manifest = read_manifest(text(gpu).encode(), "f.yaml")
    assert not manifest.objects
    (fault,) = manifest.faults
    assert fault.message == "a GPU is written by the agent of its node, from no manifest; remove it"


def test_all_faults_are_told_at_once() -> None:
    """Two wrong fields are two faults, in the order of the text."""
    with pytest.raises(ManifestError) as caught:
        validated(GPUSharingPolicy, document(sharing_policy(priority=5000, isolation="All")))
    assert [fault.field for fault in caught.value.faults] == ["spec.priority", "spec.isolation"]
