"""API keys: made, revoked, read again, looked up; and what never lets anyone in."""

import argparse
import base64
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from forecasting.errors import ConfigError
from forecasting.settings import load_settings
from serving import keys_cli
from serving.keys import Key, Keys, is_loopback, list_keys, new_key, require_keys, revoke
from serving.problems import ProblemError
from tests.serving.running import until

OTHER = [(b"host", b"x"), (b"accept", b"*/*"), (b"content-type", b"application/json")]
SOON = timedelta(hours=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "api-keys.json"


def bearer(key: str, scheme: str = "Bearer") -> list[tuple[bytes, bytes]]:
    return [*OTHER, (b"authorization", f"{scheme} {key}".encode())]


def refusal(keys: Keys, headers: list[tuple[bytes, bytes]]) -> str:
    with pytest.raises(ProblemError) as caught:
        keys.check(headers)
    assert (caught.value.kind, caught.value.status) == ("unauthorized", 401)
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")
    return caught.value.detail


def replace_line(path, **values) -> None:
    """The first key of the file, changed as by hand."""
    lines = json.loads(path.read_bytes())
    lines[0] |= values
    path.write_text(json.dumps(lines))


# making and revoking ------------------------------------------------------------------------------
def test_a_key_is_256_random_bits_and_only_its_hash_is_kept(path):
    expires = datetime(2040, 1, 1, tzinfo=UTC)
    key = new_key(path, "anna", expires, 50.0)
    assert len(base64.urlsafe_b64decode(key.removeprefix("pk_") + "=")) == 32
    assert new_key(path, "bob") != key
    anna, bob = list_keys(path)
    assert anna.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert (anna.name, anna.expires, anna.rate_per_second) == ("anna", expires, 50.0)
    assert (bob.name, bob.expires, bob.rate_per_second) == ("bob", None, None)
    assert timedelta(0) <= datetime.now(UTC) - anna.created < timedelta(minutes=1)
    assert key not in path.read_text()
    assert key not in repr(Keys(path)) + repr(anna)


def test_the_file_is_for_its_owner_alone_and_nothing_is_left_beside_it(path):
    previous = os.umask(0)
    try:
        new_key(path, "anna")
        path.chmod(0o644)
        new_key(path, "bob")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {file.name for file in path.parent.iterdir()} <= {path.name, f"{path.name}.lock"}


def test_a_linked_file_stays_linked(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    new_key(link, "anna")
    assert link.is_symlink()
    assert [key.name for key in list_keys(tmp_path / "real.json")] == ["anna"]


def test_processes_that_make_keys_at_once_lose_none(path):
    code = (
        "import sys; from pathlib import Path; from serving.keys import new_key\n"
        "for n in range(6): new_key(Path(sys.argv[1]), f'{sys.argv[2]}-{n}')"
    )
    names = ("a", "b")
    processes = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in names]
    assert [process.wait(30) for process in processes] == [0, 0]
    made = sorted(key.name for key in list_keys(path))
    assert made == [f"{name}-{n}" for name in names for n in range(6)]


@pytest.mark.parametrize("name", ["", "-x", "a\nb", "a\n", "ü", "x" * 65, "a/b", " a"])
def test_names_that_logs_could_not_show_are_refused(path, name):
    with pytest.raises(ConfigError, match=r"letters, digits.*got " + re.escape(repr(name))):
        new_key(path, name)
    assert not path.exists()


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_rates_that_are_none_are_refused(path, rate):
    with pytest.raises(ConfigError, match="above 0 were expected"):
        new_key(path, "anna", rate=rate)


@pytest.mark.parametrize("expires", [datetime.now(UTC) - SOON, datetime(2040, 1, 1)])
def test_times_that_are_past_or_nowhere_are_refused(path, expires):
    with pytest.raises(ConfigError, match="coming time with its zone"):
        new_key(path, "anna", expires)


def test_a_name_is_used_once(path):
    new_key(path, "anna")
    with pytest.raises(ConfigError, match=r"already has a key 'anna'.*revoke"):
        new_key(path, "anna")
    assert len(list_keys(path)) == 1


def test_a_revoked_key_is_gone_and_the_others_are_not(path):
    for name in ("anna", "bob"):
        new_key(path, name)
    with pytest.raises(ConfigError, match=r"got 'ana'. Did you mean 'anna'\?"):
        revoke(path, "ana")
    revoke(path, "anna")
    assert [key.name for key in list_keys(path)] == ["bob"]


def test_a_damaged_file_is_not_written_over(path):
    path.parent.mkdir()
    path.write_text("[{")
    for change in (new_key, revoke):
        with pytest.raises(ConfigError, match="Repair it or put a copy back"):
            change(path, "anna")
    assert path.read_text() == "[{"


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can be written was expected at .*file/keys.json"):
        new_key(tmp_path / "file" / "keys.json", "anna")


# looking up ---------------------------------------------------------------------------------------
def test_a_key_is_found_in_either_header(path):
    key = new_key(path, "anna", datetime.now(UTC) + SOON, 5)
    keys = Keys(path)
    for headers in (
        bearer(key),
        bearer(key, "bEARER"),
        bearer(f" {key} "),
        [*OTHER, (b"x-api-key", key.encode())],
        [(b"authorization", b"Basic eDp5"), (b"x-api-key", key.encode())],
        [(b"authorization", b"Bearer of-a-proxy"), (b"x-api-key", key.encode())],
    ):
        found = keys.check(headers)
        assert found is not None
        assert (found.name, found.rate_per_second) == ("anna", 5)


def test_without_a_file_everybody_is_let_in(path):
    keys = Keys(path)
    assert not keys.required
    assert keys.check(OTHER) is None
    assert keys.refresh() is None


def test_missing_unknown_and_expired_keys_are_told_apart(path):
    key = new_key(path, "anna")
    keys = Keys(path)
    for headers in ([], OTHER, [(b"authorization", b"Basic eDp5")], [(b"authorization", b"")]):
        assert "the request has neither" in refusal(keys, headers)
    for wrong in (key[:-1], key + "x", key.upper(), "", "pk_", "\xff" * 40, "y" * 30_000):
        detail = refusal(keys, bearer(wrong))
        assert "not known here" in detail
        assert len(wrong) < 4 or wrong not in detail
        assert refusal(keys, [(b"x-api-key", wrong.encode())]) == detail
    replace_line(path, expires="2020-02-01T10:30:00Z")
    assert keys.refresh() is None
    assert "'anna' expired on 2020-02-01 10:30 UTC" in refusal(keys, bearer(key))
    assert key not in refusal(keys, bearer(key))


def test_a_key_expires_while_it_is_loaded(path):
    key = new_key(path, "anna", datetime.now(UTC) + timedelta(seconds=0.3))
    keys = Keys(path)
    assert keys.check(bearer(key)) is not None
    until(list_keys(path)[0].is_expired, "the key to expire", 5)
    assert "expired" in refusal(keys, bearer(key))


# reading again ------------------------------------------------------------------------------------
def test_changes_are_taken_up(path):
    keys = Keys(path)
    anna = new_key(path, "anna")
    assert keys.check(OTHER) is None
    assert keys.refresh() is None
    assert keys.required
    refusal(keys, OTHER)
    bob = new_key(path, "bob")
    revoke(path, "anna")
    assert keys.refresh() is None
    assert keys.check(bearer(bob)) is not None
    assert "revoked" in refusal(keys, bearer(anna))
    revoke(path, "bob")
    assert keys.refresh() is None
    refusal(keys, bearer(bob))
    refusal(keys, OTHER)


def test_a_deleted_file_opens_nothing(path):
    key = new_key(path, "anna")
    keys = Keys(path)
    path.rename(path.with_name("away"))
    assert "is gone; the API keys read before stay valid" in keys.refresh()
    assert keys.refresh() is None, "said once"
    refusal(keys, OTHER)
    assert keys.check(bearer(key)) is not None
    path.with_name("away").rename(path)
    assert keys.refresh() is None
    assert keys.check(bearer(key)) is not None


LINE = {"name": "a", "sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[{",
        b"{}",
        b"null",
        b"\xff",
        [LINE | {"rate": 5}],
        [LINE, LINE],
        [LINE, LINE | {"name": "b"}],
        [LINE, LINE | {"sha256": "1" * 64}],
        [LINE | {"sha256": "pk_plain"}],
        [LINE | {"created": "2026-01-01"}],
        [LINE | {"expires": "2026-01-01T00:00:00"}],
        [LINE | {"rate_per_second": 0}],
    ],
    ids=str,
)
def test_a_damaged_file_changes_nothing_and_lets_no_server_start(path, content):
    key = new_key(path, "anna")
    keys = Keys(path)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    complaint = keys.refresh()
    assert str(path) in complaint
    assert "Repair it" in complaint
    assert "pk_plain" not in complaint
    assert keys.refresh() is None, "said once"
    assert keys.check(bearer(key)) is not None
    refusal(keys, OTHER)
    with pytest.raises(ConfigError, match="Repair it"):
        Keys(path)


def test_a_file_that_cannot_be_read_lets_no_server_start(path):
    path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="it cannot be read: Is a directory"):
        Keys(path)


# where keys have to be ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LocalHost", "::ffff:127.0.0.1"]
)
def test_this_machine_alone_needs_no_keys(path, host):
    assert is_loopback(host)
    require_keys(load_settings(home=path.parent, host=host), Keys(path))


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example", "::ffff:1.2.3.4"],
)
def test_where_others_can_ask_there_must_be_keys(path, host):
    settings = load_settings(home=path.parent, host=host)
    with pytest.raises(ConfigError, match=r"python -m serving key new .*PERENNIAL_HOST=127.0.0.1"):
        require_keys(settings, Keys(path))
    new_key(path, "anna")
    require_keys(settings, Keys(path))


def test_a_configured_file_must_be_there(tmp_path):
    settings = load_settings(home=tmp_path, api_keys=str(tmp_path / "keys.json"))
    with pytest.raises(ConfigError, match=r"PERENNIAL_API_KEYS=.*there is none"):
        require_keys(settings, Keys(settings.keys_file))


# the command line ---------------------------------------------------------------------------------
@pytest.fixture
def command(path, capsys):
    settings = load_settings(home=path.parent)
    parser = argparse.ArgumentParser(prog="key")
    keys_cli.add_arguments(parser)

    def run(*arguments: str) -> tuple[str, str]:
        assert keys_cli.run(settings, parser.parse_args(arguments)) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.mark.parametrize("first", [("new",), ()])
def test_key_new_prints_the_key_alone(path, command, first):
    out, err = command(*first, "--name", "anna", "--expires", "2040-01-01", "--rate", "50")
    key = out.splitlines()[-1]
    assert out == f"{key}\n"
    assert "only time that it is shown" in err
    assert key not in err
    found = Keys(path).check(bearer(key))
    assert found == Key(
        "anna",
        hashlib.sha256(key.encode()).hexdigest(),
        found.created,
        datetime(2040, 1, 1, tzinfo=UTC),
        50.0,
    )


def test_key_list_and_revoke(path, command):
    command("--name", "anna", "--expires", "2040-01-01T08:00+01:00", "--rate", "2.5")
    command("--name", "b")
    replace_line(path, expires="2020-01-01T00:00:00Z")
    lines = command("list")[0].splitlines()
    assert lines[0].split() == ["NAME", "CREATED", "EXPIRES", "RATE"]
    assert re.fullmatch(r"anna  \S+ \S+  2020-01-01 00:00 \(expired\)  2.5/s", lines[1])
    assert re.fullmatch(r"b     \S+ \S+  never +default", lines[2])
    assert "taken out" in command("revoke", "--name", "anna")[1]
    assert len(command("list")[0].splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [(), ("new",), ("revoke",), ("list", "--name", "x"), ("revoke", "--name", "x", "--rate", "5")],
)
def test_arguments_that_do_not_fit_are_refused_with_examples(command, arguments):
    with pytest.raises(ConfigError, match=r"expects .*; got .*Examples") as caught:
        command(*arguments)
    assert "python -m serving key revoke --name anna" in str(caught.value)


def test_a_time_that_is_none_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("--name", "x", "--expires", "tomorrow")
    assert "--expires: invalid" in capsys.readouterr().err
