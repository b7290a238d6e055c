"""What several unit tests share."""

import pytest

from forecasting.store import engine_of
from tests.postgres import postgres_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """Where the tables are, in SQLite and in PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tables.db'}"
        return
    with postgres_schema() as address:
        yield address


@pytest.fixture
def engine(url):
    """All tables, empty."""
    with engine_of(url) as opened:
        yield opened
