import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest

from forecasting import predictions
from forecasting.errors import ServiceError
from forecasting.predictions import (
    Answered,
    Counted,
    Prediction,
    Spool,
    Window,
    computed_line,
    has_undrained,
    json_numbers,
    open_segments,
)
from tests.models import write_model_folder
from tests.predictions import make_prediction


def read_all(folder: Path) -> list[Prediction]:
    with open_segments(folder) as segments:
        return [record for item in segments if (b := item.read()) for record in b.records]


def test_a_line_is_on_disk_when_append_returns(tmp_path):
    spool = Spool(tmp_path / "spool", "web")
    record = make_prediction()
    spool.append(record)
    assert read_all(tmp_path / "spool") == [record]
    assert (spool.written, spool.pending) == (1, 0)
    spool.close()


def test_nothing_is_made_before_the_first_record(tmp_path):
    Spool(tmp_path / "spool", "web").close()
    assert not (tmp_path / "spool").exists()
    assert not has_undrained(tmp_path / "spool")


def test_a_killed_process_loses_nothing_and_frees_its_segment(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from forecasting.predictions import Spool; from tests.predictions import make_prediction\n"
        "spool = Spool(Path(sys.argv[1]), 'web')\n"
        "for _ in range(50): spool.append(make_prediction())\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    with open_segments(tmp_path) as segments:
        (segment,) = segments
        batch = segment.read()
        assert batch is not None
        assert len(batch.records) == 50
        assert segment.finished


def test_a_segment_being_written_is_not_finished(tmp_path):
    spool = Spool(tmp_path, "web")
    spool.append(make_prediction())
    with open_segments(tmp_path) as segments:
        assert [segment.finished for segment in segments] == [False]
    spool.close()
    with open_segments(tmp_path) as segments:
        assert [segment.finished for segment in segments] == [True]


def test_a_full_segment_is_followed_by_the_next(tmp_path):
    spool = Spool(tmp_path, "web", segment_bytes=3000)
    records = [make_prediction() for _ in range(5)]
    for record in records:
        spool.append(record)
    spool.close()
    assert len(list(tmp_path.glob("*.jsonl"))) > 1
    assert sorted(r.id for r in read_all(tmp_path)) == sorted(r.id for r in records)


def test_threads_do_not_tear_lines(tmp_path):
    spool = Spool(tmp_path, "web")

    def write() -> None:
        for _ in range(50):
            spool.append(make_prediction())

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record.id for record in read_all(tmp_path)}) == 200
    spool.close()


def test_an_unfinished_line_waits_for_its_writer(tmp_path):
    spool = Spool(tmp_path, "web")
    spool.append(make_prediction())
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.stat().st_size
    with path.open("ab") as handle:
        handle.write(b'{"id": "half')
    with open_segments(tmp_path) as segments:
        batch = next(segments).read()
    assert batch is not None
    assert (len(batch.records), batch.bad, batch.end) == (1, [], whole)
    spool.close()


@pytest.mark.parametrize("length", [10, 5000])
def test_a_torn_last_line_of_a_dead_writer_is_bad(tmp_path, length):
    (tmp_path / "web-1.jsonl").write_bytes(b"x" * length)
    with open_segments(tmp_path) as segments:
        batch = next(segments).read(most_bytes=100)
    assert batch is not None
    assert batch.bad == [b"x" * length]


def test_reading_goes_on_where_it_was_committed(tmp_path):
    spool = Spool(tmp_path, "web")
    for _ in range(3):
        spool.append(make_prediction())
    with open_segments(tmp_path) as segments:
        segment = next(segments)
        batch = segment.read(most_bytes=10)
        assert batch is not None
        assert len(batch.records) == 1
        segment.commit(batch, [])
    with open_segments(tmp_path) as segments:
        batch = next(segments).read()
        assert batch is not None
        assert len(batch.records) == 2
    assert has_undrained(tmp_path)
    spool.close()


@pytest.mark.parametrize("offset", ["99999999", "-3", "nonsense", ""])
def test_a_damaged_offset_means_from_the_start(tmp_path, offset):
    spool = Spool(tmp_path, "web")
    spool.append(make_prediction())
    spool.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.with_suffix(".offset").write_text(offset)
    assert len(read_all(tmp_path)) == 1


def test_a_full_disk_keeps_records_in_memory_until_it_is_not(tmp_path, monkeypatch):
    folder = tmp_path / "spool"
    folder.write_text("a file where the folder should be")
    spool = Spool(folder, "web")
    record = make_prediction()
    spool.append(record)
    assert (spool.pending, spool.written) == (1, 0)
    assert spool.failures
    monkeypatch.setattr(predictions, "MOST_PENDING", 1)
    with pytest.raises(ServiceError, match="Free disk space"):
        spool.append(make_prediction())
    folder.unlink()
    assert spool.flush()
    assert read_all(folder) == [record]
    spool.close()


def test_a_record_whose_parts_do_not_fit_is_no_record(tmp_path):
    record = msgspec.to_builtins(make_prediction())
    record["quantiles"][2].pop()
    with pytest.raises(msgspec.ValidationError, match="fit together"):
        msgspec.convert(record, Prediction)


def answered(day: int = 2, version: int = 1) -> Answered:
    return Answered("perennial-goog", version, "GOOG", date(2008, 1, day))


def counts_in(folder: Path) -> list[Counted]:
    with open_segments(folder) as segments:
        return [each for item in segments if (batch := item.read()) for each in batch.counts]


def test_a_line_of_several_windows_is_a_record_each(tmp_path):
    contract = write_model_folder(tmp_path / "model")
    spool = Spool(tmp_path / "spool", "web")
    records = [make_prediction(), make_prediction(close=90.0)]
    windows = [
        Window(r.id, "post", r.symbol, None, r.origin, r.origin_close, r.targets) for r in records
    ]
    quantiles = np.array([r.quantiles for r in records], dtype=np.float32)
    spool.write(computed_line(contract, 7, windows, json_numbers(quantiles)), 2)
    assert spool.written == 2
    found = read_all(tmp_path / "spool")
    assert [(r.id, r.source, r.model_version, r.prices_md5) for r in found] == [
        (r.id, "post", 7, None) for r in records
    ]
    np.testing.assert_array_equal(np.array([r.quantiles for r in found], np.float32), quantiles)
    spool.close()


def test_counts_are_totals_that_go_out_with_a_flush(tmp_path):
    spool = Spool(tmp_path, "web")
    for _ in range(3):
        spool.count(answered())
    spool.count(answered(version=2))
    assert not list(tmp_path.glob("*"))
    assert spool.flush()
    assert sorted((each.model_version, each.answers) for each in counts_in(tmp_path)) == [
        (1, 3),
        (2, 1),
    ]
    spool.count(answered())
    spool.close()
    totals = [each for each in counts_in(tmp_path) if each.model_version == 1]
    assert [each.answers for each in totals] == [3, 4]
    assert len({each.writer for each in totals}) == 1


def test_a_writer_with_many_counts_goes_on_under_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "MOST_COUNTED", 2)
    spool = Spool(tmp_path, "web")
    for day in (2, 3, 4):
        spool.count(answered(day))
    spool.flush()
    spool.count(answered(2))
    spool.close()
    by_writer = Counter(each.writer for each in counts_in(tmp_path))
    assert sorted(by_writer.values()) == [1, 3]


def test_a_full_spool_takes_nothing_until_it_is_drained(tmp_path):
    spool = Spool(tmp_path, "web", most_bytes=3000)
    spool.measure()
    while spool.bytes < 3000:
        spool.append(make_prediction())
        spool.measure()
    with pytest.raises(ServiceError, match="PERENNIAL_SPOOL_MAX_MB"):
        spool.append(make_prediction())
    spool.close()
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    spool.measure()
    spool.append(make_prediction())
    spool.close()


def test_the_age_of_what_is_not_drained_is_known(tmp_path):
    spool = Spool(tmp_path, "web")
    record = make_prediction(made_at=datetime(2026, 1, 1, tzinfo=UTC))
    spool.append(record)
    spool.append(make_prediction(made_at=datetime(2026, 1, 2, tzinfo=UTC)))
    spool.measure()
    assert spool.oldest == record.made_at.timestamp()
    with open_segments(tmp_path) as segments:
        for segment in segments:
            segment.commit(segment.read(), [])
    spool.measure()
    assert spool.oldest == 0
    spool.close()


def test_counts_wait_while_the_spool_is_full_and_nothing_of_them_is_lost(tmp_path):
    spool = Spool(tmp_path, "web", most_bytes=500)
    spool.append(make_prediction())
    spool.measure()
    for _ in range(3):
        spool.count(answered())
        assert spool.flush()
    assert counts_in(tmp_path) == []
    with open_segments(tmp_path) as segments:
        for segment in segments:
            segment.commit(segment.read(), [])
    spool.measure()
    spool.flush()
    assert [each.answers for each in counts_in(tmp_path)] == [3]
    spool.close()


def test_what_waits_in_memory_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "MOST_PENDING", 20_000)
    folder = tmp_path / "spool"
    folder.write_text("in the way")
    spool = Spool(folder, "web")
    while sum(len(line) for line, _ in spool._pending) < 20_000:
        spool.append(make_prediction())
    with pytest.raises(ServiceError, match="as many as may"):
        spool.append(make_prediction())
    assert 3 < spool.pending < 30
    folder.unlink()
    assert spool.flush()
    spool.append(make_prediction())
    spool.close()
    assert len(read_all(folder)) == spool.written
