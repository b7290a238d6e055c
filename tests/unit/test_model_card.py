"""The model card of real verdicts: Markdown, and a page that needs no network."""

import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest

from forecasting import model_card
from forecasting.contest import gather
from forecasting.contract import Contract, read_contract
from forecasting.gate import Evidence, GateVerdict, Rule, judge
from tests.market import goog
from tests.models import write_model_folder

SCORES = {"validation_crps_trained": 101.25, "validation_crps_volatility": 102.5}
AS_OF = "2007-12-31"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model_folder(root / "candidate", train_end=date(2007, 6, 29))
    write_model_folder(root / "production", scale=1.02, train_end=date(2007, 1, 31))
    return root


@pytest.fixture(scope="module")
def contract(folder: Path) -> Contract:
    return read_contract(folder / "candidate")


@pytest.fixture(scope="module")
def evidence(folder: Path) -> Evidence:
    return gather(
        {"GOOG": goog(AS_OF)},
        folder / "candidate",
        folder / "production",
        horizon=5,
        validation_days=60,
        gate_days=60,
    )


@pytest.fixture(scope="module")
def verdict(evidence: Evidence) -> GateVerdict:
    return judge(evidence, Rule(0.2, 0.2, 60, uses=1.0))


def rows(markdown: str, title: str) -> list[list[str]]:
    """Cells of the table below a heading, without its header."""
    section = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_markdown_tells_the_verdict_and_every_figure_behind_it(contract, verdict):
    card = model_card.to_markdown(contract, verdict, SCORES)
    assert f"**{verdict.summary()}**" in card
    facts = dict(rows(card, "What it is"))
    assert facts["Learned from"] == "2004-08-19 to 2007-06-29"
    assert facts["Validation CRPS, trained"] == "101.25 bp"
    assert facts["Dataset"] == f"`{contract.dataset_md5}`"
    against = rows(card, "Against others on the same days")
    assert [row[0].split(" (")[0] for row in against] == [
        each.opponent for each in verdict.pairings
    ]
    for row, each in zip(against, verdict.pairings, strict=True):
        figures = (f"{each.crps:.2f}", f"{each.relative:+.2%}", f"{each.upper:+.2%}")
        assert tuple(row[1:4]) == figures
        assert row[5].startswith(f"{each.difference:+.2f} (")
    (best,) = [row[0] for row in against if "best on validation" in row[0]]
    assert best.startswith(verdict.classical)
    assert "one-sided 97.5 % bound" in card
    assert [row[0] for row in rows(card, "By horizon")][:2] == ["candidate", "random walk"]
    assert [row[0] for row in rows(card, "Do the intervals hold")] == ["80 %", "95 %"]
    assert len(rows(card, "In parts of the days")) == 6
    assert dict(rows(card, "Reserved days"))["Confidence of the bounds"] == "97.5 %"


class Page(HTMLParser):
    """Addresses that a page would fetch, and how many plots and tables it holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        self.tables += tag == "table"


def test_the_page_holds_plots_and_tables_and_fetches_nothing(contract, verdict, evidence):
    html = model_card.to_html(contract, verdict, SCORES, evidence)
    page = Page(html)
    assert page.fetched == []
    assert page.tables == 6
    assert len(re.findall(r"Plotly\.newPlot\(", html.split("</head>")[1])) == 4
    for title in ("forecasts of 5 days", "minus others, added up", "(PIT)", "calm to volatile"):
        assert title in html


def test_a_refusal_lists_its_reasons(contract, evidence):
    refused = judge(evidence, Rule(0.0, 0.0, 60))
    assert len(refused.reasons) > 1
    html = model_card.to_html(contract, refused, SCORES, evidence)
    assert html.count("<li>") == len(refused.reasons)


def test_a_candidate_that_could_not_be_scored_has_a_card_without_plots(contract):
    evidence = Evidence.nothing("It cannot be loaded: <model> | of\nanother kind.")
    verdict = judge(evidence, Rule(0.01, 0.03, 60))
    html = model_card.to_html(contract, verdict, {}, evidence)
    assert Page(html).tables == 2
    assert "newPlot" not in html
    assert "&lt;model&gt; | of" in html
    assert "<model> \\| of another kind." in model_card.to_markdown(contract, verdict, {})


def test_plots_show_the_figures(evidence, verdict):
    fan = model_card._fan_figure(evidence)
    names = [trace.name for trace in fan.data]
    assert names == ["95 %", "80 %", "50 %", "close"]
    origins = sum(each is None for each in fan.data[0].x)
    assert origins == model_card.FANS
    gaps = model_card._difference_figure(evidence, verdict)
    ends = {trace.name: trace.y[-1] for trace in gaps.data}
    for each in verdict.pairings:
        if each.limit is not None:
            assert ends[each.opponent] == pytest.approx(each.difference * verdict.days)
    bars = model_card._pit_figure(evidence).data[0]
    assert sum(bars.y) == pytest.approx(1.0)
    held = model_card._coverage_figure(evidence).data[0]
    assert sum(held.y) / 5 == pytest.approx(verdict.intervals[0].share)


def test_production_that_serves_other_symbols_is_drawn_on_its_own_days(evidence, verdict):
    some = evidence.served.copy()
    some[:20] = False
    part = replace(evidence, served=some)
    figure = model_card._difference_figure(part, judge(part, Rule(0.2, 0.2, 60)))
    assert [len(trace.x) for trace in figure.data] == [60, 60, 40]
