# SPDX-License-Identifier: Apache-2.0
"""A backend with one overlay in files, to be killed: overlay_child.py FOLDER POINT.

Fills pages 0..9 with 1 and flushes; arms the point to kill; then trims pages 0..4,
writes 2 to pages 5..14, and flushes. It never comes back from that.
"""

import sys
from pathlib import Path

from nbd_client import FLUSH, TRIM
from nbd_stage import NbdStage
from stage import PAGE, Stage

from cowshed.cache._core import lib

folder, point = Path(sys.argv[1]), int(sys.argv[2])
nbd = NbdStage(Stage(folder, nr_pages=64))
client = nbd.client(nbd.export(nbd.overlay(files=folder)))
assert client.write(0, b"\1" * 10 * PAGE) == 0
assert client.call(FLUSH).error == 0
assert lib.point_arm(point, lib.POINT_KILL, 0, 1) == 0
assert client.call(TRIM, 0, 5 * PAGE).error == 0
assert client.write(5 * PAGE, b"\2" * 10 * PAGE) == 0
client.call(FLUSH)
print("still here")
