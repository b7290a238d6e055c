"""A small client of Prefect's REST API: what the demo and the benchmarks do from outside a run."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any
from uuid import uuid4

import httpx
from tenacity import (
    Retrying,
    retry_if_exception_type,
    retry_if_result,
    stop_after_delay,
    wait_exponential_jitter,
)

from forecasting.errors import ServiceError
from forecasting.events import credentials

ENDED = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})

PAGE = 200
"""Most runs that Prefect tells in one answer, as it is set by default."""
BUSY = frozenset({408, 429, 502, 503, 504})
"""Answers after which Prefect's own clients try again; 503 is what a locked SQLite gives."""


@dataclass(frozen=True)
class Run:
    """A flow run as the API tells it."""

    id: str
    name: str
    state: str
    message: str
    creator: str
    seconds: float
    parameters: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether the run is over, well or badly."""
        return self.state in ENDED


class PrefectApi:
    """Starts and follows flow runs of a Prefect server.

    Args:
        url: address of the server, without `/api`.
        patience: seconds during which a busy or absent server is asked again.
    """

    def __init__(self, url: str, patience: float = 30.0) -> None:
        self.url = url
        headers = credentials(os.environ)
        self._http = httpx.Client(base_url=f"{url}/api", headers=headers, timeout=30)
        self._again = Retrying(
            retry=retry_if_result(lambda answer: answer.status_code in BUSY)
            | retry_if_exception_type(httpx.TransportError),
            stop=stop_after_delay(patience),
            wait=wait_exponential_jitter(multiplier=0.2, max=3),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )

    def __enter__(self) -> "PrefectApi":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def start(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Create a flow run of `flow/deployment`; its id."""
        found = self._call("GET", f"/deployments/name/{deployment}")
        body = {
            "parameters": parameters,
            "state": {"type": "SCHEDULED"},
            "idempotency_key": str(uuid4()),  # a repeated call makes no second run
        }
        return str(self._call("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> Run:
        """One flow run."""
        return _run(self._call("GET", f"/flow_runs/{run_id}"))

    def runs(self, flow: str) -> list[Run]:
        """Every run of a flow, oldest first."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC", "limit": PAGE}
        found: list[Run] = []
        for offset in count(0, PAGE):
            page = self._call("POST", "/flow_runs/filter", body | {"offset": offset})
            found += map(_run, page)
            if len(page) < PAGE:
                break
        return found

    def tasks(self, run_id: str) -> list[tuple[str, str]]:
        """Name and state name of every task run of a flow run, oldest first."""
        body = {
            "flow_runs": {"id": {"any_": [run_id]}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": 200,
        }
        found = self._call("POST", "/task_runs/filter", body)
        return [(each["name"], each["state_name"] or "") for each in found]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of one name, newest first."""
        body = {"filter": {"event": {"name": [name]}}, "limit": 50}
        return list(self._call("POST", "/events/filter", body)["events"])

    def logs(self, run_id: str) -> str:
        """Log lines of a flow run."""
        body = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
        return "\n".join(each["message"] for each in self._call("POST", "/logs/filter", body))

    def wait(
        self, run_id: str, seconds: float, tick: Callable[[Run], None] = lambda _: None
    ) -> Run:
        """Follow a run to its end.

        Raises:
            ServiceError: it did not end in time, or ended other than Completed; with its log.
        """
        deadline = time.monotonic() + seconds
        while True:
            run = self.run(run_id)
            tick(run)
            if run.ended:
                return self.require_completed(run)
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"Run {run.name} ({self.url}/runs/flow-run/{run_id}) is still {run.state} "
                    f"after {seconds:.0f} s.\n{self.logs(run_id)}"
                )
            time.sleep(0.25)

    def require_completed(self, run: Run) -> Run:
        """The run itself, if it completed.

        Raises:
            ServiceError: it ended otherwise; with its message and log.
        """
        if run.state != "COMPLETED":
            raise ServiceError(
                f"Run {run.name} ended {run.state}: {run.message}\n{self.logs(run.id)}"
            )
        return run

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        try:
            answer = self._again(self._http.request, method, path, json=body)
            answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise ServiceError(f"Prefect {method} {path}: {error.response.text}") from error
        except httpx.HTTPError as error:
            raise ServiceError(f"Prefect at {self.url} did not answer: {error!r}") from error
        return answer.json()


def _run(raw: dict[str, Any]) -> Run:
    state = raw.get("state") or {}
    return Run(
        id=raw["id"],
        name=raw["name"],
        state=raw.get("state_type") or "PENDING",
        message=state.get("message") or "",
        creator=(raw.get("created_by") or {}).get("type") or "",
        seconds=float(raw.get("total_run_time") or 0.0),
        parameters=raw.get("parameters") or {},
    )
