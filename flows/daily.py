"""What a market day asks for, once a day and in order: ingest, monitor, forecast."""

import uuid
from collections.abc import Sequence
from datetime import date

from prefect import flow, get_run_logger, tags
from prefect.runtime import flow_run
from pydantic import BaseModel
from sqlalchemy import Engine

from flows.forecast import forecast
from flows.monitor import monitor
from forecasting import market_days
from forecasting.assignment import in_production
from forecasting.errors import DataError, HistoryError
from forecasting.registry import open_registry
from forecasting.sessions import last_due
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of, now
from tasks.accounting import accounted
from tasks.events import telling
from tasks.ingest import ingest_prices, telling_missing
from tasks.monitor import last_known


class DailyResult(BaseModel):
    """What a round came to.

    `done` are the sessions that are done now and were not before, oldest first; `waiting` are
    symbols whose prices of the newest session are not there yet, to be asked for again; `notes`
    say what was left out and why.
    """

    until: date
    done: list[date] = []
    waiting: list[str] = []
    notes: list[str] = []


@flow(name="daily")
@accounted
def daily(
    symbols: list[str] = ["GOOG"],  # noqa: B006  (Prefect shows it as the default; never changed)
    as_of: date | None = None,
) -> DailyResult:
    """Ingest, monitor and forecast each market day that was not done yet, oldest first.

    Run on a day without trading, or twice, it finds nothing to do. Days that were missed are made
    up for, each as of itself. A day is done when all of its steps are: a killed round takes up the
    day that it was in, whose steps may be repeated. A symbol's first round is its newest session.
    One whose monitor fails stays to be done from that day on, and holds up no other.

    Args:
        symbols: tickers of the source.
        as_of: the last day of the round, at most the newest session whose prices are due.

    Raises:
        BadPricesError: prices break the rules; that day and those after it stay to be done.
        SourceError: so they do where the source gives nothing; `perennial.data.missing` says why.
        ExceptionGroup: monitors failed; all else is done, but for what is in the group too.
    """
    settings = load_settings()
    until = min(as_of or date.max, last_due(now()))
    result, failed = DailyResult(until=until), dict[str, Exception]()
    with (
        telling(settings),
        tags(*flow_run.tags),  # what runs inside has none of its own, and is judged by them
        market_days.one_round_at_a_time(settings),
        engine_of(settings.sql_url) as engine,
    ):
        due = market_days.due(engine, symbols, until, settings.extra_closures)
        try:
            for day, missing in due:
                newest, going = day == due[-1][0], [each for each in missing if each not in failed]
                if going:
                    _one_day(settings, engine, day, going, newest, result, failed)
        except Exception as error:
            if failed:
                raise _group(failed, error) from None
            raise
    get_run_logger().info(_headline(result))
    if failed:
        raise _group(failed)
    return result


def _group(failed: dict[str, Exception], *others: Exception) -> ExceptionGroup[Exception]:
    message = f"Monitors failed, of {', '.join(failed)}; run daily again once they are mended."
    return ExceptionGroup(message, [*failed.values(), *others])


def _one_day(
    settings: Settings,
    engine: Engine,
    day: date,
    symbols: Sequence[str],
    newest: bool,
    result: DailyResult,
    failed: dict[str, Exception],
) -> None:
    """Every step of a day, and the record of it; symbols that failed are added to `failed`.

    Of the newest session prices may still come: a symbol without them is watched, and not done.
    """
    with telling_missing(settings, symbols, result.until):  # not the oldest that is missing
        version = ingest_prices(settings, symbols, day)
    late = [each for each in symbols if last_known(settings, each, day, version.md5) < day]
    served = {symbol for held in in_production(open_registry(settings)) for symbol in held.symbols}
    for symbol in symbols:
        if symbol in served:
            _watch(symbol, day, newest, result, failed)
        else:
            result.notes.append(f"{day}: {symbol} has no version in production.")
    ready = [each for each in symbols if each not in failed and not (newest and each in late)]
    if ready:  # with those that an earlier round did: the file of a day holds all its forecasts
        whole = sorted({*market_days.done_on(engine, day), *ready} - set(late))
        _forecast([each for each in whole if each in served], day, result)
    if newest:
        result.waiting = late
    else:
        result.notes += [f"{day}: no prices of {symbol} came." for symbol in late]
    if ready:
        market_days.record(engine, ready, day, version.md5, str(flow_run.id or uuid.uuid4()))
        result.done.append(day)


def _watch(
    symbol: str, day: date, newest: bool, result: DailyResult, failed: dict[str, Exception]
) -> None:
    try:
        monitor(symbol=symbol, as_of=day, alarms=newest)
    except HistoryError as error:  # production was trained later: it has nothing to learn there
        result.notes.append(f"{day}: {symbol} was not monitored. {error}")
    except Exception as error:  # noqa: BLE001  (raised when the others are done)
        get_run_logger().exception("%s: the monitor of %s failed", day, symbol)
        failed[symbol] = error


def _forecast(symbols: list[str], day: date, result: DailyResult) -> None:
    if not symbols:
        return
    try:
        made = forecast(symbols=symbols, as_of=day)
    except DataError as error:
        result.notes.append(f"{day}: nothing was forecast. {error}")
        return
    result.notes += [f"{day}: {symbol}: {reason}" for symbol, reason in made.refused.items()]


def _headline(result: DailyResult) -> str:
    if not result.done and not result.waiting:
        return f"Nothing to do: every session up to {result.until} is done."
    done = ", ".join(str(day) for day in result.done) or "none"
    waiting = f"; prices of {', '.join(result.waiting)} have not come yet" if result.waiting else ""
    return "\n".join([f"Sessions done: {done}{waiting}.", *result.notes])
