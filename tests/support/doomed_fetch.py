# SPDX-License-Identifier: Apache-2.0
"""A process with a remote image that dies while it fetches, run by test_fetch_deaths.py.

Arguments: a socket's number, the source's path, and a point's number or -1. Sends frames', guest's
and arrays' descriptors over the socket, gives the first two extents of a block, and dies while it
gives the third; without a point it reports that it has given half of the third, and then dies.
"""

import os
import signal
import socket
import sys
from pathlib import Path

from cowshed.cache import PageStore, RemoteSource
from cowshed.cache._core import lib

EXTENT = 65536
link = socket.socket(fileno=int(sys.argv[1]))
content, point = Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
store = PageStore(80 * EXTENT)
queue = store.open_queue()
source = RemoteSource("http://origin/image", len(content), '"1"', 0)
image = store.open_image("image", source, queue=queue)
socket.send_fds(link, [b"fds"], [image.frames_fd, image.guest_fd, image.arrays_fd])
image.prefetch(0, 8)
if point == lib.POINT_FETCH_TAKEN:
    lib.point_arm(point, lib.POINT_KILL, 0, 1)
fetch = queue.take(20.0)
assert fetch is not None
fetch.fill(content[: 2 * EXTENT])
if point >= 0:
    lib.point_arm(point, lib.POINT_KILL, 0, 1)
fetch.fill(content[2 * EXTENT : 2 * EXTENT + EXTENT // 2])
if point >= 0:
    fetch.fill(content[2 * EXTENT + EXTENT // 2 : 3 * EXTENT])
link.send(b"done")
os.kill(os.getpid(), signal.SIGKILL)
