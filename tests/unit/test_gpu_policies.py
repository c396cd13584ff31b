"""Which policy a GPU is shared by; policies from a file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deviceplugin.policies import Policy, Refusal, Wanted, policy_of, product_key, wanted
from deviceplugin.watch import FileView, PolicyFile, load_policies
from meshctl.api.gpusharingpolicy import GPUSharingPolicy, GPUSharingPolicySpec
from meshctl.errors import InputError
from meshctl.sharing import REPLICAS, Gpu, Mode, Sharing

V100 = Gpu("GPU-1", "Tesla V100-SXM2-16GB", 16 << 30, (7, 0))
K40 = Gpu("GPU-2", "Tesla K40m", 12 << 30, (3, 5))
LABELS = {"pool": "gpu", "zone": "a"}
TEXT = """
apiVersion: meshctl.io/v1alpha1
kind: GPUSharingPolicy
metadata: {name: default}
spec: {replicas: %s}
"""


def policy(name: str = "default", created: str = "", generation: int = 1, **spec: Any) -> Policy:
    return Policy(name, GPUSharingPolicySpec.model_validate(spec), generation, created)


def won(*policies: Policy, gpu: Gpu = V100) -> Wanted:
    return wanted(gpu, "node-1", LABELS, policies)


def test_a_gpu_without_a_policy_has_no_slots() -> None:
    """That is no refusal: nobody asked for any."""
    nothing = won()
    assert (nothing.sharing, nothing.refused, nothing.policy) == (None, False, "")


def test_all_that_a_policy_says_is_in_force() -> None:
    """With the policy's name and generation."""
    four = policy("four", generation=7, replicas=4, isolation="Tenant", mps={"memoryLimit": "None"})
    assert won(four).sharing == four.spec.sharing("four", 7)


def test_a_policy_that_says_nothing_means_the_defaults() -> None:
    """The API's defaults are those of the vocabulary."""
    assert won(policy()).sharing == Sharing("default", generation=1)


def test_an_exclusive_gpu_has_one_slot() -> None:
    """Without saying replicas: 1."""
    shared = won(policy(mode="Exclusive")).sharing
    assert shared is not None
    assert (shared.mode, shared.replicas) == (Mode.EXCLUSIVE, 1)


def test_the_higher_priority_wins_then_the_older_then_the_name() -> None:
    """In whatever order they come; the others are named, the strongest first."""
    ranked = [
        policy("z", "2026-02-01T00:00:00Z", priority=5),
        policy("y", "2026-01-01T00:00:00Z"),
        policy("a", "2026-01-02T00:00:00Z"),
        policy("b", "2026-01-02T00:00:00Z"),
        policy("a-file"),
        policy("first", "2025-01-01T00:00:00Z", priority=-1),
    ]
    for order in itertools.permutations(ranked):
        found = won(*order)
        assert (found.policy, found.others) == ("z", ("y", "a", "b", "a-file", "first"))


def test_a_policy_is_for_nodes_with_all_its_labels() -> None:
    """A stronger one for other nodes is as good as none."""
    strong = policy("strong", priority=1, nodeSelector={"pool": "gpu", "zone": "b"})
    here = policy("here", nodeSelector={"pool": "gpu", "zone": "a"})
    assert won(strong).policy == ""
    assert won(strong, here).policy == "here"
    assert won(replace(strong, spec=here.spec)).policy == "strong"


@pytest.mark.parametrize(
    ("said", "is_it"),
    [
        ("Tesla V100-SXM2-16GB", True),
        ("Tesla-V100-SXM2-16GB", True),
        ("NVIDIA-Tesla-V100-SXM2-16GB", True),
        ("NVIDIA Tesla V100-SXM2-16GB", True),
        ("tesla-v100-sxm2-16gb", False),
        ("Tesla-V100", False),
    ],
)
def test_a_product_is_written_with_spaces_or_hyphens_and_with_nvidia_or_without(said: str, is_it: bool) -> None:
    """As NVML, GPU discovery and people write it; its case counts."""
    assert bool(won(policy(products=[said])).policy) is is_it
    newer = replace(V100, product=f"NVIDIA {V100.product}")
    assert bool(won(policy(products=[said]), gpu=newer).policy) is is_it


def test_the_key_of_a_product_is_its_own() -> None:
    """Taking it twice changes nothing."""
    assert product_key("NVIDIA H200") == product_key(product_key("NVIDIA H200")) == "H200"


def test_mps_on_an_older_gpu_is_time_slicing() -> None:
    """With all the rest as the policy says, and words that say so; a GPU that can do MPS next to it does."""
    asked = policy(replicas=20, isolation="Tenant")
    old, new = won(asked, gpu=K40), won(asked)
    assert new.sharing is not None
    assert old.sharing == replace(new.sharing, mode=Mode.TIME_SLICING)
    assert "compute capability 7.0, Tesla K40m has 3.5" in old.message
    assert (new.sharing.mode, new.message) == (Mode.MPS, "")


def test_49_replicas_at_a_client_cap_of_48_are_refused() -> None:
    """Behaviour 20: with the numbers; 48 are taken, and 60 where the driver's MPS has room for them."""
    found = won(policy(replicas=49))
    assert (found.sharing, found.refusal, found.policy) == (None, Refusal.TOO_MANY_REPLICAS, "default")
    assert "49 slots are 49 clients" in found.message
    assert "takes 48" in found.message
    assert won(policy(replicas=48)).sharing is not None
    newest = wanted(V100, "node-1", LABELS, [policy(replicas=60)], "999.1")
    assert newest.sharing is not None
    assert newest.sharing.replicas == 60


def test_processes_of_one_container_count_as_clients() -> None:
    """25 slots of two processes are 50 clients."""
    found = won(policy(replicas=25, mps={"clientsPerContainer": 2}))
    assert found.refusal is Refusal.TOO_MANY_REPLICAS
    assert "25 slots x 2 clients each are 50 clients" in found.message


def test_without_mps_there_is_no_client_cap() -> None:
    """100 slots in time are taken, asked for or by an older GPU."""
    for found in (won(policy(mode="TimeSlicing", replicas=100)), won(policy(replicas=60), gpu=K40)):
        assert found.sharing is not None
        assert not found.refused


def test_a_gpu_with_mig_is_left_alone() -> None:
    """NVIDIA's own plugin shares it."""
    found = won(policy(), gpu=replace(V100, mig=True))
    assert (found.sharing, found.refusal) == (None, Refusal.MIG_ENABLED)


def test_the_winner_alone_decides() -> None:
    """Where it can't be followed, the next policy does not take its place."""
    found = won(policy("too-many", priority=1, replicas=50), policy("weaker"))
    assert (found.sharing, found.policy, found.others) == (None, "too-many", ("weaker",))


def test_what_is_not_known_refuses_and_does_not_mean_no_policy() -> None:
    """Policies, or labels that the winner goes by; a winner that goes by none is followed."""
    assert wanted(V100, "n", LABELS, None).refusal is Refusal.POLICIES_UNKNOWN
    picky, easy = policy("picky", priority=1, nodeSelector={"pool": "gpu"}), policy("easy")
    assert wanted(V100, "n", None, [easy, picky]).refusal is Refusal.NODE_UNKNOWN
    assert wanted(V100, "n", None, [easy]).policy == "easy"
    assert wanted(V100, "n", None, [easy, policy("later", nodeSelector={"pool": "gpu"})]).refusal is None


def test_a_policy_object_becomes_a_policy() -> None:
    """Name, generation and age of its metadata."""
    value = GPUSharingPolicy.model_validate(
        {
            "apiVersion": "meshctl.io/v1alpha1",
            "kind": "GPUSharingPolicy",
            "metadata": {"name": "p", "generation": 3, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"replicas": 2},
        }
    )
    assert policy_of(value) == Policy("p", value.spec, 3, "2026-01-01T00:00:00Z")


# ------------------------------------------------------------------------------------------------------------- --policy


def test_several_policies_of_one_file_are_read(tmp_path: Path) -> None:
    """By name; what is left out has its default."""
    path = tmp_path / "policies.yaml"
    path.write_text(TEXT % 4 + "---" + TEXT.replace("default", "a") % 6)
    found = load_policies(path)
    assert [(one.name, one.spec.replicas, one.created) for one in found] == [("a", 6, ""), ("default", 4, "")]
    assert REPLICAS not in (4, 6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT % 0, "replicas"),
        (TEXT % 101, "replicas"),
        ("", "has no GPUSharingPolicy"),
        ("spec: [", "is not YAML"),
        (TEXT % 2 + "---" + TEXT % 3, "stands twice"),
        (TEXT.replace("replicas", "replica") % 2, "did you mean replicas"),
    ],
    ids=["none", "too many", "empty", "no YAML", "twice", "typing error"],
)
def test_a_bad_policy_file_is_an_error_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    """Which file, and what in it."""
    path = tmp_path / "policies.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        load_policies(path)
    assert str(path) in str(error.value)


def test_a_missing_policy_file_is_an_error(tmp_path: Path) -> None:
    """At the start: there is nothing that could stay in force."""
    with pytest.raises(InputError, match="cannot be read"):
        PolicyFile(tmp_path / "none.yaml")


def test_a_policy_file_that_breaks_leaves_what_was_read(tmp_path: Path) -> None:
    """With a problem that names the place, until it is mended; a file that says the same is no change."""
    path = tmp_path / "policies.yaml"
    path.write_text(TEXT % 4)
    file = PolicyFile(path)
    before = file.policies
    assert not file.look()
    for broken in ("spec: [", ""):
        path.write_text(broken)
        assert file.look()
        assert file.policies is before
        assert file.problem is not None
        assert str(path) in file.problem.message
        assert "stays in force" in file.problem.message
        assert not file.look()
    path.unlink()
    assert file.look()
    assert file.policies is before
    path.write_text(TEXT % 5)
    assert file.look()
    assert (file.problem, [one.spec.replicas for one in file.policies]) == (None, [5])


async def test_a_node_without_a_cluster_has_its_name_for_a_label(tmp_path: Path) -> None:
    """So that one file serves several nodes; there are no pods to learn of."""
    path = tmp_path / "policies.yaml"
    path.write_text(TEXT % 4)
    view = FileView("node-1", PolicyFile(path))
    assert view.node_labels == {"kubernetes.io/hostname": "node-1"}
    assert (view.pods(), await view.fresh_pods(1.0), view.problems()) == ((), (), ())
    path.write_text(TEXT % 5)
    await view.wait_changed()
    assert [one.spec.replicas for one in view.policies() or ()] == [5]
