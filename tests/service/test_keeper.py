# SPDX-License-Identifier: Apache-2.0
"""A keeper starts the backend again: nothing that was resident is lost, and nobody is refused."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, command, until

MIB = 1 << 20


def backend_pid(daemon: Daemon) -> int:
    """Who serves now; its keeper is daemon.pid."""
    return int((daemon.run_dir / "lock").read_text())


def died(pid: int) -> None:
    """Wait for the end of a process that is not ours."""
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.fixture
def kept(start_daemon: StartDaemon, make_image: MakeImage) -> Daemon:
    return start_daemon("--image", f"d={make_image(4 * MIB)}", kept=True)


def test_a_killed_backend_is_followed_by_one_with_everything_resident(kept: Daemon) -> None:
    kept.request("warm", image="d")
    kept.request("pin", image="d", offset=0, length=65536)
    before = kept.status()
    pids = [before["pid"]]
    for _ in range(3):
        os.kill(pids[-1], signal.SIGKILL)
        # Whoever comes meanwhile waits at the socket, which is open all the time.
        status = kept.status()
        pids.append(status["pid"])
        assert status["resident_bytes"] == before["resident_bytes"] == 4 * MIB
        assert status["loads"] == before["loads"] == 64
        assert status["images"][0]["pinned_bytes"] == 65536
    assert len(set(pids)) == 4
    assert kept.mismatches() == []
    assert kept.log().count("event=backend-died ") == 3
    assert kept.stop() == 0
    died(pids[-1])
    assert not (kept.run_dir / "cowshed.sock").exists()


def test_an_orderly_end_is_the_keepers_too(kept: Daemon) -> None:
    pid = backend_pid(kept)
    kept.request("shutdown")
    assert kept.process.wait(20) == 0
    died(pid)
    assert "backend-died" not in kept.log()


def test_a_backend_that_cannot_begin_is_not_started_again(
    run_dir: Path, make_image: MakeImage
) -> None:
    words = command("serve", "--run-dir", str(run_dir), "--image", f"d={run_dir}/none")
    ended = subprocess.run(words, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.decode().count("\n") == 1
    assert ended.stderr.startswith(b"cowshed: ")


def test_a_dead_keeper_is_replaced_and_the_new_one_keeps_everything(kept: Daemon) -> None:
    kept.request("warm", image="d")
    pid = backend_pid(kept)
    kept.kill()
    assert kept.status()["pid"] == pid  # it serves on
    until(lambda: "event=keeper-changed" in kept.log())
    os.kill(pid, signal.SIGKILL)
    status = kept.status()
    assert status["pid"] != pid
    assert status["resident_bytes"] == 4 * MIB
    assert kept.mismatches() == []
    os.kill(backend_pid(kept), signal.SIGTERM)
    died(status["pid"])


def test_a_source_that_was_replaced_meanwhile_is_said(kept: Daemon) -> None:
    kept.request("warm", image="d")
    source = Path(kept.status()["images"][0]["source"])
    copy = source.with_name("copy")
    copy.write_bytes(source.read_bytes())
    os.replace(copy, source)
    os.kill(backend_pid(kept), signal.SIGKILL)
    assert kept.status()["images"][0]["source_changed"]
    assert "event=source-changed" in kept.log()


def test_a_source_that_is_gone_keeps_guests_waiting_until_it_is_back(kept: Daemon) -> None:
    kept.request("warm", image="d")
    source = Path(kept.status()["images"][0]["source"])
    away = source.with_name("away")
    source.rename(away)
    os.kill(backend_pid(kept), signal.SIGKILL)
    until(lambda: "cannot open image source" in kept.log())
    away.rename(source)
    status = kept.status()
    assert status["resident_bytes"] == 4 * MIB
    assert not status["images"][0]["source_changed"]


def test_strangers_messages_are_not_obeyed(kept: Daemon) -> None:
    pid = backend_pid(kept)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment  # set after the fork, and forgotten
    names = [
        line.split()[-1]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if f"@cowshed-keeper-{kept.pid}-" in line
    ]
    assert len(names) == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"STOPPING=1", "\0" + names[0][1:])
        stranger.sendto(b"FDSTOREREMOVE=1\nFDNAME=image/default/d", "\0" + names[0][1:])
        stranger.sendto(b"\xff" * 4000, "\0" + names[0][1:])
    kept.request("warm", image="d")
    os.kill(pid, signal.SIGKILL)
    assert kept.status()["resident_bytes"] == 4 * MIB
