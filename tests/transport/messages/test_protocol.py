# SPDX-License-Identifier: Apache-2.0
"""Framing: what is encoded is decoded, and nothing else is let through."""

import json
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import PeerError, UsageError
from cowshed.transport.messages.protocol import (
    FLAG_MORE,
    HEADER,
    MAGIC,
    MAX_DEPTH,
    MAX_FDS,
    MAX_PACKET_BYTES,
    MAX_PIECE_BYTES,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_TAG,
    VERSION,
    Decoder,
    Message,
    encode,
    parse_body,
)

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)


def packet(
    text: bytes,
    *,
    total: int | None = None,
    piece: int | None = None,
    flags: int = 0,
    tag: int = 7,
    nr_fds: int = 0,
    magic: int = MAGIC,
    version: int = VERSION,
    reserved: int = 0,
) -> bytes:
    total = len(text) if total is None else total
    piece = len(text) if piece is None else piece
    return HEADER.pack(magic, version, flags, tag, nr_fds, reserved, total, piece) + text


def decode(packets: list[bytes], nr_fds: int = 0, limit: int = MAX_REPLY_BYTES) -> list[Message]:
    decoder = Decoder(limit)
    messages = []
    for one in packets:
        messages += decoder.feed(one, nr_fds)
        decoder.check()
        nr_fds = 0
    assert not decoder.unfinished
    return messages


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@given(st.dictionaries(st.text(), json_values, max_size=5), U32, st.integers(0, MAX_FDS))
def test_what_is_encoded_is_decoded(body: dict[str, object], tag: int, nr_fds: int) -> None:
    packets = encode(tag, body, nr_fds)
    if depth(body) > MAX_DEPTH:
        with pytest.raises(PeerError, match="deeper"):
            decode(packets, nr_fds)
    else:
        assert decode(packets, nr_fds) == [Message(tag, body, nr_fds)]


@pytest.mark.parametrize("spare", [-1, 0, 1])
@pytest.mark.parametrize("nr_packets", [1, 2, 3])
def test_long_message_goes_on_in_full_packets(nr_packets: int, spare: int) -> None:
    length = nr_packets * MAX_PIECE_BYTES + spare
    body = {"t": "x" * (length - len('{"t":""}'))}
    packets = encode(3, body, nr_fds=2)
    assert len(packets) == nr_packets + (spare > 0)
    assert all(len(one) == MAX_PACKET_BYTES for one in packets[:-1])
    assert decode(packets, 2) == [Message(3, body, 2)]


def test_header_is_as_published() -> None:
    text = b'{"op":"hello"}'
    expected = struct.pack("<4sHHIHHII", b"CSHD", 1, 0, 0x01020304, 2, 0, len(text), len(text))
    assert encode(0x01020304, {"op": "hello"}, 2) == [expected + text]
    assert HEADER.size == 24


@given(st.binary(max_size=200), st.integers(0, 9))
def test_arbitrary_bytes_are_refused(junk: bytes, nr_fds: int) -> None:
    # Nobody hits the magic by chance; what comes behind a right header is tried below.
    with pytest.raises(PeerError):
        Decoder().feed(junk, nr_fds)


@given(
    st.lists(
        st.builds(
            packet,
            st.binary(max_size=64)
            | st.sampled_from([b"{}", b'{"op":"x"}', b"x" * MAX_PIECE_BYTES]),
            total=st.none() | U32 | st.sampled_from([MAX_PIECE_BYTES, MAX_PIECE_BYTES + 1]),
            piece=st.none() | U32,
            flags=st.sampled_from([0, 0, FLAG_MORE, FLAG_MORE, 2, 0x8000]),
            tag=st.sampled_from([7, 7, 8]),
            nr_fds=st.integers(0, 9),
            reserved=st.sampled_from([0, 0, 0, 1]),
        ),
        max_size=5,
    ),
    st.integers(0, 9),
)
def test_packets_with_wrong_fields_end_in_a_message_or_a_refusal(
    packets: list[bytes], nr_fds: int
) -> None:
    decoder = Decoder(MAX_REQUEST_BYTES)
    try:
        for one in packets:
            for message in decoder.feed(one, nr_fds):
                assert isinstance(message.body, dict)
                assert message.nr_fds == nr_fds
    except PeerError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)


@given(st.data())
def test_one_changed_byte_is_no_crash_and_no_other_length(data: st.DataObject) -> None:
    good = encode(9, {"op": "open", "image": "debian", "quota_bytes": 1 << 20})[0]
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= data.draw(st.integers(1, 255))
    try:
        messages = Decoder().feed(bytes(bad))
    except PeerError:
        return
    assert len(messages) == 1
    # Only the tag and the text may differ unseen.
    assert 8 <= place < 12 or place >= HEADER.size


BODY = b'{"op":"x"}'
FULL = b"x" * MAX_PIECE_BYTES


@pytest.mark.parametrize(
    ("packets", "words"),
    [
        ([b""], "packet of 0 bytes"),
        ([packet(BODY)[: HEADER.size - 1]], "packet of 23 bytes"),
        ([packet(b"x" * (MAX_PIECE_BYTES + 1))], "packet of 65537 bytes"),
        ([packet(BODY, magic=MAGIC ^ 1)], "not a cowshed peer"),
        ([packet(BODY, version=2)], "version 2"),
        ([packet(BODY, flags=2)], "unknown flags"),
        ([packet(BODY, reserved=1)], "reserved"),
        ([packet(BODY, nr_fds=1)], "announces 1 descriptors and carries 0"),
        ([packet(BODY, piece=len(BODY) - 1)], "piece of 9"),
        ([packet(BODY, piece=len(BODY) + 1)], "piece of 11"),
        ([packet(b"", total=0)], "message of 0 bytes"),
        ([packet(BODY, total=MAX_REQUEST_BYTES + 1)], "65537 bytes; 1 to 65536"),
        ([packet(BODY, total=5)], "5 bytes has 10"),
        ([packet(BODY, total=11)], "has 10 and MORE is False"),
        ([packet(BODY, flags=FLAG_MORE)], "MORE is True"),
        ([packet(BODY, total=11, flags=FLAG_MORE)], "must fill its packet"),
        ([packet(b"", total=11, flags=FLAG_MORE)], "must fill its packet"),
        (
            [packet(FULL, total=65530, flags=FLAG_MORE), packet(BODY, total=65530, tag=8)],
            "broken off",
        ),
        ([packet(FULL, total=65530, flags=FLAG_MORE), packet(BODY, total=65522)], "broken off"),
        (
            [packet(FULL, total=65520, flags=FLAG_MORE), packet(BODY, total=65520)],
            "65520 bytes has",
        ),
        ([packet(b"[]")], "not an object"),
        ([packet(b"7")], "not an object"),
        ([packet(b"")], "message of 0 bytes"),
        ([packet(b'{"op":')], "not JSON"),
        ([packet(b'{"op":"\xff"}')], "not JSON"),
        ([packet(b'{"a":NaN}')], "NaN"),
        ([packet(b'{"a":-Infinity}')], "Infinity"),
        ([packet(b'{"a":1e999}')], "out of range"),
        ([packet(b'{"a":1,"a":2}')], "twice"),
        ([packet(b'{"a":' + b"9" * 5000 + b"}")], "not JSON"),
        ([packet(b'{"a":' + b"[" * 20000)], "deeper"),
        ([packet(b'{"a":' * 10000)], "deeper"),
        ([packet(b'{"a":' + b"[" * 16 + b"]" * 16 + b"}")], "deeper than 16"),
    ],
)
def test_every_violation_is_refused_in_one_line(packets: list[bytes], words: str) -> None:
    decoder = Decoder(MAX_REQUEST_BYTES)
    for one in packets[:-1]:
        assert decoder.feed(one) == []
    with pytest.raises(PeerError, match=words) as caught:
        decoder.feed(packets[-1])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_descriptors_come_with_the_first_packet_only() -> None:
    decoder = Decoder()
    first, second = encode(1, {"t": "x" * MAX_PIECE_BYTES}, nr_fds=1)
    decoder.feed(first, 1)
    bad = bytearray(second)
    bad[12] = 1  # nr_fds
    with pytest.raises(PeerError, match="broken off"):
        decoder.feed(bytes(bad), 1)
    with pytest.raises(PeerError, match="carries 9; at most 8"):
        Decoder().feed(packet(BODY, nr_fds=9), 9)


def test_depth_up_to_the_limit_is_accepted() -> None:
    text = b'{"a":' + b"[" * 15 + b"]" * 15 + b"}"
    assert parse_body(text) == json.loads(text)
    text = b'{"b":{},' + text[1:]  # more brackets than levels
    assert parse_body(text) == json.loads(text)
    # Broad is not deep.
    broad = b'{"a":[' + b",".join([b"[]"] * 1000) + b"]}"
    assert len(parse_body(broad)["a"]) == 1000


def test_memory_follows_what_arrived_not_what_was_announced() -> None:
    decoder = Decoder()
    tracemalloc.start()
    try:
        decoder.feed(packet(FULL, total=MAX_REPLY_BYTES, flags=FLAG_MORE))
        assert decoder.unfinished
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_PACKET_BYTES
    finally:
        tracemalloc.stop()


def test_body_that_cannot_be_sent_is_our_misuse() -> None:
    for bad in ({"a": float("nan")}, {"a": b""}, {"a": object()}):
        with pytest.raises(UsageError, match="JSON"):
            encode(1, bad)
    with pytest.raises(UsageError, match="over the limit of 100"):
        encode(1, {"a": "x" * 100}, limit_bytes=100)
    with pytest.raises(UsageError, match="tag"):
        encode(MAX_TAG + 1, {})
    with pytest.raises(UsageError, match="at most 8"):
        encode(1, {}, nr_fds=MAX_FDS + 1)
    # A lone surrogate, as a file name may have, is sent and comes back.
    assert decode(encode(1, {"a": "\udc80"}))[0].body == {"a": "\udc80"}
