# SPDX-License-Identifier: Apache-2.0
"""Packets out of a stream: however it is cut, the same messages; and never more held than one."""

import contextlib
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import PeerError
from cowshed.transport.messages.protocol import (
    HEADER,
    MAGIC,
    MAX_PIECE_BYTES,
    MAX_REQUEST_BYTES,
    VERSION,
    encode,
)
from cowshed.transport.messages.stream_decoder import StreamDecoder

BODIES = st.dictionaries(st.text(max_size=8), st.text(max_size=60) | st.integers(), max_size=4)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[a:b] for a, b in itertools.pairwise(ends)]


@given(st.lists(BODIES, max_size=5), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_however_a_stream_is_cut_it_says_the_same(
    bodies: list[dict[str, object]], places: list[int]
) -> None:
    stream = b"".join(b"".join(encode(tag, body)) for tag, body in enumerate(bodies))
    decoder = StreamDecoder()
    messages = []
    for piece in cut(stream, places):
        messages += decoder.feed(piece)
        decoder.check()
    assert [(one.tag, one.body, one.nr_fds) for one in messages] == [
        (tag, body, 0) for tag, body in enumerate(bodies)
    ]
    assert not decoder.unfinished


@given(st.lists(BODIES, min_size=1, max_size=3), st.integers(0), st.binary(min_size=1, max_size=9))
def test_a_spoiled_stream_is_refused_or_waits_and_holds_little(
    bodies: list[dict[str, object]], at: int, spoil: bytes
) -> None:
    stream = bytearray(b"".join(b"".join(encode(7, body)) for body in bodies))
    at %= len(stream)
    stream[at : at + len(spoil)] = spoil
    decoder = StreamDecoder(MAX_REQUEST_BYTES)
    with contextlib.suppress(PeerError):
        for place in range(0, len(stream), 5):
            decoder.feed(stream[place : place + 5])
            decoder.check()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((MAGIC + 1, VERSION, 0, 0, 0, 0, 1, 1), "not a cowshed peer"),
        ((MAGIC, VERSION + 1, 0, 0, 0, 0, 1, 1), "version"),
        ((MAGIC, VERSION, 0, 0, 0, 0, 1, 0), "piece of 0"),
        ((MAGIC, VERSION, 0, 0, 0, 0, 1, MAX_PIECE_BYTES + 1), "piece of"),
    ],
)
def test_a_header_is_judged_before_what_it_announces(fields: tuple[int, ...], words: str) -> None:
    with pytest.raises(PeerError, match=words):
        StreamDecoder().feed(HEADER.pack(*fields))


def test_an_announced_length_costs_no_memory() -> None:
    decoder = StreamDecoder()
    header = HEADER.pack(MAGIC, VERSION, 1, 1, 0, 0, 16 << 20, MAX_PIECE_BYTES)
    tracemalloc.start()
    decoder.feed(header)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 10
