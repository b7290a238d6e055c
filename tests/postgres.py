"""A schema of its own in a real PostgreSQL, for tests that can reach one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest

ADDRESS = os.environ.get("PERENNIAL_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test")


@contextmanager
def postgres_schema() -> Iterator[str]:
    """URL whose connections use a fresh schema, dropped at the end; skips where none answers."""
    try:
        connection = psycopg.connect(ADDRESS, connect_timeout=3, autocommit=True)
    except psycopg.Error as error:
        pytest.skip(f"no PostgreSQL at {ADDRESS} (PERENNIAL_TEST_POSTGRES): {error}")
    name = f"perennial_{uuid4().hex[:12]}"
    with connection:
        connection.execute(f'CREATE SCHEMA "{name}"')
    try:
        yield f"{ADDRESS}{'&' if '?' in ADDRESS else '?'}options=-csearch_path%3D{name}"
    finally:
        with psycopg.connect(ADDRESS, autocommit=True) as again:
            again.execute(f'DROP SCHEMA "{name}" CASCADE')
