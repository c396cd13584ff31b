"""What is kept of a pod is read as the whole pod is."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshctl.api.allocation import ALLOCATION
from meshctl.core.packing.vocabulary import Demand
from meshctl.errors import InputError
from meshctl.extender.pods import GPU_PRODUCTS, admitted, demand_of, ended, node_of, plan_of, priority_of, running
from meshctl.extender.views import VIEWS
from meshctl.sharing import RESOURCE

RESOURCES = (RESOURCE, "example.com/large")
quantities = st.sampled_from(
    ["0", "100m", "0.5", "1", "3", "512Ki", "1Gi", "129M", "1n", "1e2", "many", "-1", "NaN", 2]
)
whole = st.sampled_from(["0", "1", "3", "10", "2k", "1500m", "many", 4])
requests = st.dictionaries(st.sampled_from(["cpu", "memory", "ephemeral-storage"]), quantities, max_size=3)
limits = st.dictionaries(st.sampled_from([*RESOURCES, "nvidia.com/gpu", "cpu"]), whole, max_size=3)
containers = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["a", "b", "c"])},
        optional={
            "resources": st.none() | st.fixed_dictionaries({}, optional={"requests": requests, "limits": limits}),
            "restartPolicy": st.sampled_from(["Always"]),
            "image": st.just("i"),
        },
    ),
    max_size=4,
)
annotated = st.dictionaries(
    st.sampled_from([ALLOCATION, GPU_PRODUCTS, "other"]),
    st.sampled_from(['{"containers": [{"name": "a", "gpus": {"G": 3}}]}', "T4,Tesla V100", ",", "{", "x" * 20_000]),
)
pods = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"name": st.just("p"), "namespace": st.just("ns"), "uid": st.just("u"), "resourceVersion": st.just("7")},
            optional={
                "annotations": st.none() | annotated,
                "labels": st.just({"app": "x"}),
                "deletionTimestamp": st.just("now"),
            },
        ),
        "spec": st.fixed_dictionaries(
            {"containers": containers},
            optional={
                "initContainers": st.none() | containers,
                "nodeName": st.sampled_from(["", "n"]),
                "overhead": requests,
                "resources": st.none() | st.fixed_dictionaries({"requests": requests}),
                "priority": st.integers(-5, 5),
            },
        ),
    },
    optional={
        "status": st.fixed_dictionaries(
            {},
            optional={
                "phase": st.sampled_from(["Pending", "Running", "Succeeded", "Failed"]),
                "startTime": st.just("then"),
                "conditions": st.just([{"type": "Ready"}]),
            },
        )
    },
)


def read(pod: dict[str, Any]) -> tuple[Demand | str, Any]:
    try:
        demand: Demand | str = demand_of(pod, RESOURCES)
    except InputError:
        demand = "can't be read"
    plan = plan_of(pod, demand.asks) if isinstance(demand, Demand) else None
    return demand, (plan, priority_of(pod), running(pod), admitted(pod))


@given(pods)
def test_what_is_kept_of_a_pod_is_read_as_the_whole_pod_is(raw: dict[str, Any]) -> None:
    """Also one that can't be read; of one that has ended only that is kept. What was kept once is kept as it is."""
    before = copy.deepcopy(raw)
    kept = VIEWS["Pod"].kept(raw)
    assert raw == before
    assert VIEWS["Pod"].kept(dict(kept)) == kept
    assert ended(kept) == ended(raw)
    if ended(raw):
        assert kept["metadata"].keys() == {"name", "namespace", "uid"}
        return
    assert read(dict(kept)) == read(raw)
    assert node_of(kept) == node_of(raw)
    assert kept["metadata"].get("deletionTimestamp") == raw["metadata"].get("deletionTimestamp")
    unbound = ("resourceVersion" in kept["metadata"], kept["metadata"].get("labels"))
    assert unbound == ((False, None) if node_of(raw) else (True, raw["metadata"].get("labels")))
