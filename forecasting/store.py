"""The SQL engine and its tables: prediction log, promotions, retrains, scores, costs, audit.

SQLite under `home` by default, PostgreSQL by `PERENNIAL_DATABASE_URL`. SQLite runs in WAL mode so
that the drainer can write while a flow reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import orjson
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Date,
    DateTime,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from forecasting.errors import ConfigError, ServiceError
from forecasting.schema import upgrade

metadata = MetaData()

predictions = Table(
    "predictions",
    metadata,
    Column("id", String(36), primary_key=True, comment="one answered forecast"),
    Column("horizon", Integer, primary_key=True, comment="trading days ahead, from 1"),
    Column("made_at", DateTime(timezone=True), nullable=False),
    Column(
        "source",
        String(8),
        nullable=False,
        comment="get: latest prices; post: client's rows; batch: flow; shadow, canary: challenger",
    ),
    Column("symbol", String(32), nullable=False),
    Column("forecaster", String(64), nullable=False),
    Column("model_version", Integer, nullable=False),
    Column("run_id", String(64), nullable=False),
    Column("dataset_md5", String(64), nullable=False, comment="of the model; see prices_md5"),
    Column("prices_md5", String(64), nullable=True, comment="dataset of the rows used, if ours"),
    Column("origin", Date, nullable=False, comment="last row seen"),
    Column("origin_close", Float, nullable=False),
    Column("target", Date, nullable=False, comment="session that is forecast"),
    Column("levels", JSON, nullable=False),
    Column("quantiles", JSON, nullable=False, comment="prices, in units of the origin day"),
    Column("actual", Float, nullable=True, comment="close on target in units of the origin day"),
    Column("crps_bp", Float, nullable=True, comment="CRPS of the log return, basis points"),
    Index("ix_predictions_join", "symbol", "target", "actual"),
)

answer_counts = Table(
    "answer_counts",
    metadata,
    Column("writer", String(64), primary_key=True, comment="web worker that answered"),
    Column("forecaster", String(64), primary_key=True),
    Column("model_version", Integer, primary_key=True),
    Column("symbol", String(32), primary_key=True),
    Column("origin", Date, primary_key=True, comment="last row seen"),
    Column("answers", BigInteger, nullable=False, comment="GETs of one computed forecast"),
    Column("last_at", DateTime(timezone=True), nullable=False),
)

promotions = Table(
    "promotions",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("forecaster", String(64), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("previous", Integer, nullable=True, comment="version that held the alias before"),
    Column("fallback", Integer, nullable=True, comment="version that was `previous` before"),
    Column("state", String(16), nullable=False, comment="intended|moved|confirmed|undone"),
    Column("served", String(200), nullable=False, default="", comment="what the server said"),
    Column("who", String(200), nullable=False),
    Column("why", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
)

retrains = Table(
    "retrains",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("symbol", String(64), nullable=False, index=True),  # or the forecaster of several
    Column("as_of", Date, nullable=False),
    Column("trigger", Text, nullable=False),
    Column("flow_run_id", String(36), nullable=False),
    Column(
        "state",
        String(16),
        nullable=False,
        comment="running|promoted|refused|unchanged|failed|skipped|rolled-back",
    ),
    Column("reason", Text, nullable=False, default=""),
    Column("cpu_seconds", Float, nullable=True, comment="spent; None while it runs"),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

gate_looks = Table(
    "gate_looks",
    metadata,
    Column("forecaster", String(64), primary_key=True),
    Column("model_sha256", String(64), primary_key=True, comment="of the candidate's graph"),
    Column("first_day", Date, primary_key=True, comment="first origin of the gate's windows"),
    Column("last_day", Date, primary_key=True),
    Column("days", Integer, nullable=False),
    Column("uses", Float, nullable=False, comment="other candidates judged before, mean over days"),
    Column("verdict", String(16), nullable=False, comment="open|passed|refused"),
    Column("reasons", Text, nullable=False),
    Column("dataset_md5", String(64), nullable=False),
    Column("run_id", String(64), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

checks = Table(
    "checks",
    metadata,
    Column("symbol", String(32), primary_key=True),
    Column("as_of", Date, primary_key=True),
    Column("forecaster", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, comment="in production when checked"),
    Column("share", Float, nullable=False, comment="share of features that drifted"),
    Column("threshold", Float, nullable=False),
    Column("drifted", Boolean, nullable=False),
    Column("features", JSON, nullable=False, comment="distance of each feature; score of a shift"),
    Column("alarmed", Boolean, nullable=True, comment="whether it was told; None: before that"),
    Column("flow_run_id", String(36), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

market_days = Table(
    "market_days",
    metadata,
    Column("symbol", String(32), primary_key=True),
    Column("day", Date, primary_key=True, comment="session whose daily round is done"),
    Column("prices_md5", String(64), nullable=False, comment="dataset of the round"),
    Column("flow_run_id", String(36), nullable=False),
    Column("done_at", DateTime(timezone=True), nullable=False),
)

scores = Table(
    "scores",
    metadata,
    Column("symbol", String(32), primary_key=True),
    Column("as_of", Date, primary_key=True, comment="day on which it was known"),
    Column("forecaster", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("name", String(64), primary_key=True, comment="what is measured, such as crps_bp"),
    Column(
        "horizon", Integer, primary_key=True, comment="trading days ahead; 0: of no one horizon"
    ),
    Column("value", Float, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)

probations = Table(
    "probations",
    metadata,
    Column("id", String(36), primary_key=True, comment="of the promotion that began it"),
    Column("forecaster", String(64), nullable=False, index=True),
    Column("version", Integer, nullable=False),
    Column("previous", Integer, nullable=False, comment="version that is scored beside it"),
    Column("started", Date, nullable=False, comment="market day of the promotion"),
    Column("days", Integer, nullable=False, comment="market days that it is watched for"),
    Column("state", String(16), nullable=False, comment="watching|passed|rolled-back|superseded"),
    Column("evidence", JSON, nullable=False, default=dict, comment="as of the last look"),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
)

costs = Table(
    "costs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("flow", String(32), nullable=False, comment="flow, or step of a replay"),
    Column("flow_run_id", String(36), nullable=False),
    Column("symbol", String(64), nullable=False),
    Column("as_of", Date, nullable=False),
    Column("policy", String(32), nullable=False, default="", comment="of a replay; else empty"),
    Column("outcome", String(16), nullable=False, comment="what it came to; failed"),
    Column("wall_seconds", Float, nullable=False),
    Column("cpu_seconds", Float, nullable=False, comment="of the process and its children"),
    Column("bytes", BigInteger, nullable=False, comment="that the home grew by"),
    Column("started_at", DateTime(timezone=True), nullable=False, index=True),
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("kind", String(32), nullable=False, comment="such as alias, trigger, skip, approval"),
    Column("subject", String(64), nullable=False, comment="forecaster or symbol", index=True),
    Column("version", Integer, nullable=True),
    Column("who", String(200), nullable=False),
    Column("reason", Text, nullable=False),
    Column("details", JSON, nullable=False, default=dict),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", String(36), primary_key=True, comment="event id"),
    Column("name", String(120), nullable=False),
    Column("resource", String(200), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("delivered_at", DateTime(timezone=True), nullable=True),
)


def now() -> datetime:
    """The present, timezone-aware."""
    return datetime.now(UTC)


def _json(value: object) -> str:
    """As columns hold it: NaN is null, for what is no JSON could not be read again."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()


def open_engine(url: str) -> Engine:
    """Engine for `url` with all tables present, of the schema that the code knows.

    Raises:
        ConfigError: `url` is no SQLAlchemy URL, or its driver is not installed.
        ServiceError: the database cannot be reached, is not a database or of a newer perennial.
    """
    parsed = parse_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    try:
        if sqlite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(
            parsed,
            connect_args={"timeout": 30} if sqlite else {},
            json_serializer=_json,
            json_deserializer=msgspec.json.decode,  # quantiles of thousands of forecasts, each day
        )
    except OSError as error:
        raise ServiceError(
            f"The folder of the database {_shown(parsed)} cannot be made: {error}. "
            "Check PERENNIAL_DATABASE_URL and PERENNIAL_HOME."
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"PERENNIAL_DATABASE_URL asks for the driver of {parsed.drivername}, which is not "
            f"installed ({error}). Write postgresql:// or sqlite:///, or install it."
        ) from error
    if sqlite:
        event.listen(engine, "connect", _sqlite_pragmas)
    try:
        upgrade(engine)
    except ServiceError:
        engine.dispose()
        raise
    except SQLAlchemyError as error:
        engine.dispose()
        raise ServiceError(
            f"The database {_shown(parsed)} cannot be used: "
            f"{getattr(error, 'orig', error)}. Check PERENNIAL_DATABASE_URL; a damaged SQLite file "
            "can be moved away and is made anew (the spool keeps undrained predictions)."
        ) from error
    return engine


def parse_url(url: str) -> URL:
    """A SQLAlchemy URL, with the driver that is installed.

    Raises:
        ConfigError: it is none.
    """
    wanted = (
        "PERENNIAL_DATABASE_URL should be a SQLAlchemy URL such as "
        "postgresql://user@host/name or sqlite:////path/file.db"
    )
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except ArgumentError as error:
        raise ConfigError(f"{wanted}: {error}.") from error
    except ValueError:  # of the port; what it quotes can be part of a password
        raise ConfigError(
            f"{wanted}: its port is not a number (write special characters of a password as %XX)."
        ) from None
    if parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def _shown(url: URL) -> str:
    return url.difference_update_query(["password"]).render_as_string(hide_password=True)


def _sqlite_pragmas(connection: Any, _record: object) -> None:  # noqa: ANN401  (DBAPI object)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def exclude_writers(connection: Connection, table: Table) -> None:
    """Begin a transaction in which nobody else writes into `table`."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE"))


@contextmanager
def engine_of(url: str) -> Iterator[Engine]:
    """An engine that is disposed of at the end, for one-off work."""
    engine = open_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()
