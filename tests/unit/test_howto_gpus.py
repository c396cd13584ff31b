"""docs/howto/share-gpus.md says what is so: its picture, its reasons, its metrics, its files."""

from __future__ import annotations

import io
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from deviceplugin.allocate import Reason
from deviceplugin.health import Reason as Illness
from deviceplugin.inventory import read_gpus
from deviceplugin.ledger import Ledger
from deviceplugin.objects import Seen, gpu_object, stamped
from deviceplugin.policies import Policy, Refusal, wanted
from deviceplugin.watch import load_policies
from meshctl.cli.gpu_map import GpuMap
from meshctl.sharing import DEFAULT_IGNORED_XIDS, Mode, MpsPhase, MpsStatus, Owner, Slot
from tests.harness.gpus import NOW, read

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs" / "howto" / "share-gpus.md"
EXAMPLES = ROOT / "examples" / "gpu-sharing"
NODE = "gpu-1"
LABELS = {"meshctl.io/share-gpus": "true"}
PODS = {"resnet50": "resnet50-7d4b9c6f5-x2k4p", "bert": "bert-5c8f7b9d4-qq9zl"}


def policies() -> tuple[Policy, ...]:
    return tuple(load_policies(EXAMPLES / "policies.yaml"))


def held() -> Ledger:
    """The example's two models on the first GPU, one after the other."""
    with (EXAMPLES / "models.yaml").open() as stream:
        models: list[Any] = list(YAML(typ="safe").load_all(stream))
    uuid = read_gpus(EXAMPLES / "gpus.yaml")[0].uuid
    owners: dict[Slot, Owner] = {}
    for model in models:
        (container,) = model["spec"]["template"]["spec"]["containers"]
        owner = Owner(model["metadata"]["namespace"], PODS[model["metadata"]["name"]], container["name"])
        first = len(owners)
        owners |= {Slot(uuid, first + i): owner for i in range(container["resources"]["limits"]["hpe.com/gpus"])}
    return Ledger().observed(owners, 0.0)


def picture() -> str:
    """What `meshctl gpu map` draws of the example: its GPUs, its policies, its models."""
    shown = []
    for gpu in read_gpus(EXAMPLES / "gpus.yaml"):
        found = wanted(gpu, NODE, LABELS, policies())
        mps = (
            MpsStatus(MpsPhase.RUNNING, clients=2) if found.sharing and found.sharing.mode is Mode.MPS else MpsStatus()
        )
        seen = Seen(gpu=gpu, sharing=found.sharing, wanted=found, mps=mps, over="")
        shown.append(read(stamped(gpu_object(NODE, "", seen, held()), {}, NOW)))
    out = io.StringIO()
    Console(file=out, width=90, no_color=True).print(GpuMap(shown, datetime.fromisoformat(NOW)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_picture_is_what_the_tool_draws() -> None:
    """Of the example's files, by the agent's own code: paste what this prints when it fails."""
    drawn = picture()
    assert drawn in HOWTO.read_text()
    assert drawn.partition("\n\n")[0] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("reason", sorted({*Reason, *Refusal, *Illness} - {Illness.HEALTHY}))
def test_every_reason_is_explained(reason: str) -> None:
    """Whoever meets one finds what to do about it."""
    assert f"`{reason}`" in HOWTO.read_text()


@pytest.mark.parametrize("path", ["examples/gpu-sharing/anywhere.yaml", "deploy/agent/gpu-policy.yaml"])
def test_each_policy_to_begin_with_is_valid(path: str) -> None:
    """The agent takes it from the file as it is."""
    (policy,) = load_policies(ROOT / path)
    assert policy.spec.replicas == 10


def test_metrics_are_those_that_the_agent_has() -> None:
    """Each that it exports is in the table, and none that it does not."""
    exported = set(re.findall(r"\"(meshctl_agent_[a-z_]+)\"", (ROOT / "deviceplugin" / "metrics.py").read_text()))
    told = {name.removesuffix("_total") for name in re.findall(r"`(meshctl_agent_[a-z_]+)[`{]", HOWTO.read_text())}
    assert told == exported


def test_ignored_xids_are_those_of_the_code() -> None:
    """By name."""
    assert ", ".join(map(str, sorted(DEFAULT_IGNORED_XIDS))) in HOWTO.read_text()


@pytest.mark.parametrize("path", sorted({*re.findall(r"(?:examples|deploy)/[-a-z/]+\.yaml", HOWTO.read_text())}))
def test_files_that_it_names_are_there(path: str) -> None:
    """Under the names that it gives."""
    assert (ROOT / path).is_file()
