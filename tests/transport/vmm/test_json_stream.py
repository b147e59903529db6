# SPDX-License-Identifier: Apache-2.0
"""Cutting a stream into JSON texts: wherever it is cut on the way, the same texts come out."""

import itertools
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import PeerError
from cowshed.transport.vmm.json_stream import MAX_DEPTH, MAX_TEXT_BYTES, JsonStream

leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=12)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=9,
)
texts = st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=6), values, max_size=4)


def feed_in_pieces(stream: bytes, cuts: list[int]) -> tuple[list[bytes], bool]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    cutter = JsonStream()
    found = []
    for start, end in itertools.pairwise(edges):
        found += cutter.feed(stream[start:end])
        cutter.check()
    return found, cutter.unfinished


@given(st.lists(texts, max_size=4), st.lists(st.integers(0), max_size=9), st.booleans())
def test_texts_come_out_as_they_went_in(given: list[object], cuts: list[int], plain: bool) -> None:
    encoded = [json.dumps(one, ensure_ascii=plain).encode() for one in given]
    found, unfinished = feed_in_pieces(b" \r\n".join(encoded), cuts)
    assert [json.loads(one) for one in found] == given
    assert not unfinished


def test_every_byte_may_come_alone() -> None:
    stream = rb'[{"a\\":"]\"}{"}]{"type":2}'
    assert feed_in_pieces(stream, list(range(len(stream)))) == (
        [rb'[{"a\\":"]\"}{"}]', b'{"type":2}'],
        False,
    )


@given(st.binary(max_size=200), st.lists(st.integers(0), max_size=5))
def test_garbage_is_refused_or_kept_within_bounds(garbage: bytes, cuts: list[int]) -> None:
    try:
        found, _ = feed_in_pieces(garbage, cuts)
    except PeerError:
        return
    assert sum(map(len, found)) <= len(garbage)


@pytest.mark.parametrize(
    "stream", [b"x", b"2", b'"text"', b"[]x", b"{} ]", b"\0", b"\xff", b"null"]
)
def test_only_arrays_and_objects_begin_a_text(stream: bytes) -> None:
    with pytest.raises(PeerError, match="begins with byte"):
        JsonStream().feed(stream)


def test_depth_is_bounded() -> None:
    assert JsonStream().feed(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(PeerError, match="deeper"):
        JsonStream().feed(b"[" * (MAX_DEPTH + 1))


def test_a_text_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    text = b'["' + b"x" * (MAX_TEXT_BYTES - 4) + b'"]'
    assert JsonStream().feed(text + b"[]") == [text, b"[]"]
    with pytest.raises(PeerError, match="longer"):
        JsonStream().feed(b" " + text[:-2] + b'x"]')


def test_a_text_that_never_ends_takes_bounded_memory() -> None:
    cutter = JsonStream()
    tracemalloc.start()
    cutter.feed(b'["')
    for _ in range(MAX_TEXT_BYTES // 4096 - 1):
        cutter.feed(b"x" * 4096)
    with pytest.raises(PeerError, match="longer"):
        cutter.feed(b"x" * 4096)
    assert tracemalloc.get_traced_memory()[1] < 6 * MAX_TEXT_BYTES
    tracemalloc.stop()
