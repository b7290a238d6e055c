"""The prediction log in SQL: drain the spool into it, join with what came, read scores."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec
import numpy as np
import pandas as pd
from sqlalchemy import Engine, Row, bindparam, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from forecasting import metrics
from forecasting.errors import ServiceError
from forecasting.events import ModelUnservable, put_once
from forecasting.predictions import Counted, Prediction, Refused, open_segments
from forecasting.store import answer_counts, predictions

Record = TypeVar("Record", Prediction, Counted, Refused)
_JOIN_ROWS = 5000


def drain(engine: Engine, folder: Path) -> int:
    """Move every finished line of the spool folder into `predictions`.

    A line that is already there (a crash came between the commit and the note of it) is skipped.
    Lines that the database refuses for their content are set aside in a `.bad` file.

    Returns:
        How many answers were read and are now stored.

    Raises:
        ServiceError: the database does not take them; the spool is kept as it is.
    """
    stored = 0
    with open_segments(folder) as segments:
        for segment in segments:
            while batch := segment.read():
                refused = _store(engine, batch.records, _insert)
                stored += len(batch.records) - len(refused)
                counts = _store(engine, _latest(batch.counts), _insert_counts)
                told = _store(engine, batch.refusals, _tell)
                segment.commit(batch, [*refused, *counts, *told])
            if segment.finished:
                segment.remove()
    return stored


def _store(
    engine: Engine, records: list[Record], insert: Callable[[Engine, list[Record]], None]
) -> list[Record]:
    """Insert records; returns those that the database refuses for their content."""
    if not records:
        return []
    try:
        insert(engine, records)
    except (DataError, IntegrityError):
        if len(records) == 1:
            return records
        middle = len(records) // 2
        return _store(engine, records[:middle], insert) + _store(engine, records[middle:], insert)
    except SQLAlchemyError as error:
        raise _not_taken(engine, error) from error
    return []


def _latest(counts: list[Counted]) -> list[Counted]:
    """The largest total of each writer and answer."""
    ascending = sorted(counts, key=lambda each: each.answers)
    return list({_count_key(each): each for each in ascending}.values())


def _insert_counts(engine: Engine, counts: list[Counted]) -> None:
    """Keep totals that are larger than those that are there; older ones change nothing."""
    insert = _dialect(engine).insert(answer_counts)
    statement = insert.on_conflict_do_update(
        index_elements=list(answer_counts.primary_key),
        set_={"answers": insert.excluded.answers, "last_at": insert.excluded.last_at},
        where=insert.excluded.answers > answer_counts.c.answers,
    )
    with engine.begin() as connection:
        connection.execute(statement, [msgspec.structs.asdict(each) for each in counts])


def _tell(engine: Engine, refusals: list[Refused]) -> None:
    """Put refusals into the outbox, one a version: workers that read a file while it is being
    damaged refuse it for different reasons."""
    for refused in refusals:
        event = ModelUnservable(
            forecaster=refused.forecaster,
            version=refused.version,
            reason=refused.reason,
            where="web",
        )
        put_once(engine, event, same=f"{event.forecaster} {event.version} {event.where}")


def _count_key(counted: Counted) -> tuple[object, ...]:
    return tuple(getattr(counted, column.name) for column in answer_counts.primary_key)


def _dialect(engine: Engine) -> ModuleType:
    return postgresql if engine.dialect.name == "postgresql" else sqlite


def _not_taken(engine: Engine, error: SQLAlchemyError) -> ServiceError:
    return ServiceError(
        f"The database {engine.url.render_as_string(hide_password=True)} does not take "
        f"predictions: {getattr(error, 'orig', error)}. The spool keeps them; check "
        "PERENNIAL_DATABASE_URL and the database."
    )


def _insert(engine: Engine, records: list[Prediction]) -> None:
    statement = _dialect(engine).insert(predictions).on_conflict_do_nothing()
    with engine.begin() as connection:
        connection.execute(statement, [row for record in records for row in _rows(record)])


def _rows(record: Prediction) -> list[dict[str, Any]]:
    shared = {
        name: getattr(record, name)
        for name in record.__struct_fields__
        if name not in ("targets", "quantiles")
    }
    return [
        {**shared, "horizon": step, "target": target, "quantiles": quantiles}
        for step, (target, quantiles) in enumerate(
            zip(record.targets, record.quantiles, strict=True), start=1
        )
    ]


def join_actuals(engine: Engine, symbol: str, frame: pd.DataFrame, as_of: date) -> int:
    """Fill `actual` and `crps_bp` of forecasts whose target session is known.

    The actual is told in the units of the origin day, `origin_close * exp(log return)`, with the
    log return taken from the adjusted frame: a split between origin and target changes nothing.
    CRPS is of the log return in basis points, 2 * mean pinball loss over the levels.

    Args:
        engine: of the prediction log.
        symbol: whose forecasts are joined.
        frame: adjusted prices as known on `as_of`, indexed by session.
        as_of: targets after this day stay open, whatever the frame holds.

    Returns:
        How many forecasts (one a horizon) were filled. Those whose origin or target session is
        not in the frame stay open.
    """
    closes = frame["close"].loc[: pd.Timestamp(as_of)]
    days = pd.DatetimeIndex(closes.index).date
    by_day: dict[date, float] = dict(zip(days, closes.tolist(), strict=True))
    query = select(predictions).where(
        predictions.c.symbol == symbol,
        predictions.c.actual.is_(None),
        predictions.c.target <= as_of,
    )
    with engine.begin() as connection:
        rows = connection.execute(query).all()
        filled = [
            values
            for start in range(0, len(rows), _JOIN_ROWS)
            for values in _outcomes(rows[start : start + _JOIN_ROWS], by_day)
        ]
        if filled:
            statement = (
                update(predictions)
                .where(
                    predictions.c.id == bindparam("key_id"),
                    predictions.c.horizon == bindparam("key_horizon"),
                )
                .values(actual=bindparam("new_actual"), crps_bp=bindparam("new_crps"))
            )
            connection.execute(statement, filled)
    return len(filled)


def _outcomes(rows: Sequence[Row[Any]], by_day: dict[date, float]) -> list[dict[str, Any]]:
    known = [row for row in rows if row.origin in by_day and row.target in by_day]
    filled: list[dict[str, Any]] = []
    for levels in {tuple(row.levels) for row in known}:
        same = [row for row in known if tuple(row.levels) == levels]
        returns = np.log([by_day[row.target] / by_day[row.origin] for row in same])
        origin = np.array([row.origin_close for row in same])
        quantiles = np.log(np.array([row.quantiles for row in same]) / origin[:, None])
        scores = metrics.crps(returns, quantiles, levels) * metrics.BASIS_POINTS
        filled += [
            {
                "key_id": row.id,
                "key_horizon": row.horizon,
                "new_actual": float(close * np.exp(value)),
                "new_crps": float(score),
            }
            for row, close, value, score in zip(same, origin, returns, scores, strict=True)
        ]
    return filled


def scored(
    engine: Engine,
    symbol: str,
    *,
    since: date | None = None,
    until: date | None = None,
    forecaster: str | None = None,
    version: int | None = None,
    sources: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Forecasts that have their actual, by target and horizon.

    Args:
        engine: of the prediction log.
        symbol: whose forecasts.
        since: first target session.
        until: last target session.
        forecaster: only forecasts of this one; a version is a number of each.
        version: only forecasts of this model version.
        sources: only forecasts that came to be in these ways, see `predictions.Source`.

    Returns:
        All columns of `predictions`, dates as timestamps, and `median` (price).
    """
    query = select(predictions).where(
        predictions.c.symbol == symbol, predictions.c.actual.is_not(None)
    )
    if since is not None:
        query = query.where(predictions.c.target >= since)
    if until is not None:
        query = query.where(predictions.c.target <= until)
    if forecaster is not None:
        query = query.where(predictions.c.forecaster == forecaster)
    if version is not None:
        query = query.where(predictions.c.model_version == version)
    if sources is not None:
        query = query.where(predictions.c.source.in_(sources))
    query = query.order_by(predictions.c.target, predictions.c.horizon, predictions.c.made_at)
    with engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    table = pd.DataFrame(rows, columns=[column.name for column in predictions.columns])
    table["origin"] = pd.to_datetime(table["origin"])
    table["target"] = pd.to_datetime(table["target"])
    table["median"] = [
        float(np.interp(0.5, levels, quantiles))
        for levels, quantiles in zip(table["levels"], table["quantiles"], strict=True)
    ]
    return table
