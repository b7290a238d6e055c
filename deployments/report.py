"""The demo's report: facts as JSON, and one self-contained HTML page with plots."""

import json
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, select_autoescape
from plotly.offline import get_plotlyjs
from sqlalchemy import Engine, select

from deployments.prefect_api import PrefectApi
from forecasting import baselines, datasets, metrics
from forecasting.drift import FEATURES
from forecasting.events import DriftDetected
from forecasting.model_card import BLUE, GREEN, GREY, INK, ORANGE, RED
from forecasting.registry import open_registry
from forecasting.settings import Settings
from forecasting.store import checks, engine_of, predictions, retrains

_CONFIG = {"displayModeBar": False}


@dataclass
class Happening:
    """One line of the table: what happened on which market day."""

    day: date
    what: str
    version: int | None
    detail: str


@dataclass
class Facts:
    """Everything the report says; counts are computed, never typed in."""

    seconds: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)
    happenings: list[Happening] = field(default_factory=list)
    train_run: str = ""
    requests: int = 0
    failed_requests: int = 0
    event_ids: list[str] = field(default_factory=list)
    trainings: list[dict[str, Any]] = field(default_factory=list)
    drift_checks: list[dict[str, Any]] = field(default_factory=list)
    prices: pd.DataFrame = field(default_factory=pd.DataFrame)
    forecasts: pd.DataFrame = field(default_factory=pd.DataFrame)

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON types."""
        retrained = [each for each in self.trainings if each["flow"] == "retrain"]
        ended = [each["outcome"] for each in self.trainings]
        return {
            "seconds": round(self.seconds, 1),
            "events": len(self.event_ids),
            "retrains": len(retrained),
            "promotions": ended.count("promoted"),
            "refusals": ended.count("refused"),
            "unchanged": ended.count("unchanged"),
            "requests": self.requests,
            "failed_requests": self.failed_requests,
            "calm_checks": self._checks_of(2007),
            "crash_checks": self._checks_of(2008),
            "event_ids": self.event_ids,
            "trainings": self.trainings,
            "steps_seconds": {name: round(value, 2) for name, value in self.steps.items()},
            "happenings": [asdict(h) | {"day": h.day.isoformat()} for h in self._sorted()],
            "scores": self._scores(),
            "drift_checks": self.drift_checks,
        }

    def _sorted(self) -> list[Happening]:
        return sorted(self.happenings, key=lambda each: each.day)

    def _checks_of(self, year: int) -> dict[str, int]:
        found = [each for each in self.drift_checks if each["as_of"].startswith(str(year))]
        return {"checks": len(found), "drifted": sum(each["drifted"] for each in found)}

    def _scores(self) -> list[dict[str, Any]]:
        if self.forecasts.empty:
            return []
        grouped = self.forecasts.groupby("model_version")[["crps_bp", "random_walk_bp"]]
        table = grouped.mean().round(2)
        table["forecasts"] = grouped.size()
        table["relative"] = (table["crps_bp"] / table["random_walk_bp"]).round(4)
        return [
            {str(k): v for k, v in row.items()} for row in table.reset_index().to_dict("records")
        ]


def collect(facts: Facts, settings: Settings, api: PrefectApi, symbol: str = "GOOG") -> None:
    """Fill in what SQL, MLflow and Prefect know after the replay."""
    events = list(reversed(api.events(DriftDetected.name)))
    facts.event_ids = [event["id"] for event in events]
    alarms = {date.fromisoformat(event["payload"]["as_of"]) for event in events}
    registry = open_registry(settings)
    with engine_of(settings.sql_url) as engine:
        for flow in ("train", "retrain"):
            for run in api.runs(flow):
                logged = registry.find_run({"flow_run_id": run.id})
                facts.trainings.append(
                    {
                        "flow": flow,
                        "flow_run_id": run.id,
                        "creator": run.creator,
                        "state": run.state,
                        "as_of": str(run.parameters.get("as_of")),
                        "seconds": round(run.seconds, 1),
                        "mlflow_run_id": logged.run_id if logged else "",
                        "outcome": logged.tags.get("outcome", "") if logged else "",
                        "reasons": logged.tags.get("reasons", "") if logged else "",
                        "version": _number(logged.tags.get("version", "")) if logged else None,
                        "kind": logged.tags.get("kind", "") if logged else "",
                        "scores": dict(logged.metrics) if logged else {},
                    }
                )
        _skips(facts, engine)
        facts.drift_checks = _checks(engine)
        facts.prices = datasets.load_frame(settings, symbol, _last_day(facts))
        facts.forecasts = _forecasts(engine, facts.prices, symbol)
    _tell(facts, alarms)


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _last_day(facts: Facts) -> date:
    return date.fromisoformat(max(each["as_of"] for each in facts.drift_checks))


def _skips(facts: Facts, engine: Engine) -> None:
    with engine.connect() as connection:
        rows = connection.execute(select(retrains).where(retrains.c.state == "skipped")).mappings()
        skipped = {row["flow_run_id"]: row["reason"] for row in rows}
    for each in facts.trainings:
        if each["flow_run_id"] in skipped:
            each.update(outcome="skipped", reasons=skipped[each["flow_run_id"]])


def _checks(engine: Engine) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        rows = connection.execute(select(checks).order_by(checks.c.as_of)).mappings().all()
    return [
        {
            "as_of": row["as_of"].isoformat(),
            "version": row["version"],
            "share": row["share"],
            "threshold": row["threshold"],
            "drifted": bool(row["drifted"]),
            "features": row["features"],
        }
        for row in rows
    ]


def _forecasts(engine: Engine, prices: pd.DataFrame, symbol: str) -> pd.DataFrame:
    query = select(predictions).where(predictions.c.symbol == symbol)
    with engine.connect() as connection:
        found = pd.DataFrame(connection.execute(query).mappings().all())
    if found.empty:
        return found
    # A day's forecast may have been asked more than once: keep the last answer.
    found = found.sort_values("made_at").drop_duplicates(["origin", "horizon"], keep="last")
    found = found[found["crps_bp"].notna()].reset_index(drop=True)
    origins = np.array(sorted(found["origin"].unique()), dtype="datetime64[D]")
    levels = [float(level) for level in found["levels"].iloc[0]]
    horizon = int(found["horizon"].max())
    walk = baselines.random_walk_quantiles(prices, origins, horizon, levels)
    row = np.searchsorted(origins, found["origin"].to_numpy().astype("datetime64[D]"))
    quantiles = walk[row, found["horizon"].to_numpy() - 1]
    actual = np.log(found["actual"].to_numpy() / found["origin_close"].to_numpy())
    scores = metrics.crps(actual[:, None], quantiles[:, None, :], levels)[:, 0]
    found["random_walk_bp"] = metrics.BASIS_POINTS * scores
    return found


def _tell(facts: Facts, alarms: set[date]) -> None:
    for each in facts.drift_checks:
        day = date.fromisoformat(each["as_of"])
        if each["drifted"] and day in alarms:  # a check made up for later alarms nobody
            moved = {name: each["features"][name] for name in FEATURES}
            worst = sorted(moved.items(), key=lambda kv: -kv[1])[:3]
            detail = f"{each['share']:.0%} of features moved, most of all " + ", ".join(
                f"{name} by {score:.1f} sd" for name, score in worst
            )
            facts.happenings.append(Happening(day, "drift event", each["version"], detail))
    for each in facts.trainings:
        who = f"started by {each['creator'].lower()}" if each["creator"] else "started by hand"
        facts.happenings.append(
            Happening(
                date.fromisoformat(each["as_of"]),
                f"{each['flow']}: {each['outcome'] or each['state'].lower()}",
                each["version"] if each["outcome"] == "promoted" else None,
                f"{each['reasons']} ({who}, {each['seconds']:.0f} s)",
            )
        )


def write_report(facts: Facts, folder: Path) -> list[Path]:
    """Write `demo.json` and `demo.html`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    told = facts.to_json()
    as_json = folder / "demo.json"
    as_json.write_text(json.dumps(told, indent=1, default=str))
    figures = [_price_figure(facts), _drift_figure(facts), _score_figure(facts)]
    environment = Environment(autoescape=select_autoescape(default=True))
    page = environment.from_string(_PAGE).render(
        told=told,
        plotly=get_plotlyjs(),
        figures=[
            figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
            for figure in figures
        ],
    )
    as_html = folder / "demo.html"
    as_html.write_text(page)
    return [as_html, as_json]


def _figure(title: str, unit: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0, "font": {"size": 16}},
        template="simple_white",
        font={"family": "system-ui, sans-serif", "color": INK, "size": 13},
        height=400,
        margin={"l": 60, "r": 20, "t": 60, "b": 40},
        yaxis_title=unit,
        legend={"orientation": "h", "y": 1.0, "x": 1, "xanchor": "right", "yanchor": "bottom"},
        hovermode="x unified",
    )
    return figure


def _mark(figure: go.Figure, facts: Facts, since: date | None = None) -> None:
    styles = {"drift event": (RED, "drift"), "retrain: promoted": (GREEN, "promoted")}
    styles["train: promoted"] = (GREEN, "first model")
    for each in facts.happenings:
        if each.what in styles and (since is None or each.day >= since):
            colour, label = styles[each.what]
            figure.add_vline(
                x=pd.Timestamp(each.day).timestamp() * 1000,
                line={"color": colour, "width": 1.5, "dash": "dot"},
                annotation={"text": label, "font": {"color": colour, "size": 11}, "textangle": -90},
                annotation_position="bottom right" if colour == GREEN else "top left",
            )


def _price_figure(facts: Facts) -> go.Figure:
    figure = _figure("GOOG close, and the 5-day forecasts that were served", "US dollars")
    first = pd.Timestamp("2007-01-01")
    shown = facts.prices.loc[facts.prices.index >= first, "close"]
    if not facts.forecasts.empty:
        replayed = _day_after_day(facts.forecasts)
        far = replayed[replayed["horizon"] == replayed["horizon"].max()].sort_values("target")
        levels = np.array(far["levels"].iloc[0])
        bands = np.array(far["quantiles"].tolist())
        for low, high, alpha in ((0.025, 0.975, 0.15), (0.1, 0.9, 0.22), (0.25, 0.75, 0.3)):
            a, b = np.abs(levels - low).argmin(), np.abs(levels - high).argmin()
            name = f"{round(100 * (high - low))} % interval"
            hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
            figure.add_scatter(x=far["target"], y=bands[:, b], showlegend=False, **hidden)
            fill = f"rgba(217,122,30,{alpha})"
            figure.add_scatter(
                x=far["target"], y=bands[:, a], fill="tonexty", fillcolor=fill, name=name, **hidden
            )
    figure.add_scatter(x=shown.index, y=shown, name="close", line={"color": INK, "width": 1.4})
    _mark(figure, facts)
    return figure


def _day_after_day(forecasts: pd.DataFrame) -> pd.DataFrame:
    """The forecasts after the last pause of more than two weeks: no line is drawn across one."""
    origins = pd.to_datetime(forecasts["origin"])
    days = pd.Series(sorted(origins.unique()))
    begins = days[days.diff() > pd.Timedelta(days=14)]
    return forecasts[origins >= begins.max()] if len(begins) else forecasts


def _drift_figure(facts: Facts) -> go.Figure:
    figure = _figure("Share of features that drifted, weekly check against training", "share")
    table = pd.DataFrame(facts.drift_checks)
    figure.add_scatter(
        x=table["as_of"],
        y=table["share"],
        mode="lines+markers",
        name="share drifted",
        line={"color": BLUE, "shape": "hv", "width": 1.6},
        marker={"size": 5, "color": np.where(table["drifted"], RED, BLUE).tolist()},
    )
    figure.add_scatter(
        x=table["as_of"],
        y=table["threshold"],
        name="threshold",
        mode="lines",
        line={"color": RED, "dash": "dash", "width": 1},
    )
    figure.update_yaxes(range=[-0.03, 1.08])
    _mark(figure, facts)
    return figure


def _score_figure(facts: Facts) -> go.Figure:
    figure = _figure(
        "CRPS of served forecasts, 1-5 days, 20-day rolling mean", "bp, lower is better"
    )
    if facts.forecasts.empty:
        return figure
    by_day = _day_after_day(facts.forecasts).groupby("origin")
    daily = by_day[["crps_bp", "random_walk_bp"]].mean()
    version = by_day["model_version"].last()
    rolled = daily.rolling(20, min_periods=5).mean()
    figure.add_scatter(
        x=rolled.index, y=rolled["random_walk_bp"], name="random walk", line={"color": GREY}
    )
    palette = [ORANGE, GREEN, BLUE, RED, INK]
    for index, number in enumerate(sorted(version.unique())):
        chosen = rolled["crps_bp"].where(version == number)
        line = {"color": palette[index % len(palette)], "width": 2}
        figure.add_scatter(x=rolled.index, y=chosen, name=f"version {number}", line=line)
    _mark(figure, facts, since=daily.index.min())
    return figure


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>perennial: the loop on GOOG, 2007-2008</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1100px; margin: 2rem auto;
        padding: 0 1rem; }
 h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
 .cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
 .cards div { border: 1px solid #d8dfe6; border-radius: 8px; padding: .5rem 1rem; min-width: 6rem }
 .cards b { display: block; font-size: 1.4rem }
 table { border-collapse: collapse; width: 100%; font-size: .9rem }
 th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e4e9ee;
          vertical-align: top }
 td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
 td.d { white-space: nowrap } code { font-size: .85em }
</style><script>{{ plotly | safe }}</script></head><body>
<h1>The whole loop on Google's stock price</h1>
<p>Trained as of a day in 2007, watched through a calm year, replayed day by day into the crash of
2008. Prices: real daily data. Every retrain below was started by a Prefect automation.</p>
<div class="cards">
 <div><b>{{ told.events }}</b>drift events</div><div><b>{{ told.retrains }}</b>retrains</div>
 <div><b>{{ told.promotions }}</b>promotions</div><div><b>{{ told.refusals }}</b>refusals</div>
 <div><b>{{ told.requests }}</b>forecasts asked</div>
 <div><b>{{ told.failed_requests }}</b>failed</div>
 <div><b>{{ told.calm_checks.drifted }} of {{ told.calm_checks.checks }}</b>calm-year alarms</div>
 <div><b>{{ "%.0f" | format(told.seconds) }} s</b>in all</div>
</div>
{% for figure in figures %}{{ figure | safe }}{% endfor %}
<h2>What happened</h2>
<table><tr><th>Date</th><th>What</th><th class="n">Version</th><th>Detail</th></tr>
{% for h in told.happenings %}<tr><td class="d">{{ h.day }}</td><td class="d">{{ h.what }}</td>
<td class="n">{{ "" if h.version is none else h.version }}</td><td>{{ h.detail }}</td></tr>
{% endfor %}</table>
<h2>Scores of what was served</h2>
<p>Continuous ranked probability score in basis points of log return, mean over horizons; lower is
better. The random walk uses all past residuals and is scored on the same days.</p>
<table><tr><th>Version</th><th class="n">Forecasts</th><th class="n">CRPS</th>
<th class="n">Random walk</th><th class="n">Ratio</th></tr>
{% for s in told.scores %}<tr><td>{{ s.model_version }}</td><td class="n">{{ s.forecasts }}</td>
<td class="n">{{ s.crps_bp }}</td><td class="n">{{ s.random_walk_bp }}</td>
<td class="n">{{ s.relative }}</td></tr>{% endfor %}</table>
<h2>Seconds</h2>
<table>{% for name, s in told.steps_seconds.items() %}<tr><td>{{ name }}</td>
<td class="n">{{ s }}</td></tr>{% endfor %}</table>
<h2>Runs</h2>
<table><tr><th>Flow</th><th>As of</th><th>Outcome</th><th>Kind</th><th>Created by</th>
<th>Prefect run</th><th>MLflow run</th></tr>
{% for t in told.trainings %}<tr><td>{{ t.flow }}</td><td class="d">{{ t.as_of }}</td>
<td>{{ t.outcome }}</td><td>{{ t.kind }}</td><td>{{ t.creator or "by hand" }}</td>
<td><code>{{ t.flow_run_id }}</code></td>
<td><code>{{ t.mlflow_run_id }}</code></td></tr>{% endfor %}</table>
</body></html>
"""
