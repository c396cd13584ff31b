"""docs/howto/grpc-clients.md: its route is valid, its commands are there, its client is answered."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from meshctl.api.base import validated
from meshctl.api.document import parse
from meshctl.api.modelroute import ModelRoute
from meshctl.cli.app import app
from meshctl.model import DEFAULT_CLASS, DesiredRoute, RoutePlan
from tests.harness.envoy import plan, route_plan, xds_server
from tests.harness.grpc_servers import GrpcServers
from tests.harness.tools import DEADLINE_S

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "grpc-clients.md"
PAGE = HOWTO.read_text()


def block(language: str) -> str:
    """The page's only block in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def printed(arguments: list[str]) -> str:
    """What meshctl prints."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def planned(route: ModelRoute) -> RoutePlan:
    """All to the first endpoint for the default class, all to the last one for sizes."""
    spec, endpoints = route.route_spec(), route.endpoints()
    first, last = endpoints[0].id, endpoints[-1].id
    tables = {size.name: {first: 0, last: 1000} for size in spec.sizes} | {DEFAULT_CLASS: {first: 1000, last: 0}}
    return replace(route_plan(spec.id, {}), route=DesiredRoute(spec, endpoints, {}), weights=tables)


async def test_the_pages_client_is_answered(tmp_path: Path) -> None:
    """Its route, its bootstrap, its program: the size says which server, and nothing stands between."""
    async with GrpcServers(2) as servers, xds_server() as xds:
        text = block("yaml")
        for told, address in zip(("8001", "8002"), sorted(servers.addresses), strict=True):
            text = text.replace(told, address.partition(":")[2])
        route = validated(ModelRoute, parse(text.encode(), "page")[0])
        xds.apply(plan(planned(route)))
        command = next(line for line in commands() if "--xds-ca" not in line)
        bootstrap = tmp_path / "xds.json"
        bootstrap.write_text(printed([xds.address if word == "127.0.0.1:18000" else word for word in command]))
        answered = await output(block("python") + "print(answer.decode())", GRPC_XDS_BOOTSTRAP=str(bootstrap))
        assert answered == f"{route.endpoints()[-1].id}\n"


def commands() -> list[list[str]]:
    """The arguments of each command line of the page."""
    return [shlex.split(line) for line in re.findall(r"^    meshctl (.*?) > xds\.json$", PAGE, re.MULTILINE)]


async def output(program: str, **environment: str) -> str:
    """What a Python program of its own prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            told, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    return told.decode()


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: arguments[-1])
def test_commands_of_the_page_work(arguments: list[str]) -> None:
    """With the options that it gives them."""
    assert "xds_servers" in printed(arguments)


def test_what_it_links_to_is_there() -> None:
    """Pages beside it."""
    links: Any = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert [link for link in links if not (HOWTO.parent / link).exists()] == []
    assert len(links) > 1
