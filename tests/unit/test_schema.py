import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DatabaseError

from forecasting import schema
from forecasting.errors import ServiceError
from forecasting.store import engine_of, metadata, open_engine, parse_url
from tests.postgres import postgres_schema

MIGRATIONS = Path(schema.__file__).parent / "migrations"
FIRST_RELEASE = Path(__file__).parent / "first_release.sql"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'perennial.db'}"
        return
    with postgres_schema() as address:
        yield address


def run_script(engine: Engine, script: str) -> None:
    with engine.begin() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)


def make_first_release(url: str) -> None:
    """A database as the first release left it: its tables, rows in them, and no version."""
    engine = create_engine(parse_url(url))
    script = FIRST_RELEASE.read_text()
    if engine.dialect.name == "postgresql":
        script = script.replace("DATETIME", "TIMESTAMP WITH TIME ZONE")
    run_script(engine, script)
    engine.dispose()


def differences(connection: Connection) -> list[object]:
    """Of the database from the tables of the store, comments aside."""
    found = compare_metadata(MigrationContext.configure(connection), metadata)
    every = [each for some in found for each in (some if isinstance(some, list) else [some])]
    return [each for each in every if each[0] != "modify_comment"]


def test_the_newest_migration_is_the_one_that_the_code_asks_for():
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]


def test_migrations_come_to_the_tables_of_the_store(url):
    with engine_of(url) as engine, engine.connect() as connection:
        assert schema.revision(connection) == schema.HEAD
        assert differences(connection) == []


def test_a_database_of_the_first_release_is_brought_up_with_its_rows(url):
    make_first_release(url)
    with engine_of(url) as engine, engine.connect() as connection:
        assert schema.revision(connection) == schema.HEAD
        assert differences(connection) == []
        found = connection.execute(text("SELECT symbol, state, cpu_seconds FROM retrains")).all()
        assert [tuple(row) for row in found] == [("GOOG", "promoted", None)]
        (kept,) = connection.execute(text("SELECT crps_bp, horizon, actual FROM predictions")).all()
        assert tuple(kept) == (152.5, 2, None)
        assert connection.execute(text("SELECT alarmed FROM checks")).scalar_one() is None
        for table in ("answer_counts", "promotions", "gate_looks", "outbox"):
            query = text(f"SELECT count(*) FROM {table}")
            assert connection.execute(query).scalar_one() == 1, table


def test_many_that_come_at_once_migrate_once(url):
    make_first_release(url)
    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(open_engine, [url] * 8))
    with engines[0].connect() as connection:
        query = text("SELECT version_num FROM alembic_version")
        assert connection.execute(query).scalars().all() == [schema.HEAD]
    for engine in engines:
        engine.dispose()


def test_a_migration_that_is_killed_leaves_the_database_as_it_was(url):
    make_first_release(url)
    code = (
        "import os, sys\n"
        "from alembic import command\n"
        "from forecasting.store import open_engine\n"
        "real = command.upgrade\n"
        "def upgrade(*arguments):\n"
        "    real(*arguments)\n"
        "    os.kill(os.getpid(), 9)\n"  # all is done but the commit
        "command.upgrade = upgrade\n"
        "open_engine(sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, url], check=False, timeout=60)
    assert killed.returncode == -9
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        assert schema.revision(connection) == schema.FIRST_RELEASE
    engine.dispose()
    with engine_of(url) as engine, engine.connect() as connection:
        assert schema.revision(connection) == schema.HEAD


def test_a_database_of_a_newer_perennial_is_refused_and_left_alone(url):
    with engine_of(url) as engine, engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ServiceError, match=r"9999.*newer"):
        open_engine(url)
    engine = create_engine(parse_url(url))
    with engine.connect() as connection:
        assert schema.revision(connection) == "9999"
    engine.dispose()


@pytest.mark.parametrize("change", ["UPDATE audit SET reason = 'x'", "DELETE FROM audit"])
def test_the_audit_can_only_be_added_to(url, change):
    row = (
        "INSERT INTO audit (at, kind, subject, who, reason, details) "
        "VALUES ('2008-01-02 00:00:00', 'skip', 'GOOG', 'anna', 'cooldown', '{}')"
    )
    with engine_of(url) as engine:
        with engine.begin() as connection:
            connection.execute(text(row))
        with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
            connection.execute(text(change))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT reason FROM audit")).all() == [("cooldown",)]


def test_a_line_of_the_audit_is_not_replaced(tmp_path):
    """SQLite's REPLACE deletes without the trigger of a deletion."""
    line = (
        "INTO audit (number, at, kind, subject, who, reason, details) "
        "VALUES (1, '2008-01-02 00:00:00', 'skip', 'GOOG', 'anna', '{}', '{{}}')"
    )
    with engine_of(f"sqlite:///{tmp_path / 'perennial.db'}") as engine:
        with engine.begin() as connection:
            connection.execute(text("INSERT " + line.format("true")))
        with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
            connection.execute(text("REPLACE " + line.format("forged")))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT reason FROM audit")).all() == [("true",)]


def test_a_database_that_is_up_to_date_is_opened_without_alembic(tmp_path):
    url = f"sqlite:///{tmp_path / 'perennial.db'}"
    with engine_of(url):
        pass
    code = (
        "import sys; from forecasting.store import engine_of\n"
        "with engine_of(sys.argv[1]): pass\n"
        "assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, url], check=True, timeout=60, env=dict(os.environ))


def test_the_command_alembic_knows_the_database(tmp_path):
    environment = os.environ | {"PERENNIAL_HOME": str(tmp_path)}
    with engine_of(f"sqlite:///{tmp_path / 'perennial.db'}"):
        pass
    shown = subprocess.run(
        [sys.executable, "-m", "alembic", "check"],
        cwd=MIGRATIONS.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "No new upgrade operations" in shown.stdout
