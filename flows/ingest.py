"""Take new prices into the dataset."""

from datetime import date

from prefect import flow
from pydantic import BaseModel

from forecasting.sessions import exchange_day
from forecasting.settings import load_settings
from forecasting.store import now
from tasks.accounting import accounted
from tasks.events import telling
from tasks.ingest import ingest_prices, tell_update, telling_missing


class IngestResult(BaseModel):
    """The dataset version after an ingest; `changed` says whether this ingest made it.

    `rows`, `revised` and `factors` count new sessions, sessions that the vendor changed, and new
    splits and dividends per symbol.
    """

    md5: str
    rev: str
    symbols: list[str]
    as_of: date
    changed: bool
    rows: dict[str, int]
    revised: dict[str, int]
    factors: dict[str, int]


def today_or(as_of: date | None) -> date:
    """`as_of`, or the exchange's today where none is given."""
    return as_of or exchange_day(now())


@flow(name="ingest")
@accounted
def ingest(
    symbols: list[str] = ["GOOG"],  # noqa: B006  (Prefect shows it as the default; never changed)
    as_of: date | None = None,
) -> IngestResult:
    """Take what is new up to `as_of` into the dataset, one version for all symbols.

    A version that was not told before is the event `perennial.data.updated`, which an automation
    answers with the deployment `daily`.

    Args:
        symbols: tickers of the source.
        as_of: the day it pretends to be; today if absent.

    Returns:
        The dataset version, unchanged if nothing was new.

    Raises:
        BadPricesError: prices break the rules; nothing was taken in, and the event
            `perennial.data.rejected` says why.
        SourceError: the source gave nothing; `perennial.data.missing` says why.
    """
    settings = load_settings()
    day = today_or(as_of)
    with telling(settings), telling_missing(settings, symbols, day):
        version = ingest_prices(settings, symbols, day)
        tell_update(settings, version, symbols)
    return IngestResult(
        md5=version.md5,
        rev=version.rev,
        symbols=list(version.symbols),
        as_of=version.as_of,
        changed=version.changed,
        rows=version.rows,
        revised=version.revised,
        factors=version.factors,
    )
