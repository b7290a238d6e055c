"""`python -m deployments.record`: what the loop did and cost, and where an answer came from."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
from jinja2 import Environment, select_autoescape
from rich.console import Console
from rich.table import Column, Table

from forecasting import audit, costs, lineage
from forecasting.errors import PerennialError
from forecasting.lineage import Lineage
from forecasting.registry import open_registry
from forecasting.settings import Settings, load_settings
from forecasting.store import engine_of

EXAMPLES = """\
curl -s http://127.0.0.1:8200/v1/forecast/GOOG | python -m deployments.record lineage
python -m deployments.record lineage answer.json --html lineage.html
python -m deployments.record lineage --id 3f0c...        an id of the prediction log
python -m deployments.record audit --subject perennial-goog > audit.jsonl
python -m deployments.record costs --since 2026-11-01
"""
CPU_HOUR_DOLLARS = 0.025
"""A virtual CPU for an hour: half of an ml.t3.medium, $0.05 with two (the first of `MANAGED`)."""
MACHINE = (
    "a machine for server, Prefect and MLflow, always on (t3.medium on demand)",
    "$30",
    "https://hacecuentas.com/en/costo-servidor-cloud-aws-ec2-mensual (2026-04-17)",
)
"""What the loop runs on: a published price, source and date."""
MANAGED = (
    (
        "Amazon SageMaker, real-time endpoint on ml.t3.medium, all month",
        "$37",
        "https://www.wring.co/blog/aws-sagemaker-inference-guide (2026-03-15)",
    ),
    (
        "Amazon SageMaker, real-time endpoint on ml.m5.xlarge, all month",
        "$196",
        "https://zircon.tech/blog/the-real-cost-of-running-ai-models-on-aws-sagemaker-inference-"
        "deep-dive (us-east-1, 2025-10)",
    ),
    (
        "Vertex AI Tabular Workflow, one training of an hour on 110 MB (Google's first example)",
        "$27.03",
        "https://cloud.google.com/vertex-ai/docs/tabular-data/tabular-workflows/pricing",
    ),
)
"""Published prices of managed platforms: what, dollars, source and date."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; the exit status."""
    asked = _parser().parse_args(arguments)
    try:
        asked.run(load_settings(), asked)
    except PerennialError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.record",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="lineage|audit|costs")
    traced = commands.add_parser("lineage", help="where an answer of the server came from")
    traced.add_argument("answer", nargs="?", default="-", help="file of the answer; -: stdin")
    traced.add_argument("--id", help="id of an answer in the prediction log instead")
    traced.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    traced.set_defaults(run=_lineage)
    audited = commands.add_parser("audit", help="every alias move, trigger, skip: JSON lines")
    audited.add_argument("--subject", help="of one forecaster or symbol only")
    audited.add_argument("--since", type=_moment, metavar="TIME", help="from a UTC time on")
    audited.set_defaults(run=_audit)
    cost = commands.add_parser("costs", help="wall time, CPU time and disk of each flow")
    cost.add_argument("--since", type=_moment, metavar="TIME", help="from a UTC time on")
    cost.set_defaults(run=_costs)
    return parser


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _audit(settings: Settings, asked: argparse.Namespace) -> None:
    with engine_of(settings.sql_url) as engine:
        for entry in audit.read(engine, asked.subject, asked.since):
            sys.stdout.write(audit.to_json(entry) + "\n")


# costs ------------------------------------------------------------------------------------------


def _costs(settings: Settings, asked: argparse.Namespace) -> None:
    with engine_of(settings.sql_url) as engine:
        runs = costs.read(engine, asked.since)
    console = Console(highlight=False)
    if runs.empty:
        console.print("No run of a flow was written down yet.")
        return
    found = costs.summary(runs)
    table = Table("flow", title=f"{len(runs)} runs since {runs['started_at'].iloc[0]:%Y-%m-%d}")
    for name in ("runs", "failed", "wall min", "CPU min", "MB"):
        table.add_column(name, justify="right")
    for flow, row in found.iterrows():
        if flow == "all":
            table.add_section()
        numbers = (f"{row[name]:.1f}" for name in ("wall_minutes", "cpu_minutes", "megabytes"))
        table.add_row(str(flow), f"{row['runs']:.0f}", f"{row['failed']:.0f}", *numbers)
    console.print(table)
    console.print(_month(runs, found))


def _month(runs: pd.DataFrame, found: pd.DataFrame) -> Table:
    """What 21 market days like those on record cost, beside what platforms ask for theirs."""
    days = max(1, runs["as_of"].nunique())
    minutes = float(found["cpu_minutes"]["all"]) / days * 21
    table = Table(
        "a month",
        "dollars",
        Column("source", overflow="fold"),
        title="One month of this loop, and of others",
    )
    table.add_row(
        f"this loop's flows, 21 market days: {minutes:.1f} CPU minutes",
        f"${minutes / 60 * CPU_HOUR_DOLLARS:.2f}",
        f"{days} day(s) on record, at ${CPU_HOUR_DOLLARS} a CPU hour",
    )
    for row in (MACHINE, *MANAGED):
        table.add_row(*row)
    return table


# lineage ----------------------------------------------------------------------------------------


def _lineage(settings: Settings, asked: argparse.Namespace) -> None:
    with engine_of(settings.sql_url) as engine:
        if asked.id:
            answer = lineage.logged_answer(engine, asked.id)
        else:
            raw = sys.stdin.buffer.read() if asked.answer == "-" else _read(Path(asked.answer))
            answer = lineage.parse(raw)
        found = lineage.trace(settings, open_registry(settings), engine, answer)
    sys.stdout.write(_shown(found.table()) + "\n")
    if asked.html:
        asked.html.write_text(page(found))
        sys.stderr.write(f"{asked.html} is the page.\n")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PerennialError(f"A file with an answer was expected: {error}.") from error


def _shown(rows: Iterable[tuple[str, str, str]]) -> str:
    """Values are never broken, so that they can be copied."""
    lines, before = [], ""
    for section, name, value in rows:
        if section != before:
            lines += ["", section] if before else [section]
        lines.append(f"  {name:<22}  {value}")
        before = section
    return "\n".join(lines)


def page(found: Lineage) -> str:
    """One self-contained HTML page with everything behind an answer."""
    environment = Environment(autoescape=select_autoescape(default=True))
    sections: dict[str, list[tuple[str, str]]] = {}
    for section, name, value in found.table():
        sections.setdefault(section, []).append((name, value))
    title = f"{found.answer.symbol} from {found.answer.origin}"
    return environment.from_string(_PAGE).render(title=title, sections=sections, day=date.today())


_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Lineage of {{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
h2.missing { color: #b42318; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #d8dee4; padding: .3rem .6rem .3rem 0; vertical-align: top; }
td:first-child { width: 14rem; color: #57606a; } td:last-child { overflow-wrap: anywhere; }
</style></head><body>
<h1>Where the forecast for {{ title }} came from</h1>
{% for section, rows in sections.items() -%}
<h2 class="{{ section }}">{{ section }}</h2>
<table>
{% for name, value in rows -%}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% endfor %}<p>Printed {{ day }} by <code>python -m deployments.record lineage</code>.</p>
</body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
