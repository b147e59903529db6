# SPDX-License-Identifier: Apache-2.0
"""A process with a page store that dies at a named point, run by test_adoption.py.

Arguments: a socket's number, the source's path, capacity in extents, a point's number or -1,
whether it dies in an eviction ("evict") or a load ("load"), and the size of the image's extents, a
multiple of those that the capacity is in. Sends frames, guest's and arrays'
descriptors over the socket, makes extents 0 to 5 resident, pins 5, and dies while it loads 6, or
evicts 1 and 2; without a point it reports and then dies.
"""

import os
import signal
import socket
import sys
from pathlib import Path

from cowshed.accounting import EvictReason, evict
from cowshed.cache import FileSource, PageStore
from cowshed.cache._core import lib

link = socket.socket(fileno=int(sys.argv[1]))
source, capacity, point, end = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
store = PageStore(capacity * 65536)
extent_bytes = int(sys.argv[6])
image = store.open_image("image", FileSource.open(Path(source)), extent_bytes=extent_bytes)
socket.send_fds(link, [b"fds"], [image.frames_fd, image.guest_fd, image.arrays_fd])
image.pin(5, 1, capacity)
for extent in range(6):
    image.prefetch(extent, 1)
    image.wait_loaded(extent, 1, 20_000)
evict(image, [4], EvictReason.REQUEST)
image.note_reloads(2)
if point >= 0:
    lib.point_arm(point, lib.POINT_KILL, 0, 1)
if end == "evict":
    evict(image, [1, 2], EvictReason.REQUEST)
else:
    image.prefetch(6, 1)
    image.wait_loaded(6, 1, 20_000)
link.send(b"done")
os.kill(os.getpid(), signal.SIGKILL)
