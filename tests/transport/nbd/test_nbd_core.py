# SPDX-License-Identifier: Apache-2.0
"""The transmission phase by the book: every command, in every kind of reply."""

import errno

import pytest
from nbd_client import (
    CACHE,
    COMPACT,
    DF,
    DISC,
    EXTENDED,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
)
from nbd_stage import TERMS, NbdStage
from stage import PAGE, fail_at, let_go, stop_at, until, wait_at

from cowshed.cache._core import lib
from cowshed.transport.nbd.serving import NbdEnd

EXTENT = 16 * PAGE
every_reply = pytest.mark.parametrize("terms", list(TERMS))


@every_reply
def test_reads_are_the_images_bytes_wherever_they_begin_and_end(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(), terms)
    for _ in ("absent", "resident"):
        for offset, length in (
            (0, 1),
            (0, PAGE),
            (4095, 2),
            (100, 3 * EXTENT),
            (0, nbd.size_bytes),
        ):
            assert client.read(offset, length) == nbd.bytes[offset : offset + length]
        assert client.read(nbd.size_bytes - 7, 7) == nbd.bytes[-7:]
    nbd.stage.evict_all()
    assert client.read(0, nbd.size_bytes) == nbd.bytes


@every_reply
def test_a_read_only_export_refuses_whatever_would_change_it(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(), terms)
    assert client.write(0, b"x" * 70_000) == errno.EPERM
    assert client.call(TRIM, 0, PAGE).error == errno.EPERM
    assert client.call(ZEROES, 0, PAGE).error == errno.EPERM
    assert client.call(FLUSH).error == 0
    assert client.read(0, PAGE) == nbd.bytes[:PAGE]


def test_a_connection_may_be_read_only_on_an_export_that_is_not(nbd: NbdStage) -> None:
    export = nbd.export(nbd.overlay())
    assert nbd.client(export, read_only=True).write(0, b"x") == errno.EPERM
    assert nbd.client(export).write(0, b"x") == 0


@every_reply
def test_what_lies_past_the_end_is_refused_and_the_connection_goes_on(
    nbd: NbdStage, terms: str
) -> None:
    client = nbd.client(nbd.export(nbd.overlay()), terms)
    past = nbd.size_bytes - 1
    for kind in (READ, TRIM, CACHE):
        assert client.call(kind, past, 2).error == errno.EINVAL
        assert client.call(kind, 2**64 - 1, 2).error == errno.EINVAL
    assert client.call(ZEROES, past, 2).error == errno.ENOSPC
    assert client.write(past, b"xy") == errno.ENOSPC
    assert client.read(past, 1) == nbd.bytes[-1:]


@every_reply
def test_unknown_commands_and_flags_are_invalid(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(nbd.overlay()), terms)
    assert client.call(8, 0, PAGE).error == errno.EINVAL
    assert client.call(999, 0, PAGE).error == errno.EINVAL
    assert client.call(READ, 0, PAGE, NO_HOLE).error == errno.EINVAL
    assert client.write(0, b"x" * PAGE, REQ_ONE) == errno.EINVAL
    assert client.call(FLUSH, 0, 1).error == errno.EINVAL
    assert client.call(READ, 0, PAGE, FUA).error == 0
    assert client.read(0, PAGE) == nbd.bytes[:PAGE]


@every_reply
def test_a_request_of_no_bytes_succeeds(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(nbd.overlay()), terms)
    assert client.call(READ, 0, 0).error == 0
    assert client.call(TRIM, 0, 0).error == 0
    if terms != "extended":  # there, a payload of no bytes is none
        assert client.write(0, b"") == 0
    assert client.read(0, 1) == nbd.bytes[:1]


def test_an_unfragmented_read_has_one_chunk_or_is_too_long(nbd: NbdStage) -> None:
    client = nbd.client(nbd.export())
    reply = client.call(READ, 5, 65_536, DF)
    assert (reply.nr_chunks, reply.data) == (1, nbd.bytes[5 : 5 + 65_536])
    assert client.call(READ, 0, 300_000, DF).error == errno.EOVERFLOW


@every_reply
def test_writes_zeroes_and_trims_change_what_is_read_and_nothing_else(
    nbd: NbdStage, terms: str
) -> None:
    overlay = nbd.overlay()
    client = nbd.client(nbd.export(overlay), terms)
    other = nbd.client(nbd.export(nbd.overlay()), terms)
    expected = bytearray(nbd.bytes)
    for offset, data in ((10, b"a" * 20), (PAGE - 1, b"bc"), (5 * PAGE, b"d" * 3 * EXTENT)):
        assert client.write(offset, data) == 0
        expected[offset : offset + len(data)] = data
    assert client.call(ZEROES, 6 * PAGE - 3, 2 * PAGE, NO_HOLE).error == 0
    expected[6 * PAGE - 3 : 8 * PAGE - 3] = bytes(2 * PAGE)
    assert client.call(ZEROES, 100 * PAGE, 9 * PAGE, FAST_ZERO).error == 0
    expected[100 * PAGE : 109 * PAGE] = bytes(9 * PAGE)
    assert client.call(TRIM, 9 * PAGE + 1, 3 * PAGE).error == 0
    expected[10 * PAGE : 12 * PAGE] = nbd.bytes[10 * PAGE : 12 * PAGE]
    assert client.write(nbd.size_bytes - 9, b"last bytes"[:9]) == 0
    expected[-9:] = b"last byte"
    assert client.read(0, nbd.size_bytes) == expected
    assert other.read(0, nbd.size_bytes) == nbd.bytes
    assert overlay.account.status().private_pages == 2 + 48 - 2 + 9 + 1


def test_a_fast_zero_that_might_be_slow_is_refused(nbd: NbdStage) -> None:
    client = nbd.client(nbd.export(nbd.overlay()))
    assert client.call(ZEROES, 1, 2 * PAGE, FAST_ZERO).error == errno.ENOTSUP
    assert client.call(ZEROES, 0, PAGE, FAST_ZERO | NO_HOLE).error == errno.ENOTSUP
    assert client.read(0, 2 * PAGE) == nbd.bytes[: 2 * PAGE]


@pytest.mark.parametrize("terms", ["structured", "extended"])
def test_block_status_tells_what_is_resident_private_and_zero(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(nbd.overlay()), terms)
    nbd.stage.load(2, 3)
    assert client.write(PAGE, b"x" * PAGE) == 0
    assert client.call(ZEROES, 2 * PAGE, PAGE).error == 0
    runs = client.call(STATUS, 0, nbd.size_bytes).runs
    rest = nbd.size_bytes
    assert runs[1] == [(2 * PAGE, 0), (PAGE, 2), (rest - 3 * PAGE, 0)]
    assert runs[2] == [(2 * EXTENT, 0), (3 * EXTENT, 1), (rest - 5 * EXTENT, 0)]
    assert runs[3] == [(PAGE, 0), (2 * PAGE, 1), (rest - 3 * PAGE, 0)]
    one = client.call(STATUS, PAGE, 3 * PAGE, REQ_ONE).runs
    assert one == {1: [(PAGE, 0)], 2: [(3 * PAGE, 0)], 3: [(2 * PAGE, 1)]}


def test_block_status_without_a_context_is_invalid(nbd: NbdStage) -> None:
    assert nbd.client(nbd.export(), contexts=False).call(STATUS, 0, PAGE).error == errno.EINVAL


@every_reply
def test_cache_makes_resident_and_answers_then(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(), terms)
    assert client.call(CACHE, EXTENT + 1, 3 * EXTENT).error == 0
    assert bytes(nbd.stage.image.states(0, 6)) == bytes([0, 2, 2, 2, 2, 0])


def test_a_miss_does_not_keep_others_waiting(nbd: NbdStage) -> None:
    client = nbd.client(nbd.export(nbd.overlay()))
    nbd.stage.load(0, 1)
    stop_at(lib.POINT_LOAD_READ, 0)
    missing = [
        client.start(READ, 4 * EXTENT, PAGE),
        client.start(WRITE, 8 * EXTENT + 1, payload=b"x"),
    ]
    wait_at(lib.POINT_LOAD_READ, 2)
    assert client.read(0, PAGE) == nbd.bytes[:PAGE]
    assert client.write(0, b"y" * PAGE) == 0
    assert nbd.exports[0].counters().parked == 2
    let_go(lib.POINT_LOAD_READ)
    assert client.finish(missing[0]).data == nbd.bytes[4 * EXTENT :][:PAGE]
    assert client.finish(missing[1]).error == 0
    until(lambda: nbd.exports[0].counters().parked == 0, "nothing is parked")


@every_reply
def test_a_failed_load_is_an_error_of_that_request_alone(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(nbd.overlay()), terms)
    nbd.stage.load(0, 1)
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    assert client.call(READ, 0, 2 * EXTENT).error == errno.EIO
    assert client.call(READ, 0, nbd.size_bytes).error == errno.EIO
    assert client.write(EXTENT + 5, b"x") == errno.EIO
    assert client.call(CACHE, EXTENT, EXTENT).error == errno.EIO
    assert client.read(0, EXTENT) == nbd.bytes[:EXTENT]
    let_go(lib.POINT_LOAD_READ)
    assert client.read(0, nbd.size_bytes) == nbd.bytes


def test_disc_waits_for_what_is_outstanding(nbd: NbdStage) -> None:
    client = nbd.client(nbd.export())
    stop_at(lib.POINT_LOAD_READ, 0)
    parked = client.start(READ, 0, PAGE)
    wait_at(lib.POINT_LOAD_READ)
    client.start(DISC)
    let_go(lib.POINT_LOAD_READ)
    assert client.finish(parked).data == nbd.bytes[:PAGE]
    assert client.closed()
    ends = ended(nbd)
    assert [(end.connection_no, end.reason) for end in ends] == [
        (client.connection_no, NbdEnd.DISC)
    ]


def ended(nbd: NbdStage, nr: int = 1) -> list:
    taken: list = []

    def enough() -> bool:
        taken.extend(nbd.server.take_ended())
        return len(taken) >= nr

    until(enough, f"{nr} connections ended")
    return taken


@every_reply
def test_a_wrong_magic_ends_the_connection(nbd: NbdStage, terms: str) -> None:
    client = nbd.client(nbd.export(), terms)
    other = nbd.client(nbd.exports[0], terms)
    magic = COMPACT if terms == "extended" else EXTENDED
    client.link.sendall(magic.to_bytes(4, "big") + bytes(28))
    assert client.closed()
    assert ended(nbd)[0].reason is NbdEnd.PROTOCOL
    assert other.read(0, 1) == nbd.bytes[:1]


def test_a_client_that_leaves_in_the_middle_of_a_write_changed_only_that(nbd: NbdStage) -> None:
    overlay = nbd.overlay(quota=100)
    export = nbd.export(overlay)
    client = nbd.client(export)
    _, header = client.header(WRITE, PAGE, 50 * PAGE)
    client.link.sendall(header + b"z" * (3 * PAGE + 9))
    client.link.close()
    assert ended(nbd)[0].reason is NbdEnd.EOF
    assert overlay.account.status().private_pages == 3
    after = nbd.client(export)
    assert (
        after.read(0, nbd.size_bytes) == nbd.bytes[:PAGE] + b"z" * 3 * PAGE + nbd.bytes[4 * PAGE :]
    )


def test_bytes_that_came_with_the_negotiation_are_served_first(nbd: NbdStage) -> None:
    export = nbd.export()
    maker = nbd.client(export)
    cookie, header = maker.header(READ, 7, 9)
    client = nbd.client(export, early=header)
    client._lengths[cookie] = (READ, 7, 9)
    assert client.finish(cookie).data == nbd.bytes[7:16]


def test_an_export_in_use_cannot_be_closed(nbd: NbdStage) -> None:
    export = nbd.export()
    client = nbd.client(export)
    with pytest.raises(Exception, match="busy"):
        export.close()
    nbd.server.detach(client.connection_no)
    assert client.closed()
    assert ended(nbd)[0].reason is NbdEnd.DETACHED
    export.close()
