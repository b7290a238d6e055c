"""The gate as a step: score everybody on the same days, decide, write down, show the model card.

The contest and the card are imported inside the task: a run that ends before the gate never pays
for `arch` and plotly.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from prefect import get_run_logger
from prefect.cache_policies import NO_CACHE
from sqlalchemy import Engine

from forecasting import datasets, reserved_days
from forecasting.contract import MODEL_FILE, Contract
from forecasting.gate import Evidence, GateVerdict, Rule
from forecasting.gate import judge as judge_evidence
from forecasting.registry import Registry
from forecasting.settings import Settings
from tasks.steps import create_markdown_artifact, task

CARD, PAGE = "model-card.md", "model-card.html"


@dataclass(frozen=True, eq=False)
class Judged:
    """The verdict on a candidate and what it was found on."""

    verdict: GateVerdict
    evidence: Evidence


@task(name="gate", cache_policy=NO_CACHE, timeout_seconds=600)
def judge(
    settings: Settings,
    engine: Engine,
    contract: Contract,
    as_of: date,
    md5: str,
    candidate: Path,
    production: Path | None,
) -> Judged:
    """Score candidate, production and baselines on the same most recent days and decide.

    Args:
        contract: the candidate's; all of its symbols are judged together.
        as_of: the day of the training.
        md5: dataset version.
        candidate: folder of the candidate.
        production: folder of the version in production, if there is one.
    """
    from forecasting.contest import gather

    evidence = gather(
        {symbol: datasets.load_frame(settings, symbol, as_of, md5) for symbol in contract.symbols},
        candidate,
        production,
        horizon=settings.horizon,
        validation_days=settings.validation_days,
        gate_days=settings.gate_days,
    )
    return weigh(settings, engine, contract, md5, evidence)


def weigh(
    settings: Settings, engine: Engine, contract: Contract, md5: str, evidence: Evidence
) -> Judged:
    """Decide on evidence, once the days that it takes up are written down."""
    for problem in evidence.problems:
        get_run_logger().warning(problem)
    look = None
    if evidence.answered:  # written down before anybody knows the verdict
        look = reserved_days.claim(
            engine,
            forecaster=contract.forecaster,
            model_sha256=contract.files[MODEL_FILE],
            days=evidence.days,
            dataset_md5=md5,
            run_id=contract.run_id,
        )
    verdict = judge_evidence(
        evidence,
        Rule(
            tolerance=settings.gate_tolerance,
            classical_tolerance=settings.gate_classical_tolerance,
            min_days=settings.gate_days,
            uses=look.uses if look else 0.0,
        ),
    )
    if look is not None:
        outcome = "passed" if verdict.promote else "refused"
        reserved_days.close(engine, look, outcome, " ".join(verdict.reasons))
    return Judged(verdict, evidence)


def gate_scores(verdict: GateVerdict) -> dict[str, float]:
    """The gate's figures that could be computed, by metric name."""
    named = {
        "gate_candidate": verdict.candidate_crps,
        "gate_production": verdict.production_crps,
        "gate_random_walk": verdict.random_walk_crps,
        "gate_classical": verdict.classical_crps,
        "gate_relative": verdict.relative_to_random_walk,
        "gate_upper": verdict.upper,
    }
    named |= {f"gate_cover{each.mass * 100:.0f}": each.share for each in verdict.intervals}
    return {name: value for name, value in named.items() if value is not None}


def show_verdict(
    registry: Registry,
    run_id: str,
    contract: Contract,
    validation: Mapping[str, float],
    judged: Judged,
) -> str:
    """Verdict as MLflow metrics, model card as MLflow and Prefect artifacts; its Markdown.

    Args:
        validation: what the candidate scored on its validation windows, CRPS in bp by name.
    """
    from forecasting import model_card

    verdict = judged.verdict
    registry.log_metrics(run_id, [(key, v, 0) for key, v in gate_scores(verdict).items()])
    registry.log_dict(run_id, asdict(verdict), "gate-verdict.json")
    card = model_card.to_markdown(contract, verdict, validation)
    page = model_card.to_html(contract, verdict, validation, judged.evidence)
    registry.log_text(run_id, card, CARD)
    registry.log_text(run_id, page, PAGE)
    where = registry.artifact_link(run_id, PAGE, "This card with plots")
    create_markdown_artifact(
        f"{where}\n\n{card}", key="gate-verdict", description=verdict.summary()
    )
    return card
