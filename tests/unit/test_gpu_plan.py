"""`meshctl gpu plan` and the map's stranded shares: objects in, what people and programs read out."""

from __future__ import annotations

import io
from datetime import datetime
from typing import Any

import orjson
import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from meshctl.cli.app import app
from meshctl.cli.gpu_map import GpuMap
from meshctl.cli.gpu_plan import Proposal, Wanted
from meshctl.cli.gpu_site import Reader, Site
from meshctl.errors import InputError
from meshctl.sharing import RESOURCE
from tests.harness.extender_objects import container, node, pod
from tests.harness.gpus import NOW, gpu_object, read

REPLICA_SET = {"ownerReferences": [{"kind": "ReplicaSet", "name": "rs", "controller": True}]}
A, B = "GPU-000a-1", "GPU-000b-2"
GPUS = (
    gpu_object("a", A, 10, [("team-a", "bert", "server", [0, 1, 2, 3, 4])]),
    gpu_object("b", B, 10, [("team-a", "resnet", "server", [0, 1, 2, 3, 4])]),
)


def serving(name: str, where: str, uuid: str, slots: int = 5, **fields: Any) -> dict[str, Any]:
    """A pod that runs there with its GPU."""
    metadata = REPLICA_SET | fields.pop("metadata", {})
    plan = {"server": {uuid: slots}}
    containers = (container(slots=slots, cpu="2"),)
    return pod(name, *containers, node=where, phase="Running", started=True, plan=plan, metadata=metadata, **fields)


PODS = (serving("bert", "a", A), serving("resnet", "b", B))


def site(*pods: dict[str, Any], cpu: str = "32", others: tuple[dict[str, Any], ...] = ()) -> Site:
    reader = Reader([node(name, cpu) for name in "ab"], GPUS, others)
    for one in pods or PODS:
        reader.take(one)
    return reader.site


def wanted(slots: int | None = 8, **fields: Any) -> Wanted:
    return Wanted(slots, RESOURCE, **fields)


def text(shown: RenderableType, width: int = 118) -> str:
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(shown)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


SHOWN = """\
room for 8 of hpe.com/gpus on one GPU: 1 move proposed, nothing was changed; then it fits: a, 8 of GPU-000a-1

1.  team-a/bert  a GPU-000a: 5  ->  b GPU-000b: 5  makes room for 8 of hpe.com/gpus on GPU-000a-1 of a

                                   now  then
slots that can be used so            0     8
free slots                          10    10
largest ask that fits on one GPU     5    10
whole GPUs                           0     1
GPUs stranded for want of CPU     0.00  0.00

Moves are yours to make. For each in its order: keep the pod's replacement off the old node, end the pod, wait until
the replacement is ready; then look again, since it may have gone elsewhere. Where its owner may have one more for a
while, scale it up first and end the old pod last.
  kubectl cordon a
  kubectl delete pod --namespace=team-a bert
  kubectl uncordon a
"""


def test_what_people_read() -> None:
    """The moves, what they gain, and the commands in order."""
    assert text(Proposal(site(), wanted()).text()) == SHOWN


def test_what_programs_read() -> None:
    """All of it as plain data."""
    data = orjson.loads(orjson.dumps(Proposal(site(), wanted()).data()))
    (move,) = data["moves"]
    assert move == {
        "namespace": "team-a",
        "pod": "bert",
        "owner": "ReplicaSet/rs",
        "from": {"node": "a", "gpus": {A: 5}},
        "to": {"node": "b", "gpus": {B: 5}},
        "for": None,
        "why": f"makes room for 8 of hpe.com/gpus on {A} of a",
    }
    assert data["executed"] is False
    assert data["fits"] == {"node": "a", "gpus": {A: 8}}
    assert (data["before"]["largest_ask"], data["after"]["largest_ask"]) == (5, 10)
    assert data["commands"] == [
        "kubectl cordon a", "kubectl delete pod --namespace=team-a bert", "kubectl uncordon a"
    ]  # fmt: skip
    assert data["notes"] == []


def test_without_a_goal_gpus_become_whole() -> None:
    """Whoever leaves goes where there is room."""
    data = Proposal(site(), wanted(None)).data()
    assert (data["goal"], len(data["moves"]), data["fits"]) == ("more GPUs whole, fewer stranded", 1, None)
    assert (data["before"]["whole_gpus"], data["after"]["whole_gpus"]) == (0, 1)


def test_a_pod_that_waits_is_a_goal() -> None:
    """With what it asks for, of CPU too, on nodes that let it in."""
    waits = pod("large", container(slots=8, cpu="4"), nodeSelector={"no": "node"})
    found = Proposal(site(*PODS, waits), wanted(None, pod="team-a/large"))
    assert found.demand is not None
    assert found.demand.cpu_milli == 4000
    assert found.plan.why == "no node is open for it: they are cordoned, not ready, tainted, or not selected"
    assert not found.plan.moves
    assert Proposal(site(*PODS, pod("large", slots=8)), wanted(None, pod="team-a/large")).plan.moves
    with pytest.raises(InputError, match="no pod team-a/other waits for slots; those that do: team-a/large"):
        Proposal(site(*PODS, waits), wanted(None, pod="team-a/other"))


def test_who_must_stay_stays() -> None:
    """By its annotation; when both must, the answer says what the nodes lack."""
    keep = {"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}}
    fixed = serving("bert", "a", A, metadata=keep)
    (move,) = Proposal(site(fixed, PODS[1]), wanted()).plan.moves
    assert move.after.node == "a"
    shown = text(Proposal(site(fixed, serving("resnet", "b", B, metadata=keep)), wanted()).text())
    assert "and no 10 moves that were" in shown
    assert "kubectl" not in shown


def test_room_is_made_on_named_nodes_that_are_there() -> None:
    """One that is not known is the caller's mistake."""
    (move,) = Proposal(site(), wanted(nodes=frozenset("b"))).plan.moves
    assert move.before.node == "b"
    with pytest.raises(InputError, match="no node elsewhere; there are: a, b"):
        Proposal(site(), wanted(nodes=frozenset({"elsewhere"})))


def test_a_pod_that_cannot_be_read_is_noted_and_stays() -> None:
    """As one of which nothing is known."""
    odd = serving("bert", "a", A, metadata={"annotations": {"meshctl.io/gpu-products": " , "}})
    found = site(odd, PODS[1])
    assert [note.partition(":")[0] for note in found.notes] == ["pod team-a/bert"]
    assert "it stays where it is" in text(Proposal(found, wanted()).text())
    assert [one.key for one in found.pods] == ["uid-resnet"]


def test_the_map_shows_stranded_shares() -> None:
    """Free GPUs without CPU, by node and in all; free slots in pieces that are smaller than anything asked for."""
    reads = [read(data) for data in GPUS]
    at = datetime.fromisoformat(NOW)
    short = site(*PODS, cpu="2")
    shown = text(GpuMap(reads, at, short.beyond()))
    assert "a  hpe.com/gpus 5 of 10 used, 5 free; 0.5 GPUs stranded for want of CPU\n" in shown
    assert "2 nodes, 2 GPUs: hpe.com/gpus 10 of 20 used, 10 free, but at most 5 on one GPU; 1.0 GPUs stranded" in shown
    assert "stranded" not in text(GpuMap(reads, at, site().beyond()))
    assert "stranded" not in text(GpuMap(reads, at))


def test_the_map_counts_pieces_that_are_too_small() -> None:
    """Measured by the least that a container here has, or waits for."""
    at = datetime.fromisoformat(NOW)
    reads = [read(gpu_object("a", A, 8, [("n", "p", "c", [0, 1, 2]), ("n", "q", "c", [3, 4, 5])]))]
    assert "a  hpe.com/gpus 6 of 8 used, 2 free, 2 in pieces below 3\n" in text(GpuMap(reads, at))
    assert "pieces" not in text(GpuMap(reads, at, site(*PODS, pod("small", slots=2)).beyond()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pod=a/b", "--for=3"), "--pod and --for each say what is to fit"),
        (("--for=3", "--cpu=much"), "--cpu: 'much' is no quantity"),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], said: str) -> None:
    """Nothing is asked of any cluster."""
    result = CliRunner().invoke(app, ["gpu", "plan", *options])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
