"""The registry's webhooks: what is taken, what is refused, and MLflow's own signature."""

import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.webhooks.delivery import _generate_hmac_signature

from serving.hooks import WINDOW_SECONDS, Deliveries, signature, verify
from serving.problems import ProblemError

SECRET = "s3cret"
BODY = b'{"entity": "model_version_alias", "action": "created"}'
NOW = 1_700_000_000.0


def delivery(body: bytes = BODY, at: float = NOW, secret: str = SECRET) -> dict[str, str]:
    identity, stamp = str(uuid.uuid4()), str(int(at))
    return {
        "X-MLflow-Signature": signature(secret, identity, stamp, body),
        "X-MLflow-Delivery-Id": identity,
        "X-MLflow-Timestamp": stamp,
    }


def refusal(headers: dict[str, str], body: bytes = BODY, taken: Deliveries | None = None):
    with pytest.raises(ProblemError) as caught:
        verify(headers, body, SECRET, NOW, taken or Deliveries())
    return caught.value.status, caught.value.kind


@given(st.text(min_size=1), st.text())
def test_the_signature_is_mlflows(secret, payload):
    identity, stamp = str(uuid.uuid4()), "1700000000"
    theirs = _generate_hmac_signature(
        secret := secret.encode("utf-8", "ignore").decode(),
        identity,
        stamp,
        payload := payload.encode("utf-8", "ignore").decode(),
    )
    assert signature(secret, identity, stamp, payload.encode()) == theirs


def test_a_delivery_is_taken_once():
    headers, taken = delivery(), Deliveries()
    verify(headers, BODY, SECRET, NOW, taken)
    assert refusal(headers, taken=taken) == (409, "replayed")
    verify(delivery(), BODY, SECRET, NOW, taken)
    assert len(taken) == 2


def test_names_of_headers_may_come_in_any_case():
    headers = {name.upper(): value for name, value in delivery().items()}
    verify(headers, BODY, SECRET, NOW, Deliveries())


@pytest.mark.parametrize(
    "change",
    [
        {"X-MLflow-Signature": ""},
        {"X-MLflow-Signature": "v1,é"},
        {"X-MLflow-Signature": "v1,"},
        {"X-MLflow-Delivery-Id": "another"},
        {"X-MLflow-Timestamp": str(int(NOW) + 1)},
    ],
)
def test_what_is_not_signed_as_it_came_is_refused_and_not_remembered(change):
    taken = Deliveries()
    assert refusal(delivery() | change, taken=taken) == (401, "bad-signature")
    assert len(taken) == 0


def test_another_body_secret_or_no_headers_are_refused():
    assert refusal(delivery(), BODY + b" ") == (401, "bad-signature")
    assert refusal(delivery(secret="guess")) == (401, "bad-signature")
    assert refusal({}) == (401, "bad-signature")


@pytest.mark.parametrize("stamp", ["", "soon", "-5", "1e9", "٣", "9" * 40])
def test_a_signed_timestamp_that_is_none_is_refused(stamp):
    headers = {
        "X-MLflow-Signature": signature(SECRET, "id", stamp, BODY),
        "X-MLflow-Delivery-Id": "id",
        "X-MLflow-Timestamp": stamp,
    }
    assert refusal(headers) == (401, "bad-signature")


@pytest.mark.parametrize("off", [-WINDOW_SECONDS, 0, WINDOW_SECONDS])
def test_within_the_window_a_delivery_is_taken(off):
    verify(delivery(at=NOW + off), BODY, SECRET, NOW, Deliveries())


@pytest.mark.parametrize("off", [-WINDOW_SECONDS - 1, WINDOW_SECONDS + 1])
def test_out_of_the_window_it_is_a_replay(off):
    assert refusal(delivery(at=NOW + off)) == (409, "replayed")


def test_a_delivery_from_a_fast_clock_is_not_taken_twice():
    headers, taken = delivery(at=NOW + WINDOW_SECONDS), Deliveries()
    verify(headers, BODY, SECRET, NOW, taken)
    with pytest.raises(ProblemError, match="was taken already"):
        verify(headers, BODY, SECRET, NOW + 2 * WINDOW_SECONDS, taken)


def test_what_is_remembered_is_bounded_and_forgotten_in_time():
    taken = Deliveries(limit=100)
    for number in range(1000):
        assert taken.take(str(number), NOW)
    assert len(taken) == 100
    assert not taken.take("999", NOW)
    assert taken.take("new", NOW + 2 * WINDOW_SECONDS + 1)
    assert len(taken) == 1


def test_taking_is_quick():
    taken, start = Deliveries(), time.perf_counter()
    for number in range(50_000):
        taken.take(str(number), NOW + number / 100)
    assert time.perf_counter() - start < 5
