import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import select

from forecasting import audit, ledger
from forecasting.store import audit as table
from forecasting.store import now, retrains


def write(engine, kind="skip", subject="GOOG", **others):
    with engine.begin() as connection:
        audit.add(connection, kind, subject, **({"who": "anna", "reason": "why"} | others))


def test_lines_come_back_in_the_order_of_writing_with_all_they_say(engine):
    began = now()
    write(engine, "alias", "perennial-goog", version=3, details={"state": "moved", "previous": 2})
    write(engine, "skip", "GOOG", reason="cooldown")
    first, second = audit.read(engine)
    assert (first.kind, first.subject, first.version) == ("alias", "perennial-goog", 3)
    assert first.details == {"state": "moved", "previous": 2}
    assert (second.reason, second.version, second.who) == ("cooldown", None, "anna")
    assert first.number < second.number
    assert began <= first.at <= second.at <= now()


def test_it_can_be_asked_for_one_subject_and_from_a_moment_on(engine):
    write(engine, subject="GOOG")
    write(engine, subject="IBM")
    assert [each.subject for each in audit.read(engine, "IBM")] == ["IBM"]
    assert list(audit.read(engine, since=now() + timedelta(hours=1))) == []
    assert len(list(audit.read(engine, since=datetime(2000, 1, 1, tzinfo=UTC)))) == 2


def test_a_line_is_one_line_of_json(engine):
    write(engine, reason='line\nbreak and "quotes"', details={"day": "2008-10-31"})
    (entry,) = audit.read(engine)
    text = audit.to_json(entry)
    assert "\n" not in text
    told = json.loads(text)
    assert told["reason"] == 'line\nbreak and "quotes"'
    assert told["details"] == {"day": "2008-10-31"}
    assert datetime.fromisoformat(told["at"]) == entry.at


def test_a_change_that_fails_leaves_no_line(engine):
    def fail() -> None:
        with engine.begin() as connection:
            audit.add(connection, "skip", "GOOG", who="anna", reason="why")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(audit.read(engine)) == []


def test_every_request_for_a_retrain_is_in_it_with_its_end(engine):
    asked = {
        "symbol": "GOOG",
        "as_of": date(2008, 10, 10),
        "limits": ledger.Limits(cooldown_days=5),
    }
    first = ledger.claim(engine, trigger="drift 1", flow_run_id="a", **asked)
    ledger.claim(engine, trigger="drift 2", flow_run_id="b", **asked)
    ledger.close(engine, first.id, "promoted", "better")
    told = [(each.kind, each.who, each.details.get("state")) for each in audit.read(engine)]
    assert told == [
        ("trigger", "drift 1", None),
        ("skip", "drift 2", None),
        ("retrain", "drift 1", "promoted"),
    ]
    assert "one at a time" in list(audit.read(engine))[1].reason


def test_many_at_once_are_as_many_lines_in_ledger_and_audit(engine):
    def ask(number: int) -> None:
        ledger.claim(
            engine,
            symbol="GOOG",
            as_of=date(2008, 10, 10),
            trigger=f"drift {number}",
            flow_run_id=str(number),
            limits=ledger.Limits(cooldown_days=5),
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(20)))
    with engine.connect() as connection:
        lines = connection.execute(select(retrains.c.trigger, retrains.c.state)).all()
        kept = connection.execute(select(table.c.who, table.c.kind)).all()
    told = {"running": "trigger", "skipped": "skip"}
    assert sorted((who, told[state]) for who, state in lines) == sorted(map(tuple, kept))
    assert [kind for _, kind in kept].count("trigger") == 1
