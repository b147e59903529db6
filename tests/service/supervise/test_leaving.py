# SPDX-License-Identifier: Apache-2.0
"""A backend that leaves on purpose turns nobody away: who came is answered, or carried over."""

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from domains import ANSWER_SECONDS, Daemon, MakeImage, StartDaemon, is_stopped, until

from cowshed.transport import connect
from cowshed.transport.links.unix import connect as connect_raw

pytestmark = pytest.mark.slow

MIB = 1 << 20
NBD_MAGIC = b"NBDMAGICIHAVEOPT"
LIST, ABORT = 3, 2


@pytest.fixture
def kept(start_daemon: StartDaemon, make_image: MakeImage) -> Daemon:
    """One whose backends stop themselves on their way out, until they are told to go on."""
    before = ("env", "COWSHED_TEST_STOP_AT=departing")
    return start_daemon("--image", f"d={make_image(MIB)}", kept=True, before=before)


def begin_to_leave(kept: Daemon) -> int:
    """Have the backend accept nobody any more, and stand still there; its pid."""
    pid = int((kept.run_dir / "lock").read_text())
    os.kill(pid, signal.SIGUSR1)
    until(lambda: is_stopped(pid))
    return pid


def go(pid: int) -> None:
    """Have it leave, and wait until it is gone."""
    os.kill(pid, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{pid}").exists())


def pid_of(status: dict[str, Any]) -> int:
    return int(status["status"]["pid"])


def test_conversations_at_rest_are_carried_over(kept: Daemon) -> None:
    with connect(kept.uri) as idle, connect_raw(kept.uri) as silent:
        before = pid_of(idle.request("status"))  # both were accepted
        pid = begin_to_leave(kept)
        silent.queue({"op": "hello", "version": 1, "features": []}, tag=7)
        silent.flush()
        go(pid)
        body, _, tag = silent.recv(timeout=60)
        assert (body["ok"], tag) == (True, 7)
        after = pid_of(idle.request("status"))
        assert after != before
        assert body["pid"] == after
        go(begin_to_leave(kept))  # and once more
        assert pid_of(idle.request("status")) not in (before, after)


def test_who_is_promised_an_answer_gets_it_from_whoever_serves(kept: Daemon) -> None:
    answers: list[int] = []
    with connect(kept.uri) as backend:
        backend.request("status")
        pid = begin_to_leave(kept)
        asking = threading.Thread(target=lambda: answers.append(pid_of(backend.request("status"))))
        asking.start()
        newcomer = threading.Thread(target=lambda: answers.append(kept.status()["pid"]))
        newcomer.start()
        go(pid)
        asking.join(ANSWER_SECONDS)
        newcomer.join(ANSWER_SECONDS)
    # Who was in may still be answered by the one that leaves; nobody is turned away.
    after = kept.status()["pid"]
    assert sorted(answers) in (sorted([pid, after]), [after, after])


def test_an_nbd_handshake_under_way_is_finished(kept: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(kept.run_dir / "nbd.sock"))
        assert client.recv(18, socket.MSG_WAITALL)[:16] == NBD_MAGIC
        pid = begin_to_leave(kept)
        client.sendall((3).to_bytes(4, "big"))
        for option in (LIST, ABORT):
            client.sendall(b"IHAVEOPT" + option.to_bytes(4, "big") + bytes(4))
        os.kill(pid, signal.SIGCONT)
        said = b""
        while piece := client.recv(4096):
            said += piece
        assert b"\0\0\0\x01d" in said  # the list of exports
        until(lambda: not Path(f"/proc/{pid}").exists())
    assert kept.status()["pid"] != pid


def test_a_guest_in_its_handshake_has_its_mapping(kept: Daemon) -> None:
    """It takes two rounds, of which the second comes while the backend leaves."""
    with connect_raw(kept.uri) as guest:
        for tag, body in (
            (1, {"op": "hello", "version": 1, "features": []}),
            (2, {"op": "open", "image": "d", "guest": "g"}),
        ):
            guest.queue(body, tag=tag)
            guest.flush()
            _, fds, _ = guest.recv(timeout=60)
            for fd in fds:
                os.close(fd)
        pid = begin_to_leave(kept)
        guest.queue({"op": "close"}, tag=3)
        guest.flush()
        os.kill(pid, signal.SIGCONT)
        body, _, tag = guest.recv(timeout=60)
        assert (body["ok"], tag) == (True, 3)
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert kept.status()["guests"] == []
