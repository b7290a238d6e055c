"""What a run of a flow costs, written down by a decorator of the flow's function."""

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

from forecasting import costs
from forecasting.errors import ServiceError
from forecasting.sessions import exchange_day
from forecasting.settings import load_settings
from forecasting.store import engine_of, now
from tasks.steps import flow_run_id, policy

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def accounted(function: Callable[P, R]) -> Callable[P, R]:
    """Measure each call and write it into the table `costs`, under the function's name.

    `symbol` or `symbols` (or `forecaster`) and `as_of` are taken from the arguments, the outcome
    from the result's field of that name. Use it between `@flow` and the function.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def measured(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = load_settings()
        name = function.__name__
        about, day = _subject(bound.arguments), bound.arguments.get("as_of") or exchange_day(now())
        run_id = flow_run_id()
        with ExitStack() as stack:
            try:
                engine = stack.enter_context(engine_of(settings.sql_url))
            except ServiceError as error:  # that is no reason not to take prices in
                _log.warning("What %s costs is not written down: %s", name, error)
                return function(*args, **kwargs)
            spent = stack.enter_context(
                costs.measured(
                    engine, settings.home, name, about, day, flow_run_id=run_id, policy=policy()
                )
            )
            result = function(*args, **kwargs)
            spent.outcome = str(getattr(result, "outcome", spent.outcome))
            return result

    return measured


def _subject(arguments: dict[str, object]) -> str:
    """Whom a run is for, at most 64 characters."""
    many = arguments.get("symbols")
    if isinstance(many, list) and many:
        text = ",".join(map(str, many))
        return text if len(text) <= 64 else f"{len(many)} symbols"
    return str(arguments.get("symbol") or arguments.get("forecaster") or "")[:64]
