# SPDX-License-Identifier: Apache-2.0
"""The audit of overlays: silent whoever writes meanwhile, and naming what is wrong."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_client import TRIM, WRITE, ZEROES, Client
from nbd_stage import NbdStage
from stage import PAGE, let_go, stop_at, until, wait_at

from cowshed.accounting import Account, AuditReport, Overlay, OverlaySums, Quota, QuotaPolicy, audit
from cowshed.cache import Image
from cowshed.cache._core import lib

NR_AUDITS = 200
NR_LOOKS = 2000
NR_WRITERS = 3
NR_PAGES = 256
USED_OFFSET = 24  # struct quota_header


def audited(nbd: NbdStage, **overlays: Overlay) -> AuditReport:
    @contextlib.contextmanager
    def accounts(_: Image) -> Iterator[dict[str, Account]]:
        yield {}

    @contextlib.contextmanager
    def kept(_: Image) -> Iterator[dict[str, Overlay]]:
        yield overlays

    return audit(lambda: [nbd.stage.image], accounts, kept)


def found(report: AuditReport) -> list[tuple[str, str, str, int, int, int]]:
    return [
        (one.check, one.guest, one.place, one.place_no, one.expected, one.found)
        for one in report.mismatches
    ]


@pytest.mark.parametrize("in_files", [False, True], ids=["in-memory", "in-files"])
def test_an_audit_under_writes_finds_nothing(
    nbd: NbdStage, tmp_path: Path, rng: random.Random, in_files: bool
) -> None:
    """Requests take quota before they use it, trims give it back, the quota refuses some."""
    overlay = nbd.overlay(quota=NR_PAGES // 2, files=tmp_path if in_files else None)
    export = nbd.export(overlay)
    stop = threading.Event()
    done = [0] * NR_WRITERS

    def write(client: Client, which: int, dice: random.Random) -> None:
        while not stop.is_set():
            cookies = []
            for _ in range(16):
                page, nr = dice.randrange(NR_PAGES - 40), dice.randrange(1, 40)
                kind = dice.choice([WRITE, WRITE, ZEROES, TRIM])
                payload = bytes([which + 1]) * (nr * PAGE) if kind == WRITE else None
                cookies.append(client.start(kind, page * PAGE, nr * PAGE, payload=payload))
            for cookie in cookies:
                client.finish(cookie)
            done[which] += 1

    threads = [
        threading.Thread(
            target=write, args=(nbd.client(export), which, random.Random(rng.random()))
        )
        for which in range(NR_WRITERS)
    ]
    for thread in threads:
        thread.start()
    try:
        until(lambda: min(done) > 0, "every writer writes")
        reports = [audited(nbd, g=overlay) for _ in range(NR_AUDITS)]
        looks = [(overlay.sums(), overlay.stray_bitmap()) for _ in range(NR_LOOKS)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [found(report) for report in reports if report.mismatches] == []
    # Every single look is right, not only one of those that an audit takes.
    assert all(one.counted == one.private for one, _ in looks)
    assert all(one.used == one.private + one.in_hand for one, _ in looks)
    assert not any(any(strays) for _, strays in looks)
    last = audited(nbd, g=overlay)
    assert last.checked["overlays"] == 1
    assert last.checked["private_pages"] == overlay.account.status().private_pages
    assert overlay.sums().in_hand == 0


def test_what_a_request_has_in_hand_is_no_mismatch(nbd: NbdStage) -> None:
    """Its quota is taken when its header is read, and its payload may be long in coming."""
    overlay = nbd.overlay(quota=64)
    client = nbd.client(nbd.export(overlay))
    payload = bytes([7]) * (32 * PAGE)
    cookie, header = client.header(WRITE, 0, len(payload), payload=payload)
    client.link.sendall(header + payload[: 10 * PAGE])
    until(lambda: overlay.sums().in_hand > 0, "the quota was taken")
    assert audited(nbd, g=overlay).mismatches == []
    client.link.sendall(payload[10 * PAGE :])
    assert client.finish(cookie).error == 0
    assert overlay.sums() == OverlaySums(counted=32, private=32, used=32, in_hand=0)


def test_bytes_of_a_page_that_is_just_becoming_private_are_no_mismatch(nbd: NbdStage) -> None:
    overlay = nbd.overlay()
    client = nbd.client(nbd.export(overlay))
    stop_at(lib.POINT_OVERLAY_WRITTEN)
    cookie = client.start(WRITE, 0, payload=bytes([7]) * PAGE)
    wait_at(lib.POINT_OVERLAY_WRITTEN)
    strays: list[bytes] = []
    look = threading.Thread(target=lambda: strays.append(overlay.stray_bitmap()))
    look.start()
    until(lambda: waits_for_a_lock(look), "the look waits for the writer")
    let_go(lib.POINT_OVERLAY_WRITTEN)
    look.join()
    assert client.finish(cookie).error == 0
    assert not any(strays[0])


def waits_for_a_lock(thread: threading.Thread) -> bool:
    with contextlib.suppress(OSError):
        return "futex" in Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()
    return False


def test_a_private_page_of_zeros_needs_no_bytes(nbd: NbdStage) -> None:
    overlay = nbd.overlay()
    client = nbd.client(nbd.export(overlay))
    assert client.call(ZEROES, 0, 4 * PAGE).error == 0
    assert not any(overlay.stored_bitmap())
    report = audited(nbd, g=overlay)
    assert report.mismatches == []
    assert report.checked["private_pages"] == 4


def test_bytes_of_a_page_that_is_not_private_are_reported(nbd: NbdStage) -> None:
    overlay = nbd.overlay()
    client = nbd.client(nbd.export(overlay))
    assert client.write(0, bytes(PAGE)) == 0
    os.pwrite(overlay.fd, b"stray", 9 * PAGE)
    assert found(audited(nbd, g=overlay)) == [("private", "g", "page", 9, 0, 1)]


def test_a_quota_that_paid_for_too_much_is_reported(nbd: NbdStage) -> None:
    quota = Quota(8 * PAGE, QuotaPolicy.STOP)
    overlay = Overlay(Account(nbd.stage.image, quota))
    nbd.overlays.append(overlay)
    client = nbd.client(nbd.export(overlay))
    assert client.write(0, bytes(3 * PAGE)) == 0
    with mmap.mmap(quota.fd, 32) as header:
        struct.pack_into("Q", header, USED_OFFSET, 5)
        assert found(audited(nbd, g=overlay)) == [("private", "g", "purse", 0, 3, 5)]
        struct.pack_into("Q", header, USED_OFFSET, 3)
    quota.close()
