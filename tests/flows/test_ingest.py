"""The flow `ingest` on a Prefect server: typed result, artifacts, failures."""

from datetime import date

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.ingest import IngestResult, ingest, today_or
from forecasting import datasets
from forecasting.errors import BadPricesError, SourceError
from forecasting.events import DataUpdated
from forecasting.sessions import exchange_day
from forecasting.settings import load_settings
from forecasting.store import now, outbox
from tests import series
from tests.flows.support import rows_of

DAY = date(2008, 9, 15)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The flow builds its own settings: it is told its home as a user tells it."""
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path / "home"))
    return load_settings()


def artifact(key: str) -> str:
    """Data of the newest artifact of that name (`Artifact.get` leaves sockets open)."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.UPDATED_DESC)
    return str(found[0].data)


def test_ingest_returns_the_version_and_shows_the_data(prefect_server, home):
    result = ingest(symbols=["GOOG", "IBM"], as_of=DAY)
    assert isinstance(result, IngestResult)
    assert result.changed
    assert result.rows == {"GOOG": 1026, "IBM": 2148}
    assert result.md5 == datasets.current(home).md5
    assert '"symbol": "IBM"' in artifact("data-summary")
    assert result.md5 in artifact("dataset-version")
    assert IngestResult.model_validate_json(result.model_dump_json()) == result


def test_a_second_ingest_finds_nothing_new(prefect_server, home):
    first = ingest(as_of=DAY)
    again = ingest(as_of=DAY)
    assert first.symbols == ["GOOG"]
    assert not again.changed
    assert (again.md5, again.rev) == (first.md5, first.rev)
    (told,) = rows_of(home, outbox)
    assert (told["name"], told["resource"]) == ("perennial.data.updated", "perennial.dataset")
    expected = {"symbols": ["GOOG"], "as_of": DAY.isoformat(), "dataset_md5": first.md5}
    assert told["payload"] == {"schema": 1} | expected
    assert told["delivered_at"] is not None


def test_an_unknown_symbol_fails_at_once(prefect_server, home):
    with pytest.raises(SourceError, match="it knows AAPL, FB, GOOG, IBM, MSFT"):
        ingest(symbols=["NOPE"], as_of=DAY)
    assert datasets.current(home) is None


def test_refused_prices_are_told_once_and_reach_prefect(
    prefect_server, home, tmp_path, monkeypatch
):
    table = series.table(100)
    good = series.write_csv(table, tmp_path / "TEST.csv")
    monkeypatch.setenv("PERENNIAL_SOURCE", "file")
    monkeypatch.setenv("PERENNIAL_SOURCE_URL", good)
    day = date.fromisoformat(table["date"].iloc[-1])
    kept = ingest(symbols=["TEST"], as_of=day)
    table.loc[50, "high"] = 1.0
    series.write_csv(table, tmp_path / "TEST.csv")
    for _ in range(2):
        with pytest.raises(BadPricesError, match="high is below low"):
            ingest(symbols=["TEST"], as_of=day)
    settings = load_settings()
    assert datasets.current(settings).md5 == kept.md5
    (row,) = [each for each in rows_of(settings, outbox) if each["name"] != DataUpdated.name]
    assert (row["name"], row["resource"]) == ("perennial.data.rejected", "perennial.dataset")
    assert row["delivered_at"] is not None
    assert (row["payload"]["symbols"], row["payload"]["as_of"]) == (["TEST"], day.isoformat())
    assert "high is below low" in row["payload"]["reason"]


def test_parameters_are_typed_for_the_ui():
    schema = ingest.parameters.model_dump()["properties"]
    assert schema["symbols"]["default"] == ["GOOG"]
    assert schema["symbols"]["items"] == {"type": "string"}
    assert {"type": "string", "format": "date"} in schema["as_of"]["anyOf"]


def test_today_is_the_default():
    assert today_or(DAY) == DAY
    assert today_or(None) == exchange_day(now())
