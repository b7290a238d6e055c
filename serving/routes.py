"""The HTTP routes of the native protocol, of health and of figures.

Each reads the predictor's state once, so no answer mixes versions.
"""

import logging
import time
from typing import Any

from litestar import MediaType, Request, Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example

from forecasting.errors import ModelError, ServiceError
from serving import hooks, native, openapi, problems
from serving.exchange import Exchange
from serving.openapi import problem_spec
from serving.problems import ProblemError
from serving.schemas import Forecast, Forecasts, Health, Models
from serving.telemetry import CONTENT_TYPE
from serving.worker import Worker

log = logging.getLogger(__name__)

Asked = Request[Any, Any, Any]

_ANSWER_EXAMPLE = {
    "id": "6f1c3c0e-5d0f-4d57-9f7e-0c8d2a7b9f10",
    "symbol": "GOOG",
    "forecaster": "perennial-goog",
    "model_version": 3,
    "run_id": "b7a2f0c4c6d94f0e8d3a5e1f2b4c6d8e",
    "dataset_md5": "5f4dcc3b5aa765d61d8327deb882cf99",
    "prices_md5": "9e107d9d372bb6826bd81d3542a419d6",
    "as_of": "2008-01-02",
    "origin": "2008-01-02",
    "origin_close": 685.19,
    "levels": [0.025, 0.5, 0.975],
    "forecast": [
        {
            "horizon": 1,
            "target": "2008-01-03",
            "median": 685.2,
            "quantiles": [660.1, 685.2, 711.3],
        }
    ],
}


_ANSWER = ResponseSpec(
    Forecast,
    generate_examples=False,
    description="The forecast.",
    examples=[Example(id="forecast", summary="shortened", value=_ANSWER_EXAMPLE)],
)
_NO_SYMBOL = problems.unknown_symbol("GOGO", ["AAPL", "GOOG"])
_UNKNOWN = problem_spec(_NO_SYMBOL)
_NOBODY = problem_spec(_NO_SYMBOL, problems.unknown_model("perennial-gogo", ["perennial-goog"]))
_PARSE_ERROR = ValueError("unexpected end of data")
_NO_NUMBERS = problems.no_forecast(
    ModelError("The model answers with numbers that are not finite.")
)
_LOG_FULL = problems.log_unavailable(ServiceError("The prediction log is full."))
_NO_TABLE = ProblemError(  # these two are told by serving.columnar, which brings pyarrow
    "unreadable-table",
    400,
    "Unreadable table",
    "A body of application/vnd.apache.parquet was expected; it cannot be read: it does not begin "
    "and end with PAR1. Write it with a current Arrow library.",
)
_LARGE_TABLE = ProblemError(
    "table-too-large",
    413,
    "Table too large",
    "At most 10240000 rows were expected; the table announces 99999999. Send less of it.",
)
_BAD_WINDOW = (
    problems.invalid_request(ValueError("Object contains unknown field"), "see the schema"),
    problems.too_few_rows(64, 3),
    problems.too_many_rows(10_000, 12_345),
    problems.bad_prices("Prices must be finite and above zero; got -1."),
    problems.bad_dates("Rows must ascend by date."),
    problems.bad_symbol("a name"),
    _NO_NUMBERS,
)


@get(
    "/v1/forecast/{symbol:str}",
    summary="Forecast from the latest known prices",
    operation_class=openapi.operation(headers=[openapi.CLIENT_ID]),
    responses={
        200: _ANSWER,
        404: _UNKNOWN,
        503: problem_spec(
            problems.no_model(), problems.no_prices("GOOG", "none came yet."), _LOG_FULL
        ),
    },
)
async def get_forecast(request: Asked, symbol: str) -> Response[bytes]:
    """Price quantiles of the next sessions after the newest published row of `symbol`."""
    worker, exchange = parts(request)
    return _answer(native.get_forecast(worker, exchange, symbol))


@post(
    "/v1/forecast",
    status_code=200,
    summary="Forecast from your own rows",
    operation_class=openapi.operation(
        {"application/json": openapi.WINDOW},
        {"application/json": openapi.example_window},
        [openapi.CLIENT_ID],
    ),
    responses={
        200: _ANSWER,
        400: problem_spec(problems.malformed_json(_PARSE_ERROR)),
        404: _NOBODY,
        415: problem_spec(problems.unsupported_media_type("text/plain", "application/json")),
        422: problem_spec(*_BAD_WINDOW),
        503: problem_spec(problems.no_model(), _LOG_FULL),
    },
)
async def post_forecast(request: Asked) -> Response[bytes]:
    """Price quantiles of the next sessions after the last of the rows sent."""
    worker, exchange = parts(request)
    return _answer(await native.post_forecast(worker, exchange))


def parts(request: Asked) -> tuple[Worker, Exchange]:
    """The worker that answers, and the request as the edge sees it."""
    exchange: Exchange = request.scope["state"]["exchange"]
    return request.app.state.worker, exchange


@post(
    "/v1/forecasts",
    status_code=200,
    summary="Forecasts from many windows",
    operation_class=openapi.operation(
        {
            "application/json": openapi.WINDOWS,
            **dict.fromkeys(native.TABLES, openapi.BINARY),
        },
        {"application/json": lambda: {"windows": [openapi.example_window()]}},
        [openapi.CLIENT_ID],
        native.TABLES,
    ),
    responses={
        200: ResponseSpec(Forecasts, generate_examples=False, description="In the order sent."),
        400: problem_spec(problems.malformed_json(_PARSE_ERROR), _NO_TABLE),
        404: _NOBODY,
        413: problem_spec(_LARGE_TABLE),
        415: problem_spec(problems.unsupported_media_type("text/plain", "application/json")),
        422: problem_spec(*_BAD_WINDOW, problems.window_count(1024, 0)),
        503: problem_spec(problems.no_model(), _LOG_FULL),
    },
)
async def post_forecasts(request: Asked) -> Response[bytes]:
    """Answers in the media type of the body: JSON, Arrow IPC (stream or file) or Parquet.

    A table has the columns symbol, date, open, high, low, close and volume, and is one window a
    symbol; its answer has one row a symbol and horizon.
    """
    worker, exchange = parts(request)
    media_type, body = await native.post_forecasts(worker, exchange)
    return Response(body, media_type=media_type)


def _answer(body: bytes) -> Response[bytes]:
    return Response(body, media_type=MediaType.JSON)


@get("/v1/models", summary="What is served, and what was refused")
async def get_models(request: Asked) -> Models:
    """Forecasters with version and contract; refused versions with reasons; latest prices."""
    worker, _ = parts(request)
    return worker.service.describe()


def live(worker: Worker) -> Health:
    """That the worker still follows the model store.

    Raises:
        ProblemError: 503, it should be restarted.
    """
    if not worker.is_following():
        raise problems.not_following()
    return Health("live")


def ready(worker: Worker) -> Health:
    """That there is a model.

    Raises:
        ProblemError: 503, there is none.
    """
    if not worker.service.state.champions:
        raise problems.no_model()
    return Health("ready")


@get(
    "/health/live",
    summary="Whether this worker should be left running",
    responses={503: openapi.DEAD},
)
async def get_live(request: Asked) -> Health:
    """200 while the worker still follows the model store; 503 asks for a restart."""
    return live(parts(request)[0])


@get(
    "/health/ready",
    summary="Whether forecasts can be answered",
    responses={503: problem_spec(problems.no_model())},
)
async def get_ready(request: Asked) -> Health:
    """200 only with a model."""
    return ready(parts(request)[0])


@get("/metrics", media_type=MediaType.TEXT, summary="Figures for Prometheus")
async def get_metrics(request: Asked) -> Response[bytes]:
    """Prometheus text."""
    worker, _ = parts(request)
    worker.report()
    return Response(worker.telemetry.render(), headers={"Content-Type": CONTENT_TYPE})


@post(
    "/hooks/registry",
    status_code=202,
    media_type=MediaType.TEXT,
    summary="The registry's webhook: look at the aliases now",
    operation_class=openapi.operation(
        {"application/json": openapi.ANYTHING},
        headers=[
            openapi.header(name, openapi.text(), description, required=True)
            for name, description in (
                ("X-MLflow-Signature", "`v1,` and the HMAC-SHA256 in base64."),
                ("X-MLflow-Delivery-Id", "Of this delivery; each is taken once."),
                ("X-MLflow-Timestamp", "Seconds since 1970."),
            )
        ],
    ),
    responses={
        401: problem_spec(hooks.bad_signature()),
        409: problem_spec(hooks.replayed("taken already")),
    },
)
async def post_hook(request: Asked) -> str:
    """Only with `PERENNIAL_WEBHOOK_SECRET`, and signed with it; its content is not believed."""
    worker, exchange = parts(request)
    secret = worker.settings.webhook_secret.get_secret_value()
    if not secret:
        raise problems.no_webhook()
    body = await exchange.body(worker.settings.max_body_mb)
    headers = {
        name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers.items()
    }
    hooks.verify(headers, body, secret, time.time(), worker.deliveries)
    try:
        worker.store.poke()
    except OSError as error:  # sync looks by itself soon
        log.warning("sync cannot be told to look at the registry: %s", error)
    return ""


HANDLERS = (
    post_hook,
    get_forecast,
    post_forecast,
    post_forecasts,
    get_models,
    get_live,
    get_ready,
    get_metrics,
)
