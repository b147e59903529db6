# SPDX-License-Identifier: Apache-2.0
"""A backend with one overlay, to be killed in a request: doomed_overlay.py SOCKET FOLDER POINT OP.

Writes 1 to pages 0..9, which nobody flushes; sends the descriptors of what it leaves (quota,
ledger, pages, and the image's frames, guest's and arrays); arms the point; then makes the request.
If there is FOLDER/files, they are there.
"""

import socket
import sys
from pathlib import Path

from nbd_client import TRIM, ZEROES
from nbd_stage import NbdStage
from stage import PAGE, Stage

from cowshed.accounting import Account, Overlay, Quota, QuotaPolicy
from cowshed.cache._core import lib

link, folder = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
point, op = int(sys.argv[3]), sys.argv[4]
nbd = NbdStage(Stage(folder, nr_pages=64))
files = folder / "files"
quota = Quota(32 * PAGE, QuotaPolicy.STOP)
account = Account(nbd.stage.image, quota)
is_in_files = files.is_dir()
overlay = Overlay.files(account, files, "x", b"i" * 32) if is_in_files else Overlay(account)
client = nbd.client(nbd.export(overlay))
assert client.write(0, b"\1" * 10 * PAGE) == 0
image = nbd.stage.image
of_image = [image.frames_fd, image.guest_fd, image.arrays_fd]
socket.send_fds(link, [b"."], [quota.fd, account.fd, overlay.fd, *of_image])
assert lib.point_arm(point, lib.POINT_KILL, 0, 1) == 0
if op == "write":
    client.write(5 * PAGE, b"\2" * 10 * PAGE)
elif op == "patch":
    client.write(12 * PAGE + 100, b"\2" * 200)
elif op == "zero":
    client.call(ZEROES, 5 * PAGE, 10 * PAGE)
else:
    client.call(TRIM, 0, 5 * PAGE)
print("still here")
