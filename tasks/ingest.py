"""Step of ingest: prices into a dataset version, with a summary a person can read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any

from prefect import Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.tasks import exponential_backoff

from forecasting import datasets
from forecasting.datasets import DatasetVersion
from forecasting.errors import BadPricesError, DatasetError, SourceError
from forecasting.events import DataMissing, DataRejected, DataUpdated, put_once
from forecasting.prices import Frame, visible_factors
from forecasting.settings import Settings
from forecasting.store import engine_of
from tasks.steps import create_markdown_artifact, create_table_artifact, task

_MAY_PASS = (SourceError, DatasetError)


async def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retry when a source or remote was away; a wrong symbol, date or price stays wrong."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, _MAY_PASS) and error.__cause__ is not None


@task(
    name="ingest",
    task_run_name="ingest as of {as_of}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=exponential_backoff(backoff_factor=2),
    retry_jitter_factor=0.5,
    retry_condition_fn=_may_pass,
    timeout_seconds=600,
)
def ingest_prices(settings: Settings, symbols: Sequence[str], as_of: date) -> DatasetVersion:
    """Take what is new up to `as_of` into the dataset and publish it for the server.

    Prices that are refused are an event as well, which waits in the outbox until it is delivered.
    """
    try:
        version = datasets.ingest(settings, symbols, as_of)
    except BadPricesError as error:
        told = DataRejected(symbols=tuple(symbols), as_of=as_of, reason=str(error))
        with engine_of(settings.sql_url) as engine:
            put_once(engine, told)
        raise
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        show_data(settings, version, symbols)
        get_run_logger().info(headline(version))
    return version


@contextmanager
def telling_missing(settings: Settings, symbols: Sequence[str], as_of: date) -> Iterator[None]:
    """Put an event into the outbox if the source gives nothing inside, retries and all.

    Once a day and symbols, however often it is asked.
    """
    try:
        yield
    except SourceError as error:
        told = DataMissing(symbols=tuple(symbols), as_of=as_of, reason=str(error))
        with engine_of(settings.sql_url) as engine:
            put_once(engine, told, same=f"{as_of} {','.join(sorted(set(symbols)))}")
        raise


def tell_update(settings: Settings, version: DatasetVersion, symbols: Sequence[str]) -> None:
    """Put the event of a dataset version into the outbox, once: a repeated ingest tells no more.

    It goes by the version and not by who made it, so that one whose ingest was killed is told too.
    """
    told = DataUpdated(symbols=tuple(symbols), as_of=version.as_of, dataset_md5=version.md5)
    with engine_of(settings.sql_url) as engine:
        put_once(engine, told, same=f"{version.md5} {','.join(sorted(set(symbols)))}")


def show_data(settings: Settings, version: DatasetVersion, symbols: Sequence[str]) -> None:
    """Data summary as Prefect artifacts: a table, one row a symbol, and what the ingest did."""
    rows = [summary(settings, version, symbol) for symbol in dict.fromkeys(symbols)]
    create_table_artifact(rows, key="data-summary", description=headline(version))
    create_markdown_artifact(
        "\n".join([f"**{headline(version)}**", "", *_markdown(rows)]),
        key="dataset-version",
        description=headline(version),
    )


def headline(version: DatasetVersion) -> str:
    """One sentence on what an ingest did."""
    what = "new version" if version.changed else "unchanged, version"
    return f"As of {version.as_of}: {what} {version.md5} (git {version.rev[:10]})"


def summary(settings: Settings, version: DatasetVersion, symbol: str) -> dict[str, Any]:
    """What the dataset version holds of one symbol."""
    raw = datasets.load_raw(settings, symbol, version.md5)
    frame: Frame = datasets.load_frame(settings, symbol, version.as_of, version.md5)
    return {
        "symbol": symbol,
        "first day": f"{frame.index[0]:%Y-%m-%d}",
        "last day": f"{frame.index[-1]:%Y-%m-%d}",
        "rows": len(frame),
        "new rows": version.rows.get(symbol, 0),
        "revised rows": version.revised.get(symbol, 0),
        "splits and dividends": len(visible_factors(raw, version.as_of)),
        "new splits and dividends": version.factors.get(symbol, 0),
        "last close": round(float(frame["close"].iloc[-1]), 4),
    }


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row[name]) for name in names) for row in rows]
    return [f"| {line} |" for line in lines]
