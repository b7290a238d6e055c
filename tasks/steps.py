"""Steps of a flow: Prefect's tasks, which a replay calls as the plain functions that they are.

Years of market days are ten thousands of steps. Through Prefect each of them costs 50 to 70 ms and
rows in its database, for runs that nobody will look at. Inside `plain(...)` a task is its function:
no run, no retry, no artifact, no server. What a flow decides stays the same, for the flow does.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

from prefect import Task, artifacts
from prefect.logging import disable_run_logger
from prefect.runtime import flow_run
from prefect.utilities.callables import get_call_parameters

Create = TypeVar("Create", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Plain:
    """Attributes: `run_id` is what stands for a flow run's id; `results` holds kept results;
    `policy` is the replay's."""

    run_id: str
    results: Path
    policy: str


_plain: ContextVar[_Plain | None] = ContextVar("plain", default=None)


@contextmanager
def plain(run_id: str, results: Path, policy: str = "") -> Iterator[None]:
    """Run the functions of flows (`flow.fn`) and all their steps without Prefect.

    Args:
        run_id: what the ledger and the checks know this run by.
        results: folder of what steps with `persist_result` came to; found there by its key, such a
            step is not run again, as in Prefect.
        policy: by which a replay retrains, for what it costs.
    """
    token = _plain.set(_Plain(run_id, results, policy))
    try:
        with disable_run_logger():
            yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether there is no Prefect around."""
    return _plain.get() is not None


def flow_run_id() -> str:
    """Of the flow run, or of what stands for it; outside of both a new one at each call."""
    inside = _plain.get()
    return inside.run_id if inside else str(flow_run.id or uuid4())


def policy() -> str:
    """By which a replay retrains; empty in production."""
    inside = _plain.get()
    return inside.policy if inside else ""


@dataclass(frozen=True)
class _Ended:
    """The part of Prefect's state that flows look at."""

    name: str
    value: Any

    def result(self) -> Any:  # noqa: ANN401  (as Prefect's)
        """What the step came to."""
        return self.value


class Step(Task[Any, Any]):
    """A Prefect task that can do without Prefect."""

    def __call__(self, *arguments: Any, return_state: bool = False, **named: Any) -> Any:  # noqa: ANN401
        """Run it; see `Task.__call__`."""
        inside = _plain.get()
        if inside is None:
            return super().__call__(*arguments, return_state=return_state, **named)
        ended = self._direct(inside.results, arguments, named)
        return ended if return_state else ended.value

    def _direct(self, results: Path, arguments: tuple[Any, ...], named: dict[str, Any]) -> _Ended:
        if not self.persist_result:
            return _Ended("Completed", self.fn(*arguments, **named))
        key = get_call_parameters(self.fn, arguments, named)["key"]
        kept = results / f"{key}.pickle"
        if kept.exists():
            return _Ended("Cached", pickle.loads(kept.read_bytes()))
        found = self.fn(*arguments, **named)
        results.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_bytes(pickle.dumps(found))
        part.replace(kept)  # whole or not there
        return _Ended("Completed", found)


if TYPE_CHECKING:
    from prefect import task as task
else:

    def task(**options: Any) -> Callable[..., Step]:  # noqa: ANN401  (of Prefect)
        """Prefect's decorator of that name, for steps."""
        return partial(Step, **options)


def _shown(create: Create) -> Create:
    """Artifacts are Prefect's; without it there is nobody to show them to."""

    @wraps(create)
    def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        return None if is_plain() else create(*arguments, **named)

    return cast(Create, call)


create_markdown_artifact = _shown(artifacts.create_markdown_artifact)
create_progress_artifact = _shown(artifacts.create_progress_artifact)
create_table_artifact = _shown(artifacts.create_table_artifact)
update_progress_artifact = _shown(artifacts.update_progress_artifact)
