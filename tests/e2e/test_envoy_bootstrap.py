"""`meshctl envoy bootstrap` prints what a real Envoy accepts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshctl.address import Address
from meshctl.errors import InputError
from meshctl.sim.envoy import ENVOY_BIN, envoy_binary
from tests.harness.envoy import require_envoy

pytestmark = pytest.mark.envoy


def printed(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshctl", "envoy", "bootstrap", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("output", ["yaml", "json"])
def test_envoy_accepts_the_bootstrap(tmp_path: Path, output: str) -> None:
    """In both formats, with every option given."""
    require_envoy()
    options = ("--xds", "localhost:18000", "--listen", "127.0.0.1:0", "--admin", "[::1]:0", "--node-id", "gw")
    config = tmp_path / f"bootstrap.{output}"
    config.write_text(printed(*options, "-o", output).stdout)
    command = [str(envoy_binary()), "--mode", "validate", "-c", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("bad", ["10000", "127.0.0.1:", ":80", "127.0.0.1:http", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_named(bad: str) -> None:
    """The option, the value and an example."""
    with pytest.raises(InputError, match=r"--listen: '.*' is not HOST:PORT; for example"):
        Address.parse(bad, "--listen")


def test_a_bad_option_exits_with_2() -> None:
    """One line for people, no traceback."""
    result = printed("--xds", "nowhere")
    assert result.returncode == 2
    assert result.stderr == "meshctl: --xds: 'nowhere' is not HOST:PORT; for example 127.0.0.1:10000\n"
    assert result.stdout == ""


def test_a_missing_envoy_is_the_callers_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the variable that points nowhere."""
    monkeypatch.setenv(ENVOY_BIN, str(tmp_path / "none"))
    with pytest.raises(InputError, match="is not an executable file"):
        envoy_binary()
