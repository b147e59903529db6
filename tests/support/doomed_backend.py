# SPDX-License-Identifier: Apache-2.0
"""A backend of one guest that dies at a named point; run by test_successors.py.

    doomed_backend.py SOCKET_FD SOURCE CAPACITY_EXTENTS QUOTA_BYTES

First it sends the descriptors for a successor: frames, guest's, arrays, quota, ledger. It then
receives a packet with the guest's [uffd, pagemap] and {"base", "pid"}. Each later packet is an
order, which it answers by a packet: {"arm": POINT} makes it die there; {"evict": [..]};
{"settle": 0}; {"open": REGION} loads all and opens it; {"close": 0} closes all regions;
{"released": 0} waits until no hold is left, {"counted": N} until N answered accesses have been
counted, both of which happen after the guest goes on.
"""

import json
import os
import socket
import sys
from pathlib import Path

from regions import collapse_region

from cowshed.accounting import Account, CloseReason, Quota, QuotaPolicy, Region, evict
from cowshed.cache import ExtentState, FileSource, PageStore
from cowshed.cache._core import lib
from cowshed.faults import FaultHandler, FaultOptions


def nr_answered(account: Account) -> int:
    counters = account.status().counters
    return counters.missing_loaded + counters.minor_loaded + counters.hits


link = socket.socket(fileno=int(sys.argv[1]))
store = PageStore(int(sys.argv[3]) * 65536)
image = store.open_image("disk", FileSource.open(Path(sys.argv[2])))
quota = Quota(int(sys.argv[4]), QuotaPolicy.STOP)
account = Account(image, quota)
left = [image.frames_fd, image.guest_fd, image.arrays_fd, quota.fd, account.fd]
socket.send_fds(link, [b"{}"], left)
packet, (uffd, pagemap), _, _ = socket.recv_fds(link, 4096, 2)
told = json.loads(packet)
account.place(uffd, pagemap, [Region(told["base"], 0, image.map_bytes)])
handler = FaultHandler(account.cdata, uffd, os.pidfd_open(told["pid"]), FaultOptions(0, 4096, 0))
link.send(b"{}")
while packet := link.recv(4096):
    order = json.loads(packet)
    if "arm" in order:
        lib.point_arm(order["arm"], lib.POINT_KILL, 0, 1)
    elif "evict" in order:
        evict(image, order["evict"])
    elif "open" in order:
        while image.states().count(ExtentState.ABSENT):
            image.prefetch(0, image.nr_extents)
            image.wait_loaded(0, image.nr_extents, 60_000)
        collapse_region(image, order["open"])
        account.open_region(order["open"], 0, 1 << 40)
    elif "close" in order:
        account.close_regions(CloseReason.REQUEST)
    elif "released" in order:
        while any(image.holds()):
            os.sched_yield()
    elif "counted" in order:
        while nr_answered(account) < order["counted"]:
            os.sched_yield()
    else:
        account.settle()
    link.send(b"{}")
