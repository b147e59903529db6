# SPDX-License-Identifier: Apache-2.0
"""Handshakes of machine monitors: their authors' own forms pass, nonsense does not."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache.errors import PeerError
from cowshed.transport.vmm.handshakes import (
    HUGE_PAGE_BYTES,
    MAX_REGIONS,
    HandshakeDecoder,
    MemoryRegion,
    Policy,
    Range,
    StatRequest,
    Unexpected,
    VmmHandshake,
    range_replies,
    stat_reply,
)

PAGE = 4096
BASE = 0x7F0000000000


def region(**changes: Any) -> dict[str, Any]:
    fields = {"base_host_virt_addr": BASE, "size": 64 * PAGE, "offset": 0, "page_size": PAGE}
    return {**fields, **changes}


def decode(body: object, nr_fds: int = 1) -> Any:
    decoder = HandshakeDecoder()
    (request,) = decoder.feed(json.dumps(body).encode(), nr_fds)
    assert not decoder.unfinished
    return request


def test_firecracker_sends_a_bare_array() -> None:
    first = region(page_size_kib=PAGE)
    second = region(base_host_virt_addr=BASE + (1 << 30), offset=64 * PAGE)
    assert decode([first, second]) == VmmHandshake(
        "firecracker",
        (
            MemoryRegion(BASE, 64 * PAGE, 0, PAGE),
            MemoryRegion(BASE + (1 << 30), 64 * PAGE, 64 * PAGE, PAGE),
        ),
        Policy.COPY,
        prefault=False,
    )


@pytest.mark.parametrize(
    ("fields", "page_bytes"),
    [
        ({"page_size": PAGE, "page_size_kib": PAGE}, PAGE),
        ({"page_size": HUGE_PAGE_BYTES, "page_size_kib": 2048}, HUGE_PAGE_BYTES),
        ({"page_size_kib": PAGE}, PAGE),
        ({"page_size_kib": HUGE_PAGE_BYTES}, HUGE_PAGE_BYTES),
        ({"page_size_kib": 4}, PAGE),
        ({"page_size_kib": 2048}, HUGE_PAGE_BYTES),
        ({}, PAGE),
    ],
)
def test_older_names_of_the_page_size_are_understood(fields: Any, page_bytes: int) -> None:
    entry = {"base_host_virt_addr": BASE, "size": HUGE_PAGE_BYTES, "offset": 0, **fields}
    assert decode([entry]).regions[0].page_bytes == page_bytes


def test_nydus_sends_typed_objects() -> None:
    body = {"type": 0, "regions": [region(prot=1, flags=18)], "policy": 1, "enable_prefault": True}
    assert decode(body) == VmmHandshake(
        "nydus", (MemoryRegion(BASE, 64 * PAGE, 0, PAGE),), Policy.COPY, prefault=True
    )
    assert decode({"regions": [region()]}).policy is Policy.ZEROCOPY
    assert decode({"type": 2}, 0) == StatRequest()
    assert decode({"type": 1, "ranges": []}, 0) == Unexpected(1)
    assert decode({"type": 3}, 0) == Unexpected(3)


def test_a_wish_for_huge_pages_in_memory_without_is_not_taken_at_its_word() -> None:
    odd = region(base_host_virt_addr=BASE + PAGE, page_size=HUGE_PAGE_BYTES, size=HUGE_PAGE_BYTES)
    assert decode({"regions": [odd]}).regions[0].page_bytes == PAGE
    with pytest.raises(PeerError, match="whole pages"):
        decode([odd])


@pytest.mark.parametrize(
    "changes",
    [
        {"base_host_virt_addr": 0},
        {"base_host_virt_addr": -PAGE},
        {"base_host_virt_addr": BASE + 1},
        {"base_host_virt_addr": (1 << 64) - PAGE},
        {"base_host_virt_addr": (1 << 56) - PAGE},
        {"base_host_virt_addr": "0x1000"},
        {"base_host_virt_addr": 4096.0},
        {"base_host_virt_addr": True},
        {"base_host_virt_addr": None},
        {"size": 0},
        {"size": PAGE + 1},
        {"size": 1 << 62},
        {"size": -1},
        {"offset": -PAGE},
        {"offset": 3},
        {"offset": (1 << 48) - PAGE},
        {"page_size": 8192},
        {"page_size": 1 << 30},
        {"page_size": -4096},
        {"page_size": 1},
        {"page_size": HUGE_PAGE_BYTES},
        {"prot": 1 << 40},
        {"flags": "MAP_PRIVATE"},
    ],
)
def test_regions_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        decode([region(**changes)])


@pytest.mark.parametrize(
    "regions",
    [
        [],
        None,
        {},
        [1],
        [[]],
        [region(), region()],
        [region(), region(offset=64 * PAGE, base_host_virt_addr=BASE + 63 * PAGE)],
        [region(), region(offset=63 * PAGE, base_host_virt_addr=BASE + 64 * PAGE)],
        [
            region(base_host_virt_addr=BASE + no * 2**20, offset=no * 2**20)
            for no in range(MAX_REGIONS + 1)
        ],
    ],
)
def test_lists_of_regions_that_make_no_sense_are_refused(regions: Any) -> None:
    with pytest.raises(PeerError):
        decode({"regions": regions})


@pytest.mark.parametrize(
    "body",
    [
        {"type": 4},
        {"type": -1},
        {"type": "0", "regions": [region()]},
        {"type": 1 << 70},
        {"regions": [region()], "policy": 2},
        {"regions": [region()], "policy": "Copy"},
        {"regions": [region()], "enable_prefault": 1},
        {},
    ],
)
def test_objects_that_make_no_sense_are_refused(body: Any) -> None:
    with pytest.raises(PeerError):
        decode(body)


@pytest.mark.parametrize("nr_fds", [0, 2, 20])
def test_a_handshake_comes_with_one_descriptor(nr_fds: int) -> None:
    with pytest.raises(PeerError, match="descriptors"):
        decode([region()], nr_fds)


def test_descriptors_that_belong_to_nothing_are_refused() -> None:
    for piece, nr_fds in ((b"", 1), (b" ", 1), (b'{"type":2}', 1)):
        with pytest.raises(PeerError, match="without a handshake"):
            HandshakeDecoder().feed(piece, nr_fds)


def test_requests_may_arrive_together_or_byte_by_byte() -> None:
    stream = json.dumps({"type": 2}).encode() + json.dumps([region()]).encode()
    together = HandshakeDecoder().feed(stream, 1)
    decoder = HandshakeDecoder()
    alone = []
    for no in range(len(stream)):
        alone += decoder.feed(stream[no : no + 1], 1 if no == 20 else 0)
    assert alone == together
    assert [type(one) for one in alone] == [StatRequest, VmmHandshake]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
numbers = st.integers(-1, 2**65) | st.sampled_from(
    [0, 4, PAGE, BASE, HUGE_PAGE_BYTES, 2**47, 2**48, 2**56]
)
odd_regions = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("base_host_virt_addr", "size", "offset", "page_size", "page_size_kib", "prot"),
        numbers | json_values,
    ),
)
odd_handshakes = st.lists(odd_regions | json_values, max_size=5) | st.fixed_dictionaries(
    {},
    optional={
        "type": st.integers(-1, 5) | json_values,
        "regions": st.lists(odd_regions, max_size=4) | json_values,
        "policy": st.integers(-1, 3) | json_values,
        "enable_prefault": json_values,
    },
)


@given(odd_handshakes, st.integers(0, 3))
def test_whatever_is_let_through_holds_what_is_promised(body: Any, nr_fds: int) -> None:
    decoder = HandshakeDecoder()
    try:
        requests = decoder.feed(json.dumps(body).encode(), nr_fds)
    except PeerError:
        return
    for request in requests:
        if isinstance(request, VmmHandshake):
            assert 1 <= len(request.regions) <= MAX_REGIONS
            for one in request.regions:
                assert one.page_bytes in (PAGE, HUGE_PAGE_BYTES)
                assert one.length_bytes > 0
                assert not any(part % one.page_bytes for part in one)


@given(st.lists(st.binary(max_size=60), max_size=5), st.integers(0, 3))
def test_garbage_costs_an_error_and_nothing_else(pieces: list[bytes], nr_fds: int) -> None:
    decoder = HandshakeDecoder()
    with contextlib.suppress(PeerError):
        for piece in pieces:
            decoder.feed(piece, nr_fds)


def test_replies_are_those_of_the_document() -> None:
    assert json.loads(stat_reply(8 << 30)) == {
        "type": 3,
        "size": 8 << 30,
        "block_size": PAGE,
        "flags": 0,
        "version": 1,
    }
    ((text, nr_fds),) = range_replies([Range(0, 2 << 20)])
    assert nr_fds == 1
    assert json.loads(text) == {
        "type": 1,
        "ranges": [{"len": 2 << 20, "blob_offset": 0, "block_offset": 0}],
    }


def test_many_ranges_are_told_in_messages_that_clients_have_room_for() -> None:
    ranges = [Range((1 << 47) + no, 1 << 47) for no in range(40)]
    replies = list(range_replies(ranges))
    assert [nr_fds for _, nr_fds in replies] == [16, 16, 8]
    assert all(len(text) < 4096 for text, _ in replies)
    told = [one for text, _ in replies for one in json.loads(text)["ranges"]]
    assert [one["block_offset"] for one in told] == [one.offset_bytes for one in ranges]
