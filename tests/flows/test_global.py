"""One forecaster of several symbols: trained, judged, monitored and retrained as one."""

from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from flows.forecast import forecast
from flows.ingest import ingest
from flows.monitor import monitor
from flows.retrain import retrain
from flows.train import TrainResult, train
from forecasting import datasets
from forecasting.assignment import forecaster_name, who_serves
from forecasting.contract import read_contract
from forecasting.errors import ConfigError
from forecasting.events import DataFaulty
from forecasting.registry import open_registry
from forecasting.sessions import sessions_after
from forecasting.store import gate_looks, outbox
from tests.flows.support import configured, rows_of

SYMBOLS = ["IBM", "AAPL", "GOOG"]
NAME = "perennial-aapl-goog-ibm"
DAY, LATER = date(2007, 12, 31), date(2008, 10, 15)
LAX = {"gate_tolerance": 0.5, "gate_classical_tolerance": 0.5}

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("global")


@pytest.fixture(scope="module")
def trained(prefect_server: None, home: Path) -> TrainResult:
    with configured(home, **LAX):
        return train(symbols=SYMBOLS, as_of=DAY)


def test_one_version_serves_all_and_is_judged_on_all(home, trained, tmp_path):
    assert (trained.outcome, trained.forecaster, trained.version) == ("promoted", NAME, 1)
    assert trained.symbols == SYMBOLS
    with configured(home, **LAX) as settings:
        registry = open_registry(settings)
        registry.download(NAME, 1, tmp_path / "model")
        assert read_contract(tmp_path / "model").symbols == tuple(SYMBOLS)
        for symbol in SYMBOLS:
            assert who_serves(registry, symbol) == (NAME, tuple(SYMBOLS))
        assert who_serves(registry, "MSFT") == ("perennial-msft", ("MSFT",))
        (look,) = rows_of(settings, gate_looks)
        assert (look["forecaster"], look["days"]) == (NAME, settings.gate_days)


def test_each_symbol_and_a_new_one_are_forecast_without_training(home, trained, tmp_path):
    with configured(home, **LAX):
        ingest(symbols=[*SYMBOLS, "MSFT"], as_of=LATER)
        target = str(tmp_path / "all.parquet")
        found = forecast(symbols=[*SYMBOLS, "MSFT"], as_of=LATER, output=target)
        assert list(found.refused) == ["MSFT"]
        found = forecast(symbols=["MSFT"], as_of=LATER, output=target, forecaster=NAME)
        assert (found.refused, found.symbols) == ({}, 1)
        rows = pd.read_parquet(target)
        assert set(rows["symbol"]) == {"MSFT"}
        assert set(rows["forecaster"]) == {NAME}
        with pytest.raises(ConfigError, match=f"No version of 'perennial-x' .* there is {NAME}"):
            forecast(symbols=["MSFT"], as_of=LATER, forecaster="perennial-x")


def test_drift_of_one_symbol_retrains_the_forecaster_of_all_once(home, trained):
    with configured(home, **LAX):
        seen = monitor(symbol="AAPL", as_of=LATER)
        assert seen.version == 1
        again = retrain(symbol="AAPL", as_of=LATER, trigger="drift of AAPL")
        assert (again.forecaster, again.symbols) == (NAME, SYMBOLS)
        assert again.outcome in ("promoted", "refused")
        other = retrain(symbol="GOOG", as_of=LATER, trigger="drift of GOOG")
        assert (other.outcome, other.forecaster) == ("skipped", NAME)
        assert "cooldown" in other.reasons[0]


def test_faulty_prices_of_one_symbol_hold_back_the_retrain_of_all(home, trained):
    (day,) = sessions_after(LATER, 30)[-1:]
    with configured(home, **LAX) as settings:
        datasets.ingest(settings, ["AAPL"], day)
        seen = monitor(symbol="AAPL", as_of=day)
        assert (seen.faults, seen.aged_event_id, seen.event_id) == ([], None, None)
        told = [row for row in rows_of(settings, outbox) if row["name"] == DataFaulty.name]
        assert {row["payload"]["symbol"] for row in told} == {"GOOG", "IBM"}
        datasets.ingest(settings, ["GOOG", "IBM"], day)
        again = monitor(symbol="AAPL", as_of=day, since=LATER)
        assert again.aged_event_id or again.event_id


def test_names_are_of_the_symbols_in_any_order_and_short():
    assert forecaster_name(["GOOG"]) == "perennial-goog"
    assert forecaster_name(["IBM", "AAPL"]) == forecaster_name(["AAPL", "IBM"])
    many = [f"SYM{number}" for number in range(50)]
    name = forecaster_name(many)
    assert name.startswith("perennial-sym0-and-49-more-")
    assert len(name) < 64
    assert forecaster_name([*many[:-1], "OTHER"]) != name
