"""Requests to the API server: each with a deadline, retried within it, its errors mapped by `faults`.

Only what cannot do harm is retried: a request that is idempotent, or one that was certainly not carried out (429, or
503 with Retry-After). Nothing is read to be modified and written back, but for the Lease: `apply` is server-side apply.
Bodies are plain JSON; `kubernetes.aio` gives configuration and transport.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay, wait_random_exponential

from istio.names import MANAGER
from meshctl.adapters.kubernetes import faults
from meshctl.adapters.kubernetes.access import configuration
from meshctl.adapters.kubernetes.faults import AbsentError, BusyError, ChangedError, ExpiredError
from meshctl.adapters.kubernetes.kinds import KINDS, Kind, Raw
from meshctl.adapters.kubernetes.sockets import Sockets
from meshctl.errors import UnavailableError
from meshctl.ports import KubeObject, ObjectKey

DEADLINE_S = 10.0
"""Of a request with all its retries."""
ATTEMPT_S = 5.0
"""Of one try of it: a connection that is half open costs this, not the deadline."""
LIST_DEADLINE_S = 60.0
PAGE = 500
"""Objects per answer to a list; 500 pods are some 3 MB."""
_CONNECT_S = 3.0
_BACKOFF = wait_random_exponential(multiplier=0.1, max=2.0)


class Listing(NamedTuple):
    items: tuple[Raw, ...]
    resource_version: str
    """Of the collection: a watch from here misses nothing."""


class Event(NamedTuple):
    what: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    value: Raw


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    doing: str
    """For messages: ``apply VirtualService ns/name``."""
    url: str
    body: object = None
    content_type: str = "application/json"
    idempotent: bool = True
    attempt_s: float = ATTEMPT_S
    deadline_s: float = DEADLINE_S
    retry: bool = True


class Client:
    """One API server. Methods raise FieldConflictError, RefusedError or UnavailableError (or subclasses: `faults`)."""

    def __init__(self, config: Configuration) -> None:
        config.connection_pool_maxsize = 0  # no limit: every watch holds a connection for minutes
        self._config = config
        self._http: Any = _Transport(config)  # the package gives its methods no types

    @property
    def server(self) -> str:
        return str(self._config.host)

    async def close(self) -> None:
        await self._http.close()

    # ------------------------------------------------------------------------------------------------------ reading

    async def get(self, key: ObjectKey, *, deadline_s: float = DEADLINE_S, retry: bool = True) -> Raw | None:
        """The object as it is now; None when there is none (or no such kind)."""
        request = _Request("GET", f"get {key}", self._url(key), deadline_s=deadline_s, retry=retry)
        try:
            return await self._send(request)
        except AbsentError:
            return None

    async def pages(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        label_selector: str = "",
        field_selector: str = "",
        page: int = PAGE,
        deadline_s: float = LIST_DEADLINE_S,
        retry: bool = True,
    ) -> AsyncGenerator[Listing]:
        """All objects as of one moment, never older than what was seen before; each page has that moment's version.

        Raises ExpiredError when the server forgot that moment between two pages: begin again.
        """
        ends_s = time.monotonic() + deadline_s
        query = {"limit": str(page)} | _selected(label_selector, field_selector)
        where = f"list {kind.resource}" + (f" in namespace {namespace}" if namespace else "")
        while True:
            left_s = max(ends_s - time.monotonic(), 0.1)
            url = self._config.host + kind.path(namespace) + "?" + urlencode(query)
            answer = await self._send(_Request("GET", where, url, attempt_s=left_s, deadline_s=left_s, retry=retry))
            metadata = answer["metadata"]
            yield Listing(tuple(answer.get("items") or ()), metadata["resourceVersion"])
            if not (token := metadata.get("continue")):
                return
            query["continue"] = token

    async def list(self, kind: str, namespace: str = "", *, label_selector: str = "", retry: bool = True) -> Listing:
        """`pages` in one. A reflector is better for what is wanted more than once."""
        items: tuple[Raw, ...] = ()
        version = ""
        async for page in self.pages(KINDS[kind], namespace, label_selector=label_selector, retry=retry):
            items, version = items + page.items, page.resource_version
        return Listing(items, version)

    async def watch(
        self,
        kind: Kind,
        namespace: str,
        resource_version: str,
        *,
        label_selector: str = "",
        field_selector: str = "",
        timeout_s: float,
        silence_s: float,
    ) -> AsyncGenerator[Event | None]:
        """What happens after `resource_version`. The first item is None: the server has agreed to tell.

        Ends when the server ends it (after about `timeout_s`). Raises ExpiredError when the version is too old,
        UnavailableError when the connection is lost or silent for `silence_s`.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(int(timeout_s)),
        } | _selected(label_selector, field_selector)
        doing = f"watch {kind.resource}" + (f" in namespace {namespace}" if namespace else "")
        url = self._config.host + kind.path(namespace) + "?" + urlencode(query)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=silence_s)
        try:
            async with asyncio.timeout(LIST_DEADLINE_S):
                response = await self._open(_Request("GET", doing, url), limits)
            async with response:
                yield None
                async for line in _lines(response):
                    yield _event(doing, line)
        except faults.FOREIGN as error:
            raise faults.of_exception(doing, error, silence_s) from error

    # ------------------------------------------------------------------------------------------------------ writing

    async def apply(
        self,
        wanted: KubeObject,
        *,
        force: bool = False,
        subresource: str = "",
        manager: str = MANAGER,
        deadline_s: float = DEADLINE_S,
    ) -> Raw:
        """Server-side apply; the object as it then is. `force` takes over fields that others own."""
        key = _key_of(wanted)
        query = {"fieldManager": manager, "force": str(force).lower(), "fieldValidation": "Strict"}
        doing = f"apply {'the ' + subresource + ' of ' if subresource else ''}{key}"
        url = self._url(key, subresource, query)
        kind = "application/apply-patch+yaml"
        return await self._send(_Request("PATCH", doing, url, dict(wanted), kind, deadline_s=deadline_s))

    async def merge_patch(
        self,
        key: ObjectKey,
        patch: Mapping[str, Any],
        *,
        subresource: str = "",
        manager: str = MANAGER,
        deadline_s: float = DEADLINE_S,
    ) -> Raw:
        """JSON merge patch (RFC 7386); the object as it then is. Raises AbsentError when there is none."""
        url = self._url(key, subresource, {"fieldManager": manager, "fieldValidation": "Strict"})
        kind = "application/merge-patch+json"
        return await self._send(_Request("PATCH", f"patch {key}", url, dict(patch), kind, deadline_s=deadline_s))

    async def create(
        self, wanted: KubeObject, *, manager: str = MANAGER, deadline_s: float = DEADLINE_S, retry: bool = True
    ) -> Raw:
        """A new object; raises ExistsError when there is one (perhaps from a try whose answer was lost)."""
        key = _key_of(wanted)
        url = self._url(key._replace(name=""), "", {"fieldManager": manager, "fieldValidation": "Strict"})
        doing, body = f"create {key}", dict(wanted)
        return await self._send(
            _Request("POST", doing, url, body, idempotent=False, deadline_s=deadline_s, retry=retry)
        )

    async def replace(
        self, wanted: KubeObject, *, manager: str = MANAGER, deadline_s: float = DEADLINE_S, retry: bool = True
    ) -> Raw:
        """The whole object, if its resourceVersion is still the one in `wanted`; raises ChangedError otherwise."""
        key = _key_of(wanted)
        url = self._url(key, "", {"fieldManager": manager})
        doing, body = f"replace {key}", dict(wanted)
        return await self._send(_Request("PUT", doing, url, body, idempotent=False, deadline_s=deadline_s, retry=retry))

    async def bind(
        self,
        pod: ObjectKey,
        node: str,
        *,
        uid: str,
        resource_version: str,
        annotations: Mapping[str, str],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """The pod, if it is still the one and as it was in that version, gets its node and `annotations` in one write.

        Raises ChangedError when it is not, AbsentError when it is gone: then, and after every RefusedError, it is
        certain that nothing was written. Any other UnavailableError leaves that open.
        """
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod.name, "namespace": pod.namespace, **preconditions, "annotations": annotations},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        url = self._url(pod, "binding", {"fieldManager": MANAGER, "fieldValidation": "Strict"})
        doing = f"bind {pod} to {node}"
        await self._send(_Request("POST", doing, url, body, idempotent=False, deadline_s=deadline_s))

    async def delete(
        self, key: ObjectKey, *, uid: str = "", propagation: str = "Background", deadline_s: float = DEADLINE_S
    ) -> None:
        """Delete the object (with this UID, if given). One that is gone, or is another one by now, is no error."""
        options: Raw = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self._send(_Request("DELETE", f"delete {key}", self._url(key), options, deadline_s=deadline_s))
        except AbsentError:
            return
        except ChangedError:
            now = await self.get(key)
            if now is not None and uid in ("", now["metadata"]["uid"]):
                raise

    # ---------------------------------------------------------------------------------------------------- transport

    def _url(self, key: ObjectKey, subresource: str = "", query: Mapping[str, str] | None = None) -> str:
        path = KINDS[key.kind].path(quote(key.namespace), quote(key.name), subresource)
        return str(self._config.host) + path + (f"?{urlencode(query)}" if query else "")

    async def _send(self, request: _Request) -> Raw:
        """With retries. Raises what the last try raised."""
        ends_s = time.monotonic() + request.deadline_s
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: request.retry and _may_retry(error, request.idempotent)),
            stop=stop_before_delay(request.deadline_s),
            wait=_pause_s,
            reraise=True,
        ):
            with attempt:
                return await self._try(request, min(request.attempt_s, max(ends_s - time.monotonic(), 0.01)))
        raise AssertionError("tenacity returned without an outcome")

    async def _try(self, request: _Request, limit_s: float) -> Raw:
        try:
            async with asyncio.timeout(limit_s):
                limits = aiohttp.ClientTimeout(total=None, sock_connect=min(limit_s, _CONNECT_S))
                async with await self._open(request, limits) as response:
                    answer = orjson.loads(await response.read())
        except faults.FOREIGN as error:
            raise faults.of_exception(request.doing, error, limit_s) from error
        if not isinstance(answer, dict):
            raise UnavailableError(f"{request.doing}: the answer is not an object; is {self.server} an API server?")
        return answer

    async def _open(self, request: _Request, limits: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        """The answer's head is there and it is a success; its body is still to be read, by `async with`."""
        headers = {"Accept": "application/json", "Content-Type": request.content_type, "User-Agent": MANAGER}
        if credentials := (await self._config.auth_settings()).get("BearerToken"):
            headers["Authorization"] = str(credentials["value"])
        answer = await self._http.request(
            request.method, request.url, headers=headers, body=request.body, _request_timeout=limits
        )
        response: aiohttp.ClientResponse = answer.response
        if 200 <= response.status < 300:
            return response
        async with response:
            body = await response.read()
        raise faults.of_answer(request.doing, response.status, body, response.headers.get("Retry-After"))


@asynccontextmanager
async def connect(kubeconfig: Path | None = None, context: str | None = None) -> AsyncIterator[Client]:
    """A client that is closed at the end; nothing is sent yet. Raises InputError when there is no configuration."""
    client = Client(await configuration(kubeconfig, context))
    try:
        yield client
    finally:
        await client.close()


class _Transport(RESTClientObject):
    """The package's own, over connections that find out when their peer is dead, and that all end with `close`."""

    def __init__(self, config: Configuration) -> None:
        config.client_session_kwargs = {"trust_env": _proxied(str(config.host))}
        super().__init__(config)
        self._sockets = Sockets()

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(limit=self.maxsize, ssl=self.ssl_context, socket_factory=self._sockets.make)

    async def close(self) -> None:
        await super().close()
        await self._sockets.close()


def _proxied(server: str) -> bool:
    """Whether the environment names a proxy for it. Without one aiohttp is not to look there for each request: it does
    so in two threads, one after the other, which is half of a request's CPU time (0.8 ms; 0.4 without), and a login
    that a .netrc has for the host fails every request that has a token."""
    parts = urlsplit(server)
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


def _may_retry(error: BaseException, idempotent: bool) -> bool:
    if isinstance(error, BusyError):
        return True
    return idempotent and isinstance(error, UnavailableError) and not isinstance(error, ExpiredError | ChangedError)


def _pause_s(state: RetryCallState) -> float:
    """Jittered and growing, but never less than the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.retry_after_s if isinstance(error, BusyError) else 0.0
    return max(asked_s, _BACKOFF(state))


def _selected(labels: str, fields: str) -> dict[str, str]:
    """The part of a list's or a watch's query that says which objects."""
    return {name: text for name, text in (("labelSelector", labels), ("fieldSelector", fields)) if text}


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines. What a lost connection left of the last one is not a line."""
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line


def _event(doing: str, line: bytes) -> Event:
    said = orjson.loads(line)
    what, value = said["type"], said["object"]
    if what == "ERROR":
        raise faults.of_answer(doing, int(value.get("code") or 500), orjson.dumps(value))
    return Event(what, value)


def _key_of(wanted: KubeObject) -> ObjectKey:
    return KINDS[wanted["kind"]].key(wanted)
