"""What several unit tests share."""

import pytest

from forecasting.store import engine_of
from tests.postgres import postgres_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path):
    """All tables, empty, in SQLite and in PostgreSQL."""
    if request.param == "sqlite":
        with engine_of(f"sqlite:///{tmp_path / 'tables.db'}") as opened:
            yield opened
        return
    with postgres_schema() as url, engine_of(url) as opened:
        yield opened
