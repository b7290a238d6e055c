"""The server's own protocol: forecasts from the latest prices, and from a client's rows."""

import asyncio
import importlib
from collections.abc import Sequence

import msgspec

from serving import problems
from serving.exchange import JSON, Exchange
from serving.intake import parse_request, parse_requests
from serving.schemas import Forecast, ForecastRequest, Forecasts
from serving.service import settled
from serving.windows import Rows
from serving.worker import Worker

FORECAST = "/v1/forecast"
FORECASTS = "/v1/forecasts"
TABLES = (
    "application/vnd.apache.arrow.stream",
    "application/vnd.apache.arrow.file",
    "application/vnd.apache.parquet",
)

_encoder = msgspec.json.Encoder()


def get_forecast(worker: Worker, exchange: Exchange, symbol: str) -> bytes:
    """The answer to GET /v1/forecast/{symbol}, computed once for a version and its prices.

    Raises:
        ProblemError: unknown symbol, no model, or no usable rows.
    """
    exchange.route = f"{FORECAST}/{{symbol}}"
    latest = worker.service.latest(symbol, exchange.sticky())
    exchange.version = str(latest.served.version)
    return latest.body


async def post_forecast(worker: Worker, exchange: Exchange) -> bytes:
    """The answer to POST /v1/forecast.

    Raises:
        ProblemError: the body is not a usable request, or nothing serves the symbol.
    """
    exchange.route = FORECAST
    require_json(exchange)
    body = await exchange.body(worker.settings.max_body_mb)
    answer = await worker.service.forecast_one(parse_request(body), exchange.sticky())
    exchange.version = str(answer.model_version)
    return _encoder.encode(answer)


async def post_forecasts(worker: Worker, exchange: Exchange) -> tuple[str, bytes]:
    """The answer to POST /v1/forecasts and its media type, which is that of the request.

    Raises:
        ProblemError: the body is not a usable request, or nothing serves a symbol.
    """
    exchange.route = FORECASTS
    media_type = exchange.media_type()
    if media_type in TABLES:
        return media_type, await _post_table(worker, exchange, media_type)
    require_json(exchange)
    requests = parse_requests(await exchange.body(worker.settings.max_body_mb))
    answers = await _forecasts(worker, exchange, requests)
    return JSON.decode(), _encoder.encode(Forecasts(answers))


async def _post_table(worker: Worker, exchange: Exchange, media_type: str) -> bytes:
    # pyarrow is 60 MB that most workers never need
    columnar = await asyncio.to_thread(importlib.import_module, "serving.columnar")
    body = await exchange.body(worker.settings.max_body_mb)
    most = worker.settings.max_windows * worker.settings.max_rows
    windows = await asyncio.to_thread(columnar.read, body, media_type, most)
    answers = await _forecasts(worker, exchange, windows)
    table: bytes = await asyncio.to_thread(columnar.write, settled(answers), media_type)
    return table


async def _forecasts(
    worker: Worker, exchange: Exchange, windows: Sequence[ForecastRequest | Rows]
) -> list[Forecast]:
    answers = await worker.service.forecast(windows, exchange.sticky())
    exchange.version = version_of(answers)
    return answers


def version_of(answers: Sequence[Forecast]) -> str:
    """The version that answered, for figures; they need not know every mixture."""
    versions = {each.model_version for each in answers}
    return str(versions.pop()) if len(versions) == 1 else "several"


def require_json(exchange: Exchange) -> None:
    """Refuse a body of another kind; one that does not say what it is counts as JSON.

    Raises:
        ProblemError: 415.
    """
    found = exchange.media_type()
    if found and found != "application/json":
        raise problems.unsupported_media_type(found, "application/json")
