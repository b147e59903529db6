# SPDX-License-Identifier: Apache-2.0
"""Overlays that are followed and frozen, under NBD clients that go on writing."""

import os
import select

from nbd_client import TRIM, WRITE, ZEROES
from nbd_stage import NbdStage
from stage import PAGE


def pages_of(bitmap: bytes) -> list[int]:
    return [i for i in range(len(bitmap) * 8) if bitmap[i // 8] >> i % 8 & 1]


def test_what_is_written_to_an_overlay_is_dirty_once(nbd: NbdStage) -> None:
    overlay = nbd.overlay()
    client = nbd.client(nbd.export(overlay))
    client.write(3 * PAGE, b"a" * 2 * PAGE)
    overlay.track(True)
    assert pages_of(overlay.take_dirty()) == [3, 4]
    assert pages_of(overlay.take_dirty()) == []
    client.write(4 * PAGE + 7, b"b")
    client.call(ZEROES, 70 * PAGE, PAGE)
    client.call(TRIM, 3 * PAGE, PAGE)
    assert pages_of(overlay.take_dirty()) == [3, 4, 70]
    assert pages_of(overlay.account.private_bitmap()) == [4, 70]
    assert os.pread(overlay.fd, 9, 4 * PAGE) == b"a" * 7 + b"ba"
    overlay.track(False)


def test_changes_to_a_frozen_overlay_wait_and_reads_do_not(nbd: NbdStage) -> None:
    overlay = nbd.overlay()
    export = nbd.export(overlay)
    writer, patcher, zeroer, trimmer, reader = [nbd.client(export) for _ in range(5)]
    writer.write(0, b"a" * 8 * PAGE)
    overlay.freeze()
    waiting = [
        (writer, writer.start(WRITE, 0, payload=b"w" * PAGE)),
        # Of a page that is not resident.
        (patcher, patcher.start(WRITE, 100 * PAGE + 3, payload=b"p")),
        (zeroer, zeroer.start(ZEROES, 2 * PAGE, PAGE)),
        (trimmer, trimmer.start(TRIM, 3 * PAGE, PAGE)),
    ]
    assert reader.read(0, 8 * PAGE) == b"a" * 8 * PAGE
    assert reader.read(100 * PAGE, PAGE) == nbd.bytes[100 * PAGE : 101 * PAGE]
    assert not select.select([client.link for client, _ in waiting], [], [], 0.1)[0]
    overlay.thaw()
    for client, cookie in waiting:
        assert client.finish(cookie).error == 0
    assert reader.read(0, 5 * PAGE) == (
        b"w" * PAGE + b"a" * PAGE + bytes(PAGE) + nbd.bytes[3 * PAGE : 4 * PAGE] + b"a" * PAGE
    )
    assert reader.read(100 * PAGE + 3, 1) == b"p"


def test_a_client_that_waits_for_a_thaw_can_be_ended(nbd: NbdStage) -> None:
    overlay = nbd.overlay()
    client = nbd.client(nbd.export(overlay))
    overlay.freeze()
    client.start(WRITE, 5, payload=b"x")
    client.start(WRITE, 0, payload=b"y" * PAGE)
    nbd.disconnect()
