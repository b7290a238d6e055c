"""`python -m deployments.rollback FORECASTER`: start the deployment `rollback`, wait for its end.

The same as Quick run of `rollback` in the Prefect UI. It asks the Prefect server that
`PREFECT_API_URL` names; the work is done where that server's workers are.
"""

import argparse
import os
import sys
import time
from typing import Any

from deployments.prefect_api import PrefectApi
from forecasting.errors import PerennialError

DEPLOYMENT = "rollback/rollback"
LOCAL = "http://127.0.0.1:4200/api"
"""Where `make up` has its Prefect server."""
WAIT_SECONDS = 120


def main(arguments: list[str] | None = None) -> int:
    """Roll back, say how long it took, and where to look; 1 where it failed."""
    asked = _parser().parse_args(arguments)
    parameters: dict[str, Any] = {"forecaster": asked.forecaster, "why": asked.why}
    if asked.version is not None:
        parameters["version"] = asked.version
    url = os.environ.get("PREFECT_API_URL", LOCAL).rstrip("/").removesuffix("/api")
    began = time.monotonic()
    try:
        with PrefectApi(url, patience=5.0) as api:
            run = api.wait(api.start(DEPLOYMENT, parameters), WAIT_SECONDS)
    except PerennialError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    target = f"version {asked.version}" if asked.version is not None else "the version before"
    sys.stdout.write(
        f"{asked.forecaster} is back at {target} after {time.monotonic() - began:.0f} s: "
        f"{url}/runs/flow-run/{run.id}\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployments.rollback", description=__doc__)
    parser.add_argument("forecaster", help="registered model, such as perennial-goog")
    parser.add_argument("--version", type=int, help="any earlier version; else the one before")
    parser.add_argument("--why", default="rolled back by hand", help="kept in the history")
    return parser


if __name__ == "__main__":
    sys.exit(main())
