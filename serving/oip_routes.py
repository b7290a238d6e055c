"""Routes of the Open Inference Protocol v2 (KServe, Triton) over HTTP."""

from collections.abc import Mapping
from datetime import date
from importlib.metadata import version as installed

from litestar import MediaType, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIType, Schema

from forecasting.contract import COLUMNS
from forecasting.errors import ModelError, ServiceError
from serving import oip, openapi, problems
from serving.answers import stacked
from serving.exchange import Exchange
from serving.intake import EPOCH_ORDINAL
from serving.open_models import Served
from serving.openapi import problem_spec
from serving.routes import Asked, live, parts, ready
from serving.schemas import Health, InferAnswer
from serving.service import Service

_MODEL = "/v2/models/{name:str}"
_VERSION = _MODEL + "/versions/{version:str}"
_UNKNOWN = problem_spec(problems.unknown_model("goog", ["perennial-goog"]))
_SIZE = Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=2**31 - 1)
_DAY = Schema(type=OpenAPIType.INTEGER)


def _tensor(name: str, datatypes: Mapping[str, Schema], rank: int) -> Schema:
    """A tensor in JSON; its elements in one list in row-major order, or nested like its shape."""
    kinds = list(datatypes.values())
    items = kinds[0] if len(set(map(id, kinds))) == 1 else Schema(any_of=kinds)
    for _ in range(rank - 1):
        items = Schema(any_of=[items, openapi.array(items)])
    return openapi.record(
        {
            "name": Schema(type=OpenAPIType.STRING, enum=[name]),
            "shape": openapi.array(_SIZE, rank, rank),
            "datatype": Schema(type=OpenAPIType.STRING, enum=list(datatypes)),
            "data": openapi.array(items),
        },
        {"parameters": openapi.ANYTHING},
    )


_NUMBER = Schema(type=OpenAPIType.NUMBER)
_OUTPUT = openapi.record(
    {"name": Schema(type=OpenAPIType.STRING, enum=[oip.OUTPUT])},
    {
        "parameters": Schema(
            type=OpenAPIType.OBJECT,
            properties={"binary_data": Schema(type=OpenAPIType.BOOLEAN)},
        )
    },
)
_REQUEST = openapi.record(
    {
        "inputs": openapi.array(
            Schema(
                any_of=[
                    _tensor("ohlcv", {"FP32": _NUMBER, "FP64": _NUMBER}, 3),
                    _tensor("dates", {"INT64": _DAY, "INT32": _DAY}, 2),
                    _tensor("symbol", {"BYTES": openapi.text(), "INT64": _DAY, "INT32": _DAY}, 1),
                ]
            ),
            2,
            3,
            "Each once: `ohlcv` [windows, context, 5], `dates` (days since 1970-01-01) [windows, "
            "context], and `symbol` [windows], which may be left out where the model has only one. "
            "With raw bytes instead of `data` the body is an octet-stream.",
        )
    },
    {
        "id": openapi.text(),
        "outputs": openapi.array(_OUTPUT, 0, 1),
        "parameters": Schema(
            type=OpenAPIType.OBJECT,
            properties={"binary_data_output": Schema(type=OpenAPIType.BOOLEAN)},
        ),
    },
)


def _example() -> dict[str, object]:
    rows = openapi.example_rows()
    prices = [[row[name] for name in COLUMNS] for row in rows]
    days = [date.fromisoformat(str(row["date"])).toordinal() - EPOCH_ORDINAL for row in rows]
    count = len(rows)
    return {
        "inputs": [
            {"name": "ohlcv", "shape": [1, count, 5], "datatype": "FP32", "data": [prices]},
            {"name": "dates", "shape": [1, count], "datatype": "INT64", "data": days},
            {"name": "symbol", "shape": [1], "datatype": "BYTES", "data": ["GOOG"]},
        ]
    }


_NOT_READY = problem_spec(problems.no_model())
_JSON, _BYTES = "application/json", "application/octet-stream"
_INFER = openapi.operation(
    {_JSON: _REQUEST, _BYTES: openapi.BINARY},
    {_JSON: _example},
    [
        openapi.header(
            oip.HEADER_LENGTH,
            Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=10**12 - 1),
            "Bytes of the JSON, where raw bytes of binary tensors follow it.",
        )
    ],
    [_BYTES],
)
_ANSWERS = {
    200: ResponseSpec(InferAnswer, generate_examples=False, description="The quantiles."),
    400: problem_spec(
        oip.invalid_tensor("ohlcv", "shape [1, 64, 5] was expected; got [1, 2, 5]."),
        oip.invalid_request("inputs were expected."),
        oip.malformed_json(ValueError("unexpected end of data"), "The JSON of a request"),
    ),
    404: problem_spec(
        problems.unknown_model("goog", ["perennial-goog"]),
        problems.unknown_symbol("index 7", ["0 (GOOG)"]),
    ),
    415: problem_spec(problems.unsupported_media_type("text/plain", f"{_JSON} or {_BYTES}")),
    422: problem_spec(
        problems.bad_prices("Prices must be finite and above zero; got -1."),
        problems.bad_dates("Rows must ascend by date."),
        problems.window_count(1024, 2000),
        problems.no_forecast(ModelError("The model's numbers are not finite.")),
    ),
    503: problem_spec(
        problems.no_model(),
        problems.log_unavailable(ServiceError("The prediction log is full.")),
    ),
}


def served_model(service: Service, name: str, version: str | None = None) -> Served:
    """The version of a forecaster that a request asks for: production, if it names none.

    Raises:
        ProblemError: it is not served.
    """
    state = service.state
    if not state.champions:
        raise problems.no_model()
    if name not in state.champions:
        raise problems.unknown_model(name, sorted(state.champions))
    served = state.versions_of(name)
    if version is None:
        return served[0]
    for each in served:
        if str(each.version) == version:
            return each
    numbers = [f"version {each.version}" for each in served]
    raise problems.unknown_model(f"version {version}", numbers)


@get("/v2", summary="What this server is")
async def get_server() -> oip.ServerMetadata:
    """Name, version and extensions of the Open Inference Protocol."""
    return oip.server_metadata(installed("perennial"))


@get("/v2/health/live", summary="Whether the server lives", responses={503: openapi.DEAD})
async def get_v2_live(request: Asked) -> Health:
    """As /health/live."""
    return live(parts(request)[0])


@get("/v2/health/ready", summary="Whether it can forecast", responses={503: _NOT_READY})
async def get_v2_ready(request: Asked) -> Health:
    """As /health/ready."""
    return ready(parts(request)[0])


@get(_MODEL, summary="Inputs and outputs of a model", responses={404: _UNKNOWN, 503: _NOT_READY})
async def get_model(request: Asked, name: str) -> oip.ModelMetadata:
    """Names, datatypes and shapes of the tensors; the versions that can be asked."""
    return _metadata(parts(request)[0].service, name)


@get(
    _VERSION,
    summary="Inputs and outputs of a version",
    responses={404: _UNKNOWN, 503: _NOT_READY},
)
async def get_model_version(request: Asked, name: str, version: str) -> oip.ModelMetadata:
    """As of the model, for its version in production or its challenger."""
    return _metadata(parts(request)[0].service, name, version)


@get(
    f"{_MODEL}/ready",
    summary="Whether a model can be asked",
    responses={404: _UNKNOWN, 503: _NOT_READY},
)
async def get_model_ready(request: Asked, name: str) -> Health:
    """200 if it is served."""
    served_model(parts(request)[0].service, name)
    return Health("ready")


@get(
    f"{_VERSION}/ready",
    summary="Whether a version can be asked",
    responses={404: _UNKNOWN, 503: _NOT_READY},
)
async def get_model_version_ready(request: Asked, name: str, version: str) -> Health:
    """200 if it is served."""
    served_model(parts(request)[0].service, name, version)
    return Health("ready")


@post(
    f"{_MODEL}/infer",
    status_code=200,
    summary="Quantiles from tensors",
    operation_class=_INFER,
    responses=_ANSWERS,
)
async def post_infer(request: Asked, name: str) -> Response[bytes]:
    """Prices and dates as tensors, as JSON or binary (Inference-Header-Content-Length)."""
    return await _infer(request, name)


@post(
    f"{_VERSION}/infer",
    status_code=200,
    summary="Quantiles from tensors, by one version",
    operation_class=_INFER,
    responses=_ANSWERS,
)
async def post_infer_version(request: Asked, name: str, version: str) -> Response[bytes]:
    """As of the model, by its version in production or its challenger."""
    return await _infer(request, name, version)


async def _infer(request: Asked, name: str, version: str | None = None) -> Response[bytes]:
    worker, exchange = parts(request)
    served = served_model(worker.service, name, version)
    if exchange.media_type() not in ("", _JSON, _BYTES):
        raise problems.unsupported_media_type(exchange.media_type()[:60], f"{_JSON} or {_BYTES}")
    body = await exchange.body(worker.settings.max_body_mb)
    asked = oip.parse(body, _header_length(exchange))
    tensors = oip.tensors(asked, served.contract)
    found = await worker.service.forecast_tensors(served, tensors)
    exchange.version = str(served.version)
    answer, header = oip.render(asked, served.contract, served.version, stacked(found))
    if header is None:
        return Response(answer, media_type=MediaType.JSON)
    lengths = {oip.HEADER_LENGTH: str(header)}
    return Response(answer, media_type=_BYTES, headers=lengths)


def _header_length(exchange: Exchange) -> int | None:
    given = exchange.headers.get(oip.HEADER_LENGTH.lower().encode())
    if given is None:
        return None
    if not given.isdigit() or len(given) > 12:
        raise oip.invalid_request(
            f"{oip.HEADER_LENGTH} should be the number of bytes of the JSON before the tensors; "
            f"got {given[:40].decode('latin-1')!r}."
        )
    return int(given)


def _metadata(service: Service, name: str, version: str | None = None) -> oip.ModelMetadata:
    served = served_model(service, name, version)
    versions = [each.version for each in service.state.versions_of(name)]
    return oip.model_metadata(served.contract, versions)


HANDLERS = (
    get_server,
    get_v2_live,
    get_v2_ready,
    get_model,
    get_model_version,
    get_model_ready,
    get_model_version_ready,
    post_infer,
    post_infer_version,
)
