"""What is in the tables, for tests that look."""

from typing import Any

from sqlalchemy import Engine, select

from forecasting.store import gate_looks


def looks(engine: Engine) -> list[dict[str, Any]]:
    """Lines of the ledger of reserved days, newest first."""
    query = select(gate_looks).order_by(gate_looks.c.created_at.desc())
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]
