"""Signatures of versions: what they cover, which keys are taken, and openssl as the witness."""

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from forecasting.errors import ConfigError, ContractError
from forecasting.signing import read_private, read_public, sign, signed_bytes, verify
from tests.keys import write_pair

SHA = "a" * 64
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


def test_what_was_signed_verifies_and_is_the_same_again(pair):
    private, public = pair
    signature = sign(private, "perennial-goog", 3, SHA)
    verify(public, "perennial-goog", 3, SHA, signature)
    assert signature == sign(private, "perennial-goog", 3, SHA)


@pytest.mark.parametrize(
    "other",
    [("perennial-aapl", 3, SHA), ("perennial-goog", 4, SHA), ("perennial-goog", 3, "b" * 64)],
)
def test_a_signature_counts_for_nothing_else(pair, other):
    private, public = pair
    signature = sign(private, "perennial-goog", 3, SHA)
    with pytest.raises(ContractError, match="another key or for other content"):
        verify(public, *other, signature)


@pytest.mark.parametrize("signature", ["A" * 86 + "==", "no base64!", "", "AAAA", "é"])
def test_what_is_no_signature_is_refused(pair, signature):
    with pytest.raises(ContractError, match=r"perennial-goog version 3 .*PERENNIAL_SIGNING_KEY"):
        verify(pair[1], "perennial-goog", 3, SHA, signature)


def test_a_signature_by_another_key_is_refused(tmp_path, pair):
    stranger, _ = write_pair(tmp_path / "stranger")
    with pytest.raises(ContractError, match="another key"):
        verify(pair[1], "perennial-goog", 3, SHA, sign(stranger, "perennial-goog", 3, SHA))


def test_no_two_versions_give_the_same_bytes():
    names = ["a", 'a", 1', "a\n1", "é", "a1"]
    assert len({signed_bytes(name, n, SHA) for name in names for n in (1, 11)}) == 10
    assert signed_bytes("é", 1, SHA).isascii()


def test_wrong_files_are_named_with_what_to_do(tmp_path, pair):
    private, public = pair
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"\x00\xff no key")
    for read, paths in (
        (read_private, [garbage, public, tmp_path / "missing.pem", tmp_path]),
        (read_public, [garbage, private, tmp_path / "missing.pem", tmp_path]),
    ):
        for path in paths:
            with pytest.raises(ConfigError, match=r"PERENNIAL_\w+=.* should be .*openssl"):
                read(path)


def test_keys_of_another_kind_are_refused(tmp_path):
    rsa = generate_private_key(65537, 2048)
    private, public = tmp_path / "rsa.pem", tmp_path / "rsa.pub"
    private.write_bytes(
        rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    public.write_bytes(
        rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(ConfigError, match="another kind of key"):
        read_private(private)
    with pytest.raises(ConfigError, match="another kind of key"):
        read_public(public)


def test_an_encrypted_key_is_refused_and_says_how_to_decrypt_it(tmp_path):
    path = tmp_path / "locked.pem"
    locked = BestAvailableEncryption(b"secret")
    path.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)
    )
    with pytest.raises(ConfigError, match=r"is encrypted\. Decrypt it: openssl pkey"):
        read_private(path)


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@needs_openssl
def test_keys_made_by_openssl_work_and_openssl_verifies_what_was_signed(tmp_path):
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    signature = sign(key, "perennial-goog", 3, SHA)
    verify(public, "perennial-goog", 3, SHA, signature)
    message, raw = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(signed_bytes("perennial-goog", 3, SHA))
    raw.write_bytes(base64.b64decode(signature))
    check = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin")
    openssl(*check, "-in", message, "-sigfile", raw)


@needs_openssl
def test_a_key_that_openssl_encrypted_is_refused(tmp_path):
    key = tmp_path / "key.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x", "-out", key)
    with pytest.raises(ConfigError, match="is encrypted"):
        read_private(key)
