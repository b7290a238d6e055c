"""Routes of MLflow's scoring server and of SageMaker's container contract."""

import asyncio
from importlib.metadata import version as installed

from litestar import MediaType, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIType, Schema

from forecasting.errors import ModelError, ServiceError
from serving import oip, openapi, problems, scoring
from serving.answers import stacked
from serving.native import version_of
from serving.oip_routes import served_model
from serving.open_models import Served
from serving.openapi import problem_spec
from serving.routes import Asked, parts, ready
from serving.schemas import FORECASTER, SYMBOL, Predictions
from serving.scoring import Arrays
from serving.service import Service, settled

LARGE_BODY = 256 * 1024
"""Bytes from which on a body is read in a thread, so that others need not wait for it."""
TARGET_HEADER = b"x-amzn-sagemaker-target-model"
"""Which forecaster is meant where several are served, as SageMaker's multi-model endpoints say."""

_NUMBER = Schema(type=OpenAPIType.NUMBER)
_WHOLE = Schema(type=OpenAPIType.INTEGER)
_NAME_OR_INDEX = Schema(any_of=[openapi.text(), _WHOLE])
_SYMBOL = openapi.text(SYMBOL)
_DAY = Schema(
    any_of=[openapi.text(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]00:00(:00(\.0{1,9})?)?Z?)?$"), _WHOLE],
    description="The same in every row; integers are milli-, micro- or nanoseconds since 1970.",
)


def _tensors(depth: int) -> Schema:
    """Tensors of `inputs` (depth 1: many windows) or of one of `instances` (depth 0)."""
    prices, days = openapi.array(openapi.array(_NUMBER, 5, 5)), openapi.array(_WHOLE)
    if depth == 0:
        return openapi.record({"ohlcv": prices, "dates": days}, {"symbol": _NAME_OR_INDEX})
    symbols = Schema(any_of=[openapi.array(openapi.text()), openapi.array(_WHOLE)])
    return openapi.record(
        {"ohlcv": openapi.array(prices), "dates": openapi.array(days)}, {"symbol": symbols}
    )


_COLUMN = Schema(type=OpenAPIType.STRING, enum=list(scoring.TABLE_COLUMNS))
_VALUE = Schema(any_of=[openapi.text(), _NUMBER])
_SPLIT = openapi.record(
    {
        "columns": Schema(
            type=OpenAPIType.ARRAY, items=_COLUMN, min_items=6, max_items=7, unique_items=True
        ),
        "data": openapi.array(openapi.array(_VALUE, 6, 7)),
    },
    {"index": openapi.array(Schema(), 0)},
)
_RECORD = openapi.record({"date": _DAY, **openapi.OHLCV}, {"symbol": _SYMBOL})
_REQUEST = Schema(
    one_of=[
        openapi.record({"dataframe_split": _SPLIT}),
        openapi.record({"dataframe_records": openapi.array(_RECORD)}),
        openapi.record({"instances": openapi.array(_tensors(0))}),
        openapi.record({"inputs": _tensors(1)}),
    ],
    description=(
        "Tables of prices make one window a symbol; `symbol` may be left out where the server has "
        "only one. `inputs` and `instances` are the tensors of the model's graph."
    ),
)


def _split_example() -> dict[str, object]:
    rows = openapi.example_rows()
    data = [["GOOG", *row.values()] for row in rows]
    return {"dataframe_split": {"columns": ["symbol", *rows[0]], "data": data}}


def _csv_example() -> str:
    rows = openapi.example_rows()
    lines = [["symbol", *rows[0]], *(["GOOG", *map(str, row.values())] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


@post(
    "/invocations",
    status_code=200,
    summary="Forecasts in MLflow's scoring protocol",
    operation_class=openapi.operation(
        {"application/json": _REQUEST, "text/csv": openapi.text()},
        {"application/json": _split_example, "text/csv": _csv_example},
        [
            openapi.header(
                TARGET_HEADER.decode(),
                openapi.text(FORECASTER),
                "Forecaster that is meant; tensors need it where several are served.",
            ),
            openapi.CLIENT_ID,
        ],
    ),
    responses={
        200: ResponseSpec(Predictions, generate_examples=False, description="The quantiles."),
        400: problem_spec(
            problems.malformed_json(ValueError("unexpected end of data")),
            oip.invalid_tensor("ohlcv", "shape [windows, 64, 5] was expected; got [1, 2, 5]."),
        ),
        404: problem_spec(
            problems.unknown_symbol("GOGO", ["AAPL", "GOOG"]),
            problems.unknown_model("goog", ["perennial-goog"]),
        ),
        415: problem_spec(problems.unsupported_media_type("text/plain", "application/json")),
        422: problem_spec(
            scoring.invalid("inputs", "an object was expected."),
            problems.too_few_rows(64, 3),
            problems.too_many_rows(10_000, 12_345),
            problems.window_count(1024, 2000),
            problems.bad_prices("Prices must be finite and above zero; got -1."),
            problems.bad_dates("Rows must ascend by date."),
            problems.no_forecast(ModelError("The model's numbers are not finite.")),
        ),
        503: problem_spec(
            problems.no_model(),
            problems.log_unavailable(ServiceError("The prediction log is full.")),
        ),
    },
)
async def post_invocations(request: Asked) -> Response[bytes]:
    """`inputs` or `instances` (tensors), or a table of prices: `dataframe_split`,
    `dataframe_records` or CSV with the columns symbol, date, open, high, low, close and volume.
    """
    worker, exchange = parts(request)
    served = _target(worker.service, exchange.headers.get(TARGET_HEADER))
    content_type = exchange.headers.get(b"content-type", b"").decode("latin-1") or None
    body = await exchange.body(worker.settings.max_body_mb)
    only = _only_symbol(served)
    if len(body) > LARGE_BODY:
        parsed = await asyncio.to_thread(scoring.parse, body, content_type, only)
    else:
        parsed = scoring.parse(body, content_type, only)
    if not isinstance(parsed, Arrays):
        answers = await worker.service.forecast(parsed, exchange.sticky())
        exchange.version = version_of(answers)
        return Response(scoring.render_rows(settled(answers)), media_type=MediaType.JSON)
    if served is None:
        raise _ambiguous(worker.service)
    tensors = scoring.tensors(parsed, served.contract)
    found = await worker.service.forecast_tensors(served, tensors)
    exchange.version = str(served.version)
    return Response(scoring.render_tensors(stacked(found)), media_type=MediaType.JSON)


def _target(service: Service, name: bytes | None) -> Served | None:
    """The forecaster that is meant; None where several may be."""
    if name is not None:
        return served_model(service, name.decode("latin-1"))
    champions = service.state.champions
    if not champions:
        raise problems.no_model()
    return next(iter(champions.values())) if len(champions) == 1 else None


def _only_symbol(served: Served | None) -> str | None:
    if served is None or len(served.contract.symbols) > 1:
        return None
    return served.contract.symbols[0]


def _ambiguous(service: Service) -> problems.ProblemError:
    return scoring.invalid(
        TARGET_HEADER.decode(),
        "this server has several models, so the header should name one of "
        f"{', '.join(sorted(service.state.champions)[:20])} for tensors.",
    )


@get(
    "/ping",
    media_type=MediaType.TEXT,
    summary="Whether forecasts can be answered (SageMaker)",
    responses={503: problem_spec(problems.no_model())},
)
async def get_ping(request: Asked) -> str:
    """200 and an empty body."""
    ready(parts(request)[0])
    return ""


@get(
    "/health",
    media_type=MediaType.TEXT,
    summary="Whether forecasts can be answered (MLflow)",
    responses={503: problem_spec(problems.no_model())},
)
async def get_health(request: Asked) -> str:
    """As /ping."""
    ready(parts(request)[0])
    return ""


@get("/version", media_type=MediaType.TEXT, summary="Version of the server (MLflow)")
async def get_version() -> str:
    """The version of perennial."""
    return installed("perennial")


HANDLERS = (post_invocations, get_ping, get_health, get_version)
