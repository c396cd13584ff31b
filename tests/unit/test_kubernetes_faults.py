"""How the API server's and the transport's errors become this program's."""

from __future__ import annotations

import inspect
from typing import Any

import aiohttp
import orjson
import pytest

from meshctl.adapters.kubernetes import faults
from meshctl.errors import FieldConflictError, MeshctlError, RefusedError, UnavailableError

DOING = "apply VirtualService ns/route"
CONFLICT = {"details": {"causes": [{"reason": "FieldManagerConflict", "field": ".spec.http"}]}, "reason": "Conflict"}

ANSWERS: list[tuple[int, dict[str, Any], type[MeshctlError]]] = [
    (400, {"reason": "BadRequest"}, RefusedError),
    (401, {"reason": "Unauthorized"}, faults.UnauthenticatedError),
    (403, {"reason": "Forbidden"}, faults.ForbiddenError),
    (404, {"reason": "NotFound"}, faults.AbsentError),
    (405, {"reason": "MethodNotAllowed"}, RefusedError),
    (409, CONFLICT, FieldConflictError),
    (409, {"reason": "AlreadyExists"}, faults.ExistsError),
    (409, {"reason": "Conflict"}, faults.ChangedError),
    (410, {"reason": "Expired"}, faults.ExpiredError),
    (415, {"reason": "UnsupportedMediaType"}, RefusedError),
    (418, {}, RefusedError),
    (422, {"reason": "Invalid"}, RefusedError),
    (429, {"reason": "TooManyRequests"}, faults.BusyError),
    (500, {"reason": "InternalError"}, UnavailableError),
    (500, {"message": "failed to create typed patch object (ns/route): .spec.x: field not declared"}, RefusedError),
    (502, {}, UnavailableError),
    (503, {"reason": "ServiceUnavailable"}, UnavailableError),
    (503, {"details": {"retryAfterSeconds": 2}}, faults.BusyError),
    (504, {"reason": "Timeout"}, UnavailableError),
    (302, {}, UnavailableError),
]


@pytest.mark.parametrize(("status", "said", "kind"), ANSWERS, ids=[f"{s}-{x.get('reason')}" for s, x, _ in ANSWERS])
def test_an_answer_is_mapped_by_status_and_reason(status: int, said: dict[str, Any], kind: type[MeshctlError]) -> None:
    """And the message says what was done to which object, with the server's words."""
    error = faults.of_answer(DOING, status, orjson.dumps({"message": "because", **said}))
    assert type(error) is kind
    assert str(error).startswith(f"{DOING}: {status}")
    assert said.get("message", "because") in str(error)


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("100000", 60.0), ("Wed, 21 Oct 2026", 0.0), (None, 0.0)])
def test_retry_after_is_a_number_of_seconds_within_reason(header: str | None, seconds: float) -> None:
    """A date, which no API server sends, and a missing one leave the pause to the caller."""
    error = faults.of_answer(DOING, 429, b"", header)
    assert isinstance(error, faults.BusyError)
    assert error.retry_after_s == seconds


def test_an_answer_that_no_api_server_gave_is_quoted_in_part() -> None:
    """A proxy's page is neither JSON nor short."""
    error = faults.of_answer(DOING, 502, b"<html>" + b"x" * 10_000)
    assert type(error) is UnavailableError
    assert "<html>" in str(error)
    assert len(str(error)) < 1000


def test_every_error_of_the_transport_is_one_that_is_mapped() -> None:
    """Nothing that aiohttp raises for a request passes through unmapped."""
    raised = [
        value
        for _, value in inspect.getmembers(aiohttp, inspect.isclass)
        if issubclass(value, Exception) and not issubclass(value, Warning)
    ]
    unmapped = {value.__name__ for value in raised if not issubclass(value, faults.FOREIGN)}
    # Of server and websocket sides, and of its own streams: not raised by a client's request.
    assert unmapped <= {
        "WebSocketError",
        "EofStream",
        "InvalidUrlClientError",
        "WSMessageTypeError",
        "BadContentDispositionHeader",
    }
    for error in (aiohttp.ClientPayloadError("cut"), ConnectionResetError(), TimeoutError()):
        assert str(faults.of_exception(DOING, error, 3.0)).startswith(f"{DOING}: ")
