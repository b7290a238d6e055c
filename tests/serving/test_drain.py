"""`python -m serving drain`: from the spool into SQL, whatever happens to the database."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from forecasting.predictions import Spool
from tests.postgres import ADDRESS, postgres_schema
from tests.predictions import make_prediction
from tests.serving.running import install, put_prices, request_body, started, until, web
from tests.serving.test_reload import install_damaged


def rows(database: Path) -> int:
    if not database.exists():
        return 0
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM predictions").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def answers(database: Path) -> int:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return int(connection.execute("SELECT sum(answers) FROM answer_counts").fetchone()[0] or 0)


@pytest.fixture
def spool(tmp_path):
    made = Spool(tmp_path / "spool", "test")
    yield made
    made.close()


def test_answers_arrive_in_sql_while_the_server_runs(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path) as server, started("drain", tmp_path) as drain:
        for _ in range(4):
            server.client.post("/v1/forecast", json=request_body())
            server.get("/v1/forecast/GOOG")
        until(lambda: rows(tmp_path / "perennial.db") == 25, "5 forecasts of 5 horizons in SQL")
        until(lambda: answers(tmp_path / "perennial.db") == 4, "4 answers counted")
        assert list((tmp_path / "spool").glob("*.jsonl")), "the server still writes this one"
        server.stop()
        until(lambda: not list((tmp_path / "spool").glob("web*")), "the segment to be removed")
        assert drain.stop() == 0


def test_the_last_lines_are_drained_on_sigterm(tmp_path, spool):
    with started("drain", tmp_path) as drain:
        until(lambda: drain.logged("draining"), "the start")
        for _ in range(50):
            spool.append(make_prediction())
        assert drain.stop() == 0
    assert rows(tmp_path / "perennial.db") == 250


def test_a_damaged_database_is_said_once_and_used_again_when_repaired(tmp_path, spool):
    database = tmp_path / "perennial.db"
    database.write_bytes(b"no database at all " * 500)
    spool.append(make_prediction())
    with started("drain", tmp_path) as drain:
        until(lambda: drain.logged("cannot be used"), "the complaint")
        assert "can be moved away" in drain.log
        assert drain.popen.poll() is None
        database.rename(tmp_path / "damaged.db")
        until(lambda: rows(database) == 5, "the spool in the new database")
        until(lambda: drain.logged("takes predictions again"), "the all-clear")
        assert drain.log.count("cannot be used") == 1


def test_what_could_not_be_drained_is_drained_at_the_next_start(tmp_path, spool):
    database = tmp_path / "perennial.db"
    database.write_bytes(b"no database at all " * 500)
    spool.append(make_prediction())
    with started("drain", tmp_path) as drain:
        until(lambda: drain.logged("cannot be used"), "the complaint")
        assert drain.stop() == 1
        assert "drained at the next start" in drain.log
    database.unlink()
    with started("drain", tmp_path) as drain:
        until(lambda: rows(database) == 5, "the spool in the new database")


def test_killed_drainers_store_everything_once(tmp_path, spool):
    database = tmp_path / "perennial.db"
    for before in (0, 100, 200):
        for _ in range(20):
            spool.append(make_prediction())
        with started("drain", tmp_path) as drain:
            until(lambda before=before: rows(database) > before, "some rows")
            drain.kill()
    with started("drain", tmp_path) as drain:
        until(lambda: drain.logged("draining"), "the start")
        assert drain.stop() == 0
    assert rows(database) == 300


def test_postgresql(tmp_path, spool):
    with postgres_schema() as url:
        schema = url.rpartition("%3D")[2]
        with started("drain", tmp_path, database_url=url) as drain:
            until(lambda: drain.logged("draining"), "the start")
            for _ in range(10):
                spool.append(make_prediction())

            def stored() -> bool:
                with psycopg.connect(ADDRESS) as connection:
                    query = f'SELECT count(*) FROM "{schema}".predictions'
                    try:
                        return connection.execute(query).fetchone() == (50,)
                    except psycopg.errors.UndefinedTable:
                        return False

            until(stored, "50 rows in PostgreSQL")
            assert drain.stop() == 0
        assert not (tmp_path / "perennial.db").exists()


def test_a_database_server_that_is_away_keeps_the_spool(tmp_path, spool):
    spool.append(make_prediction())
    url = "postgresql://nobody:secret@127.0.0.1:9/nothing"
    with started("drain", tmp_path, database_url=url) as drain:
        until(lambda: drain.logged("cannot be used"), "the complaint")
        assert "secret" not in drain.log
        assert drain.stop() == 1
    assert [path.stat().st_size > 0 for path in (tmp_path / "spool").glob("*.jsonl")] == [True]


@pytest.mark.parametrize("url", ["nonsense", "oracel://somewhere/x"])
def test_an_address_that_is_none_ends_the_drainer_with_a_message(tmp_path, spool, url):
    spool.append(make_prediction())
    with started("drain", tmp_path, database_url=url) as drain:
        assert drain.popen.wait(30) == 2
        assert "PERENNIAL_DATABASE_URL should be a SQLAlchemy URL" in drain.log
        assert "Traceback" not in drain.log


def test_a_version_that_a_worker_refuses_is_told_once(tmp_path):
    install(tmp_path, 1)
    put_prices(tmp_path)
    with web(tmp_path, web_workers=2) as server, started("drain", tmp_path):
        server.get("/v1/forecast/GOOG")
        until(lambda: rows(tmp_path / "perennial.db") == 5, "the database")
        install_damaged(tmp_path, 2)
        until(lambda: server.get("/v1/models").json()["refused"], "the refusal")

        def told() -> list[tuple[str, str]]:
            database = tmp_path / "perennial.db"
            with closing(sqlite3.connect(database, timeout=30)) as connection:
                return connection.execute("SELECT name, payload FROM outbox").fetchall()

        ((name, payload),) = until(told, "the event")
        assert name == "perennial.model.unservable"
        assert json.loads(payload)["version"] == 2
        assert "altered" in json.loads(payload)["reason"]
        server.stop()
        until(lambda: not list((tmp_path / "spool").glob("web*")), "all to be drained")
        assert len(told()) == 1
