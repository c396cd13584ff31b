"""What a pod demands, read as kube-scheduler counts it."""

from __future__ import annotations

from typing import Any

import pytest

from meshctl.core.packing.vocabulary import Ask, Demand
from meshctl.errors import InputError
from meshctl.extender.pods import GPU_PRODUCTS, LONGEST_PLAN, demand_of, identity, plan_of
from meshctl.extender.views import VIEWS
from meshctl.sharing import RESOURCE
from tests.harness.extender_objects import allocation, container, pod

SIDECAR = {"restartPolicy": "Always"}


def needs(value: dict[str, Any]) -> tuple[int, int]:
    found = demand_of(value, [RESOURCE])
    return found.cpu_milli, found.memory_mib


@pytest.mark.parametrize(
    ("text", "milli"),
    [("1", 1000), ("100m", 100), ("0.1", 100), ("1500u", 2), ("1n", 1), ("2k", 2_000_000), ("1e1", 10_000), (2, 2000)],
)
def test_cpu_is_read_as_kubernetes_writes_it(text: str, milli: int) -> None:
    """Rounded up to whole millicores."""
    assert needs(pod("p", container(cpu=text)))[0] == milli


@pytest.mark.parametrize(
    ("text", "mib"),
    [("1Mi", 1), ("1", 1), ("1Gi", 1024), ("1G", 954), ("128974848", 123), ("1.5Gi", 1536)],
)
def test_memory_is_read_as_kubernetes_writes_it(text: str, mib: int) -> None:
    """Rounded up to whole MiB."""
    assert needs(pod("p", container(memory=text)))[1] == mib


def test_the_sum_is_rounded_once() -> None:
    """Three containers of half a MiB take two MiB, not three."""
    assert needs(pod("p", *(container(f"c{i}", memory="512Ki", cpu="500u") for i in range(3)))) == (2, 2)


def test_init_containers_are_a_peak_beside_their_sidecars() -> None:
    """Sidecars run on: they count with the containers, and with each init container after them."""
    init = [
        container("a", cpu="4", memory="1Gi"),
        container("s", cpu="1", memory="1Gi") | SIDECAR,
        container("b", cpu="4", memory="1Gi"),
    ]
    assert needs(pod("p", container(cpu="2", memory="3Gi"), init=init)) == (5000, 4096)
    assert needs(pod("p", container(cpu="6", memory="1Gi"), init=init)) == (7000, 2048)


def test_a_pods_own_requests_count_instead_and_the_overhead_beside_them() -> None:
    """Resources at the level of the pod, and of its runtime class."""
    value = pod("p", container(cpu="2", memory="3Gi"), resources={"requests": {"cpu": "5"}}, overhead={"cpu": "250m"})
    assert needs(value) == (5250, 3072)


def test_asks_are_in_the_kubelets_order_and_name_who_ends() -> None:
    """Init containers first; a sidecar is none that ends. Containers without GPUs keep out of it."""
    init = [container("warm", 4), container("side", 1) | SIDECAR]
    value = pod("p", container("log"), container("main", 3), init=init)
    assert demand_of(value, [RESOURCE]).asks == (
        Ask("warm", 4, RESOURCE, init=True),
        Ask("side", 1, RESOURCE),
        Ask("main", 3, RESOURCE),
    )


def test_only_resources_that_are_slots_are_asked_for() -> None:
    """Another plugin's devices are none of ours; those of a policy with a resource of its own are."""
    value = pod("p", container("a", 2, "nvidia.com/gpu"), container("b", 5, "example.com/large"))
    assert demand_of(value, [RESOURCE]).asks == ()
    assert demand_of(value, [RESOURCE, "example.com/large"]).asks == (Ask("b", 5, "example.com/large"),)


def test_products_are_named_as_people_write_them() -> None:
    """Spaces as NVML has them, the suffix of a shared GPU, commas too many."""
    said = {"annotations": {GPU_PRODUCTS: "Tesla V100-SXM2-16GB, Tesla-T4-SHARED,"}}
    assert demand_of(pod(metadata=said), []).products == frozenset({"Tesla-V100-SXM2-16GB", "Tesla-T4"})
    assert demand_of(pod(), []).products is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (pod(metadata={"annotations": {GPU_PRODUCTS: " , "}}), "does not name GPU products"),
        (pod(metadata={"annotations": {GPU_PRODUCTS: "T4,;;"}}), "does not name GPU products"),
        (pod("p", container(cpu="much")), "'much' is no quantity"),
        (pod("p", container(memory="-1Gi")), "'-1Gi' is no quantity"),
        (pod("p", container(memory="NaN")), "'NaN' is no quantity"),
        (pod("p", container(memory="1e999999999")), "is no quantity"),
        (pod("p", container() | {"resources": {"limits": {RESOURCE: "1500m"}}}), "is no whole number"),
        (pod("p", container() | {"resources": {"limits": {RESOURCE: True}}}), "True is no quantity"),
        (pod("p", container() | {"resources": {"limits": {RESOURCE: ["3"]}}}), "is no quantity"),
        (pod("p", container() | {"resources": 5}), "resources is no object"),
        ({**pod(), "spec": []}, "spec is no object"),
        ({**pod(), "spec": {"containers": {"a": 1}}}, "containers is no list"),
        ({**pod(), "spec": {"containers": ["a"]}}, "containers is no list"),
    ],
)
def test_a_pod_that_cannot_be_read_is_told_so(value: dict[str, Any], problem: str) -> None:
    """With its name and the field."""
    with pytest.raises(InputError, match=problem) as caught:
        demand_of(value, [RESOURCE])
    assert "team-a/p" in str(caught.value)


@pytest.mark.parametrize("value", [{}, {"metadata": {"name": "p"}}, {"metadata": {"uid": "u"}}, {"metadata": "p"}])
def test_a_pod_without_a_uid_is_nobody(value: dict[str, Any]) -> None:
    """A charge needs an owner."""
    with pytest.raises(InputError):
        identity(value)


def test_a_pod_that_says_nothing_demands_nothing() -> None:
    """Nulls are what is not there."""
    value = {"metadata": {"name": "p", "uid": "u", "annotations": None}, "spec": {"containers": None, "overhead": None}}
    assert demand_of(value, [RESOURCE]) == Demand()
    assert demand_of({"metadata": {"name": "p", "uid": "u"}}, [RESOURCE]) == Demand()


ASKS = (Ask("a", 3), Ask("b", 2), Ask("two", 1), Ask("two", 1, "example.com/x"))


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (allocation({"a": {"G": 3}, "b": {"G": 1, "H": 1}}), {"a": {"G": 3}, "b": {"G": 1, "H": 1}}),
        (allocation({"a": {"G": 2}, "b": {"G": 2}}), {"b": {"G": 2}}),
        (allocation({"x": {"G": 3}}), {}),
        (allocation({"two": {"G": 1}}), {}),
        ("{", {}),
        ("", {}),
        ('{"version": 2, "containers": []}', {}),
        ('{"containers": [{"name": "a", "gpus": {"G": -3}}]}', {}),
        (allocation({"a": {"G" * LONGEST_PLAN: 3}}), {}),
    ],
)
def test_a_plan_holds_for_the_containers_whose_asks_it_meets(text: str, plan: dict[str, dict[str, int]]) -> None:
    """One that gives more, less, or to nobody is none; nor is one that can't be read, or is too long."""
    value = pod(metadata={"annotations": {"meshctl.io/gpu-allocation": text}})
    assert plan_of(value, ASKS) == plan
    assert plan_of(VIEWS["Pod"].kept(value), ASKS) == plan
