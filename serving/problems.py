"""Errors as problem+json (RFC 9457), each with a stable `type`."""

import logging
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from forecasting.errors import PerennialError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
CLIENT_GONE = 499
"""Status in logs and figures of a request whose client did not wait for the answer."""


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


_LONGEST = 60
"""Characters of a client's own value that are told in an error."""


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every error answer."""

    type: Annotated[str, msgspec.Meta(pattern="^/problems/[a-z-]+$")]
    title: str
    status: Annotated[int, msgspec.Meta(ge=400, le=599)]
    detail: str
    instance: str = ""
    error: str = ""
    """`detail` once more, where the Open Inference Protocol's clients look for it."""


class ProblemError(PerennialError):
    """A request that is answered with a problem.

    Args:
        kind: last part of the problem's `type`, which never changes its meaning.
        status: HTTP status.
        title: the kind in words.
        detail: what was expected, what came, what to do.

    Attributes:
        headers: of the answer, beside those of every problem.
    """

    def __init__(self, kind: str, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.status = status
        self.title = title
        self.detail = detail
        self.headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else {}

    def problem(self, path: str) -> "Problem":
        """The body of the answer to a request for `path`."""
        error = self.detail if path.startswith("/v2") else ""
        kind = f"/problems/{self.kind}"
        return Problem(kind, self.title, self.status, self.detail, path, error)


def unknown_symbol(symbol: str, served: list[str]) -> ProblemError:
    """404: no model serves the symbol."""
    return ProblemError(
        "unknown-symbol",
        404,
        "Unknown symbol",
        f"One of {_some(served)} was expected; got {_cut(symbol)}. GET /v1/models lists every "
        "symbol that is served; train and promote a model for another one, or send its rows as "
        "JSON to POST /v1/forecast and name the `forecaster` that shall answer.",
    )


def bad_symbol(symbol: str) -> ProblemError:
    """422: a name that no symbol has."""
    return ProblemError(
        "bad-symbol",
        422,
        "Bad symbol",
        f"A symbol of 1 to 32 letters, digits or .^=_- was expected, the first of them a letter, a "
        f"digit or ^, as in GOOG; got "
        f"{_cut(symbol)}.",
    )


def unknown_model(name: str, served: list[str]) -> ProblemError:
    """404: no model of that name, or no version of it, is served."""
    return ProblemError(
        "unknown-model",
        404,
        "Unknown model",
        f"One of {_some(served)} was expected; got {_cut(name)}. GET /v1/models lists what is "
        "served.",
    )


def no_model() -> ProblemError:
    """503: nothing is served yet."""
    return ProblemError(
        "no-model",
        503,
        "No model yet",
        "No model version has been promoted to this server yet, or none could be loaded (GET "
        "/v1/models says why). Train one (the deployment `train`) and try again.",
    )


def no_prices(symbol: str, reason: str) -> ProblemError:
    """503: there is a model, but not enough known rows of the symbol."""
    return ProblemError(
        "no-prices",
        503,
        "No usable latest prices",
        f"The latest prices of {symbol} cannot be forecast from: {reason} Ingest the symbol again, "
        "or POST rows of your own to /v1/forecast.",
    )


def malformed_json(error: Exception) -> ProblemError:
    """400: the body is no JSON."""
    return ProblemError(
        "malformed-json",
        400,
        "Malformed JSON",
        f"A JSON object was expected; the body cannot be parsed: {error}. Send "
        '{"symbol": ..., "rows": [{"date": ..., "open": ..., ...}, ...]}.',
    )


def invalid_request(error: Exception, expected: str) -> ProblemError:
    """422: JSON of another shape."""
    return ProblemError(
        "invalid-request", 422, "Invalid request", f"{str(error)[:300]}. Expected: {expected}."
    )


def bad_prices(detail: str) -> ProblemError:
    """422: values that cannot be prices."""
    return ProblemError("bad-prices", 422, "Bad prices", detail)


def bad_dates(detail: str) -> ProblemError:
    """422: rows out of order, or out of the calendar."""
    return ProblemError("bad-dates", 422, "Bad dates", detail)


def too_few_rows(needed: int, got: int) -> ProblemError:
    """422: less history than the model sees."""
    return ProblemError(
        "too-few-rows",
        422,
        "Too few rows",
        f"At least {needed} rows (trading days) were expected; got {got}. Send more history, "
        "oldest first; older rows than needed are ignored.",
    )


def too_many_rows(most: int, got: int) -> ProblemError:
    """422: a window longer than any model sees."""
    return ProblemError(
        "too-many-rows",
        422,
        "Too many rows",
        f"At most {most} rows were expected in one window; got {got}. Only the last `context` of "
        "them (GET /v1/models) are used: send fewer, or raise PERENNIAL_MAX_ROWS.",
    )


def window_count(most: int, got: int) -> ProblemError:
    """422: no window, or more than one request may hold."""
    return ProblemError(
        "window-count",
        422,
        "Number of windows",
        f"1 to {most} windows were expected in one request; got {got}. Send the rest in further "
        "requests, or raise PERENNIAL_MAX_WINDOWS.",
    )


def no_forecast(reason: Exception) -> ProblemError:
    """422: the model does not answer to these rows with numbers."""
    return ProblemError("no-forecast", 422, "No forecast for these rows", str(reason))


def log_unavailable(reason: Exception) -> ProblemError:
    """503: forecasts can no longer be recorded."""
    return ProblemError("log-unavailable", 503, "Prediction log unavailable", str(reason))


def body_too_large(limit_mb: float) -> ProblemError:
    """413: more than the server reads."""
    return ProblemError(
        "body-too-large",
        413,
        "Body too large",
        f"At most {limit_mb:g} MB were expected; the body is larger. Send only the rows that the "
        "model needs (`context` in GET /v1/models), or raise PERENNIAL_MAX_BODY_MB.",
    )


def unsupported_media_type(got: str, expected: str) -> ProblemError:
    """415: a body of a kind that the route does not read."""
    return ProblemError(
        "unsupported-media-type",
        415,
        "Unsupported media type",
        f"Content-Type {expected} was expected; got {_cut(got or 'none')}.",
    )


def bad_encoding(detail: str, status: int = 400) -> ProblemError:
    """400 or 415: a compressed body that cannot be read."""
    return ProblemError("bad-encoding", status, "Bad content encoding", detail)


def overloaded(limit: int) -> ProblemError:
    """503: more requests in progress than the worker takes."""
    return ProblemError(
        "overloaded",
        503,
        "Overloaded",
        f"At most {limit} requests are answered at a time by one worker "
        "(PERENNIAL_MAX_CONCURRENCY); try again after Retry-After seconds.",
    )


def not_open(forecaster: str, reason: Exception) -> ProblemError:
    """503: a model that was closed and cannot be opened again."""
    return ProblemError(
        "no-model", 503, "Model not open", f"{forecaster} cannot be opened again: {reason}"
    )


def not_following() -> ProblemError:
    """503: a worker whose follower ended."""
    return ProblemError(
        "not-following",
        503,
        "No longer follows the model store",
        "This worker answers, but takes up nothing new any more; restart it.",
    )


def no_webhook() -> ProblemError:
    """404: the server was not told of a webhook."""
    return ProblemError(
        "no-webhook",
        404,
        "No webhook",
        "This server takes no webhook; set PERENNIAL_WEBHOOK_SECRET and register it again.",
    )


def internal() -> ProblemError:
    """500: a defect of the server."""
    return ProblemError(
        "internal", 500, "Internal error", "The server failed on this request; its log says more."
    )


def _cut(value: str) -> str:
    """A client's value in an error text, which stays short."""
    return repr(value) if len(value) <= _LONGEST else f"{value[:_LONGEST]!r}..."


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def handlers(max_body_mb: float) -> ExceptionHandlersMap:
    """Exception handlers that answer every error as a problem."""

    def too_large_or(request: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
        if error.status_code == 413:
            return _answer(request, body_too_large(max_body_mb))
        return _http_problem(request, error)

    return {
        ProblemError: _answer,
        HTTPException: too_large_or,
        ClientGoneError: _nobody,
        Exception: _unexpected,
    }


def _nobody(_: Request[Any, Any, Any], __: ClientGoneError) -> Response[None]:
    return Response(None, status_code=CLIENT_GONE)


def _answer(request: Request[Any, Any, Any], error: ProblemError) -> Response[Problem]:
    return Response(
        error.problem(request.url.path),
        status_code=error.status,
        media_type=MEDIA_TYPE,
        headers=error.headers,
    )


def _http_problem(request: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    phrase = HTTPStatus(error.status_code).phrase
    kind = phrase.lower().replace(" ", "-")
    detail = (
        f"{request.method} {request.url.path}: {error.detail}. The API is described at /schema."
    )
    problem = Problem(f"/problems/{kind}", phrase, error.status_code, detail, request.url.path)
    return Response(
        problem, status_code=error.status_code, media_type=MEDIA_TYPE, headers=error.headers
    )


def _unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    problem = internal().problem(request.url.path)
    return Response(problem, status_code=500, media_type=MEDIA_TYPE)
