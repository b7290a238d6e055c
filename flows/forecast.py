"""Forecast many symbols offline: to a Parquet file and into the prediction log."""

from datetime import date

from prefect import flow, get_run_logger
from pydantic import BaseModel

from flows.ingest import today_or
from forecasting import batch, datasets
from forecasting.batch import Batch
from forecasting.errors import DataError
from forecasting.registry import open_registry
from forecasting.settings import load_settings
from tasks.accounting import accounted
from tasks.forecast import (
    drain_log,
    find_versions,
    forecast_symbols,
    log_forecasts,
    show_forecasts,
    write_forecasts,
)

VERSIONS_A_TASK = 100
"""Model versions that are forecast with, one after the other, before their step is over."""
_NAMED = 5


class ForecastResult(BaseModel):
    """What was forecast, where it lies, and why a symbol has no forecast."""

    as_of: date
    output: str
    prices_md5: str
    symbols: int
    rows: int
    refused: dict[str, str]


@flow(name="forecast")
@accounted
def forecast(
    symbols: list[str] = ["GOOG"],  # noqa: B006  (Prefect shows it as the default; never changed)
    as_of: date | None = None,
    output: str = "",
    forecaster: str = "",
) -> ForecastResult:
    """Forecast symbols from what is known on `as_of` with the versions in production.

    The numbers are those that the server answers `GET /v1/forecast/{symbol}` with. A symbol that
    cannot be forecast keeps no other from being so. Run again, it writes the file anew and logs
    nothing twice.

    Args:
        symbols: tickers of the dataset.
        as_of: the day it pretends to be; today if absent.
        output: path or fsspec URL of the Parquet file; `forecasts/<as_of>.parquet` in the home if
            empty.
        forecaster: ask this one for all symbols, also for those that it was not trained for, such
            as a new symbol with as much history as its context; empty: whoever serves a symbol.

    Raises:
        DataError: none of the symbols can be forecast.
        DatasetError: there is no dataset yet.
        ConfigError: `output` is no file that could be written, or `forecaster` has no version in
            production.
    """
    settings = load_settings()
    day = today_or(as_of)
    target = output or str(settings.home / "forecasts" / f"{day}.parquet")
    batch.open_target(target)  # said before the work is done
    prices = datasets.find(settings)  # one version for all symbols, whatever is ingested meanwhile
    registry = open_registry(settings)
    wanted = list(dict.fromkeys(symbols))
    assigned = find_versions(registry, wanted, forecaster)
    served = {symbol for _, names in assigned for symbol in names}
    nobody = f"No version in production at {registry.shown} is for it; train it (train/train)."
    refused = {symbol: nobody for symbol in wanted if symbol not in served}
    made: list[Batch] = []
    for start in range(0, len(assigned), VERSIONS_A_TASK):
        some = assigned[start : start + VERSIONS_A_TASK]
        found, without = forecast_symbols(settings, registry, prices, day, some)
        made += found
        refused |= without
    get_run_logger().info(show_forecasts(made, refused, day))
    if not made:
        raise DataError(_none(wanted, refused, day))
    logged = log_forecasts(settings, made)
    rows = write_forecasts(made, day, target)
    drain_log(settings)
    return ForecastResult(
        as_of=day,
        output=target,
        prices_md5=prices.md5,
        symbols=logged,
        rows=rows,
        refused=refused,
    )


def _none(wanted: list[str], refused: dict[str, str], day: date) -> str:
    if not wanted:
        return "No symbol to forecast; at least one is expected, such as GOOG."
    reasons = [f"{symbol}: {reason}" for symbol, reason in refused.items()]
    more = [f"... and {len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
    return "\n  ".join(
        [f"None of {len(wanted)} symbols can be forecast as of {day}.", *reasons[:_NAMED], *more]
    )
