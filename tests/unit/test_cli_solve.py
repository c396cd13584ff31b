"""`meshctl solve` as a program sees it: a file in, JSON out, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshctl.cli import main
from meshctl.model import Policy

FLEET = """
slo: 150ms
load: 595.6
policy: Balanced
sizes:
- {name: small, batch: 1, share: 0.8}
- {name: medium, batch: 8, share: 0.15}
- {name: large, batch: 64, share: 0.05}
classes:
- {name: V100, endpoints: 3, service: {base: 5ms, perItem: 0.8ms}}
- {name: P100, endpoints: 3, service: {base: 8ms, perItem: 1.3ms}}
- {name: T4, endpoints: 3, service: {points: {1: 11.8ms, 8: 24.4ms, 64: 125.2ms}}, concurrency: 1}
- {name: K40, endpoints: 3, service: {base: 25ms, perItem: 5ms}}
"""


def asked(path: Path, capsys: pytest.CaptureFixture[str], *changes: tuple[str, str], output: str = "json") -> Any:
    text = FLEET
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (path / "fleet.yaml").write_text(text)
    code = run("solve", "-f", str(path / "fleet.yaml"), "-o", output)
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out) if output == "json" else out


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["meshctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_the_answer_has_the_promised_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights by size and class that sum to 1, attainment by size, utilisation by class, and why."""
    answer = asked(tmp_path, capsys)
    assert list(answer) == ["weights", "attainment", "utilization", "feasible", "policy", "reasons"]
    assert list(answer["weights"]) == list(answer["attainment"]) == ["small", "medium", "large"]
    for row in answer["weights"].values():
        assert list(row) == ["V100", "P100", "T4", "K40"]
        assert sum(row.values()) == pytest.approx(1)
        assert min(row.values()) >= 0
    assert answer["weights"]["large"]["K40"] == 0
    assert answer["feasible"] is True
    assert answer["policy"] == "Balanced"
    assert answer["reasons"][0]["code"] == "Solved"
    assert answer["reasons"][0]["inputs"]["capacity_rps"] == pytest.approx(744.5, abs=0.1)


def test_an_impossible_load_is_answered_with_the_best_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0, feasible false, and a reason with the figure."""
    answer = asked(tmp_path, capsys, ("595.6", "5000"))
    assert answer["feasible"] is False
    assert answer["reasons"][0]["code"] == "Infeasible"
    assert all(sum(row.values()) == pytest.approx(1) for row in answer["weights"].values())


@pytest.mark.parametrize("policy", list(Policy))
def test_every_policy_answers(policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With rows that sum to 1 and its own name."""
    answer = asked(tmp_path, capsys, ("Balanced", policy.value))
    assert answer["policy"] == policy.value
    assert all(sum(row.values()) == pytest.approx(1) for row in answer["weights"].values())


def test_gpus_shared_with_others_and_absent_ones_count_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`available` slows a class, with a reason; a class without endpoints stays named, with zeros."""
    shared = asked(
        tmp_path,
        capsys,
        ("base: 5ms, perItem: 0.8ms}", "base: 5ms, perItem: 0.8ms}, available: 0.5"),
        ("{name: K40, endpoints: 3", "{name: K40, endpoints: 0"),
        ("595.6", "150"),
    )
    codes = [(r["code"], r["subject"]) for r in shared["reasons"]]
    assert ("ForeignUtilization", "V100") in codes
    assert {row["K40"] for row in shared["weights"].values()} == {0}
    assert shared["utilization"]["K40"] == 0
    assert shared["feasible"] is True


def test_people_get_a_table_and_programs_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers."""
    assert "Balanced: feasible" in asked(tmp_path, capsys, output="table")
    assert "feasible: true" in asked(tmp_path, capsys, output="yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (FLEET.replace("150ms", "150"), "slo"),
        (FLEET.replace("load: 595.6", "load: -1"), "load"),
        (FLEET.replace("batch: 8,", "batch: eight,"), "batch"),
        ("", "is empty"),
        ("a: b: c", "fleet.yaml"),
    ],
)
def test_bad_input_is_exit_code_2_with_its_place(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names file and field; nothing is printed for a program to mistake for an answer."""
    file = tmp_path / "fleet.yaml"
    file.write_text(content)
    assert run("solve", "-f", str(file), "-o", "json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "fleet.yaml" in err.replace("\n", "")


def test_a_file_that_is_not_there_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, without a traceback."""
    assert run("solve", "-f", str(tmp_path / "none.yaml")) == 2
    err = capsys.readouterr().err
    assert "none.yaml" in err.replace("\n", "")
    assert "Traceback" not in err
