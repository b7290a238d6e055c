"""API keys: made once, kept as SHA-256 in a JSON file, looked up for every request.

A key is `pk_` and 32 random bytes. With 256 bits of chance in it a single SHA-256 is enough at
rest: slow hashes (bcrypt, argon2) are for passwords, which people choose and machines guess. A
plain dictionary may be asked for the hash: whoever measures how long that takes learns something
about hashes, from which no key follows.

The file (`PERENNIAL_API_KEYS`, or `home`/api-keys.json) is a list of `Key`. Where it exists every
request needs a key, even if the list is empty. It is only ever replaced whole, with mode 0600.
"""

import difflib
import hashlib
import ipaddress
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from filelock import FileLock, Timeout

from forecasting.errors import ConfigError
from forecasting.settings import Settings
from serving.problems import ProblemError

PREFIX = "pk_"
WWW_AUTHENTICATE = 'Bearer realm="perennial"'
"""What every answer 401 says in that header (RFC 9110, section 11.6.1)."""

_HOW_TO_MAKE = "python -m serving key new --name <who it is for>"
_RANDOM_BYTES = 32
_LONGEST = 128
"""Bytes of a credential above which it is no key of ours, and is not even hashed."""
_LOCK_SECONDS = 10.0

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@-]*\Z", max_length=64)]
Time = Annotated[datetime, msgspec.Meta(tz=True)]
Fingerprint = tuple[int, int, int, int] | None
"""Inode, times of modification and change, size; None of a file that is not there."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the keys file: everything about a key but the key.

    Attributes:
        name: whom it was made for; in logs and limits.
        sha256: of the key, in hexadecimal.
        created: when.
        expires: from when on it is refused; None: never.
        rate_per_second: requests a second; None: the server's `PERENNIAL_RATE_LIMIT`.
    """

    name: Name
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    created: Time
    expires: Time | None = None
    rate_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None

    def is_expired(self) -> bool:
        """Whether it is refused by now."""
        return self.expires is not None and datetime.now(UTC) >= self.expires


# the answers to requests without a good key -------------------------------------------------------
def missing_key() -> ProblemError:
    """401: the request carries no key."""
    return _unauthorized(
        "An API key was expected in the header `Authorization: Bearer <key>` or `X-API-Key: "
        "<key>`; the request has neither. Whoever runs this server makes keys with "
        f"`{_HOW_TO_MAKE}`."
    )


def unknown_key() -> ProblemError:
    """401: a key that was never made, or was revoked. It is not repeated in the answer."""
    return _unauthorized(
        "One of this server's API keys was expected; the one that came is not known here, or was "
        "revoked. Check that it was copied whole, or ask whoever runs this server for another one."
    )


def expired_key(key: Key) -> ProblemError:
    """401: a key whose time is over."""
    return _unauthorized(
        f"A valid API key was expected; {key.name!r} expired on {key.expires:%Y-%m-%d %H:%M} UTC. "
        "Ask whoever runs this server for another one."
    )


def _unauthorized(detail: str) -> ProblemError:
    error = ProblemError("unauthorized", 401, "Unauthorized", detail)
    error.headers["WWW-Authenticate"] = WWW_AUTHENTICATE
    return error


# what a web worker holds --------------------------------------------------------------------------
class Keys:
    """The keys file in memory. What was good once stays until something good replaces it.

    Raises:
        ConfigError: there is a file that cannot be used. (None at all is no error: see `required`.)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: Fingerprint = None
        self._keys: dict[bytes, tuple[Key, float]] | None = None
        complaint = self.refresh()
        if complaint:
            raise ConfigError(complaint)

    def __repr__(self) -> str:
        return f"Keys({str(self._path)!r}, {len(self._keys or ())} keys)"

    @property
    def required(self) -> bool:
        """Whether requests need a key: from the first time on that there is a file."""
        return self._keys is not None

    def refresh(self) -> str | None:
        """Read the file again if it changed.

        A file that is damaged, unreadable or gone changes nothing: deleting it does not open the
        server.

        Returns:
            What is wrong with the file, once for every change of it; None if nothing is.
        """
        seen = _fingerprint(self._path)
        if seen == self._seen:
            return None
        try:
            self._keys = {
                bytes.fromhex(key.sha256): (key, _seconds(key.expires)) for key in _read(self._path)
            }
        except FileNotFoundError:
            self._seen = None
            if self.required:
                return (
                    f"{self._path} is gone; the API keys read before stay valid. Put it back, or "
                    "restart the server to run it without keys."
                )
        except ConfigError as error:
            self._seen = seen
            return f"{error} Until then the API keys read before stay valid."
        else:
            self._seen = seen
        return None

    def check(self, headers: list[tuple[bytes, bytes]]) -> Key | None:
        """Whose request that is.

        Args:
            headers: of the request, names in lower case, as ASGI has them. `Authorization` with
                another scheme than Bearer is left to whoever it is meant for.

        Returns:
            The key; None where none is required.

        Raises:
            ProblemError: 401, no key, one that is not known, or one that has expired.
        """
        keys = self._keys
        if keys is None:
            return None
        refused = None
        for name, value in headers:
            if name == b"authorization":
                if value[:7].lower() != b"bearer ":
                    continue
                secret = value[7:].strip()
            elif name == b"x-api-key":
                secret = value
            else:
                continue
            found = keys.get(hashlib.sha256(secret).digest()) if len(secret) <= _LONGEST else None
            if found is None:
                refused = refused or unknown_key()
            elif found[1] != math.inf and time.time() >= found[1]:
                refused = expired_key(found[0])
            else:
                return found[0]
        raise refused or missing_key()


def require_keys(settings: Settings, keys: Keys) -> None:
    """Refuse to serve without keys where other machines can ask, or where keys were configured.

    Raises:
        ConfigError: says how to make a key.
    """
    if keys.required:
        return
    if settings.api_keys:
        raise ConfigError(
            f"A file of API keys was expected at PERENNIAL_API_KEYS={settings.api_keys}; there is "
            f"none. Make a key first: {_HOW_TO_MAKE}"
        )
    if not is_loopback(settings.host):
        raise ConfigError(
            f"API keys were expected, because PERENNIAL_HOST={settings.host} can be reached from "
            f"other machines; {settings.keys_file} does not exist. Make a key first "
            f"({_HOW_TO_MAKE}), or serve this machine only: PERENNIAL_HOST=127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost counts as no."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


# what the command line does -----------------------------------------------------------------------
def new_key(
    path: Path, name: str, expires: datetime | None = None, rate: float | None = None
) -> str:
    """Make a key and append its hash to the file.

    Args:
        path: the keys file; made if there is none.
        name: not used in the file yet.
        expires: when it stops being valid, with its zone.
        rate: requests a second.

    Returns:
        The key. It is stored nowhere.

    Raises:
        ConfigError: a name in use, values that cannot be, or a file that cannot be used.
    """
    if expires is not None and (expires.tzinfo is None or expires <= datetime.now(UTC)):
        raise ConfigError(f"A coming time with its zone was expected for expires; got {expires}.")
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"Requests a second above 0 were expected for rate; got {rate}.")
    secret = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    key = Key(name, digest, datetime.now(UTC).replace(microsecond=0), expires, rate)
    try:
        msgspec.convert(msgspec.to_builtins(key), Key)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "A name of up to 64 letters, digits, spaces or ._@- was expected, beginning with a "
            f"letter or digit; got {name!r}."
        ) from error
    with _locked(path):
        keys = list_keys(path)
        if any(other.name == name for other in keys):
            raise ConfigError(
                f"A new name was expected; {path} already has a key {name!r}. Choose another one, "
                f"or revoke it first: python -m serving key revoke --name {name!r}"
            )
        _write(path, [*keys, key])
    return secret


def revoke(path: Path, name: str) -> None:
    """Take a key out of the file. The last one leaves an empty list, so that keys stay required.

    Raises:
        ConfigError: no such key, or a file that cannot be used.
    """
    with _locked(path):
        keys = list_keys(path)
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            names = [key.name for key in keys]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"The name of a key in {path} was expected; got {name!r}.{hint} "
                "`python -m serving key list` shows all."
            )
        _write(path, kept)


def list_keys(path: Path) -> list[Key]:
    """The keys of a file, in the order in which they were made; none if there is no file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        return []


def _read(path: Path) -> list[Key]:
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=list[Key])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(
            f"API keys were expected in {path}; it cannot be read: {error.strerror}. "
            "Let the server's user read it."
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    for what, values in (
        ("name", {key.name for key in keys}),
        ("sha256", {key.sha256 for key in keys}),
    ):
        if len(values) != len(keys):
            raise _damaged(path, f"the same {what} comes twice")
    return keys


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"A JSON list of API keys as `python -m serving key` writes it was expected in {path}; "
        f"{reason}. Repair it or put a copy back."
    )


def _seconds(expires: datetime | None) -> float:
    return math.inf if expires is None else expires.timestamp()


def _fingerprint(path: Path) -> Fingerprint:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    except OSError:  # a folder that may not be entered: reading it says so
        return (0, 0, 0, 0)
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside the file, which itself is replaced; a lock ends with its holder."""
    lock = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS, mode=0o600)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"{path}.lock has been held for {_LOCK_SECONDS:.0f} s; look for a hanging "
            "`python -m serving key`."
        ) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, keys: list[Key]) -> None:
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.tmp")  # one writer at a time holds the lock
    try:
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"A file of API keys that can be written was expected at {path}: {error.strerror}. Run "
        "this as a user that may write there, or choose another file with PERENNIAL_API_KEYS."
    )
