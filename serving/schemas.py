"""What goes over the wire: requests and answers as msgspec structs."""

from datetime import date, datetime
from typing import Annotated, Literal

import msgspec

SYMBOL = r"^[A-Za-z0-9^][A-Za-z0-9.^=_-]{0,31}$"
FORECASTER = r"^[A-Za-z0-9^][A-Za-z0-9.^=_-]{0,127}$"


class PriceRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One trading day, adjusted for splits and dividends up to the last row."""

    date: date
    open: float
    high: float
    low: float
    close: float
    volume: float


class ForecastRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A client's own rows, oldest first; rows older than the model's context are ignored.

    `forecaster` names the one that shall answer, also for a symbol that none was trained for;
    without it the one that serves the symbol does.
    """

    symbol: str
    rows: list[PriceRow]
    forecaster: str | msgspec.UnsetType = msgspec.UNSET


class ForecastRequests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Several windows, of any symbols that are served."""

    windows: list[ForecastRequest]


ROW_SHAPE = "an object with exactly date (YYYY-MM-DD), open, high, low, close and volume"
REQUEST_SHAPE = (
    '{"symbol": "GOOG", "rows": [...]}, with a "forecaster" if another than the symbol\'s shall '
    "answer, each row " + ROW_SHAPE + ", all but the date finite numbers"
)


class HorizonForecast(msgspec.Struct, frozen=True):
    """The price distribution of one coming session, in units of the origin day."""

    horizon: int
    target: date
    median: float
    quantiles: list[float]


class Forecast(msgspec.Struct, frozen=True):
    """An answer. `quantiles[i]` of each horizon belongs to `levels[i]`.

    `dataset_md5` is the dataset the model was trained on, `prices_md5` the one whose rows were
    forecast from (null when the client sent the rows). `as_of` is the day up to which prices were
    known, `origin` the last row's session, whose close is `origin_close`.
    """

    id: str
    symbol: str
    forecaster: str
    model_version: int
    run_id: str
    dataset_md5: str
    prices_md5: str | None
    as_of: date
    origin: date
    origin_close: float
    levels: list[float]
    forecast: list[HorizonForecast]


class Forecasts(msgspec.Struct, frozen=True):
    """Answers in the order of the windows sent."""

    forecasts: list[Forecast]


class Refusal(msgspec.Struct, frozen=True):
    """A model version, or prices, that the server did not let in."""

    name: str
    version: int | None
    reason: str
    refused_at: datetime
    alias: str = "production"


class ModelInfo(msgspec.Struct, frozen=True):
    """A version that is being served, with what its contract says."""

    forecaster: str
    version: int
    loaded_at: datetime
    kind: str
    symbols: tuple[str, ...]
    context: int
    horizon: int
    columns: tuple[str, ...]
    levels: tuple[float, ...]
    as_of: date
    train_start: date
    train_end: date
    dataset_md5: str
    dataset_rev: str
    run_id: str
    git_commit: str


class PricesInfo(msgspec.Struct, frozen=True):
    """The latest prices that GET forecasts of a symbol start from."""

    symbol: str
    as_of: date
    dataset_md5: str
    rows: int


class Traffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which share of requests the challenger computes as well, and of clients it answers."""

    shadow_share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    canary_share: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Models(msgspec.Struct, frozen=True):
    """What this server serves, and what it refused and why."""

    models: list[ModelInfo]
    challengers: list[ModelInfo]
    traffic: Traffic
    refused: list[Refusal]
    prices: list[PricesInfo]


class Health(msgspec.Struct, frozen=True):
    """A health answer."""

    status: Literal["live", "ready"]


class InferTensor(msgspec.Struct, frozen=True):
    """An output tensor of the Open Inference Protocol; `data` is flat, or follows as bytes."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float] = []
    parameters: dict[str, int] = {}


class InferAnswer(msgspec.Struct, frozen=True):
    """An answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    outputs: list[InferTensor]
    id: str = ""
    parameters: dict[str, str] = {}


class Predictions(msgspec.Struct, frozen=True):
    """An answer of MLflow's scoring protocol: to tensors, or to a table of prices."""

    predictions: dict[str, list[list[list[float]]]] | list[dict[str, str | float]]
