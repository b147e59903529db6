# SPDX-License-Identifier: Apache-2.0
"""Guests are not taken while others are being given away: they would be left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import in_thread, is_stopped, until
from two_hosts import Host, Model

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


@contextlib.contextmanager
def _drain_to_a_silent_peer(host: Host) -> Iterator[str]:
    """Have it drain, inside `with`, to somebody who takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        drain = in_thread(lambda: host.run("drain", "--to", uri))
        until(lambda: host.the_daemon.request("drain-state")["drain"] is not None)
        yield uri
    drain.join()  # nobody is there any more


def test_a_backend_that_is_being_drained_takes_no_handoff_and_says_where_to(
    pair: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = pair
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    with _drain_to_a_silent_peer(b) as uri:
        done = a.run("drain", "--to", b.unix)
        assert done.returncode == 1
        assert f"at the target: a drain to {uri} is under way here" in done.stderr
        done = a.run("export", str(tmp_path / "guests"))
        assert done.returncode == 0, done.stderr
        done = b.run("import", str(tmp_path / "guests"))
        assert done.returncode == 1
        assert f"a drain to {uri} is under way here: wait until it is over" in done.stderr
    assert (a.guests(), b.guests()) == ({"g"}, set())
    a.drain("--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)


def test_a_commit_that_comes_once_a_drain_has_begun_is_denied_and_the_source_keeps_its_guests(
    hosts: Pair, image: Path
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-commit"))
    b.start()
    model = Model(image, 1)
    with a.open("g") as disk:
        model.write(disk)
    said: list[subprocess.CompletedProcess[str]] = []
    drain = in_thread(lambda: said.append(a.run("drain", "--to", b.unix)))
    until(lambda: is_stopped(a.the_daemon.pid))
    with _drain_to_a_silent_peer(b) as uri:
        os.kill(a.the_daemon.pid, signal.SIGCONT)
        drain.join()
    assert said[0].returncode == 1
    assert f"denied it (a drain to {uri} is under way here" in said[0].stderr
    assert (a.guests(), b.guests()) == ({"g"}, set())
    with a.open("g") as disk:
        model.check(disk)
        model.write(disk)
    assert b.the_daemon.mismatches() == []
