"""The ledger of reserved days: which days of the gate judged which candidate, and how.

Days that have judged a candidate are no longer new: whoever tries candidates until one passes has
chosen by those days. Each claim says how often its days have judged other candidates before, on
average over the days, and the gate asks for the more certainty the more often (`gate`). A candidate
that is judged again on the same days, after a crash or with another tolerance, is the same look:
its line, and what it was told then, stay as they are.

A claim is written before anybody sees a verdict. A process that is killed in between leaves its
line `open`, which counts: the days may have been seen.
"""

from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Engine, and_, insert, select, update

from forecasting import audit
from forecasting.store import exclude_writers, gate_looks, now


@dataclass(frozen=True)
class Look:
    """One candidate on one span of days.

    Attributes:
        forecaster: whose candidate.
        model_sha256: of the candidate's graph, which is what makes two candidates the same.
        first_day, last_day: of the gate.
        uses: how often, on average, the days had judged another candidate before.
    """

    forecaster: str
    model_sha256: str
    first_day: date
    last_day: date
    uses: float


def claim(
    engine: Engine,
    *,
    forecaster: str,
    model_sha256: str,
    days: NDArray[np.datetime64],
    dataset_md5: str,
    run_id: str,
) -> Look:
    """Write down that a candidate is about to be judged on these days.

    Count and line are one transaction that excludes other writers, so that of two candidates at
    once one comes second.

    Args:
        engine: from `store.open_engine`.
        forecaster: registered model.
        model_sha256: of the candidate's `model.onnx`.
        days: origins of the gate's windows, ascending.
        dataset_md5: dataset version.
        run_id: MLflow run.
    """
    first, last = days[0].astype(object), days[-1].astype(object)
    with engine.connect() as connection:
        exclude_writers(connection, gate_looks)
        found = connection.execute(
            select(gate_looks.c.uses).where(_same(forecaster, model_sha256, first, last))
        ).scalar_one_or_none()
        if found is None:
            found = _uses(connection, forecaster, model_sha256, days)
            connection.execute(
                insert(gate_looks).values(
                    forecaster=forecaster,
                    model_sha256=model_sha256,
                    first_day=first,
                    last_day=last,
                    days=len(days),
                    uses=found,
                    verdict="open",
                    reasons="",
                    dataset_md5=dataset_md5,
                    run_id=run_id,
                    created_at=now(),
                )
            )
        connection.commit()
    return Look(forecaster, model_sha256, first, last, float(found))


def close(engine: Engine, look: Look, verdict: str, reasons: str) -> None:
    """Write down the verdict, `passed` or `refused`; the newest one stays."""
    same = _same(look.forecaster, look.model_sha256, look.first_day, look.last_day)
    with engine.begin() as connection:
        line = connection.execute(
            update(gate_looks)
            .where(same)
            .values(verdict=verdict, reasons=reasons)
            .returning(gate_looks.c.run_id, gate_looks.c.dataset_md5)
        ).one()
        audit.add(
            connection,
            "verdict",
            look.forecaster,
            who=f"gate of run {line.run_id}",
            reason=reasons or "every rule of the gate holds",
            details={
                "verdict": verdict,
                "run_id": line.run_id,
                "model_sha256": look.model_sha256,
                "dataset_md5": line.dataset_md5,
                "first_day": look.first_day.isoformat(),
                "last_day": look.last_day.isoformat(),
                "uses": look.uses,
            },
        )


def _same(forecaster: str, model_sha256: str, first: date, last: date) -> ColumnElement[bool]:
    return and_(
        gate_looks.c.forecaster == forecaster,
        gate_looks.c.model_sha256 == model_sha256,
        gate_looks.c.first_day == first,
        gate_looks.c.last_day == last,
    )


def _uses(
    connection: Connection, forecaster: str, model_sha256: str, days: NDArray[np.datetime64]
) -> float:
    """Mean over the days of how many other candidates each has judged."""
    query = select(gate_looks.c.model_sha256, gate_looks.c.first_day, gate_looks.c.last_day).where(
        gate_looks.c.forecaster == forecaster,
        gate_looks.c.model_sha256 != model_sha256,
        gate_looks.c.first_day <= days[-1].astype(object),
        gate_looks.c.last_day >= days[0].astype(object),
    )
    seen: dict[str, NDArray[np.bool_]] = {}
    for other, first, last in connection.execute(query):
        used = (days >= np.datetime64(first)) & (days <= np.datetime64(last))
        seen[other] = seen.get(other, np.zeros(len(days), dtype=np.bool_)) | used
    return float(sum(used.mean() for used in seen.values()))
