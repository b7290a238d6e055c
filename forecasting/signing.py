"""Ed25519 signatures of promoted versions: who may put a version before the server's clients.

The registry can be written by many; the signing key is held by those who promote. What is signed
names forecaster, version and the sha256 of `contract.json`, which names the sha256 of every other
file. The room that knows `cryptography`; imported by the server only where a key is trusted.

    openssl genpkey -algorithm ed25519 -out signing.pem          # PERENNIAL_SIGNING_KEY
    openssl pkey -in signing.pem -pubout -out trusted.pem        # PERENNIAL_TRUSTED_KEY
"""

import base64
import binascii
import json
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from forecasting.errors import ConfigError, ContractError

FORMAT = "perennial-version-1"
"""First word of what is signed, so that a signature of another kind is never one of these."""
_MAKE = "openssl genpkey -algorithm ed25519 -out signing.pem"
_DERIVE = "openssl pkey -in signing.pem -pubout -out trusted.pem"


def signed_bytes(forecaster: str, version: int, contract_sha256: str) -> bytes:
    """What is signed: one JSON list in ASCII, so that no two versions give the same bytes."""
    return json.dumps([FORMAT, forecaster, version, contract_sha256]).encode("ascii")


def sign(key_path: Path, forecaster: str, version: int, contract_sha256: str) -> str:
    """Signature of a version in base64; the same version and key give the same one again.

    Raises:
        ConfigError: no usable key, see `read_private`.
    """
    raw = read_private(key_path).sign(signed_bytes(forecaster, version, contract_sha256))
    return base64.b64encode(raw).decode("ascii")


def verify(
    public_key_path: Path, forecaster: str, version: int, contract_sha256: str, signature: str
) -> None:
    """Check that the holder of the key signed this version of this forecaster.

    Args:
        signature: in base64; empty if there is none.

    Raises:
        ContractError: it is missing, or made by another key or for another version.
        ConfigError: no usable key, see `read_public`.
    """
    key = read_public(public_key_path)
    named = f"{forecaster} version {version}"
    hint = "Promote it with PERENNIAL_SIGNING_KEY set to the key that belongs to it."
    if not signature:
        raise ContractError(
            f"{named} should carry a signature of {public_key_path}; it has none. {hint}"
        )
    try:
        raw = base64.b64decode(signature, validate=True)
        key.verify(raw, signed_bytes(forecaster, version, contract_sha256))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise ContractError(
            f"{named} with contract {contract_sha256} should be signed for {public_key_path}; its "
            f"signature was made by another key or for other content. {hint}"
        ) from error


def read_private(path: Path) -> Ed25519PrivateKey:
    """Read a signing key.

    Raises:
        ConfigError: missing, no PEM, encrypted, or of another kind than Ed25519.
    """
    what = f"PERENNIAL_SIGNING_KEY={path} should be an Ed25519 private key in PEM, not encrypted"
    try:
        key = load_pem_private_key(_read(path, what, _MAKE), password=None)
    except TypeError as error:
        raise ConfigError(
            f"{what}; it is encrypted. Decrypt it: openssl pkey -in {path} -out signing.pem"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{what}; it cannot be read as one. Make one: {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{what}; it is another kind of key. Make one: {_MAKE}")
    return key


def read_public(path: Path) -> Ed25519PublicKey:
    """Read the key that signatures are checked with.

    Raises:
        ConfigError: missing, no PEM, a private key, or of another kind than Ed25519.
    """
    what = f"PERENNIAL_TRUSTED_KEY={path} should be an Ed25519 public key in PEM"
    try:
        key = load_pem_public_key(_read(path, what, _DERIVE))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{what}; it cannot be read as one. Derive it from the private key: {_DERIVE}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{what}; it is another kind of key. Make a pair: {_MAKE}; {_DERIVE}")
    return key


def _read(path: Path, what: str, remedy: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{what}; it cannot be read: {error}. Make one: {remedy}") from error
