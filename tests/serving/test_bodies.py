"""Bodies: bounded before and after decompression, and whole or refused."""

import asyncio
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.bodies import ClientGoneError, decompressed, read_body
from serving.problems import ProblemError

MB = 0.01  # the limit in these tests: 10,000 bytes


def read(*messages, **headers) -> bytes:
    waiting = iter(messages)

    async def receive():
        return next(waiting)

    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return asyncio.run(read_body(named, receive, MB))


def piece(body: bytes, *, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


def test_pieces_are_joined():
    assert read(piece(b"ab", more=True), piece(b"", more=True), piece(b"c")) == b"abc"
    assert read({"type": "http.request"}) == b""


def test_too_much_is_refused_whether_it_is_announced_or_not():
    for messages, headers in (
        ([], {"content_length": b"10001"}),
        ([piece(b"x" * 6000, more=True), piece(b"x" * 6000, more=True)], {}),
        ([piece(gzip.compress(b"x" * 10_001))], {"content_encoding": b"gzip"}),
    ):
        with pytest.raises(ProblemError) as caught:
            read(*messages, **headers)
        assert (caught.value.status, caught.value.kind) == (413, "body-too-large")


def test_a_client_that_left_is_no_error_of_ours():
    with pytest.raises(ClientGoneError):
        read(piece(b"a", more=True), {"type": "http.disconnect"})


def test_a_bomb_is_never_unpacked():
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < 60_000
    with pytest.raises(ProblemError) as caught:
        decompressed(bomb, b"gzip", MB)
    assert caught.value.status == 413


@pytest.mark.parametrize("encoding", [b"br", b"gzip, gzip", b"\xff"])
def test_other_encodings_are_unsupported(encoding):
    with pytest.raises(ProblemError) as caught:
        decompressed(b"", encoding, MB)
    assert (caught.value.status, caught.value.kind) == (415, "bad-encoding")


@given(st.binary(max_size=2000))
def test_what_was_compressed_comes_back(plain):
    assert decompressed(gzip.compress(plain), b"gzip", MB) == plain
    assert decompressed(zlib.compress(plain), b"deflate", MB) == plain


@given(st.binary(min_size=1, max_size=500), st.data())
def test_a_part_of_a_body_is_refused(plain, data):
    packed = gzip.compress(plain)
    cut = data.draw(st.integers(0, len(packed) - 1))
    for damaged in (packed[:cut], packed + b"more"):
        with pytest.raises(ProblemError) as caught:
            decompressed(damaged, b"gzip", MB)
        assert (caught.value.status, caught.value.kind) == (400, "bad-encoding")
