"""What GPU sharing leaves on other objects: the GPU object, the allocation annotation, the ConfigMap of resources."""

from __future__ import annotations

from typing import Any

import pytest

from meshctl.api import gpuresources
from meshctl.api.allocation import ALLOCATION, Allocation, ContainerAllocation, read_allocation
from meshctl.api.base import validated
from meshctl.api.document import ManifestError
from meshctl.api.gpu import GPU
from tests.harness.manifests import document

SMALLEST: dict[str, Any] = {
    "apiVersion": "meshctl.io/v1alpha1",
    "kind": "GPU",
    "metadata": {"name": "gpu-0001"},
    "spec": {"node": "n1", "uuid": "GPU-0001"},
}
STATUS: dict[str, Any] = {
    "product": "Tesla V100-SXM2-16GB",
    "memory": "16Gi",
    "computeCapability": "7.0",
    "driver": "570.86.15",
    "resourceName": "hpe.com/gpus",
    "mode": "MPS",
    "isolation": "Tenant",
    "severalGPUs": False,
    "policy": {"name": "shared", "generation": 2, "wanted": "exclusive", "wantedGeneration": 1},
    "slots": {"total": 10, "used": 3, "free": 7, "unavailable": 0},
    "summary": "3/10",
    "tenant": "team-a",
    "holders": [{"namespace": "team-a", "pod": "resnet-0", "container": "server", "slots": [0, 1, 2]}],
    "mps": {"state": "Running", "clients": 1, "restarts": 0, "message": ""},
    "heartbeat": "2026-01-01T00:00:00Z",
    "conditions": [
        {
            "type": "Healthy",
            "status": "True",
            "reason": "Healthy",
            "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ],
}


def test_a_gpu_is_read_as_it_was_written() -> None:
    """With a status and without."""
    for data in (SMALLEST, SMALLEST | {"status": STATUS}):
        gpu = validated(GPU, document(data))
        assert gpu.model_dump(mode="json", by_alias=True, exclude_none=True).get("status") == data.get("status")


def test_a_gpu_has_its_uuids_name() -> None:
    """So that two agents can't write one GPU under two names."""
    with pytest.raises(ManifestError, match=r"must be spec\.uuid in small letters"):
        validated(GPU, document(SMALLEST | {"metadata": {"name": "gpu-2"}}))


def test_an_allocation_is_read_as_it_was_written() -> None:
    """By container, whatever their order."""
    allocation = Allocation(containers=(ContainerAllocation(name="a", gpus={"GPU-1": 3}),))
    assert read_allocation({ALLOCATION: allocation.text()}) == allocation
    assert allocation.by_container() == {"a": {"GPU-1": 3}}
    assert read_allocation({}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the whole: Invalid JSON"),
        ("[]", "the whole: "),
        ('{"version": 2}', "version: "),
        ('{"containers": [{"name": "a"}]}', "containers.0.gpus: Field required"),
        ('{"containers": [{"name": "a", "gpus": {}}]}', "containers.0.gpus: "),
        ('{"containers": [{"name": "a", "gpus": {"GPU-1": 0}}]}', "containers.0.gpus.GPU-1: "),
        ('{"containers": [{"name": "a", "gpus": {"GPU-1": "1"}}]}', "containers.0.gpus.GPU-1: "),
        (
            '{"containers": [{"name": "a", "gpus": {"GPU-1": 1}}, {"name": "a", "gpus": {"GPU-2": 1}}]}',
            "containers.1.name: 'a' stands twice",
        ),
        ('{"pods": []}', "pods: Extra inputs are not permitted"),
    ],
)
def test_a_bad_allocation_is_a_problem_in_words(text: str, said: str) -> None:
    """With the annotation's name and the place in it."""
    with pytest.raises(ValueError, match=r"^meshctl\.io/gpu-allocation: ") as caught:
        read_allocation({ALLOCATION: text})
    assert said in str(caught.value)


@pytest.mark.parametrize("resource", ["hpe.com/gpus", "a/b", "example.com/a_b.c"])
def test_a_resource_is_a_key_and_back(resource: str) -> None:
    """The first '_' splits: a domain has none, a name may."""
    key = gpuresources.key(resource)
    assert "/" not in key
    assert gpuresources.resource(key) == resource


@pytest.mark.parametrize("wrong", ["", "gpus", "/gpus", "hpe.com/"])
def test_what_is_no_resource_has_no_key(wrong: str) -> None:
    """An error, not a key that means another resource."""
    with pytest.raises(ValueError, match="DOMAIN"):
        gpuresources.key(wrong)
    with pytest.raises(ValueError, match="DOMAIN"):
        gpuresources.resource(wrong.replace("/", "_"))


def test_limits_are_written_in_the_order_of_the_resources() -> None:
    """The same limits are the same bytes."""
    assert list(gpuresources.data({"b.com/x": 0, "a.com/y": 10}).items()) == [("a.com_y", "10"), ("b.com_x", "0")]
