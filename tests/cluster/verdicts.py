"""What the API server and `meshctl validate` say of the same text, side by side."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.adapters.manifests import read_all
from meshctl.api.crd import RESOURCES, definition
from meshctl.api.document import Severity
from meshctl.api.objects import Declared, read_manifest, read_object
from tests.cluster.cluster import Cluster
from tests.harness.tools import DEADLINE_S

WRONG_TYPES: tuple[Any, ...] = ("", 5, 1.5, True, None, [], {})


def fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of every field, the first item of a list standing for all."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from fields(child, f"{path}.{name}")
    if "items" in schema:
        yield from fields(schema["items"], f"{path}.0")


def spec_fields(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of the spec of one kind, as its definition says."""
    (resource,) = (resource for resource in RESOURCES if resource.model.__name__ == kind)
    (version,) = definition(resource)["spec"]["versions"]
    yield from fields(version["schema"]["openAPIV3Schema"]["properties"]["spec"], "spec")


def edges(schema: dict[str, Any]) -> Iterator[Any]:
    """Values on, just inside and just outside each bound of a field, and of every type."""
    yield from WRONG_TYPES
    for bound in ("minimum", "maximum"):
        if bound in schema:
            step = 1 if schema.get("type") == "integer" else 0.001
            yield from (schema[bound] - step, schema[bound], schema[bound] + step)
    if "maxLength" in schema:
        yield from ("a" * schema["maxLength"], "a" * (schema["maxLength"] + 1))
    if "maxItems" in schema and schema["items"]["type"] == "string":
        yield from ([f"a{i}" for i in range(schema["maxItems"] + more)] for more in (0, 1))


class Server:
    """Asks the API server what it would do with an object: nothing is stored."""

    def __init__(self, session: aiohttp.ClientSession, url: str, namespace: str) -> None:
        self._session, self._url, self.namespace = session, url, namespace
        self._turns = asyncio.Semaphore(8)

    async def answer(self, document: str) -> tuple[int, Any]:
        """HTTP status and body for one document of ours, sent as the text it is."""
        found = re.search(r'^ *"?kind"?: *"?(\w+)', document, re.MULTILINE)
        assert found is not None
        return await self.ask("POST", KINDS[found[1]].path(self.namespace), document)

    async def ask(self, method: str, path: str, body: str, **headers: str) -> tuple[int, Any]:
        """HTTP status and body for any request; `headers` say who asks, for example."""
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        types = {"Content-Type": "application/yaml", "Accept": "application/json"}
        async with self._session.request(
            method, self._url + path, params=query, data=body.encode(), headers={**types, **headers}
        ) as response:
            return response.status, orjson.loads(await response.read())

    async def answers(self, documents: str) -> list[tuple[int, Any]]:
        """Of each document in a text; a few texts at a time."""
        async with self._turns:
            return [await self.answer(part) for part in documents.split("---\n")]


@asynccontextmanager
async def asking(cluster: Cluster, namespace: str = "") -> AsyncIterator[Server]:
    """As an administrator, in `namespace`, or in a new one."""
    config = orjson.loads(cluster.kubeconfig.read_bytes())
    (one,), (user,) = config["clusters"], config["users"]
    authority = base64.b64decode(one["cluster"]["certificate-authority-data"]).decode()
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=authority))
    headers = {"Authorization": f"Bearer {user['user']['token']}"}
    limit = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=limit) as session:
        yield Server(session, one["cluster"]["server"], namespace or await cluster.namespace("api"))


async def verdicts(server: Server, directory: Path, documents: Iterable[str]) -> list[tuple[bool, bool, str]]:
    """For each text: does the API server take all of it, does `meshctl validate`, and what do they say."""
    found = []
    wanted = list(documents)
    asked = await asyncio.gather(*(server.answers(document) for document in wanted))
    for index, (document, answers) in enumerate(zip(wanted, asked, strict=True)):
        path = directory / f"{index}.yaml"
        path.write_text(document)
        _, faults = read_all([path])
        errors = [str(fault) for fault in faults if fault.severity is Severity.ERROR]
        said = [body.get("message", "") for _, body in answers]
        assert all(status in {201, 400, 422} for status, _ in answers), said
        found.append((all(status == 201 for status, _ in answers), not errors, f"{document}\n{said}\n{errors}"))
    return found


async def judged_otherwise(
    server: Server, directory: Path, *, good: Iterable[str] = (), bad: Iterable[str] = (), any_: Iterable[str] = ()
) -> list[str]:
    """Texts that are `good` to both, `bad` to both, or of which they only must think the same, and are not so."""
    odd = [said for api, ours, said in await verdicts(server, directory, good) if not (api and ours)]
    odd += [said for api, ours, said in await verdicts(server, directory, bad) if api or ours]
    odd += [said for api, ours, said in await verdicts(server, directory, any_) if api != ours]
    return odd


async def both_read(server: Server, document: str) -> tuple[Declared, Declared]:
    """As the API server would store it, and as it stands in a file."""
    status, stored = await server.answer(document)
    assert status == 201, stored
    (live,) = read_object(stored, "cluster").objects.values()
    (written,) = read_manifest(document.encode(), "f.yaml").objects.values()
    return live, written
