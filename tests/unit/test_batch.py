"""Offline forecasts without Prefect: who answers, which numbers, which ids, and the file."""

import io
from datetime import UTC, date, datetime
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pyarrow.parquet as parquet
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fsspec.implementations.memory import MemoryFileSystem

from forecasting import batch, datasets, model
from forecasting.assignment import Held, assign, in_production
from forecasting.batch import SCHEMA, Batch
from forecasting.contract import CONTRACT_FILE, Snapshot, decode, seal, sha256_file
from forecasting.errors import (
    ConfigError,
    ContractError,
    DatasetError,
    HistoryError,
    RegistryError,
    ServiceError,
)
from forecasting.hyperparameters import ModelConfig
from forecasting.inference import Forecaster
from forecasting.predictions import Computed
from forecasting.registry import CONTRACT_TAG, PRODUCTION, SIGNATURE_TAG, Registry, open_registry
from forecasting.sessions import sessions_after
from forecasting.signing import sign
from forecasting.windows import make_windows, split
from serving import columnar
from serving.open_models import Served
from serving.predictor import _by_symbol
from tests.market import market
from tests.models import make_snapshot, write_model_folder

DAY = date(2008, 1, 2)
NAME = "perennial-two"


@pytest.fixture
def tiny(tmp_path) -> Forecaster:
    write_model_folder(tmp_path / "tiny", symbols=("GOOG", "IBM"), forecaster=NAME)
    return Forecaster.load(tmp_path / "tiny", version=3)


def forecast_of(
    forecaster: Forecaster, *snapshots: Snapshot, as_of: date = DAY
) -> tuple[Batch, dict[str, str]]:
    by_symbol = {each.symbol: each for each in snapshots}
    return batch.forecast(forecaster, list(by_symbol), as_of, by_symbol.__getitem__)


def ids(made: Batch) -> list[str]:
    return [window.id for window in made.windows]


# --- who answers -----------------------------------------------------------------------------


def test_symbols_are_assigned_as_the_server_does(tiny):
    listed = {"b-market": "ABCD", "c-pair": "AB", "a-pair": "BC", "z-one": "C", "a-idle": "X"}
    held = [Held(name, 1, tuple(symbols), "", "") for name, symbols in listed.items()]
    champions = {}
    for each in held:
        facts = {"forecaster": each.forecaster, "symbols": each.symbols}
        contract = msgspec.structs.replace(tiny.contract, **facts)
        champions[each.forecaster] = Served(contract, 1, Path(), datetime.now(UTC))
    assigned = assign(["D", "B", "NOPE", "A", "C"], held)
    ours = {symbol: each.forecaster for each, symbols in assigned for symbol in symbols}
    theirs = {name: served.contract.forecaster for name, served in _by_symbol(champions).items()}
    assert ours == {"A": "c-pair", "B": "a-pair", "C": "z-one", "D": "b-market"}
    assert ours == {name: theirs[name] for name in "ABCD"}


def test_symbols_of_one_version_are_together_in_the_order_asked():
    everything = Held("all", 1, ("A", "B", "C"), "", "")
    assert assign(["C", "A", "B"], [everything]) == [(everything, ["C", "A", "B"])]
    assert assign(["D"], [everything]) == []


@pytest.fixture
def registry(settings) -> Registry:
    """Version 1 of one forecaster in production, another forecaster without any."""
    made = open_registry(settings)
    for name in (NAME, "perennial-waiting"):
        folder = settings.home / name
        run_id = made.start_run("a run", {})
        write_model_folder(folder, symbols=("GOOG", "IBM"), forecaster=name, run_id=run_id)
        made.register(folder, name, run_id)
    made.set_alias(NAME, PRODUCTION, 1)
    return made


def test_what_is_in_production_is_described_by_the_registry(registry, settings):
    digest = sha256_file(settings.home / NAME / CONTRACT_FILE)
    assert in_production(registry) == [Held(NAME, 1, ("GOOG", "IBM"), digest, "")]


def test_a_version_is_loaded_if_it_is_the_one_that_was_registered(registry, tmp_path):
    (held,) = in_production(registry)
    loaded = batch.load(registry, held, tmp_path / "good", None)
    assert (loaded.contract.forecaster, loaded.version) == (NAME, 1)
    registry.tag_version(NAME, 1, {CONTRACT_TAG: "0" * 64})
    (held,) = in_production(registry)
    with pytest.raises(
        ContractError, match=f"registered with a contract.json of sha256 {'0' * 64}"
    ):
        batch.load(registry, held, tmp_path / "other", None)


def test_where_a_key_is_trusted_an_unsigned_version_is_refused(registry, tmp_path):
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "signing.pem", tmp_path / "trusted.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (held,) = in_production(registry)
    with pytest.raises(ContractError, match="should carry a signature"):
        batch.load(registry, held, tmp_path / "unsigned", public)
    signature = sign(private, NAME, 1, held.contract_sha256)
    registry.tag_version(NAME, 1, {SIGNATURE_TAG: signature})
    (held,) = in_production(registry)
    assert batch.load(registry, held, tmp_path / "signed", public).version == 1


def test_a_registry_that_is_away_is_told(tmp_path):
    away = Registry(f"sqlite:///{tmp_path}")
    with pytest.raises(RegistryError, match="could not read the versions"):
        in_production(away)


# --- forecasts -------------------------------------------------------------------------------


def test_snapshots_are_those_that_are_published(settings):
    version = datasets.ingest(settings, ["AAPL", "GOOG"], DAY)
    read = datasets.snapshots(settings, version, DAY)
    for symbol in ("AAPL", "GOOG"):
        (path,) = (settings.home / "published" / symbol).glob(f"{version.md5}-*.json")
        assert read(symbol) == decode(path.read_bytes(), Snapshot, str(path))
    before = datasets.snapshots(settings, version, date(2007, 12, 31))("GOOG")
    assert before.dates[-1] == date(2007, 12, 31)
    with pytest.raises(DatasetError, match="no symbol 'NOPE'; it has AAPL, GOOG"):
        read("NOPE")
    with pytest.raises(HistoryError, match="future"):
        datasets.snapshots(settings, version, date(2999, 1, 1))


def test_a_forecast_says_what_it_was_made_from_and_for_when(tiny):
    made, refused = forecast_of(tiny, make_snapshot(close=806.19))
    (window,) = made.windows
    assert refused == {}
    assert (window.symbol, window.source, window.prices_md5) == ("GOOG", "batch", "p" * 32)
    assert (window.origin, window.origin_close) == (DAY, 806.19)
    assert window.targets == sessions_after(DAY, 5)
    assert made.quantiles.shape == (1, 5, 39)
    assert made.quantiles[0, :, 19] == pytest.approx(806.19)


def test_a_symbol_that_cannot_be_forecast_keeps_no_other_from_it(tiny):
    few = make_snapshot("IBM", count=63)
    made, refused = forecast_of(tiny, few, make_snapshot("GOOG"), make_snapshot("MSFT"))
    # one that the version does not list is forecast too: who may be asked is decided before
    assert [window.symbol for window in made.windows] == ["GOOG", "MSFT"]
    assert list(refused) == ["IBM"]
    assert (
        "64 rows of IBM are needed by perennial-two; 63 are known as of 2008-01" in refused["IBM"]
    )


@pytest.mark.parametrize("price", [0.0, 1e-60, 1e60, float("nan"), float("inf")])
def test_prices_that_are_none_in_single_precision_are_refused(tiny, price):
    good = make_snapshot("IBM")
    bad = msgspec.structs.replace(good, ohlcv=[*good.ohlcv[:-2], (price,) * 5, good.ohlcv[-1]])
    made, refused = forecast_of(tiny, bad, make_snapshot("GOOG"))
    assert "rows of IBM as of 2008-01-02 should hold finite prices above zero" in refused["IBM"]
    assert [window.symbol for window in made.windows] == ["GOOG"]


def test_a_version_that_knows_what_came_after_is_not_asked(tiny):
    before = date(2007, 12, 28)
    made, refused = forecast_of(tiny, make_snapshot(last=before), as_of=before)
    assert made.windows == []
    assert list(made.rows(before)) == list(made.lines()) == []
    assert "trained as of 2007-12-31 and knows what came after 2007-12-28" in refused["GOOG"]


def test_the_same_forecast_has_the_same_id_and_another_one_another(tiny, tmp_path):
    snapshot = make_snapshot()
    first, _ = forecast_of(tiny, snapshot)
    assert ids(forecast_of(tiny, snapshot)[0]) == ids(first)
    weekend = msgspec.structs.replace(snapshot, as_of=date(2008, 1, 5))
    assert ids(forecast_of(tiny, weekend)[0]) == ids(first), "a later day with nothing new"
    revised = msgspec.structs.replace(
        snapshot, ohlcv=[*snapshot.ohlcv[:-2], snapshot.ohlcv[-1], snapshot.ohlcv[-1]]
    )
    write_model_folder(tmp_path / "other", symbols=("GOOG",), forecaster=NAME, run_id="1" * 32)
    others = [
        forecast_of(tiny, make_snapshot("IBM")),
        forecast_of(tiny, make_snapshot(md5="q" * 32)),
        forecast_of(tiny, make_snapshot(last=date(2007, 12, 31))),
        forecast_of(tiny, revised),
        forecast_of(Forecaster.load(tmp_path / "tiny", version=4), snapshot),
        forecast_of(Forecaster.load(tmp_path / "other", version=3), snapshot),
    ]
    found = [*ids(first), *(identity for made, _ in others for identity in ids(made))]
    assert len(set(found)) == len(found) == 7


def test_numbers_do_not_depend_on_what_else_is_forecast(tmp_path):
    """A real network, whose last digits change with the size of a batch."""
    frame = market(420)
    windows = make_windows(frame, 40, 5)
    fitted = model.fit(split(windows, 40, 40), ModelConfig(hidden=8), 2, folder=tmp_path / "fit")
    (tmp_path / "model").mkdir()
    model.export_onnx(fitted, tmp_path / "model")
    facts = dict.fromkeys(("dataset_md5", "dataset_rev", "run_id", "git_commit"), "-")
    facts |= dict.fromkeys(("as_of", "train_start", "train_end"), fitted.train_end)
    facts |= {"context": 40, "horizon": 5, "kind": fitted.kind, "forecaster": NAME}
    seal(tmp_path / "model", facts | {"symbols": ("A",)})
    forecaster = Forecaster.load(tmp_path / "model", 1)
    days = [day.date() for day in frame.index]
    rows = list(frame.itertuples(index=False, name=None))
    snapshots = [
        Snapshot(
            symbol="A",
            as_of=days[end - 1],
            dataset_md5="p" * 32,
            dataset_rev="r" * 40,
            dates=days[:end],
            ohlcv=rows[:end],
        )
        for end in range(391, 421)
    ]
    left = iter(snapshots)
    made, refused = batch.forecast(forecaster, ["A"] * 30, days[-1], lambda _: next(left))
    assert refused == {}
    last = range(len(windows) - 30, len(windows))
    alone = [
        forecaster.predict(*(part[at : at + 1] for part in (windows.ohlcv, windows.dates, zeros)))
        for zeros in [np.zeros(len(windows), dtype=np.int64)]
        for at in last
    ]
    assert (made.quantiles == np.concatenate(alone)).all()


# --- the log and the table -------------------------------------------------------------------


def test_lines_of_the_log_hold_every_forecast_once(tiny, monkeypatch):
    monkeypatch.setattr(batch, "WINDOWS_A_LINE", 1)
    made, _ = forecast_of(tiny, make_snapshot("GOOG"), make_snapshot("IBM", close=93.3))
    lines = list(made.lines())
    assert [count for _, count in lines] == [1, 1]
    logged = [
        record
        for line, _ in lines
        for record in msgspec.json.decode(line, type=Computed).predictions()
    ]
    assert [record.id for record in logged] == ids(made)
    for record, numbers in zip(logged, made.quantiles, strict=True):
        assert (record.source, record.model_version, record.forecaster) == ("batch", 3, NAME)
        assert (np.array(record.quantiles, dtype=np.float32) == numbers).all()


def test_the_table_holds_the_numbers_as_they_are_written(tiny):
    made, _ = forecast_of(tiny, make_snapshot("IBM", close=93.3), make_snapshot(close=806.19))
    table = batch.table_of([made], date(2008, 1, 5))
    rows = table.to_pylist()
    assert [(row["symbol"], row["horizon"]) for row in rows] == [
        (symbol, step) for symbol in ("GOOG", "IBM") for step in range(1, 6)
    ]
    for row in rows:
        window = made.windows[row["symbol"] == "GOOG"]
        numbers = made.quantiles[int(row["symbol"] == "GOOG"), row["horizon"] - 1]
        assert row["quantiles"] == [float(str(number)) for number in numbers]
        assert row["median"] == row["quantiles"][19]
        assert row["levels"] == list(tiny.contract.quantile_levels)
        assert (row["id"], row["origin_close"]) == (window.id, window.origin_close)
        assert row["target"] == window.targets[row["horizon"] - 1]
        assert (row["origin"], row["as_of"]) == (DAY, date(2008, 1, 5))


def test_columns_are_those_of_the_server_s_tables():
    assert set(columnar._SCHEMA.names) <= set(SCHEMA.names)
    assert [field for field in SCHEMA if field.name in columnar._SCHEMA.names] == list(
        columnar._SCHEMA
    )


# --- the file --------------------------------------------------------------------------------


class Torn(MemoryFileSystem):
    """Takes every file but gives none another name."""

    protocol = "torn"
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def mv(self, *_names, **_options):
        raise OSError("connection reset")


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_file_is_written_over_another_and_leaves_nothing_beside_it(tiny, tmp_path, place):
    folder = f"memory://{tmp_path}" if place == "memory" else str(tmp_path)
    url = f"{folder}/new/2008-01-02.parquet"
    first, _ = forecast_of(tiny, make_snapshot("GOOG"), make_snapshot("IBM"))
    second, _ = forecast_of(tiny, make_snapshot("IBM"))
    for made, rows in ((first, 10), (second, 5)):
        batch.write(batch.table_of([made], DAY), url)
        files, path = fsspec.core.url_to_fs(url)
        table = parquet.read_table(io.BytesIO(files.cat_file(path)))
        assert table.schema.equals(SCHEMA)
        assert table.num_rows == rows
        assert len(files.ls(path.rpartition("/")[0])) == 1


def test_a_file_that_cannot_be_put_in_its_place_leaves_the_old_one(tiny):
    fsspec.register_implementation("torn", Torn, clobber=True)
    files = fsspec.filesystem("torn")
    files.pipe_file("/out/a.parquet", b"old")
    table = batch.table_of([forecast_of(tiny, make_snapshot())[0]], DAY)
    with pytest.raises(ServiceError, match=r"cannot be written to torn://out/a\.parquet"):
        batch.write(table, "torn://out/a.parquet")
    assert files.cat_file("/out/a.parquet") == b"old"
    assert len(files.ls("/out")) == 1


def test_a_place_that_is_none_is_told_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="which cannot be opened"):
        batch.open_target("nosuch://bucket/a.parquet")
    for folder in (str(tmp_path), f"{tmp_path}/new/"):
        with pytest.raises(ConfigError, match="Add the name of the file"):
            batch.open_target(folder)


def test_a_disk_that_refuses_is_told(tiny, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    table = batch.table_of([forecast_of(tiny, make_snapshot())[0]], DAY)
    with pytest.raises(ServiceError, match=r"cannot be written to .*file/a\.parquet"):
        batch.write(table, f"{tmp_path}/file/a.parquet")
