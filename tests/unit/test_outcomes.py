import math
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine, func, select

from forecasting import outcomes
from forecasting.contract import QUANTILE_LEVELS
from forecasting.errors import ServiceError
from forecasting.events import pending
from forecasting.predictions import Answered, Prediction, Refused, Spool
from forecasting.sessions import sessions_between
from forecasting.store import answer_counts, open_engine
from forecasting.store import predictions as table
from tests.postgres import postgres_schema
from tests.predictions import make_prediction


def spooled(folder: Path, *records: Prediction) -> None:
    spool = Spool(folder, "web")
    for record in records:
        spool.append(record)
    spool.close()


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def frame(last: date = date(2008, 1, 31), *, split: bool = False) -> pd.DataFrame:
    days = sessions_between(date(2007, 12, 3), last)
    close = 100 * np.exp(0.001 * np.arange(len(days)) + 0.01 * np.sin(np.arange(len(days))))
    if split:
        close /= 2
    return pd.DataFrame({"close": close}, index=pd.DatetimeIndex(days, name="date"))


def test_drain_stores_a_row_per_horizon_and_removes_the_segment(engine, tmp_path):
    records = [make_prediction() for _ in range(3)]
    spooled(tmp_path / "spool", *records)
    assert outcomes.drain(engine, tmp_path / "spool") == 3
    assert count(engine) == 15
    assert not list((tmp_path / "spool").glob("web*"))
    with engine.connect() as connection:
        row = connection.execute(
            select(table).where(table.c.id == records[0].id, table.c.horizon == 2)
        ).one()
    assert (row.target, row.levels) == (records[0].targets[1], list(QUANTILE_LEVELS))
    assert row.quantiles == records[0].quantiles[1]
    assert row.prices_md5 == "p" * 32


def test_a_version_that_two_workers_refuse_for_different_reasons_is_told_once(engine, tmp_path):
    for number, reason in ((3, "altered"), (3, "empty"), (4, "altered")):
        spool = Spool(tmp_path, "web")
        spool.append(Refused(forecaster="perennial-goog", version=number, reason=reason))
        spool.close()
    outcomes.drain(engine, tmp_path)
    assert sorted(event.payload["version"] for event in pending(engine)) == [3, 4]


def test_counts_are_kept_as_the_largest_total_of_each_writer(engine, tmp_path):
    key = Answered("perennial-goog", 3, "GOOG", date(2008, 1, 2))
    spools = [Spool(tmp_path, "web"), Spool(tmp_path, "web")]
    for times, spool in zip((2, 5), spools, strict=True):
        for _ in range(times):
            spool.count(key)
        spool.flush()
    outcomes.drain(engine, tmp_path)
    spools[0].count(key)
    for spool in spools:
        spool.close()
    for offset in tmp_path.glob("*.offset"):
        offset.unlink()  # all of it is read once more
    assert outcomes.drain(engine, tmp_path) == 0
    with engine.connect() as connection:
        rows = connection.execute(select(answer_counts)).all()
    assert sorted(row.answers for row in rows) == [3, 5]
    assert {(row.symbol, row.model_version, row.origin) for row in rows} == {
        ("GOOG", 3, date(2008, 1, 2))
    }


def test_draining_the_same_lines_twice_stores_them_once(engine, tmp_path):
    spool = Spool(tmp_path, "web")
    spool.append(make_prediction())
    assert outcomes.drain(engine, tmp_path) == 1
    (offset,) = tmp_path.glob("*.offset")
    offset.unlink()  # as if the drainer died between the database's commit and its own note
    spool.append(make_prediction())
    assert outcomes.drain(engine, tmp_path) == 2
    assert count(engine) == 10
    spool.close()


def test_a_segment_being_written_stays_and_is_followed(engine, tmp_path):
    spool = Spool(tmp_path, "web")
    for expected in (1, 2, 3):
        spool.append(make_prediction())
        assert outcomes.drain(engine, tmp_path) == 1
        assert count(engine) == 5 * expected
    assert list(tmp_path.glob("*.jsonl"))
    spool.close()
    assert outcomes.drain(engine, tmp_path) == 0
    assert not list(tmp_path.glob("web*"))


def test_torn_and_corrupt_lines_are_set_aside_and_the_rest_is_stored(engine, tmp_path):
    spooled(tmp_path, make_prediction())
    (path,) = tmp_path.glob("*.jsonl")
    good = path.read_bytes()
    path.write_bytes(b"\x00\xff garbage\n" + good + b'{"id": "other shape"}\n' + good[:100])
    assert outcomes.drain(engine, tmp_path) == 1
    assert count(engine) == 5
    aside = path.with_suffix(".bad").read_bytes().splitlines()
    assert aside == [b"\x00\xff garbage", b'{"id": "other shape"}', good[:100]]
    assert not path.exists()


def test_a_line_that_the_database_refuses_does_not_stop_the_others(tmp_path):
    good, other = make_prediction(), make_prediction()
    poison = make_prediction(model_version=2**40)  # no 32-bit integer
    spooled(tmp_path, good, poison, other)
    with postgres_schema() as url:
        engine = open_engine(url)
        assert outcomes.drain(engine, tmp_path) == 2
        assert count(engine) == 10
        engine.dispose()
    (aside,) = tmp_path.glob("*.bad")
    assert poison.id.encode() in aside.read_bytes()


def test_a_damaged_database_keeps_the_spool(tmp_path):
    spooled(tmp_path / "spool", make_prediction())
    engine = open_engine(f"sqlite:///{tmp_path / 'log.db'}")
    engine.dispose()
    for file in tmp_path.glob("log.db*"):
        file.write_bytes(b"this is no database" * 300)
    with pytest.raises(ServiceError, match="The spool keeps them"):
        outcomes.drain(engine, tmp_path / "spool")
    engine.dispose()
    assert len(list((tmp_path / "spool").glob("*.jsonl"))) == 1
    healthy = open_engine(f"sqlite:///{tmp_path / 'new.db'}")
    assert outcomes.drain(healthy, tmp_path / "spool") == 1
    healthy.dispose()


def test_actuals_are_in_origin_day_units_and_crps_is_that_of_a_slow_loop(engine, tmp_path):
    record = make_prediction(origin=date(2008, 1, 2), close=100.0)
    spooled(tmp_path, record)
    outcomes.drain(engine, tmp_path)
    prices = frame(split=True)  # a split since: the frame's units are not those of the origin day
    assert outcomes.join_actuals(engine, "GOOG", prices, date(2008, 1, 31)) == 5
    rows = outcomes.scored(engine, "GOOG")
    assert list(rows["horizon"]) == [1, 2, 3, 4, 5]
    for step, (_, row) in enumerate(rows.iterrows()):
        target = pd.Timestamp(record.targets[step])
        move = prices.loc[target, "close"] / prices.loc[pd.Timestamp(record.origin), "close"]
        assert row["actual"] == pytest.approx(100.0 * move)
        losses = []
        for level, quantile in zip(record.levels, record.quantiles[step], strict=True):
            gap = math.log(move) - math.log(quantile / 100.0)
            losses.append(level * gap if gap > 0 else (level - 1) * gap)
        assert row["crps_bp"] == pytest.approx(1e4 * 2 * sum(losses) / len(losses))
        assert row["median"] == pytest.approx(100.0)


def test_only_targets_known_by_as_of_are_joined_and_only_once(engine, tmp_path):
    record = make_prediction()
    spooled(tmp_path, record)
    outcomes.drain(engine, tmp_path)
    prices = frame()
    assert outcomes.join_actuals(engine, "GOOG", prices, record.targets[1]) == 2
    assert outcomes.join_actuals(engine, "GOOG", prices, record.targets[1]) == 0
    assert outcomes.join_actuals(engine, "MSFT", prices, record.targets[4]) == 0
    assert outcomes.join_actuals(engine, "GOOG", prices, record.targets[4]) == 3


def test_unknown_origin_or_target_stays_open(engine, tmp_path):
    spooled(tmp_path, make_prediction(origin=date(2001, 1, 2)))
    outcomes.drain(engine, tmp_path)
    assert outcomes.join_actuals(engine, "GOOG", frame(), date(2008, 1, 31)) == 0
    assert outcomes.scored(engine, "GOOG").empty


def test_other_levels_are_scored_on_their_own(engine, tmp_path):
    three = make_prediction(levels=[0.1, 0.5, 0.9], quantiles=[[95.0, 100.0, 105.0]] * 5)
    spooled(tmp_path, three, make_prediction())
    outcomes.drain(engine, tmp_path)
    assert outcomes.join_actuals(engine, "GOOG", frame(), date(2008, 1, 31)) == 10
    assert outcomes.scored(engine, "GOOG")["crps_bp"].gt(0).all()


def test_scored_can_be_narrowed(engine, tmp_path):
    first = make_prediction(model_version=1)
    second = make_prediction(model_version=2, source="post", prices_md5=None)
    spooled(tmp_path, first, second)
    outcomes.drain(engine, tmp_path)
    outcomes.join_actuals(engine, "GOOG", frame(), date(2008, 1, 31))
    assert set(outcomes.scored(engine, "GOOG", version=2)["id"]) == {second.id}
    assert set(outcomes.scored(engine, "GOOG", sources=["get"])["id"]) == {first.id}
    assert set(outcomes.scored(engine, "GOOG", forecaster=first.forecaster)["id"]) == {
        first.id,
        second.id,
    }
    assert outcomes.scored(engine, "GOOG", forecaster="perennial-aapl", version=1).empty
    day = first.targets[2]
    assert set(outcomes.scored(engine, "GOOG", since=day)["horizon"]) == {3, 4, 5}
    assert set(outcomes.scored(engine, "GOOG", until=day)["horizon"]) == {1, 2, 3}
