import json
from datetime import date

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecasting.contract import (
    CONTRACT_FILE,
    CONTRACT_VERSION,
    GOLDEN_FILE,
    MODEL_FILE,
    QUANTILE_LEVELS,
    Contract,
    Golden,
    Snapshot,
    decode,
    encode,
    read_contract,
    seal,
    sha256_file,
    verify_files,
)
from forecasting.errors import ContractError
from tests.models import make_snapshot, write_model_folder

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"), max_size=12)
numbers = st.lists(finite, max_size=4)
tables = st.lists(st.lists(numbers, max_size=3), max_size=2)
whole = st.integers(-(2**53), 2**53)
days = st.dates()

contracts = st.builds(
    Contract,
    version=whole,
    forecaster=text,
    symbols=st.lists(text, max_size=4).map(tuple),
    kind=st.sampled_from(["lstm", "volatility"]),
    context=whole,
    horizon=whole,
    quantile_levels=numbers.map(tuple),
    as_of=days,
    train_start=days,
    train_end=days,
    dataset_md5=text,
    dataset_rev=text,
    run_id=text,
    git_commit=text,
    files=st.dictionaries(text, text, max_size=4),
)
goldens = st.builds(
    Golden,
    ohlcv=tables,
    dates=st.lists(st.lists(whole, max_size=3), max_size=2),
    symbol=st.lists(whole, max_size=2),
    quantiles=tables,
)
snapshots = st.builds(
    Snapshot,
    symbol=text,
    as_of=days,
    dataset_md5=text,
    dataset_rev=text,
    dates=st.lists(days, max_size=3),
    ohlcv=st.lists(st.tuples(*[finite] * 5), max_size=3),
)


@given(st.one_of(contracts, goldens, snapshots))
def test_what_is_written_is_read_back(value):
    again = decode(encode(value), type(value), "here")
    assert again == value
    assert encode(again) == encode(value)


@given(st.dictionaries(text, text, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_equal_values_are_equal_bytes_whatever_the_order(files, random):
    shuffled = list(files.items())
    random.shuffle(shuffled)
    one, other = contract(files=files), contract(files=dict(shuffled))
    assert encode(one) == encode(other)


def contract(**changes: object) -> Contract:
    facts = {
        "forecaster": "perennial-goog",
        "symbols": ("GOOG", "AAPL"),
        "kind": "lstm",
        "context": 64,
        "horizon": 5,
        "as_of": date(2007, 12, 31),
        "train_start": date(2004, 8, 19),
        "train_end": date(2007, 6, 29),
        "dataset_md5": "d" * 32,
        "dataset_rev": "e" * 40,
        "run_id": "0" * 32,
        "git_commit": "f" * 40,
        "files": {},
    }
    return msgspec.convert({**facts, **changes}, Contract)


def test_levels_are_39_symmetric_steps_of_a_fortieth():
    assert len(QUANTILE_LEVELS) == 39
    assert (QUANTILE_LEVELS[0], QUANTILE_LEVELS[19], QUANTILE_LEVELS[-1]) == (0.025, 0.5, 0.975)
    for low, high in zip(QUANTILE_LEVELS, reversed(QUANTILE_LEVELS), strict=True):
        assert low + high == pytest.approx(1)


def test_a_symbol_has_its_index_and_an_unknown_one_is_named():
    assert [contract().symbol_index(symbol) for symbol in ("GOOG", "AAPL")] == [0, 1]
    with pytest.raises(ContractError, match=r"perennial-goog serves GOOG, AAPL; got .*'IBM'"):
        contract().symbol_index("IBM")
    assert [contract().symbol_input(symbol) for symbol in ("GOOG", "AAPL", "IBM")] == [0, 1, 0]


@pytest.fixture
def folder(tmp_path):
    write_model_folder(tmp_path / "version")
    return tmp_path / "version"


def edit(folder, **changes):
    path = folder / CONTRACT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(ContractError) as caught:
        verify_files(folder, read_contract(folder))
    return str(caught.value)


def test_an_untouched_folder_passes(folder):
    contract = read_contract(folder)
    verify_files(folder, contract)
    assert contract.version == CONTRACT_VERSION


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
def test_an_altered_file_is_named_with_both_hashes(folder, name):
    expected = sha256_file(folder / name)
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1  # one bit
    (folder / name).write_bytes(raw)
    said = refusal(folder)
    for part in (str(folder / name), "altered", expected, sha256_file(folder / name)):
        assert part in said


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder} lacks {name}" in refusal(folder)


def test_a_folder_without_a_contract_is_no_model_version(folder):
    (folder / CONTRACT_FILE).unlink()
    said = refusal(folder)
    assert str(folder) in said
    assert CONTRACT_FILE in said


def test_an_extra_field_is_named(folder):
    edit(folder, colour="blue")
    said = refusal(folder)
    assert str(folder / CONTRACT_FILE) in said
    assert "unknown field `colour`" in said


@pytest.mark.parametrize("extra", [{}, {"calibration": "a field of a later version"}])
def test_another_contract_version_is_named_whatever_its_fields(folder, extra):
    edit(folder, version=CONTRACT_VERSION + 1, **extra)
    said = refusal(folder)
    assert str(folder / CONTRACT_FILE) in said
    assert f"version {CONTRACT_VERSION + 1}; this code reads {CONTRACT_VERSION}" in said


@pytest.mark.parametrize("field", ["symbols", "run_id", "files"])
def test_a_missing_field_is_named(folder, field):
    path = folder / CONTRACT_FILE
    facts = json.loads(path.read_text())
    del facts[field]
    path.write_text(json.dumps(facts))
    said = refusal(folder)
    assert str(path) in said
    assert f"missing required field `{field}`" in said


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"[]", b'{"run_id": "\xff"}', b"NaN"])
def test_garbage_is_refused_with_the_file_named(folder, garbage):
    (folder / CONTRACT_FILE).write_bytes(garbage)
    assert str(folder / CONTRACT_FILE) in refusal(folder)


@pytest.mark.parametrize("kind", [Golden, Snapshot])
def test_garbage_in_the_other_files_is_refused_with_the_file_named(kind):
    for garbage in (b"", b"{}", b"\xff", b'{"symbol": "\xff"}'):
        with pytest.raises(ContractError, match=f"a/file is not a valid {kind.__name__}"):
            decode(garbage, kind, "a/file")


def test_a_snapshot_row_has_five_numbers():
    raw = json.loads(encode(make_snapshot()))
    raw["ohlcv"][3] = raw["ohlcv"][3][:4]
    with pytest.raises(ContractError, match=r"\$\.ohlcv\[3\]"):
        decode(json.dumps(raw).encode(), Snapshot, "a/file")


def test_seal_hashes_every_file_and_what_it_wrote_verifies(folder):
    facts = msgspec.to_builtins(read_contract(folder))
    del facts["files"]
    (folder / "MLmodel").write_text("flavors: {}\n")
    sealed = seal(folder, facts)
    assert set(sealed.files) == {MODEL_FILE, GOLDEN_FILE, "MLmodel"}
    assert all(sealed.files[name] == sha256_file(folder / name) for name in sealed.files)
    assert read_contract(folder) == sealed
    verify_files(folder, sealed)
    before = (folder / CONTRACT_FILE).read_bytes()
    assert seal(folder, facts) == sealed
    assert (folder / CONTRACT_FILE).read_bytes() == before
    (folder / "MLmodel").write_text("flavors: {python_function: {}}\n")
    assert "MLmodel is altered" in refusal(folder)
