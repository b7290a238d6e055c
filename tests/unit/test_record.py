from datetime import date

from deployments import record
from forecasting import costs
from forecasting.settings import load_settings
from forecasting.store import engine_of


def test_costs_are_shown_by_flow_and_as_a_month_beside_platforms(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    assert record.main(["costs"]) == 0
    assert "No run of a flow" in capsys.readouterr().out
    settings = load_settings()
    with engine_of(settings.sql_url) as engine:
        for day in (1, 2):
            with costs.measured(engine, tmp_path, "monitor", "GOOG", date(2008, 12, day)):
                pass
    assert record.main(["costs"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs since" in shown
    assert "monitor" in shown
    assert "2 day(s) on record" in shown
    for _, dollars, source in record.MANAGED:
        assert dollars in shown
        assert source.split(" ")[0][:40] in shown
