import json
import math
import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from deployments.report import Facts, Happening, write_report
from forecasting.contract import QUANTILE_LEVELS
from forecasting.sessions import sessions_after, sessions_between

HAPPENINGS = [
    Happening(date(2008, 9, 15), "retrain: refused", None, "production is <better> & stays"),
    Happening(date(2007, 1, 31), "train: promoted", 1, "CRPS 210.0 | random walk 215.0 bp"),
    Happening(date(2008, 3, 14), "drift event", 1, "share 0.75: volatility 1.90"),
    Happening(date(2008, 3, 14), "retrain: promoted", 2, "CRPS 250.0 | production 260.0"),
    Happening(date(2008, 3, 17), "hot reload", 2, "no restart, no failed request"),
]


def training(flow: str, number: int, outcome: str) -> dict[str, object]:
    return {
        "flow": flow,
        "flow_run_id": f"prefect-run-{number}",
        "creator": "AUTOMATION" if flow == "retrain" else "",
        "state": "COMPLETED",
        "as_of": f"2008-0{number}-15",
        "seconds": 12.5,
        "mlflow_run_id": f"mlflow-run-{number}",
        "outcome": outcome,
        "reasons": "",
        "scores": {"gate_candidate": 210.0},
    }


def check(as_of: str, share: float) -> dict[str, object]:
    return {
        "as_of": as_of,
        "version": 1,
        "share": share,
        "threshold": 0.5,
        "drifted": share >= 0.5,
        "features": {"volatility": 2 * share},
    }


def forecasts(prices: pd.DataFrame) -> pd.DataFrame:
    """Two versions, one after the other; each loses or wins against the random walk by a tenth."""
    rows = []
    origins = [day.date() for day in prices.index[-40:]]
    for position, origin in enumerate(origins):
        version = 1 + position // 20
        for horizon, target in enumerate(sessions_after(origin, 2), start=1):
            spread = 1 + 0.1 * (np.array(QUANTILE_LEVELS) - 0.5)
            rows.append(
                {
                    "origin": origin,
                    "target": target,
                    "horizon": horizon,
                    "model_version": version,
                    "levels": list(QUANTILE_LEVELS),
                    "quantiles": list(100 * spread),
                    "crps_bp": 110.0 if version == 1 else 90.0,
                    "random_walk_bp": 100.0,
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture
def facts() -> Facts:
    days = sessions_between(date(2006, 12, 1), date(2008, 3, 31))
    close = 100 + 10 * np.sin(np.arange(len(days)) / 9)
    prices = pd.DataFrame({"close": close}, index=pd.DatetimeIndex(days, name="date"))
    return Facts(
        seconds=301.26,
        steps={"stack started": 12.345, "trained, gated, promoted": 60.0},
        happenings=list(HAPPENINGS),
        train_run="prefect-run-1",
        requests=212,
        failed_requests=0,
        event_ids=["event-1", "event-2", "event-3"],
        trainings=[
            training("train", 1, "promoted"),
            training("retrain", 2, "promoted"),
            training("retrain", 3, "refused"),
            training("retrain", 4, "unchanged"),
        ],
        drift_checks=[
            check("2007-06-29", 0.0),
            check("2007-09-28", 0.5),
            check("2008-03-07", 0.25),
            check("2008-03-14", 0.75),
            check("2008-03-21", 0.75),
        ],
        prices=prices,
        forecasts=forecasts(prices),
    )


def written(facts: Facts, folder: Path) -> dict[str, object]:
    page, told = write_report(facts, folder)
    assert (page, told) == (folder / "demo.html", folder / "demo.json")
    return json.loads(told.read_text(), parse_constant=lambda name: pytest.fail(name))


class Page(HTMLParser):
    """Text of the cells, addresses that a browser would load, scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.code = ""
        self._in = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in = tag
        if tag in ("td", "th"):
            self.cells.append("")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("td", "th", "code"):
            self.cells[-1] += data
        if self._in in ("script", "style"):
            self.code += data


def test_json_counts_what_happened_and_names_the_runs(facts, tmp_path):
    told = written(facts, tmp_path / "reports")
    counted = ("events", "retrains", "promotions", "refusals", "unchanged", "requests")
    assert [told[name] for name in counted] == [3, 3, 2, 1, 1, 212]
    assert told["failed_requests"] == 0
    assert told["seconds"] == 301.3
    assert told["steps_seconds"] == {"stack started": 12.35, "trained, gated, promoted": 60.0}
    assert told["event_ids"] == ["event-1", "event-2", "event-3"]
    runs = [(each["flow_run_id"], each["mlflow_run_id"]) for each in told["trainings"]]
    assert runs == [(f"prefect-run-{n}", f"mlflow-run-{n}") for n in (1, 2, 3, 4)]
    assert told["calm_checks"] == {"checks": 2, "drifted": 1}
    assert told["crash_checks"] == {"checks": 3, "drifted": 2}


def test_scores_are_means_of_each_version_beside_the_random_walk(facts, tmp_path):
    assert written(facts, tmp_path)["scores"] == [
        {
            "model_version": version,
            "crps_bp": score,
            "random_walk_bp": 100.0,
            "forecasts": 40,
            "relative": score / 100,
        }
        for version, score in ((1, 110.0), (2, 90.0))
    ]


def test_happenings_are_told_in_the_order_of_their_days(facts, tmp_path):
    told = written(facts, tmp_path)["happenings"]
    assert [each["day"] for each in told] == sorted(each.day.isoformat() for each in HAPPENINGS)
    assert {each["what"] for each in told} == {each.what for each in HAPPENINGS}


def test_the_page_needs_nothing_from_elsewhere(facts, tmp_path):
    written(facts, tmp_path)
    page = Page(tmp_path / "demo.html")
    assert [each for each in page.addresses if not each.startswith(("#", "data:"))] == []
    assert not {"link", "iframe", "img", "object", "embed"} & set(page.tags)
    own = page.code.replace(get_plotlyjs(), "")
    assert len(page.code) - len(own) > 1_000_000, "plotly is inlined, once"
    assert len(own) < 1_000_000
    assert not re.search(r"@import|url\(\s*['\"]?http|\bfetch\(|\bimport\(", own)
    assert own.count("Plotly.newPlot") == 3


def test_the_page_holds_every_happening_run_and_step(facts, tmp_path):
    written(facts, tmp_path)
    page = Page(tmp_path / "demo.html")
    cells = [cell.strip() for cell in page.cells]
    for each in HAPPENINGS:
        row = [each.day.isoformat(), each.what, "" if each.version is None else str(each.version)]
        assert has(cells, [*row, each.detail]), each
    for number in (1, 2, 3, 4):
        assert has(cells, [f"prefect-run-{number}", f"mlflow-run-{number}"])
    assert has(cells, ["stack started", "12.35"])
    assert has(cells, ["2", "40", "90.0", "100.0", "0.9"])
    assert "better" not in page.tags, "text is escaped"


def has(cells: list[str], row: list[str]) -> bool:
    """Whether the cells of `row` follow each other."""
    return any(cells[at : at + len(row)] == row for at in range(len(cells)))


def test_without_forecasts_there_is_a_report_without_scores(facts, tmp_path):
    facts.forecasts = pd.DataFrame()
    assert written(facts, tmp_path)["scores"] == []
    cells = [cell.strip() for cell in Page(tmp_path / "demo.html").cells]
    assert all(each.detail in cells for each in HAPPENINGS)


def test_a_day_without_a_score_leaves_no_nan_in_the_json(facts, tmp_path):
    facts.forecasts.loc[0, "crps_bp"] = math.nan
    (first, _) = written(facts, tmp_path)["scores"]
    assert first["crps_bp"] == 110.0


def test_written_again_it_replaces_the_one_before(facts, tmp_path):
    written(facts, tmp_path)
    facts.happenings = []
    assert written(facts, tmp_path)["happenings"] == []
    assert HAPPENINGS[1].detail not in (tmp_path / "demo.html").read_text()
