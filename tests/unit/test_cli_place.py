"""`meshctl place` as a program sees it: two files in, JSON out, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from meshctl.cli import main
from meshctl.sim.openb import made_up


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["meshctl", "place", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    nodes, pods = made_up(10, 200, 1)
    (tmp_path / "nodes.csv").write_text(nodes)
    (tmp_path / "pods.csv").write_text(pods)
    return ["--nodes", str(tmp_path / "nodes.csv"), "--pods", str(tmp_path / "pods.csv")]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = run(*arguments, "-o", "json")
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_the_answer_has_the_promised_fields(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Allocated by arrived per cent, lost pods by reason, decisions, and how long they took."""
    found = answer(capsys, *files, "--policy", "fgd", "--arrivals", "1.3", "--seed", "3")

    assert list(found) == ["allocated", "rejected", "decisions", "decision_ms"]
    assert list(found["allocated"]) == ["100", "110", "120", "130"]
    assert all(0.5 < share <= 1 for share in found["allocated"].values())
    assert sum(found["rejected"].values()) < found["decisions"]
    assert 0 < found["decision_ms"]["p50"] <= found["decision_ms"]["p99"]


@pytest.mark.parametrize("policy", ["stranding", "fgd", "bestfit", "packing", "dotprod", "spread", "random"])
def test_every_policy_has_its_name(policy: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And the same seed gives the same answer."""
    first, again = (answer(capsys, *files, "--policy", policy, "--arrivals", "1") for _ in range(2))
    assert first["allocated"] == again["allocated"]
    assert first["rejected"] == again["rejected"]


def test_without_an_output_format_people_get_a_table(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The policy, a line for each per cent, what was lost: no line is broken in the middle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert run(*files, "--arrivals", "1.1") == 0
    title, header, *rows, spent, lost = capsys.readouterr().out.splitlines()
    assert title == "stranding: share of the cluster's GPUs"
    assert header.split() == ["ARRIVED", "ALLOCATED"]
    assert [row.rpartition("%  ")[0] for row in rows] == ["100 ", "110 "]
    assert re.fullmatch(r"\d+ decisions, p50 \S+ ms, p99 \S+ ms", spent)
    assert re.fullmatch(r"lost: (none|\d+ \w+(, \d+ \w+)*)", lost)


def test_help_runs_to_the_end_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the docstring breaks its lines does not matter; no name of an option or a column is cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert run("--help") == 0
    out = capsys.readouterr().out
    assert "cluster-trace-gpu-v2023). The pods come in a random order" in out
    assert "…" not in out


def test_a_mistake_in_a_file_is_the_callers(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a message with file, line, column and what to do; nothing on standard output."""
    Path(files[1]).write_text("sn,cpu_milli,memory_mib,gpu,model\nn0,many,1,1,T4\n")
    assert run(*files) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{files[1]}:2:2: cpu_milli: 'many' is no whole number from 0 to 1000000000: give one" in err
