"""`meshctl validate`: lines that an editor can jump to, exit 0 or 2."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner, Result

from meshctl.api.crd import ROOT
from meshctl.api.solve import load_solve_file
from meshctl.cli.validate import validate
from tests.featuretests.test_manifests_directory import slo, two
from tests.harness.manifests import text

app = typer.Typer()
app.command()(validate)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_good_files_are_valid(tmp_path: Path) -> None:
    """Nothing on standard output, exit 0."""
    (tmp_path / "a.yaml").write_text(text(*two()))
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "3 valid objects, 0 problems\n"


def test_each_problem_is_a_line(tmp_path: Path) -> None:
    """`file:line:column: field: message`, in the order of files and lines; exit 2."""
    good, bad, broken = tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml"
    good.write_text(text(*two()))
    bad.write_text(
        "apiVersion: meshctl.io/v1alpha1\nkind: ModelRoute\nmetadata: {name: c}\nspec:\n"
        "  model: m\n  slo: {latency: 150}\n  backend: {endpoints: []}\n"
    )
    broken.write_text("a: [\n")
    result = run(broken, good, bad, tmp_path / "nope.yaml")
    assert result.exit_code == 2
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{bad}:6:9: spec.slo.latency: 150 has no unit; write")
    assert lines[1].startswith(f"{bad}:7:13: spec.backend.endpoints: ")
    assert lines[2].startswith(f"{broken}:2:1: is not YAML: ")
    assert lines[3] == f"{tmp_path}/nope.yaml:1:1: cannot be read: No such file or directory"
    assert len(lines) == 4


def test_warning_alone_is_valid(tmp_path: Path) -> None:
    """A GPU without a profile is told, and is no mistake."""
    (tmp_path / "a.yaml").write_text(text(two()[0]))
    result = run(tmp_path / "a.yaml")
    assert result.exit_code == 0
    assert ": warning: spec.backend.endpoints: no ModelProfile for model resnet50 on V100" in result.stdout


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_output_for_programs(tmp_path: Path, output: str) -> None:
    """The same as data; exit 2 as well."""
    path = tmp_path / "a.yaml"
    path.write_text(text(slo("a", 5)))
    result = run(path, "-o", output)
    assert result.exit_code == 2
    if output == "json":
        found = orjson.loads(result.stdout)
        (problem,) = found["problems"]
        assert (found["valid"], found["objects"]) == (False, [])
        assert (problem["file"], problem["object"], problem["field"]) == (
            str(path),
            "ModelRoute default/a",
            "spec.slo.latency",
        )


def test_same_file_named_twice_is_read_once(tmp_path: Path) -> None:
    """A directory and a file in it are one file."""
    (tmp_path / "a.yaml").write_text(text(*two()))
    assert run(tmp_path, tmp_path / "a.yaml").exit_code == 0


def test_examples_are_valid() -> None:
    """Every example in the repository is a manifest without even a warning, a question for solve, or not for us."""
    others = {"gpu-sharing/gpus.yaml": "an inventory", "gpu-sharing/models.yaml": "Deployments that ask for slots"}
    paths = sorted((ROOT / "examples").glob("*/*.yaml"))
    result = run(*(path for path in paths if str(path.relative_to(ROOT / "examples")) not in others))
    assert (result.exit_code, result.stdout) == (0, "")
    for path in sorted((ROOT / "examples").glob("solve*.yaml")):
        assert load_solve_file(path).classes
