"""docs/howto/placement.md says what is so: its files, its series, its reasons, its configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Node, Refusal
from meshctl.extender.metrics import Figures, Metrics

ROOT = Path(__file__).parents[2]
HOWTO = ROOT / "docs" / "howto" / "placement.md"
SHIPPED = ROOT / "deploy" / "extender" / "scheduler-config.yaml"


def test_files_that_it_names_are_there() -> None:
    """Links, and what commands apply."""
    text = HOWTO.read_text()
    links = {HOWTO.parent / path for path in re.findall(r"\]\(([^)#:]+)", text)}
    named = {ROOT / path for path in re.findall(r"deploy/extender/[\w.-]*", text)}
    assert [path for path in links | named if not path.exists()] == []
    assert len(named) > 4


def test_series_are_those_that_are_exported() -> None:
    """All of them, under these names."""
    metrics = Metrics()
    metrics.observe(Figures)
    exported = set(re.findall(r"^# TYPE (\w+) ", metrics.exposition().decode(), re.MULTILINE))
    told = set(re.findall(r"meshctl_extender_\w+", HOWTO.read_text()))
    assert told <= exported
    assert {name for name in exported if not name.endswith(("_created", "_under_way"))} == told


def test_an_existing_scheduler_is_told_what_the_second_one_is() -> None:
    """But for where the extender is found, and where the files are."""
    (block,) = re.findall(r"```yaml\n(apiVersion: kubescheduler.*?)```", HOWTO.read_text(), re.DOTALL)
    yaml = YAML(typ="safe")
    told, shipped = yaml.load(block), yaml.load(SHIPPED)

    def same(config: Any) -> Any:
        (extender,) = config["extenders"]
        del extender["urlPrefix"]
        files = {key: Path(value).name for key, value in extender["tlsConfig"].items() if key.endswith("File")}
        return {**extender, "tlsConfig": {**extender["tlsConfig"], **files}}, config["percentageOfNodesToScore"]

    assert same(told) == same(shipped)


ONE = (Ask("server", 1),)


@pytest.mark.parametrize(
    "demand",
    [
        Demand(asks=(Ask("server", 3),)),
        Demand(asks=(Ask("server", 1, "other.io/gpus"),)),
        Demand(2000, asks=ONE),
        Demand(0, 2000, asks=ONE),
        Demand(asks=ONE, products=frozenset({"T4"})),
        Demand(asks=(Ask("closed", 1, "closed.io/gpus"),)),
    ],
)
def test_words_of_a_refusal_are_explained(demand: Demand) -> None:
    """As the scheduler shows them, up to the numbers."""
    fleet = Fleet()
    gpus = (Device("A", 4, "V100"), Device("B", 4, "V100"), Device("C", 4, "", "closed.io/gpus", closed="unhealthy: x"))
    fleet.put(Node("n", 1000, 1000, gpus))
    fleet.charge("p", Charge("n", gpus={"A": 2, "B": 2}))
    refusal = fleet.fit(demand, "n")
    assert isinstance(refusal, Refusal)
    told = re.sub(r"V100|T4|other.io/gpus|: \d+\w* .*|x$", "...", refusal.message)
    shown = told.replace("......", "...").removesuffix("...").strip()
    assert shown in HOWTO.read_text(), refusal.message
