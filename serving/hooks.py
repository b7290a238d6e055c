"""Webhooks of the registry: whether a request really comes from it, and only once.

MLflow signs each delivery with HMAC-SHA256 over `<delivery id>.<timestamp>.<body>` (its
`mlflow.webhooks.delivery`). What a webhook says is not believed: it only makes sync look at the
registry at once, so a replay that another worker takes does no harm.
"""

import base64
import hashlib
import hmac
from collections.abc import Mapping

from serving.problems import ProblemError

SIGNATURE_HEADER = "x-mlflow-signature"
DELIVERY_HEADER = "x-mlflow-delivery-id"
TIMESTAMP_HEADER = "x-mlflow-timestamp"
WINDOW_SECONDS = 300
"""How far a delivery's timestamp may be from this machine's clock."""
REMEMBERED = 10_000
"""Delivery ids that are kept, at most; each only as long as its timestamp would pass."""


class Deliveries:
    """Ids of the deliveries that were taken lately. For one event loop or thread."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._until: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def take(self, identity: str, now: float) -> bool:
        """Remember an id; False if it was taken already."""
        while self._until and next(iter(self._until.values())) < now:
            del self._until[next(iter(self._until))]
        if identity in self._until:
            return False
        if len(self._until) >= self._limit:
            del self._until[next(iter(self._until))]
        # a timestamp may lie one window ahead, and then passes for another one
        self._until[identity] = now + 2 * WINDOW_SECONDS
        return True


def verify(
    headers: Mapping[str, str], body: bytes, secret: str, now: float, taken: Deliveries
) -> None:
    """Take one delivery of the registry's webhook.

    Args:
        headers: of the request; their names in any case.
        body: as it came.
        secret: `settings.webhook_secret`, not empty.
        now: seconds since 1970.
        taken: deliveries of this process so far; this one is added.

    Raises:
        ProblemError: 401 `bad-signature`: not signed with the secret; 409 `replayed`: it was taken
            before, or is older (or newer) than the window.
    """
    given = {name.lower(): value for name, value in headers.items()}
    identity, stamp = given.get(DELIVERY_HEADER, ""), given.get(TIMESTAMP_HEADER, "")
    expected = signature(secret, identity, stamp, body)
    if not hmac.compare_digest(expected.encode(), given.get(SIGNATURE_HEADER, "").encode()):
        raise bad_signature()
    seconds = _seconds(stamp)
    if abs(now - seconds) > WINDOW_SECONDS:
        raise replayed(
            f"Its timestamp should be within {WINDOW_SECONDS} s of this server's clock; it is "
            f"{now - seconds:.0f} s old. Check both clocks."
        )
    if not taken.take(identity, now):
        raise replayed(f"Delivery {identity} was taken already; each is taken once.")


def signature(secret: str, identity: str, stamp: str, body: bytes) -> str:
    """What MLflow puts into its signature header."""
    signed = f"{identity}.{stamp}.".encode() + body
    digest = hmac.digest(secret.encode(), signed, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode('ascii')}"


def bad_signature() -> ProblemError:
    """401: not from the registry."""
    error = ProblemError(
        "bad-signature",
        401,
        "Bad signature",
        "A delivery signed by the registry was expected (X-MLflow-Signature, X-MLflow-Delivery-Id, "
        "X-MLflow-Timestamp); its signature is missing or made with another secret. Register the "
        "webhook again with this server's PERENNIAL_WEBHOOK_SECRET.",
    )
    error.headers["WWW-Authenticate"] = 'MLflow-Signature realm="perennial"'  # RFC 9110: every 401
    return error


def replayed(reason: str) -> ProblemError:
    """409: signed by the registry, but not for now."""
    return ProblemError("replayed", 409, "Replayed delivery", reason)


def _seconds(stamp: str) -> int:
    if stamp.isascii() and stamp.isdigit() and len(stamp) < 20:
        return int(stamp)
    raise bad_signature()
