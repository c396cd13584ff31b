"""What the API client takes from its environment: a proxy, where it names one, and no login."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from meshctl.adapters.kubernetes.client import connect
from meshctl.ports import ObjectKey

POD = ObjectKey("Pod", "team", "p")


class Server:
    """Answers every request with a pod, and keeps what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        """Host and Authorization."""

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append((request.headers["Host"], request.headers.get("Authorization", "")))
        return web.json_response({"kind": "Pod", "metadata": {"name": "p"}})


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever whoever runs this has."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    found, application = Server(), web.Application()
    application.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield found, "http://{}:{}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


def kubeconfig(path: Path, url: str) -> Path:
    names = {"name": "x", "context": {"cluster": "x", "user": "x"}}
    cluster, user = {"name": "x", "cluster": {"server": url}}, {"name": "x", "user": {"token": "secret"}}
    config = {"clusters": [cluster], "users": [user], "contexts": [names], "current-context": "x"}
    path.write_bytes(orjson.dumps({"apiVersion": "v1", "kind": "Config", **config}))  # JSON is YAML
    return path


async def test_a_login_for_the_host_does_not_get_in_the_way_of_the_token(
    server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ~/.netrc that names the API server's host, for another program."""
    found, url = server
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password something\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with connect(kubeconfig(tmp_path / "config", url)) as client:
        assert await client.get(POD) is not None
    assert [authorization for _, authorization in found.asked] == ["Bearer secret"]


async def test_a_proxy_of_the_environment_is_asked(
    server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not for the hosts that it is not for."""
    found, url = server
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with connect(kubeconfig(tmp_path / "config", "http://api.example:8080")) as client:
        assert await client.get(POD) is not None
    async with connect(kubeconfig(tmp_path / "direct", url)) as client:
        assert await client.get(POD) is not None
    assert [host for host, _ in found.asked] == ["api.example:8080", url.removeprefix("http://")]
