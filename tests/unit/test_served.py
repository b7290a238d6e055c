from datetime import UTC, date, datetime
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from forecasting import outcomes, served
from forecasting.contract import QUANTILE_LEVELS
from forecasting.predictions import Answered, Spool
from forecasting.served import Traffic, prediction_drift, shapes, traffic
from tests.predictions import make_prediction

Z = np.array([NormalDist().inv_cdf(level) for level in QUANTILE_LEVELS])
FRIDAY, MONDAY = date(2008, 1, 4), date(2008, 1, 7)
AT_NIGHT = datetime(2008, 1, 7, 21, 30, tzinfo=UTC)  # half past four in New York
LATE = datetime(2008, 1, 8, 1, tzinfo=UTC)  # eight in the evening there, Monday's prices are due


def normal(sigma):
    """Quantiles [n, 2, k] of one sigma a day, and its double."""
    return np.stack([sigma, 2 * sigma], axis=1)[:, :, None] * Z


def test_the_shape_of_an_interval_is_its_width_and_skew():
    width, skew = shapes(np.array([0.02 * Z, np.exp(Z)]), QUANTILE_LEVELS)
    tenth = NormalDist().inv_cdf(0.9)
    assert width[0] == pytest.approx(np.log(0.04 * tenth))
    assert skew[0] == pytest.approx(0, abs=1e-9)
    low, high = np.exp(-tenth), np.exp(tenth)
    assert skew[1] == pytest.approx((low + high - 2) / (2 * (high - low)))


def test_wider_predictions_are_as_far_as_their_log_widths_are():
    rng = np.random.default_rng(1)
    usual = 0.02 * np.exp(0.2 * rng.standard_normal(250))
    newest = 0.04 * np.exp(0.2 * rng.standard_normal(40))
    found = prediction_drift(normal(usual), normal(newest), QUANTILE_LEVELS)
    assert [each.horizon for each in found] == [1, 2]
    even = np.quantile(np.log(usual), (np.arange(40) + 0.5) / 40)
    expected = stats.wasserstein_distance(even, np.log(newest)) / even.std()
    for each in found:
        assert each.days == 40
        assert each.width == pytest.approx(expected)
        assert each.skew == pytest.approx(0, abs=1e-6)
    ratio = found[1].mean_width_bp / found[1].usual_width_bp
    assert ratio == pytest.approx(newest.mean() / usual.mean())


def test_predictions_of_the_same_kind_have_not_drifted():
    rng = np.random.default_rng(2)
    sigma = 0.02 * np.exp(0.2 * rng.standard_normal(290))
    found = prediction_drift(normal(sigma[:250]), normal(sigma[250:]), QUANTILE_LEVELS)
    assert max(each.width for each in found) < 0.5


def test_a_few_predictions_are_not_compared():
    few = normal(np.full(served.LEAST_DAYS - 1, 0.02))
    assert prediction_drift(normal(np.full(250, 0.02)), few, QUANTILE_LEVELS) == []


def closes() -> pd.DataFrame:
    """As traded, and adjusted for a split that came later."""
    index = pd.DatetimeIndex([FRIDAY, MONDAY], name="date")
    return pd.DataFrame({"traded": [100.0, 102.0], "adjusted": [50.0, 51.0]}, index)


def log(engine, folder, *records, repeated: int = 0) -> None:
    spool = Spool(folder, "web")
    for record in records:
        spool.append(record)
    for _ in range(repeated):
        spool.count(Answered("perennial-goog", 1, "GOOG", MONDAY))
    spool.close()
    outcomes.drain(engine, folder)


def sent(origin: date = MONDAY, close: float = 102.0, **changes: object):
    given = {"source": "post", "prices_md5": None, "made_at": AT_NIGHT}
    return make_prediction(origin, close, **(given | changes))


def test_what_clients_send_is_held_against_our_prices_and_days(engine, tmp_path):
    log(
        engine,
        tmp_path,
        sent(),
        sent(close=51.0),  # adjusted: also right
        sent(close=10200.0),  # cents
        sent(FRIDAY, 100.0),  # Monday's prices were not due yet
        sent(FRIDAY, 100.0, made_at=LATE),
        sent(date(2008, 1, 5), 100.0),  # a Saturday
        sent(source="get", prices_md5="p" * 32),
        sent(symbol="MSFT"),
        sent(made_at=datetime(2008, 1, 10, tzinfo=UTC)),  # not yet
    )
    today = datetime.now(UTC).date()
    assert traffic(engine, "GOOG", today, closes()) == []
    found = traffic(engine, "GOOG", MONDAY, closes())
    assert found == [
        Traffic("post", 6, 0, 6 / 7, stale=1 / 6, other_price=1 / 6, unknown_day=1 / 6),
        Traffic("get", 1, 0, 1 / 7, stale=0.0, other_price=0.0, unknown_day=0.0),
    ]


def test_answers_that_were_repeated_are_counted(engine, tmp_path):
    now = datetime.now(UTC)
    record = make_prediction(MONDAY, 102.0, made_at=now)
    log(engine, tmp_path, record, repeated=3)
    (found,) = traffic(engine, "GOOG", now.date(), closes())
    assert (found.source, found.forecasts, found.repeated) == ("get", 1, 3)
