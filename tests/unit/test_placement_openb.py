"""The traces' files: what they mean, and what each mistake in them is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshctl.api.document import ManifestError
from meshctl.core.packing.vocabulary import Ask, Demand, Device, Node
from meshctl.errors import InputError
from meshctl.sim import openb
from meshctl.sim.openb import Pod, load, made_up, parse_nodes, parse_pods

NODES = "sn,cpu_milli,memory_mib,gpu,model\n"
PODS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos\n"
ONE_NODE = NODES + "n0,64000,262144,2,P100\n"
ONE_POD = PODS + "p0,4000,8192,1,460,,LS\n"


def test_a_node_has_its_gpus_as_devices_in_order() -> None:
    """Two GPUs of a model, a hundred slots each; a node without GPUs needs no model."""
    found = parse_nodes(ONE_NODE + "n1,1000,2048,0,\n", "nodes.csv")

    assert found == (
        Node("n0", 64000, 262144, (Device("n0-gpu-00", 100, "P100"), Device("n0-gpu-01", 100, "P100"))),
        Node("n1", 1000, 2048),
    )


def test_a_pod_asks_for_a_share_for_whole_gpus_or_for_none() -> None:
    """A container for each GPU; the models that will do; the sum of what is asked for, in milli."""
    lines = ("p0,4000,8192,1,460,,LS", "p1,88000,327680,2,1000,V100M16|V100M32,LS", "p2,20000,65536,0,0,,BE")
    share, several, none = parse_pods(PODS + "\n".join(lines), "pods.csv")

    assert share == Pod("p0", Demand(4000, 8192, (Ask("gpu-00", 46),)), 460)
    asks = (Ask("gpu-00", 100), Ask("gpu-01", 100))
    assert several == Pod("p1", Demand(88000, 327680, asks, frozenset({"V100M16", "V100M32"})), 2000)
    assert none == Pod("p2", Demand(20000, 65536), 0)


def test_fewer_slots_round_shares_up() -> None:
    """460 milli are 5 of 10 slots; what counts as allocated stays what was asked for."""
    (pod,) = parse_pods(ONE_POD, "pods.csv", slots=10)
    assert pod.demand.asks == (Ask("gpu-00", 5),)
    assert pod.gpu_milli == 460


def test_gpu_spec_may_be_missing_as_in_one_of_the_traces() -> None:
    """multigpu20 has five columns."""
    (pod,) = parse_pods("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np0,1,1,1,1000\n", "pods.csv")
    assert pod.demand.products is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "f.csv:1:1: no column sn, cpu_milli, memory_mib, gpu, model: the header must have "),
        ("sn,gpu\n", "f.csv:1:1: no column cpu_milli, memory_mib, model: "),
        (NODES, "f.csv:1:4: gpu: no node has a GPU: give at least one that has"),
        (NODES + "n0,1,1,0,\n", "f.csv:1:4: gpu: no node has a GPU"),
        (ONE_NODE + "n1,1,1\n", "f.csv:3:1: 3 fields, 5 in the header: give one for each"),
        (ONE_NODE + "n0,1,1,1,T4\n", "f.csv:3:1: sn: 'n0' is there twice: names must differ"),
        (ONE_NODE + ",1,1,1,T4\n", "f.csv:3:1: sn: is empty: give a name"),
        (ONE_NODE + "n1,1,1,1,\n", "f.csv:3:5: model: is empty: give a name"),
        (ONE_NODE + "n1,1.5,1,1,T4\n", "f.csv:3:2: cpu_milli: '1.5' is no whole number from 0 to 1000000000: give one"),
        (ONE_NODE + "n1,1,-1,1,T4\n", "f.csv:3:3: memory_mib: '-1' is no whole number from 0 to 1000000000: give one"),
        (ONE_NODE + "n1,1,1,65,T4\n", "f.csv:3:4: gpu: '65' is no whole number from 0 to 64: give one"),
        (ONE_NODE + "n1,1,1,²,T4\n", "f.csv:3:4: gpu: '²' is no whole number from 0 to 64: give one"),
        (ONE_NODE + f"n1,{'9' * 5000},1,1,T4\n", "f.csv:3:2: cpu_milli: '99999"),
        (ONE_NODE + 'n1,"1,1,1,T4\n', "not CSV: unexpected end of data: put such a field in double quotes"),
    ],
)
def test_a_mistake_in_the_node_file_is_named_with_its_place(text: str, expected: str) -> None:
    """File, line, column, what is wrong, and what to do."""
    with pytest.raises(ManifestError) as raised:
        parse_nodes(text, "f.csv")
    assert expected in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PODS, "f.csv:1:4: num_gpu: no pod asks for a GPU: give at least one that does"),
        (PODS + "p0,1,1,0,0,,LS\n", "f.csv:1:4: num_gpu: no pod asks for a GPU"),
        (ONE_POD + "p1,1,1,1,0,,LS\n", "f.csv:3:5: gpu_milli: is 0 where num_gpu is 1: both are 0, or neither"),
        (ONE_POD + "p1,1,1,0,500,,LS\n", "f.csv:3:5: gpu_milli: is 500 where num_gpu is 0: both are 0, or neither"),
        (ONE_POD + "p1,1,1,1,1001,,LS\n", "f.csv:3:5: gpu_milli: '1001' is no whole number from 0 to 1000: give one"),
    ],
)
def test_a_mistake_in_the_pod_file_is_named_with_its_place(text: str, expected: str) -> None:
    """The same for pods."""
    with pytest.raises(ManifestError) as raised:
        parse_pods(text, "f.csv")
    assert expected in str(raised.value)


def test_all_faults_are_reported_at_once_but_not_thousands() -> None:
    """One line each, in the file's order, at most twenty."""
    with pytest.raises(ManifestError) as raised:
        parse_nodes(ONE_NODE + "".join(f"m{i},x,y,1,T4\n" for i in range(1000)), "f.csv")
    assert len(raised.value.faults) == openb.MAX_FAULTS
    assert [fault.place.line for fault in raised.value.faults[:4]] == [3, 3, 4, 4]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """No such file; not text."""
    with pytest.raises(InputError, match=r"nodes\.csv:1:1: cannot be read: No such file"):
        load(tmp_path / "nodes.csv", tmp_path / "pods.csv")
    (tmp_path / "nodes.csv").write_bytes(NODES.encode() + b"n0,1,1,1,T4\xff\n")
    with pytest.raises(InputError, match=r"nodes\.csv:2: byte 0xff is not UTF-8"):
        load(tmp_path / "nodes.csv", tmp_path / "pods.csv")


def test_made_up_traces_are_the_same_for_the_same_seed_and_of_the_shape_of_the_real_ones() -> None:
    """They read without a fault, and have shares, whole GPUs, several, none, and models."""
    assert made_up(20, 2000, 1) == made_up(20, 2000, 1) != made_up(20, 2000, 2)
    nodes, pods = made_up(20, 2000, 1)
    assert len(parse_nodes(nodes, "nodes.csv")) == 20
    found = parse_pods(pods, "pods.csv")
    assert len(found) == 2000
    assert {len(pod.demand.asks) for pod in found} == {0, 1, 4, 8}
    assert any(pod.demand.products for pod in found)
    shares = sum(0 < pod.gpu_milli < 1000 for pod in found) / len(found)
    assert 0.32 < shares < 0.43


def test_the_published_traces_are_found_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$OPENB_DIR first, then beside the repository; None when they are not there."""
    monkeypatch.delenv(openb.ENVIRONMENT, raising=False)
    root = tmp_path / "repository"
    root.mkdir()
    assert openb.find(root) is None
    beside = tmp_path / "shared" / "openb"
    beside.mkdir(parents=True)
    (beside / openb.NODES_FILE).write_text(ONE_NODE)
    found = openb.find(root)
    assert found is not None
    assert found.resolve() == beside
    monkeypatch.setenv(openb.ENVIRONMENT, str(tmp_path))
    assert openb.find(root) is None
