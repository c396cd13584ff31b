"""Where the API server is, and with which credentials it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from meshctl.adapters.kubernetes import access
from meshctl.adapters.kubernetes.client import connect
from meshctl.errors import InputError


def kubeconfig(path: Path, user: dict[str, Any], context: str = "here") -> Path:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": context, "context": {"cluster": "c", "user": "u"}}],
        "current-context": context,
    }
    path.write_bytes(orjson.dumps(config))
    return path


async def bearer(config: Any) -> str:
    return str((await config.auth_settings())["BearerToken"]["value"])


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No pod, no $KUBECONFIG, and a home directory of our own."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


async def test_without_any_configuration_the_error_says_what_to_do(outside: Path) -> None:
    """It names the file that was looked for."""
    with pytest.raises(InputError, match=r"\.kube/config: no such file; name a kubeconfig"):
        async with connect():
            pass


async def test_a_kubeconfig_is_found_as_kubectl_finds_it(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named, else $KUBECONFIG (of which some may not exist), else the one at home."""
    (outside / ".kube").mkdir()
    kubeconfig(outside / ".kube" / "config", {"token": "home"})
    assert await bearer(await access.configuration(None)) == "Bearer home"
    other = kubeconfig(outside / "other", {"token": "other"})
    monkeypatch.setenv("KUBECONFIG", f"{outside}/no-such:{other}")
    assert await bearer(await access.configuration(None)) == "Bearer other"
    named = kubeconfig(outside / "named", {"token": "named"})
    assert await bearer(await access.configuration(named)) == "Bearer named"


@pytest.mark.parametrize("text", ["", "[]", "a: b", "{", "current-context: x", "\0"])
async def test_a_file_that_is_no_kubeconfig_is_the_callers_mistake(outside: Path, text: str) -> None:
    """It is named, whatever is wrong with it."""
    path = outside / "config"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        await access.configuration(path)


async def test_a_context_that_is_not_there_is_the_callers_mistake(outside: Path) -> None:
    """It is named."""
    with pytest.raises(InputError, match="elsewhere"):
        await access.configuration(kubeconfig(outside / "config", {"token": "t"}), "elsewhere")


async def test_credentials_that_change_are_read_again(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token file, and an exec plugin's token; what cannot be read leaves the last good one."""
    monkeypatch.setattr(access, "REFRESH_S", 0.0)
    token = outside / "token"
    token.write_text("first")
    plugin = outside / "plugin"
    plugin.write_text(
        '#!/bin/sh\nprintf \'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", '
        f'"status": {{"token": "%s"}}}}\' "$(cat {token})"\n'
    )
    plugin.chmod(0o700)
    run = {"command": str(plugin), "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never"}
    by_file = await access.configuration(kubeconfig(outside / "f", {"tokenFile": str(token)}))
    by_plugin = await access.configuration(kubeconfig(outside / "p", {"exec": run}))
    assert [await bearer(by_file), await bearer(by_plugin)] == ["Bearer first"] * 2
    token.write_text("second")
    assert [await bearer(by_file), await bearer(by_plugin)] == ["Bearer second"] * 2
    token.unlink()
    plugin.unlink()
    assert [await bearer(by_file), await bearer(by_plugin)] == ["Bearer second"] * 2
