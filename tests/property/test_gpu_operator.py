"""What the GPU operator says of any cluster: statuses that the schema takes, every GPU once, no limit too low."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshctl.api.gpusharingpolicy import GPUSharingPolicyStatus
from meshctl.controller.gpuclaims import cards_of, claims_of, limits, read_policy, totals
from meshctl.controller.gpupolicies import notices, statuses
from meshctl.sharing import RESOURCE
from meshctl.told import dated
from tests.harness.gpus import NOW, condition, gpu_object
from tests.harness.manifests import sharing_policy

OTHER = "x.io/gpu"
names = st.sampled_from(["a", "b", "c"])
specs = st.fixed_dictionaries(
    {"mode": st.sampled_from(["MPS", "TimeSlicing"]), "replicas": st.sampled_from([1, 4, 49])},
    optional={
        "priority": st.integers(-1, 1),
        "products": st.lists(st.sampled_from(["NVIDIA H200", "Tesla-T4"]), min_size=1, unique=True),
        "nodeSelector": st.just({"pool": "x"}),
        "resourceName": st.just(OTHER),
        "severalGPUs": st.booleans(),
        "unknown": st.just(1),
    },
)
policies = st.dictionaries(names, st.tuples(specs, st.integers(1, 3)), max_size=3)
gpus = st.lists(
    st.fixed_dictionaries(
        {"node": st.sampled_from(["n1", "n2", "n3"]), "product": st.sampled_from(["NVIDIA H200", "Tesla T4", ""])},
        optional={
            "capability": st.sampled_from(["7.5", "3.5", "new"]),
            "force": st.tuples(names, st.integers(1, 3), st.sampled_from([RESOURCE, OTHER]), st.integers(1, 20)),
            "wanted": st.tuples(names, st.integers(1, 3)),
            "heartbeat": st.sampled_from([NOW, "2026-05-04T09:00:00Z", "never"]),
        },
    ),
    max_size=8,
)


def _gpu(number: int, said: dict[str, Any]) -> dict[str, Any]:
    name, generation, resource, total = said.get("force", ("", 0, None, 0))
    wanted, wanted_generation = said.get("wanted", ("", 0))
    policy = {"name": name, "generation": generation, "wanted": wanted, "wantedGeneration": wanted_generation}
    status = {
        "product": said["product"],
        "computeCapability": said.get("capability", "9.0"),
        "resourceName": resource,
        "mode": "MPS" if name else None,
        "policy": policy if name or wanted else None,
        "heartbeat": said.get("heartbeat"),
        "conditions": [condition("Shared", "False", "MigEnabled", "MIG is on")] if wanted else None,
    }
    return gpu_object(said["node"], f"GPU-{number}", total, **status)


@given(policies, gpus, st.dictionaries(st.sampled_from([RESOURCE, OTHER]), st.integers(0, 50)))
def test_statuses_are_valid_and_count_every_gpu_once(
    written: dict[str, tuple[dict[str, Any], int]], found: list[dict[str, Any]], before: dict[str, int]
) -> None:
    """The same objects say the same again, without an Event; a limit is never below what any GPU has in force."""
    nodes = {"n1": {"pool": "x"}, "n2": dict[str, str]()}
    reads = []
    for name, (spec, generation) in sorted(written.items()):
        raw = sharing_policy(name, **spec)
        raw["metadata"] |= {"generation": generation, "uid": name}
        reads.append(read_policy(raw))
    valid = {read.name: read.policy for read in reads if read.policy is not None}
    cards = cards_of([_gpu(number, said) for number, said in enumerate(found)])
    claims = claims_of(cards, nodes, valid.values())
    said = statuses(reads, claims, nodes, datetime.fromisoformat(NOW))
    assert said.keys() == written.keys()
    for status in said.values():
        told = dated(status, {}, NOW)
        GPUSharingPolicyStatus.model_validate(told, strict=False)
        assert sum(node["gpus"] for node in status["nodes"]) == status["gpus"] >= status["ready"]
        assert dated(status, told, "2027-01-01T00:00:00Z") == told
        assert list(notices(told, told)) == []
    assert sum(status["gpus"] for status in said.values()) == sum(bool(claim.wanted.policy) for claim in claims)
    most = limits(claims, valid, before)
    for card in cards:
        if card.in_force is not None:
            assert most[card.status["resourceName"]] >= card.status["slots"]["total"]
    counted = totals(cards, said.values())
    assert (sum(counted.gpus.values()), sum(counted.policies.values())) == (len(cards), 3 * len(said))
