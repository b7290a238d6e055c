"""Take new prices into the dataset."""

from datetime import date

from prefect import flow
from pydantic import BaseModel

from forecasting.errors import BadPricesError
from forecasting.settings import load_settings
from tasks.accounting import accounted
from tasks.events import deliver_events
from tasks.ingest import ingest_prices


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
    """`as_of`, or today where none is given."""
    return as_of or date.today()


@flow(name="ingest")
@accounted
def ingest(
    symbols: list[str] = ["GOOG"],  # noqa: B006  (Prefect shows it as the default; never changed)
    as_of: date | None = None,
) -> IngestResult:
    """Take what is new up to `as_of` into the dataset, one version for all symbols.

    Args:
        symbols: tickers of the source.
        as_of: the day it pretends to be; today if absent.

    Returns:
        The dataset version, unchanged if nothing was new.

    Raises:
        BadPricesError: prices break the rules; nothing was taken in, and the event
            `perennial.data.rejected` says why.
    """
    settings = load_settings()
    try:
        version = ingest_prices(settings, symbols, today_or(as_of))
    except BadPricesError:
        deliver_events(settings)  # somebody may wait for it: `perennial.data.rejected`
        raise
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
