"""The OpenAPI file: how routes tell what they take and answer, and what all of them have in common.

A handler declares its bodies and its own problems; what the layers around it may answer (keys,
limits, sizes, the HTTP protocol itself) is added to every operation when the file is made, which
happens with the first look at it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from typing import Any

from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Example,
    OpenAPI,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)

from forecasting.sessions import sessions_between
from forecasting.settings import Settings
from serving import keys, limits, problems, protocol
from serving.edge import OPEN_PATHS, SIGNED_PATHS
from serving.exchange import DOCS
from serving.keys import Keys
from serving.problems import Problem, ProblemError
from serving.schemas import FORECASTER, SYMBOL

Document = dict[str, Any]
Examples = Mapping[str, Callable[[], object]]

EXAMPLE_ROWS = 64
LARGEST = 3.4028234e38
"""What a float32 holds."""
VERSION = r"^[1-9][0-9]{0,17}$"


# bodies -------------------------------------------------------------------------------------------
def text(
    pattern: str | None = None, form: OpenAPIFormat | None = None, says: str | None = None
) -> Schema:
    """A string."""
    return Schema(type=OpenAPIType.STRING, pattern=pattern, format=form, description=says)


def array(
    items: Schema | Reference, least: int = 1, most: int | None = None, says: str | None = None
) -> Schema:
    """A list."""
    return Schema(
        type=OpenAPIType.ARRAY, items=items, min_items=least, max_items=most, description=says
    )


def record(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """An object with these properties and no others."""
    return Schema(
        type=OpenAPIType.OBJECT,
        properties={**required, **(optional or {})},
        required=list(required),
        additional_properties=False,
    )


ANYTHING = Schema(type=OpenAPIType.OBJECT)
BINARY = text(form=OpenAPIFormat.BINARY)
PRICE = Schema(type=OpenAPIType.NUMBER, exclusive_minimum=0, maximum=LARGEST)
VOLUME = Schema(type=OpenAPIType.NUMBER, minimum=0, maximum=LARGEST)
OHLCV = {**dict.fromkeys(("open", "high", "low", "close"), PRICE), "volume": VOLUME}
WINDOW = Reference(ref="#/components/schemas/Window")
WINDOWS = Reference(ref="#/components/schemas/Windows")


def example_rows(count: int = EXAMPLE_ROWS) -> list[dict[str, str | float]]:
    """Rows that the server forecasts from, if its model's context is not longer."""
    days = sessions_between(date(2008 - count // 200 - 1, 1, 2), date(2008, 1, 2))[-count:]
    rows: list[dict[str, str | float]] = []
    for place, day in enumerate(days):
        close = round(640 + 45 * math.sin(place / 9), 2)
        prices = {"open": close - 2.5, "high": close + 6.25, "low": close - 7.75, "close": close}
        volume = 4_300_000 + 1000 * place
        rounded = {name: round(value, 2) for name, value in prices.items()}
        rows.append({"date": day.isoformat(), **rounded, "volume": volume})
    return rows


def example_window() -> dict[str, object]:
    """A body of POST /v1/forecast."""
    return {"symbol": "GOOG", "rows": example_rows()}


def header(name: str, schema: Schema, description: str, required: bool = False) -> Parameter:
    """A header that is looked at."""
    return Parameter(
        name=name, param_in="header", schema=schema, description=description, required=required
    )


CLIENT_ID = header(
    "X-Client-Id",
    text(),
    "Who asks, if not the key or the address says it: while a canary runs, the same client is "
    "always answered by the same version.",
)


def operation(
    content: Mapping[str, Schema | Reference] | None = None,
    examples: Examples | None = None,
    headers: Sequence[Parameter] = (),
    answers: Sequence[str] = (),
) -> type[Operation]:
    """An operation that reads headers and a body without the framework's help.

    Args:
        content: media type -> schema of the body.
        examples: media type -> how to make an example that the server answers.
        headers: that it looks at.
        answers: media types of bytes that it may answer beside JSON.
    """

    @dataclass
    class ReadingOperation(Operation):
        def __post_init__(self) -> None:
            if headers:
                self.parameters = [*(self.parameters or ()), *headers]
            if content:
                self.request_body = RequestBody(required=True, content=_media(content, examples))
            good = (self.responses or {}).get("200")
            if isinstance(good, OpenAPIResponse) and good.content:
                good.content |= {name: OpenAPIMediaType(schema=BINARY) for name in answers}

    return ReadingOperation


def _media(
    content: Mapping[str, Schema | Reference], examples: Examples | None
) -> dict[str, OpenAPIMediaType]:
    made = {name: make() for name, make in (examples or {}).items()}
    return {
        name: OpenAPIMediaType(
            schema=schema,
            examples={"example": Example(value=made[name])} if name in made else None,
        )
        for name, schema in content.items()
    }


# problems -----------------------------------------------------------------------------------------
def problem_spec(*errors: ProblemError) -> ResponseSpec:
    """The answer of one status: these problems."""
    return ResponseSpec(
        Problem,
        generate_examples=False,
        media_type=problems.MEDIA_TYPE,
        description=_described(errors),
        examples=[
            Example(id=error.kind, summary=error.title, value=_body(error)) for error in errors
        ],
    )


def _described(errors: Sequence[ProblemError]) -> str:
    return " or ".join(f"{error.title} (`/problems/{error.kind}`)" for error in errors)


def _body(error: ProblemError) -> dict[str, object]:
    return {
        "type": f"/problems/{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }


def _response(errors: Sequence[ProblemError]) -> Document:
    return {
        "description": _described(errors),
        "content": {
            problems.MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {
                    error.kind: {"summary": error.title, "value": _body(error)} for error in errors
                },
            }
        },
    }


DEAD = problem_spec(problems.not_following())


# the file -----------------------------------------------------------------------------------------
def config(settings: Settings, known: Keys) -> OpenAPIConfig:
    """How Litestar makes the file of a server with these settings and keys."""

    @dataclass
    class Completed(OpenAPI):
        def to_schema(self) -> Document:
            return complete(super().to_schema(), settings, known.required)

    @dataclass
    class Config(OpenAPIConfig):
        def to_openapi_schema(self) -> OpenAPI:
            made = super().to_openapi_schema()
            return Completed(**{each.name: getattr(made, each.name) for each in fields(made)})

    return Config(
        title="perennial",
        version=version("perennial"),
        description=(
            "Price quantiles for the next sessions, from a model that renews itself. Every answer "
            "carries X-Request-Id: the request's own, if it sent one of up to 64 letters, digits "
            "or ._-, which is in the server's log. Every error is a problem (RFC 9457) whose "
            "`type` never changes its meaning."
        ),
        path=DOCS,
        use_handler_docstrings=True,
        operation_id_creator=lambda handler, *_: handler.handler_name,
    )


def complete(document: Document, settings: Settings, with_keys: bool) -> Document:
    """Add to a file what all operations have in common, and take out what this server has not."""
    paths, components = document["paths"], document["components"]
    if not settings.webhook_secret.get_secret_value():
        for path in SIGNED_PATHS:
            del paths[path]
    components["schemas"] |= _windows(settings)
    components["headers"] = _HEADERS
    components["parameters"] = _PARAMETERS
    shared: Document = {}
    components["responses"] = shared
    for path, item in paths.items():
        for each in item.values():
            open_to_all = path in OPEN_PATHS | SIGNED_PATHS
            around = [*_with_keys()] if with_keys and not open_to_all else []
            around += _with_body(settings) if "requestBody" in each else ()
            for error in (*around, *_always(settings, path not in OPEN_PATHS)):
                _add(each["responses"], error, shared)
            _finish(each)
            if with_keys and open_to_all:
                each["security"] = []
    for response in shared.values():
        _finish_response(response)
    paths["/v1/models"]["get"]["responses"]["200"]["links"] = _links(paths)
    if with_keys:
        components["securitySchemes"] = _SCHEMES
        document["security"] = [{name: []} for name in _SCHEMES]
    return document


def _with_keys() -> Iterator[ProblemError]:
    yield keys.missing_key()
    yield keys.unknown_key()


def _with_body(settings: Settings) -> Iterator[ProblemError]:
    yield protocol.request_timeout(settings.request_seconds)
    yield problems.body_too_large(settings.max_body_mb)
    yield problems.bad_encoding("A whole gzip body was expected; it ends too early.")
    yield problems.bad_encoding("Content-Encoding gzip, deflate or none was expected.", 415)


def _always(settings: Settings, is_limited: bool) -> Iterator[ProblemError]:
    """What the layers around a handler may answer in its place."""
    if is_limited:
        yield limits.rate_limited("anna", 50, 0.02)
        yield problems.overloaded(settings.max_concurrency)
    else:
        yield protocol.overloaded(settings.max_connections)
    yield protocol.uri_too_long()
    yield protocol.headers_too_large()
    yield problems.internal()


def _add(responses: Document, error: ProblemError, shared: Document) -> None:
    """Document a problem: with those of the same status, or where all operations find it."""
    status = str(error.status)
    own = responses.get(status)
    name = error.kind
    if own is None or "$ref" in own:
        responses[status] = {"$ref": f"#/components/responses/{name}"}
        shared.setdefault(name, _response([error]))
        return
    (media,) = own["content"].values()
    if error.kind not in media["examples"]:
        own["description"] += f" or {_described([error])}"
        media["examples"][error.kind] = {"summary": error.title, "value": _body(error)}


def _finish(each: Document) -> None:
    each.pop("deprecated", None)
    if "parameters" in each:
        each["parameters"] = [
            {"$ref": f"#/components/parameters/{given['name']}"} if given["in"] == "path" else given
            for given in each["parameters"]
        ]
    for response in each["responses"].values():
        if "$ref" not in response:
            _finish_response(response)


def _finish_response(response: Document) -> None:
    content = response.get("content", {})
    for media in content.values():
        for example in media.get("examples", {}).values():
            example.pop("id", None)  # Litestar's, not OpenAPI's
    told = content.get(problems.MEDIA_TYPE, {}).get("examples", {})
    statuses = {example["value"]["status"] for example in told.values()}
    names = {"X-Request-Id"} | {name for status in statuses for name in _SAYS.get(status, ())}
    response["headers"] = {
        **response.get("headers", {}),
        **{name: {"$ref": f"#/components/headers/{name}"} for name in sorted(names)},
    }


def _links(paths: Document) -> Document:
    """From the list of what is served to everything that can be asked of it."""
    found = {}
    for path, item in paths.items():
        for each in item.values():
            wanted = [name for name in _IN_MODELS if f"{{{name}}}" in path]
            if wanted:
                found[each["operationId"]] = {
                    "operationId": each["operationId"],
                    "parameters": {name: _IN_MODELS[name] for name in wanted},
                }
    return found


def _windows(settings: Settings) -> Document:
    """Schemas of what is sent, with the sizes that this server is set to."""
    row = record({"date": text(form=OpenAPIFormat.DATE), **OHLCV})
    rows = array(
        Reference(ref="#/components/schemas/Row"),
        most=settings.max_rows,
        says="Trading days, oldest first, each date once, high not below low; at least `context` "
        "of them (GET /v1/models), of which the last `context` are used.",
    )
    forecaster = text(
        FORECASTER,
        says="Who shall answer, one of `forecaster` in GET /v1/models, also for a symbol that "
        "nothing was trained for; without it who serves the symbol does.",
    )
    window = record({"symbol": text(SYMBOL), "rows": rows}, {"forecaster": forecaster})
    windows = record({"windows": array(WINDOW, most=settings.max_windows)})
    made = {"Row": row, "Window": window, "Windows": windows}
    return {name: {"title": name, **schema.to_schema()} for name, schema in made.items()}


_IN_MODELS = {
    "symbol": "$response.body#/prices/0/symbol",
    "name": "$response.body#/models/0/forecaster",
    "version": "$response.body#/models/0/version",
}
_SAYS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
_SECONDS = {"type": "integer", "minimum": 1}
_HEADERS: Document = {
    "X-Request-Id": {
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
    },
    "Retry-After": {"required": True, "schema": _SECONDS, "description": "Seconds to wait."},
    "WWW-Authenticate": {"required": True, "schema": {"type": "string"}},
}
_PARAMETERS: Document = {
    name: {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": pattern},
        "description": description,
        "examples": {"example": {"value": example}},
    }
    for name, pattern, example, description in (
        ("symbol", SYMBOL, "GOOG", "One of `symbols` in GET /v1/models."),
        ("name", FORECASTER, "perennial-goog", "One of `forecaster` in GET /v1/models."),
        ("version", VERSION, "3", "In production, or the challenger's."),
    )
}
_SCHEMES: Document = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`python -m serving key new`"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
