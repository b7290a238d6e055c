"""The full engine of a replay: the same days on a stack of their own, with nothing left out.

Prefect's server and worker, its automations, the registry and the inference server run as they do
in production. Flows run through Prefect, forecasts are asked over HTTP, and a retrain is started by
an automation that heard an event; only the market, and the calendar of a policy that has one, are
played here. For short spans: a day takes seconds.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from sqlalchemy import Engine

from deployments.prefect_api import PrefectApi
from deployments.stack import Stack
from forecasting import ledger
from forecasting import replay as lines
from forecasting.errors import ServiceError
from forecasting.events import RETRAINING
from forecasting.replay import Policy, metered
from forecasting.settings import PREFIX
from forecasting.store import engine_of

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from flows.replay import OnDay, Span

CHAIN = frozenset({"perennial.data.updated"})
"""Events that start the flows of a day, which are played here in their order."""
_CHANGED = {"name", "description", "enabled", "tags", "trigger", "actions"}
PLACED = {
    f"{PREFIX}{name}" for name in ("HOME", "PORT", "SERVER_URL", "TRACKING_URI", "CONFIRM_SECONDS")
}
"""Settings that the stack sets itself; a promotion waits for its server, as it does by default."""


def play_full(
    home: Path, span: "Span", policy: Policy, on_day: "OnDay", settings: Mapping[str, str]
) -> None:
    """Play every market day that is not done yet on a stack that is started for it.

    Args:
        home: a copy of the first version's home; the stack's.
        span: what is replayed.
        policy: by which.
        on_day: see `flows.replay.replay`.
        settings: environment of the replay.
    """
    extra = {
        key: value
        for key, value in settings.items()
        if key.startswith(PREFIX) and key not in PLACED
    }
    with Stack(home, extra=extra | {"PERENNIAL_POLL_SECONDS": "0.1"}) as stack:
        wanted = stack.environment()
        os.environ.clear()
        os.environ.update(wanted)
        began = datetime.now(UTC)
        stack.start()
        stack.deploy()
        with (
            _talking_to(stack),
            PrefectApi(stack.prefect_url) as api,
            httpx.Client(base_url=stack.server_url, timeout=10) as client,
            engine_of(f"sqlite:///{home / 'perennial.db'}") as engine,
        ):
            listen_only_to(policy)
            take_up_lost_runs(engine, began)
            _Full(engine, api, client, span, policy).play(on_day)


@contextmanager
def _talking_to(stack: Stack) -> Iterator[None]:
    """Prefect reads its environment once, when it is imported: before there was a stack.

    What runs in this process sends no heartbeats: a replay that is killed finds its own runs.
    """
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOCAL_STORAGE_PATH,
        temporary_settings,
    )

    told = stack.environment()
    with temporary_settings(
        {
            PREFECT_API_URL: told["PREFECT_API_URL"],
            PREFECT_LOCAL_STORAGE_PATH: Path(told["PREFECT_LOCAL_STORAGE_PATH"]),
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # to end one takes up to a second a flow
        }
    ):
        yield


def listen_only_to(policy: Policy) -> None:
    """Have the automations start a retrain for the policy's events, and nothing for others."""
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    with get_client(sync_client=True) as client:
        for automation in client.read_automations():
            trigger = automation.trigger
            if not (isinstance(trigger, EventTrigger) and trigger.expect & (RETRAINING | CHAIN)):
                continue
            heard = trigger.expect & policy.events
            if heard:
                trigger.expect = set(heard)
            else:
                automation.enabled = False
            wanted = AutomationCore(**automation.model_dump(include=_CHANGED))
            client.update_automation(automation.id, wanted)


def take_up_lost_runs(engine: Engine, began: datetime) -> None:
    """Have runs that a kill cut off start again: as the same runs, so that the ledger knows them.

    Those of a replay's own process it plays again itself.

    Args:
        engine: of the ledger; a run that is in it as running, and that an automation has found
            without a heartbeat meanwhile, was cut off too.
        began: when this stack was started; what runs since then is its own.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed, Scheduled

    in_retrain = ledger.running(engine)
    cut_off = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CRASHED])
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(state=FlowRunFilterState(type=cut_off))
        for run in client.read_flow_runs(flow_run_filter=wanted):
            if run.state is None or not _is_lost(run.state, str(run.id) in in_retrain, began):
                continue
            message = "Its process was killed with the replay."
            again: State = Crashed(message=message)
            if run.deployment_id:
                again = Scheduled(message=message)
            client.set_flow_run_state(run.id, again, force=True)


def _is_lost(state: "State", in_retrain: bool, began: datetime) -> bool:
    return in_retrain if state.is_crashed() else state.timestamp < began


class _Full:
    """One replay on a running stack; `asked` counts retrains that no event started."""

    def __init__(
        self, engine: Engine, api: PrefectApi, client: httpx.Client, span: "Span", policy: Policy
    ) -> None:
        self.engine, self.api, self.client = engine, api, client
        self.span, self.policy = span, policy
        self.asked = 0

    def play(self, on_day: "OnDay") -> None:
        days, done = self.span.days, lines.last_day(self.engine)
        for position, day in enumerate(days, start=1):
            if done is None or day > done:
                on_day(position, len(days), day, self.day(position, day))

    def day(self, position: int, day: date) -> str:
        """One market day; what a retrain came to."""
        from flows.ingest import ingest
        from flows.monitor import monitor

        with metered() as meter:
            ingest([self.span.symbol], as_of=day)
            self.ask(day)
            monitor(self.span.symbol, as_of=day)
        trigger = self.policy.trigger(position, day, [])
        begun = {run.parameters.get("trigger") for run in self.api.runs("retrain")}
        if trigger and trigger not in begun:  # by a process that was killed before the day's end
            parameters = {"symbol": self.span.symbol, "as_of": str(day), "trigger": trigger}
            self.api.start("retrain/retrain", parameters)
            self.asked += 1
        told = self.settle(day)
        lines.end_day(self.engine, self.policy.name, self.span.symbol, day, [], meter)
        return told

    def settle(self, day: date, seconds: float = 600) -> str:
        """Wait for every retrain that was started; what came of those of the day.

        Raises:
            ServiceError: an event started none, or one does not end.
        """
        expected = self.asked + lines.count_events(self.engine, self.policy.events)
        deadline = time.monotonic() + seconds
        while len(runs := self.api.runs("retrain")) < expected:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{expected} retrains were asked for by {day}, {len(runs)} were started: look "
                    f"at the automations at {self.api.url}/automations"
                )
            time.sleep(0.25)
        for run in runs:
            if not run.ended:
                self.api.wait(run.id, seconds)
        return "; ".join(lines.decisions(self.engine, day))

    def ask(self, day: date, seconds: float = 30) -> None:
        """A forecast over HTTP that starts from the day's close.

        Raises:
            ServiceError: the server does not come to that day.
        """
        deadline = time.monotonic() + seconds
        while True:
            answer = self.client.get(f"/v1/forecast/{self.span.symbol}")
            if answer.is_success and answer.json()["origin"] == str(day):
                return
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"The server does not forecast from {day} after {seconds:.0f} s: {answer.text}"
                )
            time.sleep(0.05)
