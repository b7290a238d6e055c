import sqlite3
from contextlib import suppress
from datetime import date

import numpy as np
import pytest
from sqlalchemy import Engine, inspect, text

from forecasting import audit
from forecasting.errors import ConfigError, ServiceError
from forecasting.store import engine_of, metadata, open_engine
from tests.postgres import ADDRESS, postgres_schema
from tests.services import free_port

TABLES = {
    "answer_counts",
    "audit",
    "checks",
    "costs",
    "gate_looks",
    "market_days",
    "outbox",
    "predictions",
    "probations",
    "promotions",
    "retrains",
    "scores",
}
SECRET = "s3cret-word"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'deep' / 'folder' / 'perennial.db'}"
        return
    with postgres_schema() as address:
        yield address


def tables(engine: Engine) -> dict[str, set[str]]:
    found = inspect(engine)
    names = set(found.get_table_names()) - {"alembic_version"}
    return {name: {c["name"] for c in found.get_columns(name)} for name in names}


def test_every_table_is_made_with_its_columns(url):
    with engine_of(url) as engine:
        made = tables(engine)
    assert set(made) == set(metadata.tables) == TABLES
    assert made == {name: set(t.columns.keys()) for name, t in metadata.tables.items()}


def test_opening_again_keeps_what_is_there(url):
    with engine_of(url) as engine, engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbox (id, name, resource, payload, occurred_at, attempts) "
                "VALUES ('1', 'n', 'r', '{}', '2008-01-02 00:00:00', 0)"
            )
        )
    with engine_of(url) as first, engine_of(url) as second, second.connect() as connection:
        assert tables(first) == tables(second)
        assert connection.execute(text("SELECT count(*) FROM outbox")).scalar_one() == 1


def test_a_number_that_is_none_does_not_spoil_its_row(url):
    """NaN is no JSON: PostgreSQL would refuse it, and SQLite hold what cannot be read again."""
    said = {"score": float("nan"), "of": np.float64(0.1), "days": {3: date(2008, 1, 2)}}
    with engine_of(url) as engine:
        with engine.begin() as connection:
            audit.add(connection, "retrain", "GOOG", who="me", reason="why", details=said)
        (line,) = audit.read(engine)
    assert line.details == {"score": None, "of": 0.1, "days": {"3": "2008-01-02"}}


def test_a_reader_does_not_block_the_drainer_on_sqlite(tmp_path):
    url = f"sqlite:///{tmp_path / 'perennial.db'}"
    with engine_of(url) as reading, engine_of(url) as writing:
        with reading.connect() as reader:
            count = text("SELECT count(*) FROM retrains")
            reader.exec_driver_sql("BEGIN")
            assert reader.execute(count).scalar_one() == 0
            with writing.begin() as writer:
                writer.execute(
                    text(
                        "INSERT INTO retrains VALUES "
                        "('1', 'GOOG', '2008-01-02', 't', 'f', 'running', '', '2008-01-02', NULL)"
                    )
                )
            assert reader.execute(count).scalar_one() == 0
        with reading.connect() as reader:
            assert reader.execute(count).scalar_one() == 1


@pytest.mark.parametrize("header", [b"", b"SQLite format 3\0"])
def test_a_damaged_sqlite_file_is_named_with_what_to_do_and_left_as_it_is(tmp_path, header):
    path = tmp_path / "perennial.db"
    damaged = header + b"this is no database" * 500
    path.write_bytes(damaged)
    with pytest.raises(ServiceError) as caught:
        open_engine(f"sqlite:///{path}")
    for part in (str(path), "not a database", "PERENNIAL_DATABASE_URL", "moved away"):
        assert part in str(caught.value)
    assert path.read_bytes() == damaged
    path.rename(tmp_path / "aside.db")
    with engine_of(f"sqlite:///{path}") as engine:
        assert set(tables(engine)) == TABLES


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ServiceError, match="cannot be made") as caught:
        open_engine(f"sqlite:///{tmp_path / 'file' / 'perennial.db'}")
    for part in (str(tmp_path / "file"), "PERENNIAL_DATABASE_URL", "PERENNIAL_HOME"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "query", ["", f"?password={SECRET}"], ids=["in the address", "in the query"]
)
def test_a_dead_address_is_named_without_its_password(query):
    port = free_port()
    with pytest.raises(ServiceError) as caught:
        open_engine(f"postgresql://me:{SECRET}@127.0.0.1:{port}/loop{query}")
    assert f"127.0.0.1:{port}/loop" in str(caught.value)
    assert "PERENNIAL_DATABASE_URL" in str(caught.value)
    assert_hidden(caught.value)


def test_a_database_that_does_not_exist_is_named():
    with postgres_schema():
        address = f"{ADDRESS.partition('?')[0].rpartition('/')[0]}/no_such_database"
    with pytest.raises(ServiceError, match='database "no_such_database" does not exist'):
        open_engine(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/var/lib/perennial.db",
        "not a url",
        f"postgres://me:{SECRET}@host/loop",
        f"postgresql://me:{SECRET}@host:port/loop",
        f"postgresql://me:5432/{SECRET}@host:x/loop",
    ],
)
def test_what_is_no_database_address_is_refused_with_an_example(address):
    with pytest.raises(ConfigError) as caught:
        open_engine(address)
    assert "PERENNIAL_DATABASE_URL should be a SQLAlchemy URL" in str(caught.value)
    assert "sqlite:////path/file.db" in str(caught.value)
    assert_hidden(caught.value)


def test_a_driver_that_is_not_installed_is_named():
    with pytest.raises(
        ConfigError, match=r"mysql, which is not installed.*postgresql://"
    ) as caught:
        open_engine(f"mysql://me:{SECRET}@host/loop")
    assert_hidden(caught.value)


def test_engine_of_closes_its_connections_after_an_error_too(url):
    with suppress(ZeroDivisionError), engine_of(url) as engine:
        with engine.connect() as connection:
            raw = connection.connection.driver_connection
        raise ZeroDivisionError
    if engine.dialect.name == "postgresql":
        assert raw.closed
    else:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            raw.execute("SELECT 1")


def assert_hidden(error: BaseException) -> None:
    """Neither the error nor anything that a traceback shows with it holds the password."""
    seen: BaseException | None = error
    while seen is not None:
        assert SECRET not in str(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
