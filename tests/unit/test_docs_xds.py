"""docs/xds.md says what is so: its tests exist, its methods, limits and metrics are those of the code."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from xds.limits import Limits
from xds.metrics import REJECTIONS, XdsMetrics
from xds.services import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "xds.md").read_text()


def section(title: str) -> str:
    """Text of the page under a heading."""
    _, _, rest = PAGE.partition(f"\n## {title}\n")
    assert rest, f"no section {title!r}"
    return rest.partition("\n## ")[0]


def test_every_test_that_it_names_exists() -> None:
    """Each row of the table of behaviours has its test, and no test stands there twice."""
    rows = re.findall(r"^\| (.+) \| (.*) \|$", section("Behaviours and their tests"), re.MULTILINE)[1:]
    named = [(behaviour, test.strip("`").split("::")) for behaviour, test in rows if not behaviour.startswith("**")]
    assert len(named) > 30
    missing = [
        "::".join(test)
        for _, test in named
        if len(test) != 2
        or not (file := ROOT / "tests" / test[0]).is_file()
        or not re.search(rf"^(async def |def |class )?{test[1]}\b", file.read_text(), re.MULTILINE)
    ]
    assert missing == []
    assert len({behaviour for behaviour, _ in named}) == len(named)


def test_methods_are_those_that_are_served() -> None:
    """All of them, and no others."""
    rows = re.findall(r"^\| `(envoy\.service\.\S+)` \| .* \| `(\w+)` \| `(\w+)` \|$", PAGE, re.MULTILINE)
    assert {f"/{service}/{method}" for service, *methods in rows for method in methods} == METHODS.keys()


def test_limits_are_the_defaults() -> None:
    """Each with its value."""
    rows = re.findall(r"^\| `(\w+)` \| ([0-9.]+) \| ", section("What is refused, and how"), re.MULTILINE)
    assert {name: float(value) for name, value in rows} == asdict(Limits())


def test_metrics_are_those_that_are_exported() -> None:
    """Each by name, with its label; and the words of the one that says why."""
    metrics = XdsMetrics()
    metrics.observe(lambda: 0, lambda: 0)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    exported = {
        re.sub("_(bucket|count|sum)$", "", s.name) + "".join(f"{{{label}}}" for label in s.labels if label != "le")
        for s in samples
        if not s.name.endswith("_created")
    }
    assert set(re.findall(r"`(meshctl_xds_[^`]+)`", section("Metrics"))) == exported
    words = re.search(r"rejected_streams_total.* ended: (.*) \|", section("Metrics"))
    assert words is not None
    assert words[1].replace("`", "").split(", ") == list(REJECTIONS)
