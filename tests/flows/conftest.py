"""One Prefect server for all tests of flows, with a database and a home of its own.

`tests/conftest.py` has dropped every `PREFECT_*` variable; the harness names its own server in
the settings of this process, which wins over a `.env` file too.
"""

from collections.abc import Iterator

import pytest
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server for the session."""
    with prefect_test_harness(server_startup_timeout=120):
        yield
