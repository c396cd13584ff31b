"""What went wrong at the API server, in this program's own errors: the ONE place where foreign ones are mapped.

The subclasses here are for callers who act differently (a reflector lists again after 410); for everyone else they
are what `meshctl.errors` calls them. A message says what was being done, to which object, and the server's words.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from meshctl.errors import FieldConflictError, MeshctlError, RefusedError, UnavailableError

_DETAIL_CHARS = 600
_MOST_RETRY_AFTER_S = 60.0
_NOT_IN_SCHEMA = "failed to create typed patch object"
"""Server-side apply answers 500 for a field that the kind does not have (seen with 1.37)."""


class AbsentError(RefusedError):
    """404: no such object, or no such kind."""


class ForbiddenError(RefusedError):
    """401, 403: not with these credentials."""


class ExistsError(RefusedError):
    """409 AlreadyExists: an object of this name is there."""


class ExpiredError(UnavailableError):
    """410: the version asked for is no longer known; list again."""


class ChangedError(UnavailableError):
    """409 Conflict: somebody else wrote in between (resourceVersion or UID differ); read again."""


class BusyError(UnavailableError):
    """429, or 503 with Retry-After: certainly not done; ask again after `retry_after_s`."""

    retry_after_s: float = 0.0


class UnauthenticatedError(ForbiddenError):
    """401: credentials that the server does not know (any more)."""


BY_STATUS: Mapping[int, type[MeshctlError]] = {
    400: RefusedError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: AbsentError,
    405: RefusedError,
    406: RefusedError,
    408: UnavailableError,
    409: ChangedError,
    410: ExpiredError,
    413: RefusedError,
    415: RefusedError,
    422: RefusedError,
    425: UnavailableError,
    429: BusyError,
}
"""Any other 4xx is refused; 5xx, and what no API server says, is unavailable."""


def of_answer(doing: str, status: int, body: bytes, retry_after: str | None = None) -> MeshctlError:
    """The error for an answer that is not a success. `doing` says what was tried, to which object."""
    said = _status_object(body)
    reason = said.get("reason", "")
    kind = BY_STATUS.get(status, RefusedError if 400 <= status < 500 else UnavailableError)
    if status == 409:
        kind = _conflict(said)
    retry_after_s = _retry_after_s(said, retry_after)
    if status == 503 and retry_after_s is not None:
        kind = BusyError
    if _NOT_IN_SCHEMA in str(said.get("message")):
        kind = RefusedError
    words = str(said.get("message") or body.decode("utf-8", "replace").strip() or "no reason given")[:_DETAIL_CHARS]
    error = kind(f"{doing}: {status}{f' {reason}' if reason else ''}: {words}")
    if isinstance(error, BusyError):
        error.retry_after_s = retry_after_s or 0.0
    return error


def of_exception(doing: str, error: Exception, deadline_s: float) -> UnavailableError:
    """The error for a request that got no whole answer."""
    if isinstance(error, TimeoutError):
        return UnavailableError(f"{doing}: no answer within {deadline_s:.3g} s")
    return UnavailableError(f"{doing}: {str(error) or type(error).__name__}")


FOREIGN = (aiohttp.ClientError, OSError, TimeoutError, ssl.SSLError, orjson.JSONDecodeError)
"""What the transport raises when it gets no whole answer."""


def _conflict(said: Mapping[str, Any]) -> type[MeshctlError]:
    causes = (said.get("details") or {}).get("causes") or ()
    if any(cause.get("reason") == "FieldManagerConflict" for cause in causes):
        return FieldConflictError
    return ExistsError if said.get("reason") == "AlreadyExists" else ChangedError


def _status_object(body: bytes) -> Mapping[str, Any]:
    """The ``Status`` in the body; empty when something else than an API server answered (a proxy's page, say)."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}


def _retry_after_s(said: Mapping[str, Any], header: str | None) -> float | None:
    """Seconds to wait, as the header or the Status says; None when neither does (an HTTP date counts as neither)."""
    for value in (header, (said.get("details") or {}).get("retryAfterSeconds")):
        if value is not None and str(value).isdecimal():
            return min(float(value), _MOST_RETRY_AFTER_S)
    return None
