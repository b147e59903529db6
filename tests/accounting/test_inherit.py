# SPDX-License-Identifier: Apache-2.0
"""Memory that comes with private pages in it, as a forked child's: charged, guarded, granted."""

import fcntl
import struct

from stage import EXTENT_PAGES, PAGE, Stage, content, private_pages, until

from cowshed.accounting import Account
from cowshed.cache._core import lib
from cowshed.faults import FaultHandler, FaultOptions


def test_what_a_mapping_brings_along_is_charged_past_the_quota_and_the_rest_is_guarded(
    stage: Stage,
) -> None:
    """Played with a new account for a guest's memory, its shared pages unprotected as by fork."""
    guest = stage.guest(window=EXTENT_PAGES)
    guest.read(0, 16)
    guest.call("fill", page=2, nr_pages=3, byte=7)
    guest.call("fill", page=40, nr_pages=1, byte=8)
    regions = guest.account.regions()
    guest.handler.stop()
    guest.account.close()
    for page in (0, 1, 5, 6):
        at = guest.base + page * PAGE
        fcntl.ioctl(guest.fds[0], 0xC018AA06, struct.pack("QQQ", at, PAGE, 0))
    guest.quota = stage.quota(2)
    guest.account = Account(stage.image, guest.quota)
    guest.account.place(guest.fds[0], guest.fds[1], regions)
    options = FaultOptions(0, PAGE, 0)
    guest.handler = FaultHandler(guest.account.cdata, guest.fds[0], guest.pidfd, options)
    assert guest.account.adopt_private() == 4
    assert guest.account.adopt_private() == 0
    assert (private_pages(guest), guest.quota.status().used_pages) == (4, 4)
    looks = stage.looks(guest, 0, 16)
    assert looks.count(lib.PAGE_LOOK_PRIVATE) == 3
    assert looks.count(lib.PAGE_LOOK_OPEN) == 0
    assert stage.image.refs()[0] == 1
    assert stage.audit().mismatches == []
    guest.call("poke", page=3, byte=9)  # its own already: no event
    stuck = guest.start("write", offset=0, given_hex="01")
    until(lambda: guest.account.status().stopped_since_ns, "the next charge stops")
    guest.call("discard", page=2, nr_pages=3)
    guest.finish(stuck)
    assert guest.read(0) == b"\1" + content(0)[1:]
    assert stage.audit().mismatches == []
