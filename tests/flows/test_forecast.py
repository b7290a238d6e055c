"""The flow `forecast`: the server's numbers in a file and in the log, and who has none and why."""

import asyncio
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from prefect.logging import disable_run_logger
from prefect.states import exception_to_failed_state

from flows.forecast import ForecastResult, forecast
from forecasting import datasets, model
from forecasting.batch import SCHEMA
from forecasting.contract import Contract, seal
from forecasting.errors import (
    ConfigError,
    DataError,
    DatasetError,
    HistoryError,
    RegistryError,
    ServiceError,
)
from forecasting.hyperparameters import ModelConfig
from forecasting.registry import PRODUCTION, Registry, open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import predictions
from forecasting.windows import join, make_windows, split
from tasks.forecast import (
    _was_away,
    drain_log,
    find_versions,
    forecast_symbols,
    log_forecasts,
    write_forecasts,
)
from tests.flows.support import configured, flow_artifacts, rows_of
from tests.models import write_model_folder
from tests.serving.running import started, until, web

TRAINED = date(2011, 12, 30)
DAY = date(2012, 6, 20)
LATER = date(2012, 7, 31)
PAIR = ("AAPL", "GOOG")
ASKED = ["GOOG", "FB", "IBM", "NOPE", "MSFT", "AAPL", "GOOG"]
SHARED = ("symbol", "forecaster", "model_version", "run_id", "dataset_md5", "prices_md5")

pytestmark = pytest.mark.usefixtures("prefect_server")


def write_real_model(settings: Settings, folder: Path, run_id: str) -> Contract:
    """A network of two symbols, fitted to their prices, though not for long."""
    frames = [datasets.load_frame(settings, symbol, TRAINED) for symbol in PAIR]
    windows = join([make_windows(frame, 64, 5, index) for index, frame in enumerate(frames)])
    splits = split(windows, 60, 60)
    fitted = model.fit(splits, ModelConfig(hidden=8), 1, folder=folder.with_name("fit"))
    folder.mkdir()
    model.export_onnx(fitted, folder)
    facts = {"forecaster": "perennial-pair", "symbols": PAIR, "kind": fitted.kind}
    facts |= {"context": 64, "horizon": 5, "as_of": TRAINED, "run_id": run_id}
    facts |= {"train_start": fitted.train_start, "train_end": fitted.train_end}
    return seal(
        folder, facts | dict.fromkeys(("dataset_md5", "dataset_rev", "git_commit"), "0" * 32)
    )


def put_into_production(registry: Registry, folder: Path, forecaster: str, run_id: str) -> None:
    registry.set_alias(forecaster, PRODUCTION, registry.register(folder, forecaster, run_id))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prices that reach beyond `DAY`, published as of it; a version for every symbol but one."""
    made = tmp_path_factory.mktemp("forecast")
    settings = load_settings(home=made)
    version = datasets.ingest(settings, ["AAPL", "FB", "GOOG", "IBM"], LATER, publish_rows=False)
    for symbol in (*PAIR, "FB", "IBM"):
        datasets.publish(settings, version, symbol, DAY)
    registry = open_registry(settings)
    run_id = registry.start_run("trained", {})
    write_real_model(settings, made / "pair", run_id)
    put_into_production(registry, made / "pair", "perennial-pair", run_id)
    for symbol in ("FB", "IBM", "MSFT"):
        name = f"perennial-{symbol.lower()}"
        facts = {"forecaster": name, "symbols": (symbol,), "run_id": run_id, "as_of": TRAINED}
        write_model_folder(made / name, **facts)
        put_into_production(registry, made / name, name, run_id)
    return made


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> Iterator[Settings]:
    """The home of all, and tables of the test's own."""
    with configured(home, database_url=f"sqlite:///{tmp_path / 'perennial.db'}") as made:
        yield made


def logged(settings: Settings) -> list[dict[str, Any]]:
    found = rows_of(settings, predictions, "symbol", "horizon")
    return [row for row in found if row["source"] == "batch"]


def test_the_file_holds_the_numbers_of_the_server_to_the_last_digit(settings, home):
    result = forecast(symbols=["GOOG", "IBM", "AAPL"], as_of=DAY)
    assert result.output == str(home / "forecasts" / "2012-06-20.parquet")
    table = parquet.read_table(result.output)
    assert table.schema.equals(SCHEMA)
    with started("sync", home), web(home, ready=False) as server:
        for symbol in ("AAPL", "GOOG", "IBM"):
            path = f"/v1/forecast/{symbol}"
            until(lambda path=path: server.get(path).status_code == 200, f"an answer of {path}")
            answer = server.get(path).json()
            rows = [row for row in table.to_pylist() if row["symbol"] == symbol]
            assert len(rows) == len(answer["forecast"]) == 5
            for row, step in zip(rows, answer["forecast"], strict=True):
                assert {name: row[name] for name in SHARED} == {n: answer[n] for n in SHARED}
                assert row["levels"] == answer["levels"]
                assert row["as_of"].isoformat() == answer["as_of"] == "2012-06-20"
                assert row["origin"].isoformat() == answer["origin"] == "2012-06-20"
                assert row["origin_close"] == answer["origin_close"]
                assert row["target"].isoformat() == step["target"]
                assert (row["horizon"], row["median"]) == (step["horizon"], step["median"])
                assert row["quantiles"] == step["quantiles"]


def test_every_symbol_is_told_of_and_one_without_a_forecast_harms_no_other(settings, tmp_path):
    state = forecast(
        symbols=ASKED, as_of=DAY, output=str(tmp_path / "out.parquet"), return_state=True
    )
    result = state.result()
    assert isinstance(result, ForecastResult)
    assert (result.symbols, result.rows, result.as_of) == (3, 15, DAY)
    assert sorted(result.refused) == ["FB", "MSFT", "NOPE"]
    assert "64 rows of FB are needed by perennial-fb; 23 are known" in result.refused["FB"]
    assert "no symbol 'MSFT'; it has AAPL, FB, GOOG, IBM" in result.refused["MSFT"]
    assert "No version in production" in result.refused["NOPE"]
    assert ForecastResult.model_validate_json(result.model_dump_json()) == result
    rows = parquet.read_table(result.output).to_pylist()
    assert [row["symbol"] for row in rows[::5]] == ["AAPL", "GOOG", "IBM"]
    shown = json.loads(flow_artifacts(str(state.state_details.flow_run_id))["forecasts"])
    assert {row["symbol"]: row["why not"] for row in shown if row["why not"]} == result.refused
    told = {row["symbol"]: (row["forecaster"], row["version"]) for row in shown if row["version"]}
    assert told["GOOG"] == told["AAPL"] == ("perennial-pair", "1")
    assert told["IBM"] == ("perennial-ibm", "1")


def test_a_second_run_logs_nothing_twice(settings, tmp_path):
    first = forecast(symbols=["GOOG", "IBM"], as_of=DAY, output=str(tmp_path / "a.parquet"))
    before = logged(settings)
    again = forecast(symbols=["IBM", "GOOG"], as_of=DAY, output=str(tmp_path / "b.parquet"))
    assert logged(settings) == before
    tables = [parquet.read_table(each.output) for each in (first, again)]
    assert tables[0].equals(tables[1])
    rows = tables[0].to_pylist()
    assert len(before) == len(rows) == 10
    for record, row in zip(before, rows, strict=True):
        same = ("id", *SHARED, "horizon", "origin", "origin_close", "target", "levels", "quantiles")
        assert {name: record[name] for name in same} == {name: row[name] for name in same}
    assert list(settings.spool_dir.glob("forecast-*")) == []


def test_nothing_after_the_day_is_seen(settings, tmp_path):
    """Its dataset reaches beyond the day; one that ends there gives the same numbers."""
    result = forecast(symbols=["GOOG"], as_of=DAY, output=str(tmp_path / "a.parquet"))
    short = load_settings(home=tmp_path / "short")
    version = datasets.ingest(short, ["GOOG"], DAY)
    with disable_run_logger():
        registry = open_registry(settings)
        assigned = find_versions.fn(registry, ["GOOG"])
        made, refused = forecast_symbols.fn(short, registry, version, DAY, assigned)
        write_forecasts.fn(made, DAY, str(tmp_path / "b.parquet"))
    assert refused == {}
    own = ["id", "prices_md5"]
    seen = parquet.read_table(result.output).drop_columns(own)
    assert seen.equals(parquet.read_table(tmp_path / "b.parquet").drop_columns(own))
    assert version.md5 != result.prices_md5


def test_a_day_before_production_was_trained_is_refused(settings):
    with pytest.raises(DataError, match="trained as of 2011-12-30 and knows what came after"):
        forecast(symbols=["GOOG"], as_of=date(2011, 12, 29))
    assert logged(settings) == []


def test_where_none_can_be_forecast_it_fails_and_says_why(settings, home):
    target = home / "none.parquet"
    state = forecast(symbols=["FB", "NOPE"], as_of=DAY, output=str(target), return_state=True)
    assert state.is_failed()
    with pytest.raises(DataError, match=r"None of 2 symbols.*2012-06-20(.|\n)*NOPE(.|\n)*FB: 64"):
        state.result()
    assert not target.exists()
    shown = json.loads(flow_artifacts(str(state.state_details.flow_run_id))["forecasts"])
    assert [row["symbol"] for row in shown] == ["FB", "NOPE"]
    with pytest.raises(DataError, match="at least one is expected"):
        forecast(symbols=[], as_of=DAY)


def test_what_cannot_work_is_told_before_any_work(settings, tmp_path):
    with pytest.raises(ConfigError, match="Add the name of the file"):
        forecast(symbols=["GOOG"], as_of=DAY, output=str(tmp_path))
    with configured(tmp_path / "empty"), pytest.raises(DatasetError, match="no dataset"):
        forecast(symbols=["GOOG"], as_of=DAY)
    with pytest.raises(HistoryError, match="future"):
        forecast(symbols=["GOOG"], as_of=date(2999, 1, 1))


# --- steps by themselves ---------------------------------------------------------------------


def test_a_version_that_does_not_load_keeps_no_other_from_it(settings, tmp_path):
    registry = open_registry(load_settings(home=tmp_path / "registry"))
    for symbol in ("GOOG", "IBM", "AAPL"):
        name, run_id = f"perennial-{symbol.lower()}", registry.start_run("trained", {})
        folder = tmp_path / name
        write_model_folder(folder, forecaster=name, symbols=(symbol,), run_id=run_id)
        put_into_production(registry, folder, name, run_id)
    files = {path.read_text(): path for path in (tmp_path / "registry").rglob("contract.json")}
    for text, path in files.items():
        if '"IBM"' in text:
            path.with_name("model.onnx").write_bytes(b"altered")
        if '"AAPL"' in text:
            for each in path.parent.iterdir():
                each.unlink()
    prices = datasets.find(settings)
    assigned = find_versions.fn(registry, ["GOOG", "IBM", "AAPL"])
    made, refused = forecast_symbols.fn(settings, registry, prices, DAY, assigned)
    assert [window.symbol for each in made for window in each.windows] == ["GOOG"]
    assert "model.onnx is altered" in refused["IBM"]
    assert "AAPL" in refused
    assert list(settings.work_dir.iterdir()) == []


def test_a_registry_that_goes_away_is_no_fault_of_the_versions(settings, tmp_path):
    assigned = find_versions.fn(open_registry(settings), ["GOOG"])
    away = Registry("http://127.0.0.1:9", None)
    with pytest.raises(RegistryError, match="read the aliases"):
        forecast_symbols.fn(settings, away, datasets.find(settings), DAY, assigned)


def test_many_symbols_of_one_version_are_one_download(settings):
    class Counting(Registry):
        downloads = 0

        def download(self, *arguments: Any) -> Path:
            self.downloads += 1
            return super().download(*arguments)

    registry = Counting(settings.mlflow_uri, settings.mlflow_artifacts)
    assigned = find_versions.fn(registry, list(PAIR))
    made, _ = forecast_symbols.fn(settings, registry, datasets.find(settings), DAY, assigned)
    assert [len(each.windows) for each in made] == [2]
    assert registry.downloads == 1


def test_a_full_log_takes_no_forecast(settings, tmp_path):
    home = tmp_path / "full"
    (home / "spool").mkdir(parents=True)
    (home / "spool" / "web-1-1.jsonl").write_bytes(b" " * 2000 + b"\n")
    full = load_settings(home=home, spool_max_mb=0.001)
    registry = open_registry(settings)
    assigned = find_versions.fn(registry, ["IBM"])
    made, _ = forecast_symbols.fn(settings, registry, datasets.find(settings), DAY, assigned)
    with pytest.raises(ServiceError, match="PERENNIAL_SPOOL_MAX_MB"):
        log_forecasts.fn(full, made)
    roomy = load_settings(home=home)
    assert log_forecasts.fn(roomy, made) == 1
    assert drain_log.fn(roomy) == 1
    assert len(logged(roomy)) == 5


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (RegistryError("away"), True),
        (ServiceError("database locked"), True),
        (HistoryError("too early"), False),
        (ConfigError("a folder"), False),
    ],
)
def test_only_what_may_pass_is_retried(error, retried):
    async def asked() -> bool:
        state = await exception_to_failed_state(error)
        return await _was_away(find_versions, None, state)

    assert asyncio.run(asked()) is retried
