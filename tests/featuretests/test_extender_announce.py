"""The label by which the Service finds the replica that binds: written to an API server that fails as it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration
from structlog.testing import capture_logs

from meshctl.adapters.kubernetes.client import Client
from meshctl.extender import announce
from meshctl.extender.announce import LABEL, Announcer
from meshctl.ports import ObjectKey
from tests.harness.tools import until

POD = ObjectKey("Pod", "system", "extender-1")
STANDS_BY = "another replica of the extender binds"


@dataclass
class Replica:
    """It binds, or says why not."""

    unready: str = ""


@dataclass
class Pods:
    """The API server's side."""

    labels: dict[str, str] = field(default_factory=dict)
    status: int = 200
    asked: int = 0

    async def patch(self, request: web.Request) -> web.Response:
        assert request.path == "/api/v1/namespaces/system/pods/extender-1"
        self.asked += 1
        if self.status != 200:
            return web.json_response({"kind": "Status", "message": "as told"}, status=self.status)
        for name, value in orjson.loads(await request.read())["metadata"]["labels"].items():
            self.labels.pop(name, None)
            if value is not None:
                self.labels[name] = value
        return web.json_response({"metadata": {"labels": self.labels}})

    @property
    def labelled(self) -> bool:
        return self.labels.get(LABEL) == "true"

    async def becomes(self, labelled: bool) -> None:
        async def holds() -> bool:
            return self.labelled is labelled

        await until(holds, f"labelled: {labelled}")


@pytest.fixture
async def pods() -> Pods:
    return Pods(labels={"app": "extender"})


@asynccontextmanager
async def announcing(pods: Pods, replica: Replica) -> AsyncIterator[Announcer]:
    """Runs; ends with the label withdrawn."""
    application = web.Application()
    application.router.add_patch("/{path:.*}", pods.patch)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = Client(Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}"))
    announcer = Announcer(client, POD, lambda: replica.unready)
    running = asyncio.create_task(announcer.run())
    try:
        yield announcer
    finally:
        running.cancel()
        await announcer.withdraw()
        await client.close()
        await runner.cleanup()


async def _agrees(announcer: Announcer) -> None:
    async def holds() -> bool:
        return not announcer.problem()

    await until(holds, "nobody is led there in vain")


async def test_the_label_follows_who_binds(pods: Pods) -> None:
    """Put on, taken off when it binds no more, put on again, taken off at the end; other labels stay."""
    replica = Replica()
    async with announcing(pods, replica):
        for _ in range(2):
            replica.unready = ""
            await pods.becomes(labelled=True)
            replica.unready = STANDS_BY
            await pods.becomes(labelled=False)
        replica.unready = ""
        await pods.becomes(labelled=True)
    assert pods.labels == {"app": "extender"}


async def test_a_restarted_container_takes_off_what_the_one_before_left(pods: Pods) -> None:
    """It is not ready until then, and has nothing to do afterwards."""
    pods.labels[LABEL] = "true"
    async with announcing(pods, Replica(STANDS_BY)) as announcer:
        assert STANDS_BY in announcer.problem()
        await _agrees(announcer)
        assert pods.labels == {"app": "extender"}
    assert pods.asked == 1


@pytest.mark.parametrize("status", [403, 500])
async def test_a_failure_is_told_once_and_tried_again(pods: Pods, status: int) -> None:
    """Who binds is ready all the same; who binds no more, and could not say so, is not."""
    pods.status = status
    replica = Replica()
    with capture_logs() as logs:
        async with announcing(pods, replica) as announcer:
            await until(lambda: _asked(pods, 3), "it is tried again")
            assert not announcer.problem()
            replica.unready = STANDS_BY
            assert LABEL in announcer.problem()
            pods.status = 200
            await _agrees(announcer)
            replica.unready = ""
            await pods.becomes(labelled=True)
    warned = [line["error"] for line in logs if line["log_level"] == "warning"]
    assert len(warned) == len(set(warned)) <= 1
    assert ("grant patch on pods" in "".join(warned)) is (status == 403)


async def _asked(pods: Pods, times: int) -> bool:
    return pods.asked >= times


async def test_what_somebody_else_did_to_it_does_not_last(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late write of its own, or a hand: the label is written again by and by."""
    monkeypatch.setattr(announce, "AGAIN_S", 0.1)
    async with announcing(pods, Replica()):
        await pods.becomes(labelled=True)
        del pods.labels[LABEL]
        await pods.becomes(labelled=True)


async def test_the_end_waits_for_no_api_server(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that can't take its label off ends nevertheless."""
    monkeypatch.setattr(announce, "END_S", 0.05)
    async with announcing(pods, Replica()):
        await pods.becomes(labelled=True)
        pods.status = 500
    assert pods.labelled
