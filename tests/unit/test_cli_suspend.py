"""`meshctl pause` and `meshctl resume` refuse what names no route and no cluster, before asking anybody."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from meshctl.cli.app import app
from meshctl.errors import InputError


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b/c"], "'a/b/c' is not a route; write NAME or NAMESPACE/NAME"),
        (["/a"], "'/a' is not a route"),
        (["a/"], "'a/' is not a route"),
        ([""], "'' is not a route"),
        (["a/b", "-n", "c"], "'a/b' is not in namespace 'c'; give one of the two"),
        (["a", "--kubeconfig", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
    ids=["three parts", "no namespace", "no name", "nothing", "two namespaces", "no kubeconfig"],
)
def test_what_names_nothing_is_refused(
    command: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's mistake, in words."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
