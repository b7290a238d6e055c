"""From rows to forecasts: one immutable state that is swapped whole, and what answers from it."""

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecasting.contract import Snapshot
from forecasting.errors import ContractError, ModelError
from forecasting.inference import Forecaster
from forecasting.predictions import Prediction
from forecasting.sessions import sessions_after
from serving import problems
from serving.intake import parse_request, usable_rows
from serving.model_store import Fingerprint, ModelStore, check
from serving.problems import ProblemError
from serving.schemas import (
    Forecast,
    HorizonForecast,
    ModelInfo,
    Models,
    PriceRow,
    PricesInfo,
    Refusal,
)


@dataclass(frozen=True)
class Loaded:
    """A forecaster in memory."""

    forecaster: Forecaster
    loaded_at: datetime


@dataclass(frozen=True)
class Latest:
    """The forecast from the latest prices, or why there is none."""

    snapshot: Snapshot
    answer: Forecast | None
    problem: ProblemError | None


@dataclass(frozen=True)
class State:
    """All that a request needs. Never changed: a new one replaces it."""

    models: dict[str, Loaded] = field(default_factory=dict)
    by_symbol: dict[str, Loaded] = field(default_factory=dict)
    latest: dict[str, Latest] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    model_marks: dict[str, Fingerprint] = field(default_factory=dict)
    price_marks: dict[str, Fingerprint] = field(default_factory=dict)

    @property
    def versions(self) -> dict[str, int]:
        """Forecaster -> version."""
        return {name: loaded.forecaster.version for name, loaded in self.models.items()}

    def loaded(self, symbol: str) -> Loaded:
        """The model that serves a symbol.

        Raises:
            ProblemError: there is none.
        """
        if not self.models:
            raise problems.no_model()
        if symbol not in self.by_symbol:
            raise problems.unknown_symbol(symbol, sorted(self.by_symbol))
        return self.by_symbol[symbol]

    def forecast_latest(self, symbol: str) -> Forecast:
        """Forecast from the latest published rows; each call is an answer with an id of its own.

        Raises:
            ProblemError: unknown symbol, no model, or no usable rows.
        """
        self.loaded(symbol)
        latest = self.latest.get(symbol)
        if latest is None:
            raise problems.no_prices(symbol, "none were published yet.")
        if latest.answer is None:
            raise latest.problem or problems.no_prices(symbol, "they were refused.")
        return msgspec.structs.replace(latest.answer, id=str(uuid4()))

    def forecast_rows(self, body: bytes) -> Forecast:
        """Forecast from a client's rows.

        Raises:
            ProblemError: the body is not a usable request, or nothing serves the symbol.
        """
        request = parse_request(body)
        loaded = self.loaded(request.symbol)
        dates, ohlcv = usable_rows(request.rows, loaded.forecaster.contract.context)
        origin = request.rows[-1]
        try:
            return _forecast(loaded.forecaster, request.symbol, dates, ohlcv, origin)
        except ModelError as error:
            raise problems.no_forecast(error) from error

    def describe(self) -> Models:
        """What is served and what was refused."""
        return Models(
            models=[_describe(loaded) for _, loaded in sorted(self.models.items())],
            refused=[refusal for _, refusal in sorted(self.refused.items())],
            prices=[
                PricesInfo(name, item.as_of, item.dataset_md5, len(item.dates))
                for name, item in sorted(self.snapshots.items())
            ],
        )


class Predictor:
    """Holds the one reference that requests read, and moves it.

    Attributes:
        state: what requests are answered from; read it once a request.
    """

    def __init__(self, store: ModelStore) -> None:
        self.state = State()
        self._store = store
        self._lock = threading.Lock()

    def refresh(self) -> tuple[State, State]:
        """Look at the model store and swap the state if it asks for another one.

        Loads, verifies and warms up before the swap; meant for a thread of its own.

        Returns:
            The state before and the state now (the same object if nothing changed).
        """
        with self._lock:
            before = self.state
            self.state = refresh(self._store, before)
            return before, self.state


def refresh(store: ModelStore, state: State) -> State:
    """The state that the model store asks for now; `state` itself if nothing changed.

    Whatever cannot be loaded is listed in `refused`, and what was served before stays. Runs off
    the event loop.
    """
    model_marks = {name: store.model_fingerprint(name) for name in store.forecasters()}
    price_marks = store.price_files()
    if model_marks == state.model_marks and price_marks == state.price_marks:
        return state
    models, snapshots, refused = dict(state.models), dict(state.snapshots), dict(state.refused)
    for name, mark in model_marks.items():
        if mark != state.model_marks.get(name):
            _refresh_model(store, name, models, refused)
    for name, price_mark in price_marks.items():
        if price_mark != state.price_marks.get(name):
            _refresh_snapshot(store, name, snapshots, refused)
    by_symbol = _by_symbol(models)
    return State(
        models=models,
        by_symbol=by_symbol,
        latest=_latest(state, by_symbol, snapshots),
        snapshots=snapshots,
        refused=refused,
        model_marks=model_marks,
        price_marks=price_marks,
    )


def _refresh_model(
    store: ModelStore, name: str, models: dict[str, Loaded], refused: dict[str, Refusal]
) -> None:
    key = f"model {name}"
    refused.pop(key, None)
    refused.pop(f"sync {name}", None)
    noted = store.refused(name)
    if noted is not None:
        refused[f"sync {name}"] = Refusal(name, noted.version, noted.reason, noted.refused_at)
    version: int | None = None
    try:
        current = store.current(name)
        if current is None:
            return
        version = current.version
        loaded = check(store.version_folder(name, version), name, version)
        served = models.get(name)
        if served is None or served.forecaster.version != version or _differs(served, loaded):
            models[name] = Loaded(loaded, datetime.now(UTC))
    except (ContractError, OSError) as error:
        refused[key] = Refusal(name, version, str(error), datetime.now(UTC))
        if name not in models:
            _fall_back(store, name, models)


def _differs(served: Loaded, loaded: Forecaster) -> bool:
    return served.forecaster.contract != loaded.contract


def _fall_back(store: ModelStore, name: str, models: dict[str, Loaded]) -> None:
    """After a restart with a damaged current version: the last one that was good."""
    for version in store.fallbacks(name):
        try:
            loaded = check(store.version_folder(name, version), name, version)
        except (ContractError, OSError):
            continue
        models[name] = Loaded(loaded, datetime.now(UTC))
        return


def _refresh_snapshot(
    store: ModelStore, name: str, snapshots: dict[str, Snapshot], refused: dict[str, Refusal]
) -> None:
    key = f"prices {name}"
    refused.pop(key, None)
    try:
        snapshots[name] = store.snapshot(name)
    except (ContractError, OSError) as error:
        refused[key] = Refusal(name, None, str(error), datetime.now(UTC))


def _by_symbol(models: dict[str, Loaded]) -> dict[str, Loaded]:
    """Symbol -> model; where two serve one, the one with fewer symbols, then the first by name."""
    worst_first = sorted(models.values(), key=_rank, reverse=True)
    return {symbol: item for item in worst_first for symbol in item.forecaster.contract.symbols}


def _rank(loaded: Loaded) -> tuple[int, str]:
    contract = loaded.forecaster.contract
    return len(contract.symbols), contract.forecaster


def _latest(
    state: State, by_symbol: dict[str, Loaded], snapshots: dict[str, Snapshot]
) -> dict[str, Latest]:
    latest = {}
    for symbol, snapshot in snapshots.items():
        loaded = by_symbol.get(symbol)
        if loaded is None:
            continue
        known = state.latest.get(symbol)
        if (
            known is not None
            and known.snapshot is snapshot
            and state.by_symbol.get(symbol) is loaded
        ):
            latest[symbol] = known
        else:
            latest[symbol] = _forecast_snapshot(loaded.forecaster, snapshot)
    return latest


def _forecast_snapshot(forecaster: Forecaster, snapshot: Snapshot) -> Latest:
    rows = [
        PriceRow(day, *values) for day, values in zip(snapshot.dates, snapshot.ohlcv, strict=True)
    ]
    try:
        dates, ohlcv = usable_rows(rows, forecaster.contract.context)
        answer = _forecast(forecaster, snapshot.symbol, dates, ohlcv, rows[-1])
    except (ProblemError, ModelError) as error:
        return Latest(snapshot, None, problems.no_prices(snapshot.symbol, str(error)))
    answer = msgspec.structs.replace(answer, prices_md5=snapshot.dataset_md5, as_of=snapshot.as_of)
    return Latest(snapshot, answer, None)


def _forecast(
    forecaster: Forecaster,
    symbol: str,
    dates: NDArray[np.int64],
    ohlcv: NDArray[np.float32],
    origin: PriceRow,
) -> Forecast:
    contract = forecaster.contract
    index = np.array([contract.symbol_index(symbol)], dtype=np.int64)
    quantiles = _round(forecaster.predict(ohlcv[None], dates[None], index)[0])
    levels = list(contract.quantile_levels)
    targets = sessions_after(origin.date, contract.horizon)
    return Forecast(
        id=str(uuid4()),
        symbol=symbol,
        forecaster=contract.forecaster,
        model_version=forecaster.version,
        run_id=contract.run_id,
        dataset_md5=contract.dataset_md5,
        prices_md5=None,
        as_of=origin.date,
        origin=origin.date,
        origin_close=origin.close,
        levels=levels,
        forecast=[
            HorizonForecast(step, target, float(np.interp(0.5, levels, row)), row.tolist())
            for step, (target, row) in enumerate(zip(targets, quantiles, strict=True), start=1)
        ],
    )


def _round(prices: NDArray[np.float32]) -> NDArray[np.float64]:
    """To seven significant digits, all that float32 has: shorter answers, same numbers."""
    exact = prices.astype(np.float64)
    magnitude = np.floor(np.log10(np.maximum(np.abs(exact), 1e-30)))
    factor = 10.0 ** (6 - magnitude)
    rounded: NDArray[np.float64] = np.round(exact * factor) / factor
    return rounded


def to_prediction(answer: Forecast, source: str) -> Prediction:
    """The log's record of an answer."""
    return Prediction(
        id=answer.id,
        made_at=datetime.now(UTC),
        source="get" if source == "get" else "post",
        symbol=answer.symbol,
        forecaster=answer.forecaster,
        model_version=answer.model_version,
        run_id=answer.run_id,
        dataset_md5=answer.dataset_md5,
        prices_md5=answer.prices_md5,
        origin=answer.origin,
        origin_close=answer.origin_close,
        targets=[step.target for step in answer.forecast],
        levels=answer.levels,
        quantiles=[step.quantiles for step in answer.forecast],
    )


def _describe(loaded: Loaded) -> ModelInfo:
    contract = loaded.forecaster.contract
    return ModelInfo(
        forecaster=contract.forecaster,
        version=loaded.forecaster.version,
        loaded_at=loaded.loaded_at,
        kind=contract.kind,
        symbols=contract.symbols,
        context=contract.context,
        horizon=contract.horizon,
        columns=contract.columns,
        levels=contract.quantile_levels,
        as_of=contract.as_of,
        train_start=contract.train_start,
        train_end=contract.train_end,
        dataset_md5=contract.dataset_md5,
        dataset_rev=contract.dataset_rev,
        run_id=contract.run_id,
        git_commit=contract.git_commit,
    )
