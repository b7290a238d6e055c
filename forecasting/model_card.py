"""The model card of a candidate: what it is, what the gate found, in Markdown and in HTML.

Both tell the same tables; the page holds four plots beside them and needs no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, select_autoescape
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from forecasting.contract import Contract
from forecasting.gate import (
    CANDIDATE,
    INTERVALS,
    PRODUCTION,
    SLICE_MARGIN,
    Evidence,
    GateVerdict,
    percent,
)
from forecasting.metrics import Array, inside, pit
from forecasting.sessions import sessions_after

INK, BLUE, ORANGE, RED, GREEN, GREY = (
    "#1c2733",
    "#2a6fbb",
    "#d97a1e",
    "#c23b3b",
    "#2c8a57",
    "#9aa7b4",
)
FANS = 10
"""Forecasts in the fan chart, the newest ones that do not overlap."""
_BANDS = ((0.95, 0.16), (0.8, 0.26), (0.5, 0.42))
_CONFIG = {"displayModeBar": False, "responsive": True}


@dataclass(frozen=True)
class Section:
    """One table of the card; `header` is empty where the rows are names and values."""

    title: str
    text: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def to_markdown(contract: Contract, verdict: GateVerdict, scores: Mapping[str, float]) -> str:
    """The card without plots.

    Args:
        contract: of the candidate.
        verdict: of the gate.
        scores: of the candidate on the validation windows, CRPS in bp by name.
    """
    lines = [f"# {_title(contract)}", "", f"**{_cell(verdict.summary())}**", ""]
    if not verdict.promote:
        lines += [*verdict.notes, ""]
    for section in _sections(contract, verdict, scores):
        header = section.header or ("", "")
        lines += [f"## {section.title}", "", section.text, ""]
        lines += [_row(header), _row(["---"] * len(header))]
        lines += [*(_row([_cell(cell) for cell in row]) for row in section.rows), ""]
    return "\n".join(lines)


def to_html(
    contract: Contract, verdict: GateVerdict, scores: Mapping[str, float], evidence: Evidence
) -> str:
    """The card as one page with plots; arguments as in `to_markdown`, and what was judged on."""
    figures = []
    if verdict.intervals:  # what could be judged can be drawn
        figures = [
            _fan_figure(evidence),
            _difference_figure(evidence, verdict),
            _pit_figure(evidence),
            _coverage_figure(evidence),
        ]
    environment = Environment(autoescape=select_autoescape(default=True))
    return environment.from_string(_PAGE).render(
        title=_title(contract),
        contract=contract,
        verdict=verdict,
        percent=percent,
        sections=_sections(contract, verdict, scores),
        plotly=get_plotlyjs() if figures else "",
        figures=[
            each.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
            for each in figures
        ],
    )


# --- tables --------------------------------------------------------------------------------------


def _title(contract: Contract) -> str:
    return f"{contract.forecaster}, candidate of {contract.as_of}"


def _sections(
    contract: Contract, verdict: GateVerdict, scores: Mapping[str, float]
) -> list[Section]:
    told = [_about(contract, scores)]
    if verdict.pairings:
        told += [_against(verdict), _by_horizon(verdict), _intervals(verdict), _slices(verdict)]
    return [*told, _reserved(verdict)]


def _about(contract: Contract, scores: Mapping[str, float]) -> Section:
    kinds = {
        "lstm": "a volatility regression, corrected by an LSTM",
        "volatility": "a volatility regression; the LSTM did not earn its place and is left out",
    }
    rows = [
        ("Symbols", ", ".join(contract.symbols)),
        ("Kind", f"`{contract.kind}`: {kinds[contract.kind]}"),
        ("Known on", contract.as_of.isoformat()),
        ("Learned from", f"{contract.train_start} to {contract.train_end}"),
        ("Answers", f"{len(contract.quantile_levels)} quantiles of {contract.horizon} days"),
        ("Needs", f"{contract.context} rows of prices"),
        ("Dataset", f"`{contract.dataset_md5}`"),
        ("Run", f"`{contract.run_id}`"),
        ("Code", f"`{contract.git_commit}`"),
        *((_score_name(name), f"{value:.2f} bp") for name, value in scores.items()),
    ]
    text = (
        "Forecasts how far prices may move in the next days, around the last price. It says "
        "nothing of the direction, knows prices and volumes only, and is no investment advice."
    )
    return Section("What it is", text, (), tuple(rows))


def _score_name(key: str) -> str:
    """`validation_crps_trained` as `Validation CRPS, trained`."""
    where, _, what = key.partition("_crps_")
    return f"{where.capitalize()} CRPS, {what}" if what else key


def _against(verdict: GateVerdict) -> Section:
    rows = tuple(
        (
            each.opponent + (" (best on validation)" * (each.opponent == verdict.classical)),
            f"{each.crps:.2f}",
            f"{each.relative:+.2%}",
            f"{each.upper:+.2%}",
            "shown only" if each.limit is None else _limit(each.limit),
            f"{each.difference:+.2f} ({each.low:+.2f} to {each.high:+.2f})",
            ("" if each.dm_t is None else f"{each.dm_t:.2f} ") + f"({each.dm_p:.3f})",
        )
        for each in verdict.pairings
    )
    text = (
        "CRPS in basis points of log return, mean over horizons, lower is better; the candidate's "
        f"is {verdict.candidate_crps:.2f} on the same {verdict.windows} windows of {verdict.days} "
        f"days, {verdict.first_day} to {verdict.last_day}. Differences are candidate minus "
        f"opponent, with HAC errors: of the relative one a one-sided {percent(verdict.confidence)} "
        "bound, of the other a two-sided 95 % interval and the test of Diebold and Mariano."
    )
    header = ("Against", "CRPS", "relative", "upper bound", "allowed", "difference", "t (p)")
    return Section("Against others on the same days", text, header, rows)


def _limit(limit: float) -> str:
    return f"at most {limit:+.1%}" if limit else "below zero"


def _by_horizon(verdict: GateVerdict) -> Section:
    horizons = sum(key.startswith("day_") for key in verdict.table[0])
    names = tuple(f"day_{h}" for h in range(1, horizons + 1))
    rows = tuple(
        (str(row["contestant"]), *(f"{row[name]:.2f}" for name in names)) for row in verdict.table
    )
    header = ("CRPS", *(f"day {h}" for h in range(1, horizons + 1)))
    return Section("By horizon", "CRPS in basis points, days ahead.", header, rows)


def _intervals(verdict: GateVerdict) -> Section:
    rows = tuple(
        (
            percent(each.mass),
            f"{each.share:.1%}",
            f"{each.low:.1%} to {each.high:.1%}",
            "{:.0%} to {:.0%}".format(*INTERVALS[each.mass]),
            "" if each.production is None else f"{each.production:.1%}",
        )
        for each in verdict.intervals
    )
    text = "What share of outcomes the central intervals held, over all horizons."
    header = ("Interval", "held", "within error", "bounds", "production's held")
    return Section("Do the intervals hold", text, header, rows)


def _slices(verdict: GateVerdict) -> Section:
    rows = tuple(
        (
            each.name,
            each.opponent,
            str(each.days),
            "too few days" if each.relative is None else f"{each.relative:+.2%}",
            "" if each.lower is None else f"{each.lower:+.2%}",
        )
        for each in verdict.slices
    )
    text = (
        "Calm and volatile are the halves of the days by the range volatility of the month before; "
        "after earnings is the middle of a quarter's first month to the middle of its second. A "
        f"lower 95 % bound above {SLICE_MARGIN:+.0%} refuses."
    )
    header = ("Days that are", "against", "days", "relative", "lower 95 % bound")
    return Section("In parts of the days", text, header, rows)


def _reserved(verdict: GateVerdict) -> Section:
    rows = (
        ("Days judged on", f"{verdict.days}, {verdict.first_day} to {verdict.last_day}"),
        ("Other candidates judged on them", f"{verdict.uses:.2f} a day, on average"),
        ("Confidence of the bounds", percent(verdict.confidence)),
    )
    text = "The more candidates the same days have judged, the surer a bound has to be."
    return Section("Reserved days", text, (), rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that cannot end a cell or a line of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


# --- plots ---------------------------------------------------------------------------------------


def _figure(title: str, unit: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        template="simple_white",
        font={"family": "system-ui, sans-serif", "color": INK, "size": 12},
        height=340,
        margin={"l": 60, "r": 15, "t": 70, "b": 40},
        yaxis_title=unit,
        legend={"orientation": "h", "y": 1.0, "x": 0, "xanchor": "left", "yanchor": "bottom"},
    )
    return figure


def _fan_figure(evidence: Evidence) -> go.Figure:
    """The newest forecasts of the first symbol that do not overlap, and what came."""
    symbol = str(evidence.symbols[0])
    rows = np.flatnonzero(evidence.symbols == symbol)
    horizon = evidence.returns.shape[1]
    starts = rows[::-1][::horizon][:FANS][::-1]
    figure = _figure(f"{symbol}: forecasts of {horizon} days, and what came", "price")
    for mass, alpha in _BANDS:
        x: list[date | None] = []
        y: list[float | None] = []
        for row in starts:
            days = [
                _day(evidence.origins[row]),
                *sessions_after(_day(evidence.origins[row]), horizon),
            ]
            low, high = _band(evidence, row, mass)
            x += [*days, *reversed(days), None]
            y += [*low, *reversed(high), None]
        figure.add_scatter(
            x=x,
            y=y,
            fill="toself",
            fillcolor=f"rgba(217,122,30,{alpha})",
            line={"width": 0},
            mode="lines",
            name=percent(mass),
            hoverinfo="skip",
        )
    shown, last = rows[rows >= starts[0]], rows[-1]
    came = evidence.last_close[last] * np.exp(evidence.returns[last])
    ahead = sessions_after(_day(evidence.origins[last]), horizon)
    figure.add_scatter(
        x=[*(_day(day) for day in evidence.origins[shown]), *ahead],
        y=np.concatenate([evidence.last_close[shown], came]),
        mode="lines",
        line={"color": INK, "width": 1.6},
        name="close",
    )
    return figure


def _band(evidence: Evidence, row: int, mass: float) -> tuple[list[float], list[float]]:
    """Lower and upper prices of an interval, from the last close on."""
    close, quantiles = float(evidence.last_close[row]), evidence.quantiles[row]
    low, high = (
        [close, *(close * np.exp([np.interp(level, evidence.levels, q) for q in quantiles]))]
        for level in ((1.0 - mass) / 2.0, (1.0 + mass) / 2.0)
    )
    return low, high


def _difference_figure(evidence: Evidence, verdict: GateVerdict) -> go.Figure:
    figure = _figure("CRPS, candidate minus others, added up", "bp, falling is better")
    colours = {PRODUCTION: GREEN, verdict.classical: BLUE}
    mine = np.asarray(evidence.crps[CANDIDATE], dtype=np.float64)
    for each in verdict.pairings:
        if each.limit is None:
            continue
        chosen = evidence.served if each.opponent == PRODUCTION else np.ones(len(mine), dtype=bool)
        theirs = np.asarray(evidence.crps[each.opponent], dtype=np.float64)
        days, gaps = _daily(evidence.origins[chosen], (mine - theirs)[chosen].mean(axis=1))
        figure.add_scatter(
            x=days.astype(object),
            y=np.cumsum(gaps),
            name=each.opponent,
            line={"color": colours.get(each.opponent, GREY), "width": 2},
        )
    figure.add_hline(y=0, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(hovermode="x unified")
    return figure


def _pit_figure(evidence: Evidence) -> go.Figure:
    """Ten bars that are level if the forecasts are calibrated; the band is of chance."""
    figure = _figure("Where outcomes fell in the forecast (PIT)", "share of outcomes")
    values = pit(evidence.returns, evidence.quantiles, evidence.levels)
    counts, edges = np.histogram(values, bins=np.linspace(0.0, 1.0, 11))
    error = 1.96 * np.sqrt(0.1 * 0.9 / len(evidence.days))
    figure.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts / values.size,
        width=0.096,
        marker={"color": BLUE},
        hovertemplate="%{y:.1%}<extra></extra>",
        showlegend=False,
    )
    figure.add_hrect(
        y0=max(0.1 - error, 0.0),
        y1=0.1 + error,
        fillcolor=GREY,
        opacity=0.3,
        line_width=0,
        layer="below",
    )
    figure.add_hline(y=0.1, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title="level of the outcome", range=[0, 1])
    figure.update_yaxes(tickformat=".0%", range=[0, max(0.2, 1.1 * counts.max() / values.size)])
    return figure


def _coverage_figure(evidence: Evidence) -> go.Figure:
    figure = _figure("What intervals held, from calm to volatile days", "share of outcomes")
    names = ("calmest fifth", "2nd", "3rd", "4th", "most volatile")
    part = np.minimum((evidence.volatility * len(names)).astype(int), len(names) - 1)
    for (mass, _), colour in zip(INTERVALS.items(), (ORANGE, BLUE), strict=True):
        held = inside(evidence.returns, evidence.quantiles, evidence.levels, mass).mean(axis=1)
        chosen = [part == number for number in range(len(names))]
        days = [max(len(np.unique(evidence.origins[each])), 1) for each in chosen]
        figure.add_scatter(
            x=names,
            y=[float(held[each].mean()) if each.any() else None for each in chosen],
            error_y={
                "array": [1.96 * np.sqrt(mass * (1 - mass) / count) for count in days],
                "thickness": 1.2,
            },
            mode="markers",
            marker={"color": colour, "size": 9},
            name=f"{percent(mass)} interval",
            hovertemplate="%{y:.1%}<extra></extra>",
        )
        figure.add_hline(y=mass, line={"color": colour, "width": 1, "dash": "dot"})
    figure.update_yaxes(tickformat=".0%", range=[0.4, 1.08])
    return figure


def _daily(origins: NDArray[np.datetime64], values: Array) -> tuple[NDArray[np.datetime64], Array]:
    days, day = np.unique(origins, return_inverse=True)
    return days, np.bincount(day, values) / np.bincount(day)


def _day(origin: np.datetime64) -> date:
    return date.fromisoformat(str(origin))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1100px; margin: 2rem auto;
        padding: 0 1rem; }
 h1 { font-size: 1.6rem; margin-bottom: .6rem } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem }
 p { margin: .3rem 0 .6rem }
 .verdict { border-left: 5px solid #2c8a57; background: #f1f7f4; padding: .6rem 1rem }
 .verdict.refused { border-color: #c23b3b; background: #faf1f1 }
 .verdict ul { margin: .2rem 0; padding-left: 1.2rem }
 .cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
 .cards div { border: 1px solid #d8dfe6; border-radius: 8px; padding: .5rem 1rem; min-width: 6rem }
 .cards b { display: block; font-size: 1.3rem }
 .plots > div { min-width: 0 }
 .plots { display: grid; gap: .5rem;
          grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)) }
 .wide { overflow-x: auto }
 table { border-collapse: collapse; width: 100%; font-size: .9rem }
 th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e4e9ee;
          vertical-align: top; font-variant-numeric: tabular-nums }
 .facts td:first-child { width: 16rem; color: #5b6875 }
 code { font-size: .85em; word-break: break-all }
</style>{% if plotly %}<script>{{ plotly | safe }}</script>{% endif %}</head><body>
<h1>{{ title }}</h1>
<div class="verdict{{ "" if verdict.promote else " refused" }}">
{% if verdict.promote %}{{ verdict.summary() }}
{% else %}<b>Refused</b>
<ul>{% for reason in verdict.reasons %}<li>{{ reason }}</li>{% endfor %}</ul>
{% if verdict.notes %}<p>{{ verdict.notes | join(" ") }}</p>{% endif %}
{% endif %}</div>
{% if verdict.pairings %}<div class="cards">
 <div><b>{{ "%.1f bp" | format(verdict.candidate_crps) }}</b>CRPS</div>
{% for p in verdict.pairings if p.limit is not none %}
 <div><b>{{ "%+.1f %%" | format(100 * p.relative) }}</b>against {{ p.opponent }}</div>
{% endfor %}{% for i in verdict.intervals %}
 <div><b>{{ "%.0f %%" | format(100 * i.share) }}</b>in the {{ percent(i.mass) }} interval</div>
{% endfor %}</div>{% endif %}
<div class="plots">{% for figure in figures %}<div>{{ figure | safe }}</div>{% endfor %}</div>
{% for s in sections %}<h2>{{ s.title }}</h2><p>{{ s.text }}</p>
<div class="wide"><table{% if not s.header %} class="facts"{% endif %}>
{% if s.header %}<tr>{% for cell in s.header %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in s.rows %}<tr>{% for cell in row %}<td>{{ cell | replace("`", "") }}</td>{% endfor %}
</tr>{% endfor %}</table></div>
{% endfor %}</body></html>
"""
