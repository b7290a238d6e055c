"""Many symbols, each with a forecaster of its own, trained on Ray."""

from datetime import date
from pathlib import Path

import pytest

from flows.train import TrainResult
from flows.train_each import train_each
from forecasting.errors import DataError
from forecasting.registry import PRODUCTION, open_registry
from forecasting.store import gate_looks
from tests.flows.support import children, client_of, configured, kept, rows_of

DAY, EARLIER = date(2007, 12, 31), date(2007, 11, 30)
LAX = {"gate_tolerance": 0.5, "gate_classical_tolerance": 0.5, "concurrency": 2}

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("each")


@pytest.fixture(scope="module")
def trained(prefect_server: None, home: Path) -> list[TrainResult]:
    with configured(home, **LAX):
        return train_each(symbols=["IBM", "GOOG", "IBM"], as_of=DAY)


def test_each_symbol_has_a_forecaster_of_its_own(home, trained):
    assert [(each.symbol, each.outcome, each.version) for each in trained] == [
        ("IBM", "promoted", 1),
        ("GOOG", "promoted", 1),
    ]
    with configured(home, **LAX) as settings:
        registry = open_registry(settings)
        for result in trained:
            assert registry.alias(result.forecaster, PRODUCTION) == 1
            run = client_of(settings).get_run(result.run_id)
            assert (run.info.status, run.data.tags["symbol"]) == ("FINISHED", result.symbol)
            assert "gate_candidate" in run.data.metrics
            assert result.forecaster in kept(settings, result.run_id, "model-card.md")
            (search,) = children(settings, result.run_id)
            assert len(children(settings, search.info.run_id)) == settings.trials
        assert {look["forecaster"] for look in rows_of(settings, gate_looks)} == {
            "perennial-ibm",
            "perennial-goog",
        }


@pytest.mark.slow
def test_the_same_again_is_unchanged_and_an_earlier_day_is_refused(home, trained):
    with configured(home, **LAX) as settings:
        (again,) = train_each(symbols=["GOOG"], as_of=DAY)
        assert (again.outcome, again.version) == ("unchanged", 1)
        (early,) = train_each(symbols=["GOOG"], as_of=EARLIER)
        assert early.outcome == "refused"
        assert "production has seen those days" in early.reasons[0]
        assert not list(settings.work_dir.glob("tmp*"))


def test_a_symbol_that_cannot_be_trained_keeps_no_other_from_it(home, trained):
    # FB was listed in May 2012: too short a history for a split
    with configured(home, **LAX):
        short, whole = train_each(symbols=["FB", "MSFT"], as_of=date(2012, 8, 31))
        assert (short.outcome, whole.outcome) == ("refused", "promoted")
        assert "rows of prices are needed" in short.reasons[0]


def test_no_symbol_is_an_error(prefect_server, home):
    with configured(home), pytest.raises(DataError, match="No symbol to train"):
        train_each(symbols=[])
