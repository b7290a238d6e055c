"""One Prefect server for all tests of flows, with a database and a home of its own.

`tests/conftest.py` has dropped every `PREFECT_*` variable; the harness names its own server in
the settings of this process, which wins over a `.env` file too.
"""

from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server for the session.

    No run sends heartbeats: Prefect takes up to a second to end them.
    """
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
