"""The HTTP routes. Each reads the predictor's state once, so no answer mixes versions."""

from dataclasses import dataclass
from typing import Any

from litestar import MediaType, Request, Response, get, post
from litestar.datastructures import State as AppState
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    Example,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    RequestBody,
    Schema,
)

from forecasting.errors import ServiceError
from serving import problems
from serving.predictor import to_prediction
from serving.problems import Problem
from serving.schemas import Forecast, Health, Models
from serving.telemetry import CONTENT_TYPE
from serving.worker import Worker

_NUMBER = Schema(type=OpenAPIType.NUMBER)
_ROW_EXAMPLE = {
    "date": "2008-01-02",
    "open": 692.87,
    "high": 697.37,
    "low": 677.73,
    "close": 685.19,
    "volume": 4306900,
}
_ROW = Schema(
    type=OpenAPIType.OBJECT,
    properties={
        "date": Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.DATE),
        **dict.fromkeys(("open", "high", "low", "close", "volume"), _NUMBER),
    },
    required=["date", "open", "high", "low", "close", "volume"],
)
_REQUEST = Schema(
    type=OpenAPIType.OBJECT,
    properties={
        "symbol": Schema(type=OpenAPIType.STRING),
        "rows": Schema(
            type=OpenAPIType.ARRAY,
            items=_ROW,
            description="Trading days, oldest first; at least `context` of them.",
        ),
    },
    required=["symbol", "rows"],
)
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


@dataclass
class PostForecastOperation(Operation):
    """Documents the body, which the handler decodes itself."""

    def __post_init__(self) -> None:
        """Add the request body."""
        self.request_body = RequestBody(
            required=True,
            content={
                "application/json": OpenAPIMediaType(
                    schema=_REQUEST,
                    examples={
                        "rows": Example(
                            summary="the last of at least 64 rows shown",
                            value={"symbol": "GOOG", "rows": [_ROW_EXAMPLE]},
                        )
                    },
                )
            },
        )


def _problem_spec(*errors: problems.ProblemError) -> ResponseSpec:
    return ResponseSpec(
        Problem,
        generate_examples=False,
        media_type=problems.MEDIA_TYPE,
        description=" or ".join(f"{error.title} (`/problems/{error.kind}`)" for error in errors),
        examples=[
            Example(
                id=error.kind,
                summary=error.title,
                value={
                    "type": f"/problems/{error.kind}",
                    "title": error.title,
                    "status": error.status,
                    "detail": error.detail,
                },
            )
            for error in errors
        ],
    )


_ANSWER = ResponseSpec(
    Forecast,
    generate_examples=False,
    description="The forecast.",
    examples=[Example(id="forecast", summary="shortened", value=_ANSWER_EXAMPLE)],
)
_UNKNOWN = _problem_spec(problems.unknown_symbol("GOGO", ["AAPL", "GOOG"]))
_PARSE_ERROR = ValueError("unexpected end of data")


@get(
    "/v1/forecast/{symbol:str}",
    summary="Forecast from the latest known prices",
    responses={
        200: _ANSWER,
        404: _UNKNOWN,
        503: _problem_spec(problems.no_model(), problems.no_prices("GOOG", "none came yet.")),
    },
)
async def get_forecast(symbol: str, state: AppState) -> Forecast:
    """Price quantiles of the next sessions after the newest published row of `symbol`."""
    worker: Worker = state.worker
    return _record(worker, worker.predictor.state.forecast_latest(symbol), "get")


@post(
    "/v1/forecast",
    status_code=200,
    summary="Forecast from your own rows",
    operation_class=PostForecastOperation,
    responses={
        200: _ANSWER,
        400: _problem_spec(problems.malformed_json(_PARSE_ERROR)),
        404: _UNKNOWN,
        413: _problem_spec(problems.body_too_large(4)),
        422: _problem_spec(
            problems.invalid_request(ValueError("Object contains unknown field"), "see the schema"),
            problems.too_few_rows(64, 3),
            problems.bad_prices("Prices must be finite and above zero; got -1."),
            problems.bad_dates("Rows must ascend by date."),
        ),
        503: _problem_spec(problems.no_model()),
    },
)
async def post_forecast(request: Request[Any, Any, Any], state: AppState) -> Forecast:
    """Price quantiles of the next sessions after the last of the rows sent."""
    worker: Worker = state.worker
    body = await request.body()
    return _record(worker, worker.predictor.state.forecast_rows(body), "post")


def _record(worker: Worker, answer: Forecast, source: str) -> Forecast:
    try:
        worker.spool.append(to_prediction(answer, source))
    except ServiceError as error:
        raise problems.log_unavailable(error) from error
    return answer


@get("/v1/models", summary="What is served, and what was refused")
async def get_models(state: AppState) -> Models:
    """Forecasters with version and contract; refused versions with reasons; latest prices."""
    worker: Worker = state.worker
    return worker.predictor.state.describe()


@get("/health/live", summary="Whether this worker should be left running")
async def get_live(state: AppState) -> Response[Health]:
    """200 while the worker still follows the model store; 503 asks for a restart."""
    worker: Worker = state.worker
    alive = worker.is_following()
    return Response(
        Health("live" if alive else "no longer follows the model store"),
        status_code=200 if alive else 503,
    )


@get(
    "/health/ready",
    summary="Whether forecasts can be answered",
    responses={503: _problem_spec(problems.no_model())},
)
async def get_ready(state: AppState) -> Health:
    """200 only with a model."""
    worker: Worker = state.worker
    if not worker.predictor.state.models:
        raise problems.no_model()
    return Health("ready")


@get("/metrics", include_in_schema=False, media_type=MediaType.TEXT)
async def get_metrics(state: AppState) -> Response[bytes]:
    """Prometheus text."""
    worker: Worker = state.worker
    worker.telemetry.spooled(worker.spool)
    return Response(worker.telemetry.render(), headers={"Content-Type": CONTENT_TYPE})


HANDLERS = (get_forecast, post_forecast, get_models, get_live, get_ready, get_metrics)
