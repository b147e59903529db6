# SPDX-License-Identifier: Apache-2.0
"""The block request engine under a frontend that has no socket (frontend.c)."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_frontend import (
    ALLOCATE,
    DISCARD,
    FAST,
    FLUSH,
    FUA,
    PREFETCH,
    READ,
    RUN_BYTES,
    SPLIT,
    WRITE,
    ZERO,
    MemoryFrontend,
    Request,
)
from nbd_stage import NbdStage
from stage import PAGE, fail_at, let_go, stop_at, wait_at

from cowshed.accounting import MissingPages, Overlay
from cowshed.cache._core import lib

Front = Callable[..., MemoryFrontend]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frontend")


@pytest.fixture
def front(nbd: NbdStage, folder: Path) -> Iterator[Front]:
    """Make a frontend of the stage's image, with an overlay or none."""
    made: list[MemoryFrontend] = []

    def make(overlay: Overlay | None = None) -> MemoryFrontend:
        made.append(MemoryFrontend(folder, nbd.stage.image, overlay))
        return made[-1]

    yield make
    for point in range(lib.POINT_NR):
        lib.point_release(point)
    for each in made:
        each.close()


def write(queue: MemoryFrontend, offset: int, payload: bytes, flags: int = 0) -> int:
    """Write, with all of the payload at once; the error."""
    request = queue.submit(WRITE, offset, len(payload), flags)
    taken = queue.write(request, payload)
    while taken < len(payload):
        assert queue.is_woken()
        queue.run()
        taken += queue.write(request, payload[taken:])
    return queue.finish(request)


def read(queue: MemoryFrontend, offset: int, length: int) -> bytes:
    request = queue.submit(READ, offset, length)
    assert queue.finish(request) == 0
    return request.bytes


def test_what_is_resident_is_read_within_the_call(nbd: NbdStage, front: Front) -> None:
    nbd.stage.load()
    queue = front()
    request = queue.submit(READ, 5000, 70_000)
    assert (request.is_done, request.state.err, request.state.whole) == (True, 0, True)
    assert request.bytes == nbd.bytes[5000:75_000]
    assert queue.state.nr_hits == 2
    assert queue.state.nr_misses == 0


def test_a_miss_waits_for_its_load_and_holds_nothing_meanwhile(nbd: NbdStage, front: Front) -> None:
    nbd.stage.load(0, 1)
    queue = front()
    stop_at(lib.POINT_LOAD_READ, 0)  # readahead may come there first
    request = queue.submit(READ, 0, 3 * PAGE + (64 << 10))
    wait_at(lib.POINT_LOAD_READ)
    queue.run()
    assert not request.is_done
    assert (queue.state.nr_waiting, queue.state.nr_undone) == (1, 1)
    assert nbd.stage.evict(0) == [0]
    let_go(lib.POINT_LOAD_READ)
    assert queue.finish(request) == 0
    assert request.bytes == nbd.bytes[: request.length]
    assert request.state.missed
    assert request.state.whole
    assert (queue.state.nr_waiting, queue.state.buffered_bytes) == (0, 0)


def test_a_load_that_fails_fails_the_requests_that_waited_for_it(
    nbd: NbdStage, front: Front
) -> None:
    queue = front()
    fail_at(lib.POINT_LOAD_READ, errno.EIO)
    requests = [queue.submit(READ, 0, PAGE), queue.submit(PREFETCH, 0, 9 * PAGE)]
    assert [queue.finish(each) for each in requests] == [-errno.EIO, -errno.EIO]
    lib.point_release(lib.POINT_LOAD_READ)
    assert read(queue, 0, PAGE) == nbd.bytes[:PAGE]


@pytest.mark.parametrize("flags", [0, SPLIT])
def test_a_long_read_is_given_whole_or_in_runs(nbd: NbdStage, front: Front, flags: int) -> None:
    queue = front()
    request = queue.submit(READ, 100, 3 * RUN_BYTES, flags)
    assert queue.finish(request) == 0
    assert request.bytes == nbd.bytes[100 : 100 + 3 * RUN_BYTES]
    assert (request.state.nr_runs, request.state.whole) == ((1, True) if not flags else (4, False))


def test_a_prefetch_completes_once_its_range_is_resident(nbd: NbdStage, front: Front) -> None:
    queue = front()
    assert queue.finish(queue.submit(PREFETCH, 0, nbd.size_bytes)) == 0
    assert read(queue, 0, 4 * PAGE) == nbd.bytes[: 4 * PAGE]
    assert queue.state.nr_undone == 0, "everything was there"


def test_a_missing_page_is_waited_for_alone(nbd: NbdStage, front: Front) -> None:
    overlay = nbd.overlay()
    pages = MissingPages(overlay)
    pages.expect(2, 3)
    nbd.stage.load()
    queue = front(overlay)
    late = queue.submit(READ, PAGE, 3 * PAGE)
    part = queue.submit(WRITE, 4 * PAGE + 5, 2)
    assert queue.write(part, b"pp") == 2
    queue.run()
    assert read(queue, 8 * PAGE, PAGE) == nbd.bytes[8 * PAGE : 9 * PAGE]
    assert not late.is_done
    assert not part.is_done
    pages.arrive(2, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)
    assert queue.finish(late) == queue.finish(part) == 0
    assert late.bytes == nbd.bytes[PAGE : 2 * PAGE] + b"a" * PAGE + b"b" * PAGE
    assert read(queue, 4 * PAGE, 8) == b"cccccppc"


def test_a_lost_page_fails_who_needs_it(nbd: NbdStage, front: Front) -> None:
    overlay = nbd.overlay()
    pages = MissingPages(overlay)
    pages.expect(2, 1)
    queue = front(overlay)
    request = queue.submit(READ, 2 * PAGE, 1)
    pages.lose(2, 1)
    assert queue.finish(request) == -errno.EIO
    assert queue.finish(queue.submit(READ, 2 * PAGE, 1)) == -errno.EIO
    assert write(queue, 2 * PAGE, b"w" * PAGE) == 0
    assert read(queue, 2 * PAGE, 3) == b"www"


def test_at_the_quota_nothing_of_a_request_is_done(nbd: NbdStage, front: Front) -> None:
    overlay = nbd.overlay(quota=2)
    queue = front(overlay)
    assert write(queue, PAGE, b"w" * PAGE) == 0
    assert write(queue, PAGE - 1, b"x" * (2 * PAGE)) == -errno.ENOSPC
    assert queue.finish(queue.submit(ZERO, 0, 4 * PAGE)) == -errno.ENOSPC
    assert read(queue, 0, 3 * PAGE) == (
        nbd.bytes[:PAGE] + b"w" * PAGE + nbd.bytes[2 * PAGE : 3 * PAGE]
    )
    assert overlay.sums().used == 1
    assert write(queue, PAGE, b"y" * (2 * PAGE)) == 0


def test_payload_may_come_in_any_portions(nbd: NbdStage, front: Front) -> None:
    overlay = nbd.overlay()
    queue = front(overlay)
    payload = random.randbytes(5 * PAGE)
    request = queue.submit(WRITE, 3 * PAGE - 7, len(payload))
    pending, at = b"", 0
    while at < len(payload) or pending:
        nr = random.randrange(1, 3000)
        pending += payload[at : at + nr]
        at += nr
        taken = queue.write(request, pending)
        pending = pending[taken:]
    assert queue.finish(request) == 0
    assert read(queue, 3 * PAGE - 9, len(payload) + 4) == (
        nbd.bytes[3 * PAGE - 9 : 3 * PAGE - 7] + payload + nbd.bytes[8 * PAGE - 7 : 8 * PAGE - 5]
    )
    assert overlay.sums().in_hand == 0


def test_a_freeze_stalls_the_queue_in_its_order_and_reads_go_on(
    nbd: NbdStage, front: Front
) -> None:
    overlay = nbd.overlay()
    nbd.stage.load()
    queue, reader = front(overlay), front(overlay)
    overlay.freeze()
    first = queue.submit(WRITE, 0, PAGE)
    assert queue.write(first, b"1" * PAGE) == 0
    assert (queue.state.frozen, queue.state.accepts) == (True, False)
    assert read(reader, 0, PAGE) == nbd.bytes[:PAGE]
    assert not queue.is_woken(0.05)
    overlay.thaw()
    assert queue.is_woken()
    queue.run()
    assert queue.state.accepts
    assert queue.write(first, b"1" * PAGE) == PAGE
    assert first.is_done
    assert write(queue, 0, b"2") == 0
    assert read(reader, 0, 2) == b"21"


@pytest.mark.parametrize("op", [ZERO, DISCARD])
def test_a_range_that_is_cleared_waits_for_a_thaw(nbd: NbdStage, front: Front, op: int) -> None:
    overlay = nbd.overlay()
    queue = front(overlay)
    assert write(queue, 0, b"w" * (4 * PAGE)) == 0
    overlay.freeze()
    request = queue.submit(op, PAGE, 2 * PAGE)
    queue.run()
    assert not request.is_done
    overlay.thaw()
    assert queue.finish(request) == 0
    middle = bytes(2 * PAGE) if op == ZERO else nbd.bytes[PAGE : 3 * PAGE]
    assert read(queue, 0, 4 * PAGE) == b"w" * PAGE + middle + b"w" * PAGE


def test_zeros_are_promised_fast_only_where_they_are(nbd: NbdStage, front: Front) -> None:
    overlay = nbd.overlay()
    queue = front(overlay)
    assert queue.finish(queue.submit(ZERO, 1, PAGE, FAST)) == -errno.ENOTSUP
    assert queue.finish(queue.submit(ZERO, 0, PAGE, FAST | ALLOCATE)) == -errno.ENOTSUP
    assert queue.finish(queue.submit(ZERO, 0, PAGE, FAST)) == 0
    assert queue.finish(queue.submit(ZERO, PAGE, PAGE, ALLOCATE)) == 0
    assert queue.finish(queue.submit(ZERO, 2 * PAGE + 1, 7)) == 0
    want = bytearray(nbd.bytes[: 3 * PAGE])
    want[: 2 * PAGE] = bytes(2 * PAGE)
    want[2 * PAGE + 1 : 2 * PAGE + 8] = bytes(7)
    assert read(queue, 0, 3 * PAGE) == want


def test_a_client_that_takes_nothing_holds_no_extent(nbd: NbdStage, front: Front) -> None:
    queue = front()
    stop_at(lib.POINT_LOAD_READ, 0)
    requests = [queue.submit(READ, no * (64 << 10), 64 << 10) for no in range(8)]
    queue.stall(True)
    let_go(lib.POINT_LOAD_READ)
    assert nbd.stage.image.wait_loaded(0, 8, 20_000)
    queue.run()
    assert len(nbd.stage.evict(*range(8))) == 8
    while queue.is_woken(0):
        queue.run()
    assert not any(each.is_done for each in requests)
    assert queue.state.buffered_bytes == 8 * (64 << 10)
    queue.stall(False)
    for no, request in enumerate(requests):
        assert queue.finish(request) == 0
        assert request.bytes == nbd.bytes[no * (64 << 10) : (no + 1) * (64 << 10)]
    assert queue.state.buffered_bytes == 0


def test_a_queue_takes_no_more_than_it_may(nbd: NbdStage, front: Front) -> None:
    queue = front()
    stop_at(lib.POINT_LOAD_READ, 0)
    requests: list[Request] = []
    while queue.state.accepts:
        requests.append(queue.submit(READ, 0, 1))
    assert len(requests) == 256
    let_go(lib.POINT_LOAD_READ)
    assert all(queue.finish(each) == 0 for each in requests)
    assert queue.state.accepts


def test_a_client_that_leaves_ends_its_requests_once_their_loads_end(
    nbd: NbdStage, front: Front
) -> None:
    overlay = nbd.overlay()
    pages = MissingPages(overlay)
    pages.expect(128, 1)
    queue = front(overlay)
    stop_at(lib.POINT_LOAD_READ)
    loading = queue.submit(READ, 0, PAGE)
    wait_at(lib.POINT_LOAD_READ)
    missing = queue.submit(READ, 128 * PAGE, 1)
    long = queue.submit(READ, 64 * PAGE, 2 * RUN_BYTES, SPLIT)
    payload = queue.submit(WRITE, 8 * PAGE, 2 * PAGE)
    assert queue.write(payload, b"w" * PAGE) == PAGE
    queue.cancel(payload)
    queue.leave()
    assert payload.state.err == missing.state.err == long.state.err == -errno.ESHUTDOWN
    assert overlay.sums().in_hand == 0
    assert not loading.is_done
    let_go(lib.POINT_LOAD_READ)
    assert queue.finish(loading) == 0
    assert loading.bytes == bytes(PAGE), "nobody is given anything"


def test_a_flush_and_a_durable_write_wait_for_the_disk(
    nbd: NbdStage, front: Front, tmp_path: Path
) -> None:
    overlay = nbd.overlay(files=tmp_path)
    queue = front(overlay)
    assert write(queue, 0, b"w" * PAGE) == 0
    stop_at(lib.POINT_OVERLAY_FLUSH)
    flush = queue.submit(FLUSH)
    wait_at(lib.POINT_OVERLAY_FLUSH)
    durable = queue.submit(WRITE, PAGE, PAGE, FUA)
    assert queue.write(durable, b"d" * PAGE) == PAGE
    queue.run()
    assert not flush.is_done
    assert not durable.is_done
    let_go(lib.POINT_OVERLAY_FLUSH)
    assert queue.finish(flush) == queue.finish(durable) == 0
    fail_at(lib.POINT_OVERLAY_FLUSH, errno.EIO)
    assert write(queue, 0, b"x", FUA) == -errno.EIO


def test_random_requests_read_what_a_model_does(nbd: NbdStage, front: Front) -> None:
    overlay = nbd.overlay(quota=150)
    queue = front(overlay)
    model = bytearray(nbd.bytes)
    private: set[int] = set()
    for _ in range(600):
        offset = random.randrange(nbd.size_bytes)
        length = random.randrange(
            1, min(random.choice((9, 5000, 9 * PAGE)), nbd.size_bytes - offset) + 1
        )
        pages = range(offset // PAGE, (offset + length + PAGE - 1) // PAGE)
        match random.choice((READ, READ, WRITE, DISCARD, ZERO, PREFETCH, "evict")):
            case "evict":
                nbd.stage.evict(*random.sample(range(nbd.stage.image.nr_extents), 4))
            case int(op) if op == READ:
                assert read(queue, offset, length) == model[offset : offset + length]
            case int(op) if op == PREFETCH:
                assert queue.finish(queue.submit(PREFETCH, offset, length)) == 0
            case int(op) if op == DISCARD:
                assert queue.finish(queue.submit(DISCARD, offset, length)) == 0
                end = offset + length
                whole = [
                    no
                    for no in pages
                    if no * PAGE >= offset and min((no + 1) * PAGE, nbd.size_bytes) <= end
                ]
                for no in whole:
                    model[no * PAGE : (no + 1) * PAGE] = nbd.bytes[no * PAGE : (no + 1) * PAGE]
                private -= set(whole)
            case op:
                payload = random.randbytes(length) if op == WRITE else bytes(length)
                err = (
                    write(queue, offset, payload)
                    if op == WRITE
                    else queue.finish(queue.submit(ZERO, offset, length))
                )
                assert err == (-errno.ENOSPC if len(private | set(pages)) > 150 else 0)
                if not err:
                    model[offset : offset + length] = payload
                    private |= set(pages)
        assert overlay.sums().private == len(private)
    assert queue.state.nr_requests == queue.state.nr_waits == 0
