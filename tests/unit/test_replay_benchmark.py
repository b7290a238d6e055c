"""`make replay`: what its claim says of policies, and the markets that it plants."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.replay import CALM, CHANGED, KNOWN, LEARNED, claim, planted
from forecasting.replay import Summary

NOISE = np.random.default_rng(1).normal(1, 0.1, 400)


def summary(policy: str, crps: float, cpu_minutes: float) -> Summary:
    days = pd.bdate_range("2007-01-03", periods=len(NOISE))
    counts = dict.fromkeys(("retrains", "promotions", "refusals", "skips", "rollbacks"), 0)
    shares = dict.fromkeys(("coverage", "coverage95", "watch_cpu_minutes", "wall_minutes"), 0.0)
    return Summary(
        policy=policy,
        days=len(days),
        crps=crps,
        cpu_minutes=cpu_minutes,
        days_per_minute=100.0,
        losses=pd.Series(crps * NOISE, days),
        **counts,
        **shares,
    )


@pytest.mark.parametrize(
    ("crps", "cpu", "holds"),
    [(100.4, 2.0, True), (100.6, 2.0, False), (100.4, 2.1, False), (99.0, 2.0, True)],
)
def test_the_claim_is_of_quality_and_of_cost(crps, cpu, holds):
    found = {
        "never": summary("never", 104.0, 0.0),
        "monthly": summary("monthly", 100.0, 4.0),
        "both": summary("both", crps, cpu),
        "oracle": summary("oracle", 90.0, 0.1),
    }
    told = claim(found)
    assert told["holds"] is holds
    assert told["best"] == ("both" if crps < 100 else "monthly"), "an oracle is nobody's policy"
    best = min(crps, 100.0)
    assert told["behind"] == pytest.approx(crps / best - 1, abs=1e-5)
    assert told["never_behind"] == pytest.approx(104 / best - 1, abs=1e-5)
    assert told["lower"] <= told["behind"] <= told["upper"]
    assert told["cpu_over_monthly"] == pytest.approx(cpu / 4, abs=1e-3)


def test_the_loop_is_judged_as_both_is():
    found = {
        "never": summary("never", 104.0, 0.0),
        "monthly": summary("monthly", 100.0, 4.0),
        "both": summary("both", 102.0, 2.0),
        "loop": summary("loop", 99.0, 3.0),
    }
    told = claim(found, "loop")
    assert (told["best"], told["behind"], told["cpu_over_monthly"]) == ("loop", 0.0, 0.75)
    assert not told["holds"]


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.4), (0.4, 1.0)])
def test_a_planted_market_moves_its_news_and_nothing_else(tmp_path, before, after):
    """Closes are those of a market without a change; what is within a day grows or shrinks."""
    market = planted(tmp_path, "night", "night", 1, before, after)
    same = planted(tmp_path, "same", "same", 1, 1.0, 1.0)
    found, plain = (
        pd.read_csv(tmp_path / f"{each.symbol}.csv", index_col="date", parse_dates=True)
        for each in (market, same)
    )
    change = found.index.get_loc(pd.Timestamp(market.changed))
    assert (change, len(found)) == (LEARNED + CALM, LEARNED + CALM + CHANGED)
    assert [found.index.get_loc(pd.Timestamp(day)) - change for day in market.oracle] == [*KNOWN]
    pd.testing.assert_series_equal(found["close"], plain["close"])
    assert (found["high"] >= found[["open", "close"]].max(axis=1)).all()
    assert (found["low"] <= found[["open", "close"]].min(axis=1)).all()
    own, whole = (
        np.log(each["high"].to_numpy() / each["low"].to_numpy()) for each in (found, plain)
    )
    assert (own / whole)[:change].mean() == pytest.approx(before, abs=0.01)
    assert (own / whole)[change:].mean() == pytest.approx(after, abs=0.01)
