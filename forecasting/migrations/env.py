"""Where Alembic finds the database: the connection of `forecasting.schema`, else the settings'."""

from alembic import context
from sqlalchemy import Connection, create_engine

from forecasting.settings import load_settings
from forecasting.store import metadata, parse_url


def run(connection: Connection) -> None:
    """Run what is asked for; SQLite's tables are copied where it cannot alter them."""
    context.configure(connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:  # the command `alembic`, for who writes a migration
    engine = create_engine(parse_url(load_settings().sql_url))
    with engine.connect() as own:
        run(own)
        own.commit()
    engine.dispose()
