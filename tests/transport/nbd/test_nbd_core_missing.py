# SPDX-License-Identifier: Apache-2.0
"""Pages that are still elsewhere, under NBD clients that read and write them."""

from __future__ import annotations

import errno
import random
import select
from pathlib import Path

import pytest
from nbd_client import DF, READ, TRIM, WRITE, ZEROES, Client
from nbd_stage import TERMS, NbdStage
from stage import PAGE, MakeStage, until

from cowshed.accounting import MissingPages, Overlay
from cowshed.cache import UsageError

LATE = [(2, 6), (64, 3), (100, 60), (256, 1)]  # the last page is half a page


def page(no: int) -> bytes:
    return bytes([no % 250 + 1]) * PAGE


@pytest.fixture
def missing(nbd: NbdStage) -> tuple[NbdStage, Overlay, MissingPages]:
    overlay = nbd.overlay(quota=1000)
    pages = MissingPages(overlay)
    for run in LATE:
        pages.expect(*run)
    return nbd, overlay, pages


def runs(bitmap: int) -> list[int]:
    return [no for no in range(bitmap.bit_length()) if bitmap >> no & 1]


def all_missing() -> list[int]:
    return [no for first, nr in LATE for no in range(first, first + nr)]


def is_silent(*clients: Client) -> bool:
    return not select.select([client.link for client in clients], [], [], 0.05)[0]


@pytest.mark.parametrize("terms", list(TERMS))
def test_a_read_waits_for_its_pages_alone_and_nobody_waits_with_it(
    missing: tuple[NbdStage, Overlay, MissingPages], terms: str
) -> None:
    nbd, _, pages = missing
    export = nbd.export(missing[1])
    client, other = nbd.client(export, terms), nbd.client(export, terms)
    cookie = client.start(READ, PAGE, 4 * PAGE)
    assert other.read(10 * PAGE, PAGE) == nbd.bytes[10 * PAGE : 11 * PAGE]
    assert client.read(0, 2 * PAGE) == nbd.bytes[: 2 * PAGE]
    assert select.select([pages.fd], [], [], 60)[0]
    assert runs(pages.take_wanted()) == [2, 3, 4]
    assert runs(pages.take_wanted()) == []
    assert pages.arrive(2, page(2) + page(3)) == 2
    assert is_silent(client)
    assert pages.arrive(3, page(9) + page(4)) == 1
    want = nbd.bytes[PAGE : 2 * PAGE] + page(2) + page(3) + page(4)
    assert client.finish(cookie).data == want
    assert pages.nr_left == len(all_missing()) - 3


def test_pages_are_charged_from_the_start(missing: tuple[NbdStage, Overlay, MissingPages]) -> None:
    _, overlay, pages = missing
    assert runs(int.from_bytes(overlay.account.private_bitmap(), "little")) == all_missing()
    assert runs(pages.bitmap()) == all_missing()
    sums = overlay.sums()
    assert (sums.counted, sums.private, sums.used, sums.in_hand) == (len(all_missing()),) * 3 + (0,)
    with pytest.raises(UsageError, match="private already"):
        pages.expect(1, 2)


def test_what_replaces_whole_pages_waits_for_nothing_and_what_comes_late_is_dropped(
    missing: tuple[NbdStage, Overlay, MissingPages],
) -> None:
    nbd, overlay, pages = missing
    client = nbd.client(nbd.export(overlay))
    assert client.write(2 * PAGE, b"w" * PAGE) == 0
    assert client.call(ZEROES, 3 * PAGE, PAGE).error == 0
    assert client.call(TRIM, 4 * PAGE, PAGE).error == 0
    # The image's last page is half a page: all of it.
    assert client.write(256 * PAGE, b"e" * (PAGE // 2)) == 0
    assert pages.arrive(2, page(2) + page(3) + page(4)) == 0
    assert pages.arrive(256, page(256)) == 0
    assert client.read(2 * PAGE, 3 * PAGE) == (
        b"w" * PAGE + bytes(PAGE) + nbd.bytes[4 * PAGE : 5 * PAGE]
    )
    assert client.read(256 * PAGE, PAGE // 2) == b"e" * (PAGE // 2)
    sums = overlay.sums()
    assert sums.counted == sums.private == sums.used == len(all_missing()) - 1
    assert overlay.stray_bitmap().strip(b"\0") == b""


def test_a_write_of_a_part_waits_and_then_has_the_page_around_it(
    missing: tuple[NbdStage, Overlay, MissingPages],
) -> None:
    nbd, overlay, pages = missing
    export = nbd.export(overlay)
    client, other = nbd.client(export), nbd.client(export)
    parts = [client.start(WRITE, 2 * PAGE + 5, payload=b"p" * (PAGE + 10))]
    parts.append(client.start(ZEROES, 5 * PAGE + 1, 2))
    assert other.read(0, PAGE) == nbd.bytes[:PAGE]
    wanted: list[int] = []

    def all_are_wanted() -> bool:
        wanted.extend(runs(pages.take_wanted()))
        return len(wanted) >= 3

    until(all_are_wanted, "the pages of both are wanted")
    assert wanted == [2, 3, 5]
    assert is_silent(client)
    pages.arrive(2, b"".join(page(no) for no in range(2, 6)))
    for cookie in parts:
        assert client.finish(cookie).error == 0
    got = other.read(2 * PAGE, 4 * PAGE)
    want = bytearray(b"".join(page(no) for no in range(2, 6)))
    want[5 : PAGE + 15] = b"p" * (PAGE + 10)
    want[3 * PAGE + 1 : 3 * PAGE + 3] = bytes(2)
    assert got == want


def test_a_part_that_waits_for_a_page_that_is_trimmed_meanwhile_is_of_the_image(
    missing: tuple[NbdStage, Overlay, MissingPages],
) -> None:
    nbd, overlay, _ = missing
    export = nbd.export(overlay)
    client, other = nbd.client(export), nbd.client(export)
    cookie = client.start(WRITE, 64 * PAGE + 5, payload=b"p")
    client.read(0, 1)
    assert other.call(TRIM, 64 * PAGE, PAGE).error == 0
    assert client.finish(cookie).error == 0
    want = bytearray(nbd.bytes[64 * PAGE : 65 * PAGE])
    want[5:6] = b"p"
    assert other.read(64 * PAGE, PAGE) == want


@pytest.mark.parametrize("terms", list(TERMS))
def test_a_lost_page_is_an_error_until_it_is_written_or_arrives(
    missing: tuple[NbdStage, Overlay, MissingPages], terms: str
) -> None:
    nbd, overlay, pages = missing
    client = nbd.client(nbd.export(overlay), terms)
    waiting = [
        client.start(READ, 3 * PAGE, PAGE),
        client.start(WRITE, 4 * PAGE + 1, payload=b"x"),
    ]
    client.read(0, 1)
    assert pages.lose(0, 200) == 69
    assert pages.lose(0, 200) == 0
    assert pages.nr_lost == 69
    for cookie in waiting:
        assert client.finish(cookie).error == errno.EIO
    assert client.call(READ, 0, 20 * PAGE).error == errno.EIO
    assert client.write(64 * PAGE + 1, b"x") == errno.EIO
    assert client.write(64 * PAGE, b"h" * PAGE) == 0
    assert client.read(64 * PAGE, PAGE) == b"h" * PAGE
    assert pages.arrive(3, page(3)) == 1
    assert client.read(3 * PAGE, PAGE) == page(3)
    pages.find()
    cookie = client.start(READ, 4 * PAGE, PAGE)
    client.read(0, 1)
    pages.arrive(4, page(4))
    assert client.finish(cookie).data == page(4)


def test_long_reads_wait_too(missing: tuple[NbdStage, Overlay, MissingPages]) -> None:
    nbd, overlay, pages = missing
    export = nbd.export(overlay)
    readers = [nbd.client(export, terms) for terms in TERMS]
    cookies = [reader.start(READ, 0, nbd.size_bytes) for reader in readers]
    one = readers[1].start(READ, PAGE, 60 * PAGE, DF)
    want = bytearray(nbd.bytes)
    for first, nr in reversed(LATE):
        content = b"".join(page(no) for no in range(first, first + nr))
        want[first * PAGE : (first + nr) * PAGE] = content[: nbd.size_bytes - first * PAGE]
        pages.arrive(first, content)
    for reader, cookie in zip(readers, cookies, strict=True):
        assert reader.finish(cookie).data == want[: nbd.size_bytes]
    assert readers[1].finish(one).data == want[PAGE : 61 * PAGE]
    assert pages.nr_left == 0


def test_a_client_that_waits_can_be_ended(missing: tuple[NbdStage, Overlay, MissingPages]) -> None:
    nbd, overlay, _ = missing
    client = nbd.client(nbd.export(overlay))
    client.start(READ, 2 * PAGE, PAGE)
    client.start(WRITE, 4 * PAGE + 1, payload=b"x")
    client.read(0, 1)
    nbd.disconnect()


def test_nothing_is_said_of_zeros_in_missing_pages(
    missing: tuple[NbdStage, Overlay, MissingPages],
) -> None:
    nbd, overlay, pages = missing
    client = nbd.client(nbd.export(overlay))
    pages.arrive(2, page(2))
    client.call(ZEROES, 3 * PAGE, PAGE)
    status = client.call(7, 0, 9 * PAGE).runs
    flags = [flag for length, flag in status[1] for _ in range(length // PAGE)]
    assert flags[:9] == [0, 0, 0, 2, 0, 0, 0, 0, 0]
    assert [flag for length, flag in status[3] for _ in range(length // PAGE)][:9] == (
        [0, 0] + [1] * 6 + [0]
    )


@pytest.mark.parametrize("how", ["closed", "left"])
def test_files_know_which_pages_are_missing_and_which_came(
    how: str, tmp_path: Path, make_stage: MakeStage
) -> None:
    nbd = NbdStage(make_stage(nr_pages=257))
    try:
        overlay = nbd.overlay(files=tmp_path)
        pages = MissingPages(overlay)
        pages.expect(5, 100)
        overlay.flush()
        client = nbd.client(nbd.export(overlay))
        pages.arrive(5, page(5))
        assert client.write(6 * PAGE, page(6)) == 0
        assert client.call(ZEROES, 7 * PAGE, PAGE).error == 0
        assert client.call(TRIM, 8 * PAGE, PAGE).error == 0
        if how == "closed":
            nbd.disconnect()
        else:
            overlay.flush()
            # What a kill leaves: copies, since the files are locked.
            folder = tmp_path / "copy"
            folder.mkdir()
            for name in ("x.pages", "x.map"):
                (folder / name).write_bytes((tmp_path / name).read_bytes())
            tmp_path = folder
        overlay = nbd.overlay(files=tmp_path)
        pages = MissingPages(overlay)
        assert runs(pages.bitmap()) == list(range(9, 105))
        assert runs(int.from_bytes(overlay.account.private_bitmap(), "little")) == [
            5, 6, 7, *range(9, 105)
        ]  # fmt: skip
        client = nbd.client(nbd.export(overlay))
        want = page(5) + page(6) + bytes(PAGE) + nbd.bytes[8 * PAGE : 9 * PAGE]
        assert client.read(5 * PAGE, 4 * PAGE) == want
        cookie = client.start(READ, 50 * PAGE, PAGE)
        client.read(0, 1)
        pages.arrive(50, page(50))
        assert client.finish(cookie).data == page(50)
    finally:
        nbd.close()


def test_whatever_clients_do_while_pages_arrive_every_byte_is_right(
    missing: tuple[NbdStage, Overlay, MissingPages],
) -> None:
    nbd, overlay, pages = missing
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    client = nbd.client(nbd.export(overlay))
    model = bytearray(nbd.bytes)
    for no in all_missing():
        model[no * PAGE : (no + 1) * PAGE] = page(no)
    size = nbd.size_bytes
    model = model[:size]
    to_come = all_missing()
    rng.shuffle(to_come)
    waiting: dict[int, tuple[int, int, bytes]] = {}
    while to_come:
        for _ in range(4):
            at = rng.randrange(size - 3 * PAGE)
            length = rng.choice((1, 700, PAGE, 2 * PAGE))
            begin, end = at // PAGE * PAGE, -(-(at + length) // PAGE) * PAGE
            # What is under way at once touches other pages: what comes first is not said.
            if any(begin < stop and start < end for start, stop, _ in waiting.values()):
                continue
            what = rng.choice(("read", "write", "trim"))
            if what == "read":
                want = bytes(model[at : at + length])
                waiting[client.start(READ, at, length)] = (begin, end, want)
            elif what == "trim":
                assert client.call(TRIM, begin, PAGE).error == 0
                model[begin : begin + PAGE] = nbd.bytes[begin : begin + PAGE]
            else:
                data = rng.randbytes(length)
                waiting[client.start(WRITE, at, payload=data)] = (begin, end, b"")
                model[at : at + length] = data
        no = to_come.pop()
        pages.arrive(no, page(no))
    for cookie, (_, _, want) in waiting.items():
        reply = client.finish(cookie)
        assert (reply.error, reply.data) == (0, want)
    assert client.read(0, size) == model
    assert pages.nr_left == 0
    sums = overlay.sums()
    assert sums.counted == sums.private == sums.used
