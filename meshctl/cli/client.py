"""How the reading commands ask a running controller, or an agent: one GET, typed, with a deadline.

Failures of the network, of HTTP and of what is no answer of theirs are mapped here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import aiohttp
import orjson
import typer
from pydantic import TypeAdapter

from meshctl.errors import InputError, MeshctlError

T = TypeVar("T")

TIMEOUT_S = 5.0
"""The controller answers from memory; later it is not there, or not well."""

LISTED = 50
"""Names in a message, at most."""

AdminOption = Annotated[
    str, typer.Option("--admin", envvar="MESHCTL_ADMIN", help="URL of the controller's admin API.", metavar="URL")
]
DEFAULT_ADMIN = "http://127.0.0.1:18001"


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked, for messages."""

    name: str
    command: str
    option: str
    """Where its address comes from."""
    example: str


CONTROLLER = Asked("controller", "meshctl run", "--admin (or MESHCTL_ADMIN)", DEFAULT_ADMIN)
AGENT = Asked("agent", "meshctl agent", "--agent", "127.0.0.1:18002")


def fetch(admin: str, path: str, type_: type[T], asked: Asked = CONTROLLER) -> T:
    """What GET `admin`/api/v1/`path` answers. Raises InputError (the asker's fault) or MeshctlError."""
    url = f"{admin.rstrip('/')}/api/v1/{path}"
    try:
        status, body = asyncio.run(_get(url))
    except aiohttp.InvalidURL as error:
        raise InputError(f"{admin!r} is no address ({asked.option}); write for example {asked.example}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        detail = _words(error) or f"no answer within {TIMEOUT_S:g} s"
        hint = f"is `{asked.command}` up, and {asked.option} its address?"
        raise MeshctlError(f"cannot reach the {asked.name} at {admin}: {detail}; {hint}") from error
    try:
        if status == 404:
            raise _not_found(orjson.loads(body))
        if status != 200:
            raise MeshctlError(f"the {asked.name} answered {url} with HTTP {status}: {body[:200]!r}")
        return TypeAdapter(type_).validate_json(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of JSON too, and of its shape
        message = f"{url} did not answer as a meshctl {asked.name} of this version; is {asked.option} right?"
        raise MeshctlError(message) from error


def _words(error: Exception) -> str:
    """Of a connection that nobody took the cause alone: the address is told anyway."""
    if isinstance(error, aiohttp.ClientConnectorError) and (cause := error.os_error).errno:
        return str(cause.strerror) if isinstance(cause, socket.gaierror) else os.strerror(cause.errno)
    return str(error)


async def _get(url: str) -> tuple[int, bytes]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
        return response.status, await response.read()


def _not_found(answer: dict[str, Any]) -> InputError:
    """The answer says what is not there and, under a second key, what is."""
    error = answer.pop("error")
    ((kind, there),) = answer.items()
    return unknown(error, kind, there)


def unknown(error: str, kind: str, there: Sequence[str]) -> InputError:
    """`error` says what is not there; these of its `kind` (routes, proxies) are."""
    if not there:
        return InputError(f"{error}; there are no {kind}")
    more = f" and {len(there) - LISTED} more" if len(there) > LISTED else ""
    return InputError(f"{error}; the {kind} are: {', '.join(there[:LISTED])}{more}")
