"""Has the market left the data that the model in production was trained on? (Evidently)

The latest rows are compared with the whole training span of the version in production, feature by
feature, by Evidently's normed Wasserstein distance: how far the distribution moved, in standard
deviations of the reference. Such a distance depends on the number of rows, so both sides have
equally many: the training span is represented by evenly spaced quantiles of each feature, which
brings it to the window's length without the noise of drawing days from it. Drift is a large enough
share of features beyond the threshold, or a lasting shift of volatility (`forecasting.breaks`).

`compare` gives a verdict in about two milliseconds; `drift_report` also runs Evidently's
`DataDriftPreset` and its HTML (about half a second). Both call the same Evidently test.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
from evidently import ColumnType, DataDefinition, Dataset, Regression, Report
from evidently.core.report import Snapshot as Snapshot  # for those who hand it on
from evidently.legacy.calculations.stattests import wasserstein_stat_test
from evidently.presets import DataDriftPreset, RegressionPreset
from numpy.typing import ArrayLike

from forecasting.breaks import Shift
from forecasting.errors import DataError, HistoryError

FEATURES = (
    "log_return",
    "overnight_return",
    "intraday_return",
    "absolute_return",
    "log_range",
    "volume_change",
)
SHIFT = "volatility_shift"
"""Beside `FEATURES`: the statistic of `forecasting.breaks`, signed."""
METHOD = str(wasserstein_stat_test.name)


@dataclass(frozen=True, eq=False)
class Reference:
    """What a model version was trained on, as long as one recent window.

    Attributes:
        table: each of `FEATURES` by evenly spaced quantiles of its values over the training span,
            ascending. Columns are independent; a row is no day.
        train_start: first day of the training span.
        train_end: last day of the training span.
        span_rows: sessions in the training span.
    """

    table: pd.DataFrame
    train_start: date
    train_end: date
    span_rows: int


@dataclass(frozen=True)
class FeatureDrift:
    """One feature's comparison.

    Attributes:
        feature: one of `FEATURES`.
        score: normed Wasserstein distance, in standard deviations of the reference.
        drifted: whether the score reaches the threshold.
        reference_mean: mean of the reference rows, in units of the feature.
        recent_mean: mean of the recent rows.
        reference_std: standard deviation of the reference rows.
        recent_std: standard deviation of the recent rows.
    """

    feature: str
    score: float
    drifted: bool
    reference_mean: float
    recent_mean: float
    reference_std: float
    recent_std: float


@dataclass(frozen=True)
class DriftVerdict:
    """Whether recent data drifted from the reference, and why.

    Attributes:
        drifted: whether `share` reaches `required_share`, or volatility shifted for good.
        share: share of features that drifted.
        required_share: share at which a verdict is drift.
        threshold: score at which one feature has drifted.
        method: name of the Evidently test.
        rows: length of each window.
        reference_start: first day of the training span behind the reference.
        reference_end: last day of that span.
        recent_start: first recent session.
        recent_end: last recent session, the date of the check.
        features: one entry a feature.
        shift: what `forecasting.breaks` says of volatility; None where training was too short.
    """

    drifted: bool
    share: float
    required_share: float
    threshold: float
    method: str
    rows: int
    reference_start: date
    reference_end: date
    recent_start: date
    recent_end: date
    features: tuple[FeatureDrift, ...]
    shift: Shift | None = None

    def with_shift(self, shift: Shift | None) -> "DriftVerdict":
        """The verdict with what volatility says, drift if either says so."""
        return replace(self, shift=shift, drifted=self.drifted or bool(shift and shift.found))

    def scores(self) -> dict[str, float]:
        """Distances by feature, and `SHIFT` where volatility was watched."""
        found = {each.feature: each.score for each in self.features}
        return found if self.shift is None else found | {SHIFT: self.shift.score}

    def table(self) -> list[dict[str, str | float | bool]]:
        """One row a feature, for reports."""
        return [asdict(feature) for feature in self.features]

    def summary(self) -> str:
        """One sentence for logs and reports."""
        beyond = [f"{f.feature} {f.score:.2f}" for f in self.features if f.drifted]
        shifted = f" Volatility: {self.shift}." if self.shift and self.shift.found else ""
        return (
            f"{'Drift' if self.drifted else 'No drift'} on {self.recent_end}: "
            f"{len(beyond)} of {len(self.features)} features beyond {self.threshold:g} "
            f"({', '.join(beyond) or 'none'}), {self.required_share:.0%} required.{shifted}"
        )


@dataclass(frozen=True)
class RegressionScores:
    """Point accuracy of forecasts against what came true, in units of the prices given.

    Attributes:
        rows: forecasts scored.
        mean_error: mean of prediction minus actual.
        mae: mean absolute error.
        mape: mean absolute percentage error, in percent.
        rmse: root mean squared error.
        r2: share of variance explained. A random walk on prices also scores near 1.
        abs_max_error: largest absolute error.
    """

    rows: int
    mean_error: float
    mae: float
    mape: float
    rmse: float
    r2: float
    abs_max_error: float


def features(frame: pd.DataFrame) -> pd.DataFrame:
    """What the monitor watches: quantities free of the price level, one row a session.

    Args:
        frame: prices by session with columns open, high, low, close, volume.

    Returns:
        Columns `FEATURES` (log returns and log ratios), the first session left out.

    Raises:
        DataError: a value is not finite.
    """
    previous = frame["close"].shift(1)
    log_return = np.log(frame["close"] / previous)
    table = pd.DataFrame(
        {
            "log_return": log_return,
            "overnight_return": np.log(frame["open"] / previous),
            "intraday_return": np.log(frame["close"] / frame["open"]),
            "absolute_return": np.abs(log_return),
            "log_range": np.log(frame["high"] / frame["low"]),
            "volume_change": np.log(frame["volume"].clip(lower=1.0)).diff(),
        },
        index=frame.index,
    ).iloc[1:]
    _check_finite(table, "prices")
    return table


def reference_rows(table: pd.DataFrame, train_start: date, train_end: date, rows: int) -> Reference:
    """The reference of a model version: its training span, brought to `rows` rows.

    Args:
        table: as `features` returns.
        train_start: first session of the span, `Contract.train_start`.
        train_end: last session of the span, `Contract.train_end`.
        rows: how many, the length of the recent window.

    Raises:
        HistoryError: the span holds fewer rows.
    """
    span = table.loc[pd.Timestamp(train_start) : pd.Timestamp(train_end)]
    if len(span) < rows:
        raise HistoryError(
            f"The training span {train_start} to {train_end} holds {len(span)} rows; a reference "
            f"needs at least {rows}. Lower PERENNIAL_DRIFT_WINDOW or train on more history."
        )
    levels = (np.arange(rows) + 0.5) / rows
    return Reference(
        table=pd.DataFrame({name: np.quantile(span[name], levels) for name in FEATURES}),
        train_start=train_start,
        train_end=train_end,
        span_rows=len(span),
    )


def recent_rows(table: pd.DataFrame, as_of: date, rows: int) -> pd.DataFrame:
    """The latest `rows` rows up to `as_of`.

    Raises:
        HistoryError: fewer are known by then.
    """
    known = table.loc[: pd.Timestamp(as_of)]
    if len(known) < rows:
        raise HistoryError(
            f"{len(known)} rows are known on {as_of}; a comparison needs {rows}. "
            "Lower PERENNIAL_DRIFT_WINDOW or ask for a later date."
        )
    return known.iloc[-rows:]


def compare(
    reference: Reference, recent: pd.DataFrame, threshold: float, share: float
) -> DriftVerdict:
    """Compare two windows of equal length, without a report.

    Args:
        reference: as `reference_rows` returns.
        recent: rows to judge, as `recent_rows` returns.
        threshold: distance at which one feature has drifted, in reference standard deviations.
        share: share of drifted features, in (0, 1], at which the verdict is drift.

    Returns:
        The verdict.

    Raises:
        DataError: windows of unequal length, other columns than `FEATURES`, or not finite.
    """
    _check(reference, recent)
    scores = {name: distance(reference.table[name], recent[name]) for name in FEATURES}
    return _verdict(reference, recent, scores, threshold, share)


def distance(reference: ArrayLike, recent: ArrayLike) -> float:
    """Evidently's normed Wasserstein distance of two samples, in standard deviations of the first.

    Args:
        reference: sample [n].
        recent: sample [n], as long as the other: distances depend on the number of rows.
    """
    result = wasserstein_stat_test(
        pd.Series(np.asarray(reference)), pd.Series(np.asarray(recent)), ColumnType.Numerical, None
    )
    return float(result.drift_score)


def compare_dates(
    table: pd.DataFrame,
    reference: Reference,
    dates: Sequence[date],
    threshold: float,
    share: float,
) -> list[DriftVerdict]:
    """Verdicts of many check dates against one reference, without reports.

    Args:
        table: as `features` returns; rows after a date are not used for it.
        reference: as `reference_rows` returns; its length is that of each recent window.
        dates: check dates.
        threshold: see `compare`.
        share: see `compare`.

    Raises:
        HistoryError: too few rows are known on a date.
        DataError: see `compare`.
    """
    return [
        compare(reference, recent_rows(table, day, len(reference.table)), threshold, share)
        for day in dates
    ]


def drift_report(
    reference: Reference, recent: pd.DataFrame, threshold: float, share: float
) -> tuple[DriftVerdict, str]:
    """The same comparison by Evidently's `DataDriftPreset`, with its HTML report.

    Arguments and errors as in `compare`.

    Returns:
        (verdict, one self-contained HTML page).
    """
    verdict, snapshot = drift_snapshot(reference, recent, threshold, share)
    return verdict, page(snapshot)


def drift_snapshot(
    reference: Reference, recent: pd.DataFrame, threshold: float, share: float
) -> tuple[DriftVerdict, Snapshot]:
    """As `drift_report`, with Evidently's own object in place of the page."""
    _check(reference, recent)
    definition = DataDefinition(numerical_columns=list(FEATURES))
    columns = list(FEATURES)
    preset = DataDriftPreset(columns=columns, method=METHOD, threshold=threshold, drift_share=share)
    snapshot = Report([preset]).run(
        Dataset.from_pandas(recent[columns], data_definition=definition),
        Dataset.from_pandas(reference.table, data_definition=definition),
        timestamp=recent.index[-1].to_pydatetime(),
    )
    scores = {
        metric["config"]["column"]: float(metric["value"])
        for metric in snapshot.dict()["metrics"]
        if "column" in metric["config"]
    }
    return _verdict(reference, recent, scores, threshold, share), snapshot


def page(snapshot: Snapshot) -> str:
    """One self-contained HTML page."""
    return str(snapshot.get_html_str(as_iframe=False))


def regression_report(joined: pd.DataFrame) -> tuple[RegressionScores, str]:
    """Evidently's regression report of forecast medians against actual closes.

    Args:
        joined: columns `median` and `actual`, one row a forecast whose target has come, in the
            order in which the plots should show them; other columns are left out.

    Returns:
        (scores, one self-contained HTML page).

    Raises:
        DataError: fewer than two rows, a column is missing, or a value is not finite.
    """
    wanted = ["actual", "median"]
    missing = [name for name in wanted if name not in joined.columns]
    if missing or len(joined) < 2:
        raise DataError(
            f"A regression report needs at least 2 rows with columns {wanted}; "
            f"got {len(joined)} rows with columns {list(joined.columns)}."
        )
    table = joined[wanted].astype("float64").reset_index(drop=True)
    _check_finite(table, "forecasts and actuals")
    definition = DataDefinition(
        numerical_columns=wanted, regression=[Regression(target="actual", prediction="median")]
    )
    with warnings.catch_warnings():
        # Evidently scores its bins one by one, some of a single forecast
        warnings.filterwarnings("ignore", "R.*score is not well-defined", UserWarning)
        snapshot = Report([RegressionPreset()]).run(
            Dataset.from_pandas(table, data_definition=definition), None
        )
    return _regression_scores(snapshot.dict()["metrics"], len(table)), page(snapshot)


def _regression_scores(metrics: list[dict[str, Any]], rows: int) -> RegressionScores:
    """The figures of Evidently's regression preset, by the name of each metric's type."""
    found = {metric["config"]["type"].rsplit(":", 1)[-1]: metric["value"] for metric in metrics}
    return RegressionScores(
        rows=rows,
        mean_error=float(found["MeanError"]["mean"]),
        mae=float(found["MAE"]["mean"]),
        mape=float(found["MAPE"]["mean"]),
        rmse=float(found["RMSE"]),
        r2=float(found["R2Score"]),
        abs_max_error=float(found["AbsMaxError"]),
    )


def _verdict(
    reference: Reference,
    recent: pd.DataFrame,
    scores: dict[str, float],
    threshold: float,
    share: float,
) -> DriftVerdict:
    entries = tuple(
        FeatureDrift(
            feature=name,
            score=scores[name],
            drifted=scores[name] >= threshold,
            reference_mean=float(reference.table[name].mean()),
            recent_mean=float(recent[name].mean()),
            reference_std=float(reference.table[name].std(ddof=0)),
            recent_std=float(recent[name].std(ddof=0)),
        )
        for name in FEATURES
    )
    found = sum(entry.drifted for entry in entries) / len(entries)
    return DriftVerdict(
        drifted=found >= share,
        share=found,
        required_share=share,
        threshold=threshold,
        method=METHOD,
        rows=len(reference.table),
        reference_start=reference.train_start,
        reference_end=reference.train_end,
        recent_start=recent.index[0].date(),
        recent_end=recent.index[-1].date(),
        features=entries,
    )


def _check(reference: Reference, recent: pd.DataFrame) -> None:
    rows = len(reference.table)
    if rows != len(recent) or rows == 0:
        raise DataError(
            f"Drift is judged on windows of equal length; the reference has {rows} "
            f"rows, the recent window {len(recent)}."
        )
    for name, window in (("reference", reference.table), ("recent window", recent)):
        missing = [column for column in FEATURES if column not in window.columns]
        if missing:
            raise DataError(
                f"The {name} lacks {', '.join(missing)}; make it with drift.features()."
            )
        _check_finite(window[list(FEATURES)], name)


def _check_finite(table: pd.DataFrame, what: str) -> None:
    bad = ~np.isfinite(table.to_numpy(np.float64))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"{int(bad.sum())} values of the {what} are not finite, first "
            f"{table.columns[column]} of row {table.index[row]}. Evidently would leave them out "
            "silently; ingest validated prices."
        )
