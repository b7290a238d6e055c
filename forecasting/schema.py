"""The version of the database's schema: every change of `store`'s tables is an Alembic migration.

`store.open_engine` brings a database to `HEAD` before anybody reads it, whoever comes first; others
wait. A change is made by hand or by `alembic revision --autogenerate` (pyproject.toml says where),
and a test holds that the migrations come to the tables of `store`.
"""

from pathlib import Path

from sqlalchemy import Connection, Engine, func, inspect, select, text

from forecasting.errors import ServiceError

HEAD = "0002"
"""Newest migration; known here so that Alembic is imported only where there is something to do."""
FIRST_RELEASE = "0001"
_VERSIONS = "alembic_version"
_LOCK_KEY = 0x70657273  # of PostgreSQL's advisory lock: "pers"


def upgrade(engine: Engine) -> None:
    """Bring the database to `HEAD`, in one transaction that excludes others who would.

    A database without a version is empty, or of the first release, which kept none.

    Raises:
        ServiceError: it was made by a newer perennial.
        SQLAlchemyError: it cannot be reached, or is none; nothing was changed.
    """
    with engine.connect() as connection:
        if revision(connection) == HEAD:
            return
        _exclude_others(connection)
        found = revision(connection)
        if found != HEAD:
            _migrate(connection, found)
        connection.commit()


def revision(connection: Connection) -> str | None:
    """The migration that the database is at; None without one."""
    inspector = inspect(connection)
    if inspector.has_table(_VERSIONS):
        found = connection.execute(text(f"SELECT version_num FROM {_VERSIONS}")).scalar()
        return str(found) if found else None
    return FIRST_RELEASE if inspector.has_table("predictions") else None


def _exclude_others(connection: Connection) -> None:
    connection.rollback()  # what it has read so far may be old
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK_KEY)))


def _migrate(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        if found == FIRST_RELEASE:
            command.stamp(config, FIRST_RELEASE)
        command.upgrade(config, HEAD)
    except CommandError as error:
        raise ServiceError(
            f"The database is at version {found} of its schema, and this perennial knows versions "
            f"up to {HEAD}: a newer one has used it. Use that one, or another database "
            "(PERENNIAL_DATABASE_URL, PERENNIAL_HOME)."
        ) from error
