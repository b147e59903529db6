# SPDX-License-Identifier: Apache-2.0
"""From freeze to thaw no private byte of a guest changes, and nothing of what waited is lost."""

import os

from stage import PAGE, Stage, content


def test_frozen_writes_and_discards_wait_and_reads_do_not(stage: Stage) -> None:
    guest = stage.guest()
    guest.call("fill", page=1, nr_pages=1, byte=1)
    guest.handler.freeze()
    assert guest.account.status().frozen
    write = guest.start("write", offset=PAGE, given_hex="07")
    first = guest.start("write", offset=20 * PAGE, given_hex="07")
    guest.wait_stuck(write)
    guest.wait_stuck(first)
    assert guest.read(1) == b"\1" * PAGE
    assert guest.read(50) == content(50)
    discard = guest.start("discard", page=1, nr_pages=1)
    assert os.pread(guest.fds[2], PAGE, guest.base + PAGE) == b"\1" * PAGE
    assert not guest.answered(discard)
    assert stage.audit().mismatches == []
    guest.handler.thaw()
    guest.finish(discard)
    guest.finish(write)
    guest.finish(first)
    assert not guest.account.status().frozen
    assert stage.audit().mismatches == []
