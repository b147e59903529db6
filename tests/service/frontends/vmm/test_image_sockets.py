# SPDX-License-Identifier: Apache-2.0
"""Who gets in at an image's own socket: those who may use the image, and not too many of them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from domains import NOBODY, MakeImage, StartDaemon

MIB = 1 << 20
MEMBER, OUTSIDER = NOBODY, 54321
# Asks for the device's size on so many connections, and prints each answer.
ASK = """
import os, socket, sys
uid, path, nr = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
os.setgroups([]), os.setgid(uid), os.setuid(uid)
kept = []
for _ in range(nr):
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(60)
    one.connect(path)
    kept.append(one)
    try:
        one.send(b'{"type": 2}')
        print(one.recv(4096).decode())
    except (BrokenPipeError, ConnectionResetError):
        print()
"""
CONFIG = """
[[image]]
name = "d"
source = "image.raw"
uids = [{member}]
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users: needs root")


def answers(path: Path, uid: int, nr: int = 1) -> list[str]:
    command = [sys.executable, "-c", ASK, str(uid), str(path), str(nr)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()


def test_who_may_not_use_an_image_is_told_nothing_of_it(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    make_image(MIB)
    config = run_dir / "cowshed.toml"
    config.write_text(CONFIG.format(member=MEMBER))
    daemon = start_daemon("--config", str(config))
    path = run_dir / "images" / "d.sock"
    assert answers(path, OUTSIDER) == [""]
    daemon.wait_logged(f"uid={OUTSIDER}")
    for uid in (MEMBER, 0):
        (answer,) = answers(path, uid)
        assert json.loads(answer)["size"] == MIB


def test_one_user_cannot_take_every_place(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    source = make_image(MIB)
    daemon = start_daemon("--image", f"d={source}", before=("prlimit", "--nofile=400"))
    path = run_dir / "images" / "d.sock"
    given = [bool(answer) for answer in answers(path, OUTSIDER, nr=9)]
    nr_in = sum(given)
    assert given == [True] * nr_in + [False] * (9 - nr_in)
    assert 0 < nr_in < 9
    daemon.wait_logged(f"uid {OUTSIDER} has {nr_in} connections open")


def test_without_descriptors_a_peer_is_turned_away_and_does_not_wait_for_one(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    """One that stays in the queue would wake the loop for ever."""
    daemon = start_daemon("--image", f"d={make_image(MIB)}")
    path = run_dir / "images" / "d.sock"
    highest = max(int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd"))
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    assert "" in answers(path, 0, nr=20)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)
    (answer,) = answers(path, 0)
    assert json.loads(answer)["size"] == MIB
