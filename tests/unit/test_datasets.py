"""Dataset versions with real git, real DVC, a folder as remote, and processes that collide."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from forecasting import datasets
from forecasting.contract import Snapshot, decode
from forecasting.datasets import DatasetVersion
from forecasting.errors import BadPricesError, DatasetError, HistoryError, SourceError
from forecasting.settings import Settings, load_settings
from forecasting.sources import Payload
from tests import series

MONDAY, TUESDAY, SATURDAY = date(2008, 9, 15), date(2008, 9, 16), date(2008, 9, 20)
REPOSITORY = Path(__file__).parents[2]


def git(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return done.stdout.strip()


def python(
    code: str, *arguments: object, env: dict[str, str] | None = None, cwd: Path = REPOSITORY
):
    """A process of its own that can import the project."""
    environment = (dict(os.environ) if env is None else env) | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def from_file(tmp_path: Path, **others: object) -> Settings:
    """Settings whose source are the files of `tmp_path`."""
    return load_settings(
        home=tmp_path / "home", source="file", source_url=str(tmp_path / "{symbol}.csv"), **others
    )


def with_remote(tmp_path: Path, remote: Path) -> Settings:
    return load_settings(home=tmp_path / "home", dvc_remote=str(remote))


# --- versions --------------------------------------------------------------------------------


def test_the_first_ingest_makes_a_version(settings):
    assert datasets.current(settings) is None
    assert datasets.versions(settings) == []
    version = datasets.ingest(settings, ["GOOG", "AAPL"], MONDAY)
    assert version.changed
    assert version.symbols == ("AAPL", "GOOG")
    assert version.rows == {"GOOG": 1026, "AAPL": 2148}
    assert version.factors == {"GOOG": 0, "AAPL": 2}
    assert datasets.current(settings) == version
    assert git(settings.data_dir, "rev-parse", "HEAD") == version.rev
    assert git(settings.data_dir, "status", "--porcelain") == ""
    assert f"md5: {version.md5}.dir" in (settings.data_dir / "prices.dvc").read_text()


def test_a_new_day_is_one_new_row_and_one_commit(settings):
    first = datasets.ingest(settings, ["GOOG", "IBM"], MONDAY)
    second = datasets.ingest(settings, ["GOOG", "IBM"], TUESDAY)
    assert second.rows == {"GOOG": 1, "IBM": 1}
    assert second.md5 != first.md5
    assert [version.md5 for version in datasets.versions(settings)] == [second.md5, first.md5]
    assert git(settings.data_dir, "rev-list", "--count", "HEAD") == "2"


def test_nothing_new_is_no_version(settings):
    friday = datasets.ingest(settings, ["GOOG"], date(2008, 9, 19))
    weekend = datasets.ingest(settings, ["GOOG"], SATURDAY)
    assert not weekend.changed
    assert (weekend.md5, weekend.rev, weekend.rows) == (friday.md5, friday.rev, {"GOOG": 0})
    assert weekend.as_of == SATURDAY
    assert len(datasets.versions(settings)) == 1


def test_an_earlier_date_finds_everything_there_already(settings):
    latest = datasets.ingest(settings, ["GOOG"], TUESDAY)
    earlier = datasets.ingest(settings, ["GOOG"], date(2007, 1, 3))
    assert not earlier.changed
    assert earlier.md5 == latest.md5
    assert datasets.load_frame(settings, "GOOG", date(2007, 1, 3)).index[-1].date() == date(
        2007, 1, 3
    )


def test_a_symbol_can_be_added_later(settings):
    datasets.ingest(settings, ["GOOG"], MONDAY)
    both = datasets.ingest(settings, ["IBM"], MONDAY)
    assert both.symbols == ("GOOG", "IBM")
    assert both.rows == {"IBM": 2148}
    assert len(datasets.load_frame(settings, "GOOG", MONDAY)) == 1026


def test_equal_histories_have_equal_versions(tmp_path):
    made = []
    for name in ("one", "two"):
        settings = load_settings(home=tmp_path / name)
        datasets.ingest(settings, ["AAPL"], MONDAY)
        made.append(datasets.ingest(settings, ["AAPL"], TUESDAY))
    assert made[0] == made[1]


def test_steps_and_one_leap_reach_the_same_md5(tmp_path):
    stepped, leapt = load_settings(home=tmp_path / "a"), load_settings(home=tmp_path / "b")
    for day in (date(2005, 2, 25), date(2005, 2, 28), MONDAY):  # over Apple's split
        last = datasets.ingest(stepped, ["AAPL"], day)
    assert datasets.ingest(leapt, ["AAPL"], MONDAY).md5 == last.md5


def test_old_versions_come_back_byte_for_byte(settings):
    kept = {}
    for day in (MONDAY, TUESDAY, date(2008, 9, 17)):
        version = datasets.ingest(settings, ["GOOG"], day)
        kept[version.md5] = (settings.data_dir / "prices" / "GOOG" / "rows.parquet").read_bytes()
    assert len(kept) == 3
    for md5, content in kept.items():
        assert datasets.read_bytes(settings, md5, "GOOG/rows.parquet") == content
        assert datasets.read_bytes(settings, f"{md5}.dir", "GOOG/rows.parquet") == content
    first = datasets.versions(settings)[-1]
    assert len(datasets.load_raw(settings, "GOOG", first.rev[:10]).rows) == 1026
    assert datasets.load_frame(settings, "GOOG", SATURDAY, first.md5).index[-1].date() == MONDAY


def test_dvc_itself_agrees(settings):
    first = datasets.ingest(settings, ["GOOG"], MONDAY)
    datasets.ingest(settings, ["GOOG"], TUESDAY)
    git(settings.data_dir, "checkout", "-q", first.rev)
    command = [sys.executable, "-m", "dvc", "checkout", "--quiet"]
    environment = os.environ | {"DVC_SITE_CACHE_DIR": str(settings.home / "site")}
    subprocess.run(command, cwd=settings.data_dir, env=environment, check=True)
    content = (settings.data_dir / "prices" / "GOOG" / "rows.parquet").read_bytes()
    assert content == datasets.read_bytes(settings, first.md5, "GOOG/rows.parquet")


def test_what_is_not_there_is_named(settings):
    with pytest.raises(DatasetError, match=r"There is no dataset in .* yet; run an ingest first"):
        datasets.load_frame(settings, "GOOG", MONDAY)
    version = datasets.ingest(settings, ["GOOG"], MONDAY)
    with pytest.raises(DatasetError, match="no symbol 'IBM'; it has GOOG"):
        datasets.load_frame(settings, "IBM", MONDAY)
    with pytest.raises(DatasetError, match="There is no dataset version '0123456789abcdef'"):
        datasets.load_frame(settings, "GOOG", MONDAY, "0123456789abcdef")
    with pytest.raises(DatasetError, match=r"has no GOOG/x; it has GOOG/factors\.parquet"):
        datasets.read_bytes(settings, version.md5, "GOOG/x")


def test_dates_out_of_range(settings):
    with pytest.raises(HistoryError, match="first known day is 2004-08-19"):
        datasets.ingest(settings, ["GOOG"], date(2004, 1, 2))
    with pytest.raises(HistoryError, match="in the future"):
        datasets.ingest(settings, ["GOOG"], date(2999, 1, 1))
    assert datasets.current(settings) is None
    datasets.ingest(settings, ["GOOG"], MONDAY)
    with pytest.raises(HistoryError, match="first known day is 2004-08-19"):
        datasets.load_frame(settings, "GOOG", date(2004, 1, 2))
    with pytest.raises(HistoryError, match="in the future"):
        datasets.load_frame(settings, "GOOG", date(2999, 1, 1))


def test_symbols_are_checked(settings):
    with pytest.raises(DatasetError, match="at least one is expected"):
        datasets.ingest(settings, [], MONDAY)
    with pytest.raises(SourceError, match="is no symbol"):
        datasets.ingest(settings, ["../x"], MONDAY)
    with pytest.raises(SourceError, match="it knows AAPL"):
        datasets.ingest(settings, ["GOOG", "NOPE"], MONDAY)
    assert datasets.current(settings) is None


# --- as_of -----------------------------------------------------------------------------------


def test_apple_before_and_after_its_split(settings):
    datasets.ingest(settings, ["AAPL"], date(2013, 3, 1))
    before = datasets.load_frame(settings, "AAPL", date(2005, 2, 25))
    after = datasets.load_frame(settings, "AAPL", date(2005, 2, 28))
    assert before["close"].iloc[-1] == 88.99
    assert after["close"].iloc[-1] == 44.86
    assert after["close"].iloc[-2] == 88.99 / 2
    assert after["volume"].iloc[-2] == before["volume"].iloc[-1] * 2
    moves = np.diff(np.log(after["close"].to_numpy()))
    assert moves[:-1] == pytest.approx(np.diff(np.log(before["close"].to_numpy())))


def test_a_later_ingest_leaves_an_earlier_view_alone(settings):
    datasets.ingest(settings, ["AAPL"], date(2012, 8, 8))
    before = datasets.load_frame(settings, "AAPL", date(2012, 8, 8))
    datasets.ingest(settings, ["AAPL"], date(2013, 3, 1))
    assert datasets.load_frame(settings, "AAPL", date(2012, 8, 8)).equals(before)


def test_every_row_after_as_of_may_change_without_a_trace(tmp_path):
    table = series.split_at(series.table(60), 20, 2.0)
    table["adj_close"] = np.where(np.arange(60) < 20, table["close"] / 2, table["close"])
    other = table.astype("object")
    other.loc[41:, ["open", "high", "low", "close", "volume", "adj_close"]] = 12345.678
    as_of = date.fromisoformat(table["date"][40])
    made = []
    for name, content in (("a", table), ("b", other)):
        series.write_csv(content, tmp_path / "TEST.csv")  # the address is told, so it is the same
        settings = from_file(tmp_path).model_copy(update={"home": tmp_path / name})
        version = datasets.ingest(settings, ["TEST"], as_of)
        made.append((version, datasets.load_frame(settings, "TEST", as_of)))
    assert made[0][0] == made[1][0]
    assert made[0][1].equals(made[1][1])


def test_a_version_says_which_file_and_rows_a_span_of_days_is(tmp_path):
    series.write_csv(series.table(60), tmp_path / "TEST.csv")
    settings = from_file(tmp_path)
    days = [date.fromisoformat(day) for day in series.table(60)["date"]]
    first = datasets.ingest(settings, ["TEST"], days[40])
    second = datasets.ingest(settings, ["TEST"], days[59])
    for version, span, rows in (
        (first, (days[3], days[40]), (3, 40)),
        (second, (days[41], days[59]), (41, 59)),
    ):
        md5, *found = datasets.row_span(settings, "TEST", version.md5, *span)
        assert tuple(found) == rows
        content = datasets.read_bytes(settings, version.md5, "TEST/rows.parquet")
        assert hashlib.md5(content).hexdigest() == md5
    address = f"file {tmp_path / 'TEST.csv'}"
    assert datasets.source_of(settings, "TEST", first.md5) == address
    assert datasets.source_of(settings, "TEST", second.md5) == address
    assert datasets.source_of(settings, "OTHER", second.md5) == ""
    with pytest.raises(DatasetError, match="no row of TEST"):
        datasets.row_span(settings, "TEST", first.md5, days[45], days[50])


def test_a_secret_of_an_address_is_not_written_down():
    payload = Payload("X", "file", "https://anna:pw@prices.example/X.csv?token=1#a", b"")
    assert payload.origin == "file https://prices.example/X.csv"


# --- revisions and bad files -----------------------------------------------------------------


def test_a_vendor_revision_is_a_version_and_is_told(tmp_path, caplog):
    settings = from_file(tmp_path)
    table = series.table(30)
    last = date.fromisoformat(table["date"].iloc[-1])
    series.write_csv(table, tmp_path / "TEST.csv")
    first = datasets.ingest(settings, ["TEST"], last)
    table.loc[10, ["close", "adj_close"]] = table["close"][10] + 0.01
    table.loc[10, "high"] += 0.01
    series.write_csv(table, tmp_path / "TEST.csv")
    second = datasets.ingest(settings, ["TEST"], date(2006, 6, 1))
    assert second.revised == {"TEST": 1}
    assert second.rows == {"TEST": 0}
    assert "changed 1 sessions that were already known" in caplog.text
    assert datasets.load_frame(settings, "TEST", last).equals(
        datasets.load_frame(settings, "TEST", last, first.md5)
    )
    assert not datasets.ingest(settings, ["TEST"], date(2006, 6, 1)).changed


def test_a_bad_file_is_refused_whole_and_kept(tmp_path):
    settings = from_file(tmp_path)
    table = series.table(40)
    series.write_csv(table[:30], tmp_path / "TEST.csv")
    series.write_csv(series.table(30, seed=1), tmp_path / "GOOD.csv")
    good = datasets.ingest(settings, ["TEST"], date(2006, 6, 1))
    table.loc[33, "close"] = -1.0
    series.write_csv(table, tmp_path / "TEST.csv")
    with pytest.raises(BadPricesError) as caught:
        datasets.ingest(settings, ["GOOD", "TEST"], date(2006, 6, 1))
    text = str(caught.value)
    assert "close is -1.0, a positive number is expected" in text
    assert f"version {good.md5} stays current" in text
    assert datasets.current(settings) == good
    (folder,) = settings.quarantine_dir.iterdir()
    assert str(folder) in text
    assert (folder / "TEST.csv").read_bytes() == (tmp_path / "TEST.csv").read_bytes()
    reason = json.loads((folder / "reason.json").read_text())
    assert reason["symbol"] == "TEST"
    assert reason["sha256"] == hashlib.sha256((tmp_path / "TEST.csv").read_bytes()).hexdigest()
    assert "close is -1.0" in reason["error"]
    with pytest.raises(BadPricesError):
        datasets.ingest(settings, ["TEST"], date(2006, 6, 1))
    assert len(list(settings.quarantine_dir.iterdir())) == 1


def test_every_bad_file_of_an_ingest_is_named(tmp_path):
    for symbol in ("A", "B"):
        series.write_csv(series.table(9).drop(index=4), tmp_path / f"{symbol}.csv")
    with pytest.raises(BadPricesError, match=r"(?s)Prices of A .*Prices of B .*no version yet"):
        datasets.ingest(from_file(tmp_path), ["A", "B"], date(2006, 6, 1))


def test_a_gap_between_what_is_stored_and_what_comes_is_refused(tmp_path):
    settings = from_file(tmp_path)
    table = series.table(40)
    series.write_csv(table[:20], tmp_path / "TEST.csv")
    good = datasets.ingest(settings, ["TEST"], date(2006, 6, 1))
    series.write_csv(table[25:], tmp_path / "TEST.csv")
    with pytest.raises(BadPricesError, match=r"2006-02-0\d: session missing"):
        datasets.ingest(settings, ["TEST"], date(2006, 6, 1))
    assert datasets.current(settings) == good
    series.write_csv(table[15:], tmp_path / "TEST.csv")
    assert datasets.ingest(settings, ["TEST"], date(2006, 6, 1)).rows == {"TEST": 20}
    assert len(datasets.load_frame(settings, "TEST", date(2006, 6, 1))) == 40


# --- publishing ------------------------------------------------------------------------------


def pointer(settings: Settings, symbol: str) -> tuple[Path, dict[str, str]]:
    folder = Path(settings.published) / symbol
    return folder, json.loads((folder / "latest.json").read_bytes())


def test_ingest_publishes_the_latest_rows(settings):
    version = datasets.ingest(settings, ["GOOG", "FB"], date(2013, 3, 1))
    folder, says = pointer(settings, "GOOG")
    content = (folder / says["file"]).read_bytes()
    assert set(says) == {"file", "sha256"}
    assert says["file"] == f"{version.md5}-2013-03-01.json"
    assert says["sha256"] == hashlib.sha256(content).hexdigest()
    snapshot = decode(content, Snapshot, "snapshot")
    frame = datasets.load_frame(settings, "GOOG", date(2013, 3, 1))
    assert (snapshot.symbol, snapshot.as_of) == ("GOOG", date(2013, 3, 1))
    assert (snapshot.dataset_md5, snapshot.dataset_rev) == (version.md5, version.rev)
    assert len(snapshot.dates) == len(snapshot.ohlcv) == 512
    assert snapshot.dates[-1] == date(2013, 3, 1)
    assert np.array(snapshot.ohlcv) == pytest.approx(frame.to_numpy()[-512:])
    folder, says = pointer(settings, "FB")
    assert len(decode((folder / says["file"]).read_bytes(), Snapshot, "snapshot").dates) == 196


def test_publishing_follows_every_ingest_and_keeps_few_snapshots(settings):
    for day in range(1, 20):
        datasets.ingest(settings, ["GOOG"], date(2008, 9, day))
        folder, says = pointer(settings, "GOOG")
        assert says["file"].endswith(f"-2008-09-{day:02}.json")
        assert (folder / says["file"]).is_file()
    assert len(list(folder.iterdir())) == datasets.SNAPSHOTS_KEPT + 1


def test_an_earlier_date_does_not_set_published_prices_back(settings):
    datasets.ingest(settings, ["GOOG"], date(2008, 9, 15))
    published = pointer(settings, "GOOG")[1]
    earlier = datasets.ingest(settings, ["GOOG"], date(2007, 1, 31))
    assert pointer(settings, "GOOG")[1] == published
    datasets.publish(settings, earlier, "GOOG", date(2007, 1, 31))  # unless asked for
    assert pointer(settings, "GOOG")[1]["file"].endswith("-2007-01-31.json")


def test_a_damaged_pointer_is_published_anew(settings):
    datasets.ingest(settings, ["GOOG"], date(2008, 9, 15))
    (Path(settings.published) / "GOOG" / "latest.json").write_bytes(b"{")
    datasets.ingest(settings, ["GOOG"], date(2007, 1, 31))
    assert pointer(settings, "GOOG")[1]["file"].endswith("-2007-01-31.json")


def test_publishing_can_be_left_out_and_done_later(settings):
    version = datasets.ingest(settings, ["GOOG"], MONDAY, publish_rows=False)
    assert not Path(settings.published).exists()
    address = datasets.publish(settings, version, "GOOG", date(2008, 9, 1), rows=7)
    assert len(decode(Path(address).read_bytes(), Snapshot, address).dates) == 7


def test_publishing_through_fsspec(tmp_path):
    import fsspec

    settings = load_settings(home=tmp_path / "home", published_url="memory://published")
    version = datasets.ingest(settings, ["GOOG"], MONDAY)
    store = fsspec.filesystem("memory")
    says = json.loads(store.cat_file("/published/GOOG/latest.json"))
    assert says["file"] == f"{version.md5}-{MONDAY}.json"
    assert store.exists(f"/published/GOOG/{says['file']}")


def test_an_address_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings = load_settings(home=tmp_path / "home", published_url=str(tmp_path / "file"))
    with pytest.raises(DatasetError, match="PERENNIAL_PUBLISHED_URL"):
        datasets.ingest(settings, ["GOOG"], MONDAY)
    assert datasets.current(settings) is not None


# --- remote ----------------------------------------------------------------------------------


def test_versions_are_pushed_and_pulled_back(tmp_path):
    remote = tmp_path / "remote"
    remote.mkdir()
    settings = with_remote(tmp_path, remote)
    first = datasets.ingest(settings, ["GOOG"], MONDAY)
    content = datasets.read_bytes(settings, first.md5, "GOOG/rows.parquet")
    datasets.ingest(settings, ["GOOG"], TUESDAY)
    shutil.rmtree(settings.data_dir / ".dvc" / "cache")
    assert datasets.read_bytes(settings, first.md5, "GOOG/rows.parquet") == content
    assert len(datasets.load_frame(settings, "GOOG", TUESDAY)) == 1027
    shutil.rmtree(settings.data_dir / ".dvc" / "cache")
    assert datasets.ingest(settings, ["GOOG"], date(2008, 9, 17)).rows == {"GOOG": 1}


def test_a_missing_remote_is_named_and_gets_everything_later(tmp_path):
    remote = tmp_path / "nas" / "remote"
    settings = with_remote(tmp_path, remote)
    for day in (MONDAY, TUESDAY):
        with pytest.raises(DatasetError) as caught:
            datasets.ingest(settings, ["GOOG"], day)
    version = datasets.current(settings)
    assert str(remote) in str(caught.value)
    assert "PERENNIAL_DVC_REMOTE" in str(caught.value)
    assert f"Version {version.md5} is committed" in str(caught.value)
    assert not remote.exists()
    assert pointer(settings, "GOOG")[1]["file"].startswith(version.md5)
    remote.mkdir(parents=True)
    assert not datasets.ingest(settings, ["GOOG"], TUESDAY).changed
    shutil.rmtree(settings.data_dir / ".dvc" / "cache")
    for old in datasets.versions(settings):
        assert datasets.read_bytes(settings, old.md5, "GOOG/rows.parquet")


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "http://127.0.0.1:1/x"])
def test_a_remote_that_cannot_be_used_is_named(tmp_path, url):
    settings = load_settings(home=tmp_path / "home", dvc_remote=url)
    with pytest.raises(DatasetError, match="PERENNIAL_DVC_REMOTE"):
        datasets.ingest(settings, ["GOOG"], MONDAY)
    assert datasets.current(settings) is not None


def test_an_altered_cache_is_noticed_and_mended_from_the_remote(tmp_path):
    remote = tmp_path / "remote"
    remote.mkdir()
    settings = with_remote(tmp_path, remote)
    version = datasets.ingest(settings, ["GOOG"], MONDAY)
    content = datasets.read_bytes(settings, version.md5, "GOOG/rows.parquet")
    oid = hashlib.md5(content).hexdigest()
    cached = settings.data_dir / ".dvc/cache/files/md5" / oid[:2] / oid[2:]
    cached.chmod(0o644)
    cached.write_bytes(b"altered")
    alone = load_settings(home=settings.home)
    with pytest.raises(DatasetError, match="missing or altered"):
        datasets.read_bytes(alone, version.md5, "GOOG/rows.parquet")
    assert datasets.read_bytes(settings, version.md5, "GOOG/rows.parquet") == content


# --- crashes, neighbours, environments -------------------------------------------------------


def test_what_a_killed_run_left_behind_is_cleared(settings):
    first = datasets.ingest(settings, ["GOOG", "IBM"], MONDAY)
    root = settings.data_dir
    (root / "prices" / "GOOG" / "rows.parquet").unlink()
    (root / "prices" / "GOOG" / "rows.parquet").write_bytes(b"half")
    (root / "prices" / "IBM" / "factors.parquet").unlink()
    (root / "prices" / "STRAY").mkdir()
    (root / "prices" / "STRAY" / "rows.parquet").write_bytes(b"stray")
    (root / "prices.dvc").write_text("outs: []\n")
    (root / ".git" / "index.lock").write_text("")
    (root / ".git" / "refs" / "heads" / "main.lock").write_text("")
    assert datasets.current(settings) == first
    assert len(datasets.load_frame(settings, "GOOG", MONDAY)) == 1026
    second = datasets.ingest(settings, ["GOOG"], TUESDAY)
    assert second.symbols == ("GOOG", "IBM")
    clean = load_settings(home=settings.home.parent / "clean")
    datasets.ingest(clean, ["GOOG", "IBM"], MONDAY)
    assert datasets.ingest(clean, ["GOOG"], TUESDAY) == second


def test_a_registry_half_made_is_made_anew(settings):
    settings.home.mkdir(parents=True)
    part = settings.home / "data.part"
    (part / ".dvc").mkdir(parents=True)
    assert datasets.ingest(settings, ["FB"], date(2013, 1, 4)).changed
    assert not part.exists()


def test_a_damaged_registry_is_named(settings):
    datasets.ingest(settings, ["FB"], date(2013, 1, 4))
    shutil.rmtree(settings.data_dir / ".git")
    with pytest.raises(DatasetError, match="is damaged"):
        datasets.current(settings)
    with pytest.raises(DatasetError, match="is damaged"):
        datasets.ingest(settings, ["FB"], date(2013, 1, 7))


INGEST = """
    import sys
    from datetime import date
    from forecasting import datasets
    from forecasting.settings import load_settings
    settings = load_settings(home=sys.argv[1])
    for day in sys.argv[3:]:
        print(datasets.ingest(settings, [sys.argv[2]], date.fromisoformat(day)).md5)
"""


def test_two_processes_at_once_lose_nothing(tmp_path):
    days = ["2008-09-15", "2008-09-16", "2008-09-17", "2008-09-18", "2008-09-19"]
    runs = [python(INGEST, tmp_path / "home", symbol, *days) for symbol in ("GOOG", "IBM", "GOOG")]
    for run in runs:
        _, errors = run.communicate(timeout=200)
        assert run.returncode == 0, errors
    settings = load_settings(home=tmp_path / "home")
    versions = datasets.versions(settings)
    assert versions[0].symbols == ("GOOG", "IBM")
    assert len(versions) == 10  # GOOG's days once, IBM's days once
    assert git(settings.data_dir, "fsck", "--strict") == ""
    alone = load_settings(home=tmp_path / "alone")
    assert datasets.ingest(alone, ["GOOG", "IBM"], date(2008, 9, 19)).md5 == versions[0].md5


def test_with_an_empty_home_no_git_identity_and_inside_a_repository(tmp_path):
    """Nothing is written outside the project's home, and the repository around does not see it."""
    outer, empty = tmp_path / "outer", tmp_path / "empty"
    outer.mkdir()
    empty.mkdir()
    git(outer, "init", "-q")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(empty),
        "GIT_DIR": str(outer / ".git"),  # as inside a hook of the repository around
        "GIT_INDEX_FILE": str(outer / ".git" / "index"),
    }
    run = python(
        INGEST, ".perennial", "GOOG", "2008-09-15", "2008-09-16", env=environment, cwd=outer
    )
    out, errors = run.communicate(timeout=100)
    assert run.returncode == 0, errors
    assert len(out.split()) == 2
    assert list(empty.iterdir()) == []
    assert git(outer, "status", "--porcelain") == ""
    data = outer / ".perennial" / "data"
    assert (
        git(data, "log", "-1", "--format=%an <%ae> %cn")
        == "perennial <perennial@localhost> perennial"
    )
    assert git(data, "rev-list", "--count", "HEAD") == "2"


def test_the_users_git_settings_play_no_part(tmp_path):
    """Signing, hooks and templates of the user would break or alter a commit."""
    home = tmp_path / "user"
    hooks = home / "hooks"
    hooks.mkdir(parents=True)
    (hooks / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    (hooks / "pre-commit").chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[commit]\n\tgpgsign = true\n[core]\n\thooksPath = {hooks}\n\tautocrlf = true\n"
        "[user]\n\tname = Somebody\n\temail = somebody@example.org\n"
        "[init]\n\tdefaultBranch = trunk\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    run = python(INGEST, tmp_path / "home", "GOOG", "2008-09-15", env=environment)
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 0, errors
    data = tmp_path / "home" / "data"
    assert git(data, "log", "--format=%an %G?", HOME=str(home)) == "perennial N"
    plain = load_settings(home=tmp_path / "plain")
    assert datasets.ingest(plain, ["GOOG"], MONDAY).rev == git(data, "rev-parse", "HEAD")


def test_a_version_is_a_plain_value():
    version = DatasetVersion("m", "r", ("GOOG",), MONDAY, changed=True)
    assert version == DatasetVersion("m", "r", ("GOOG",), MONDAY, changed=True)
    assert version.rows == {}
