"""Key pairs for tests, as `openssl genpkey -algorithm ed25519` makes them."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def write_pair(folder: Path) -> tuple[Path, Path]:
    """`signing.pem` and `trusted.pem` in a folder that is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "signing.pem", folder / "trusted.pem"
    key = Ed25519PrivateKey.generate()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public
