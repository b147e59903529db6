# SPDX-License-Identifier: Apache-2.0
"""What the backend does to a program under `cowshed attach`: evict, stop at a quota, die."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from attached import Attached, StartReader
from domains import until

pytestmark = pytest.mark.slow

PAGE = 4096


def wait_stopped(attached: Attached, name: str) -> None:
    until(lambda: attached.daemon.guest_status(name)["state"] == "stopped-quota")


def test_evictions_between_reads_are_not_seen(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    reader.call("map")
    first = reader.call("map", first=16, nr_pages=100, writable=True)
    reader.call("write", no=first, page=3, nr_pages=5)
    for _ in range(5):
        assert reader.call("check") == []
        attached.daemon.request("evict", image="disk")
        assert reader.call("child_check") == 0
        attached.daemon.request("evict", image="disk")
    assert attached.daemon.mismatches() == []


def test_mappings_and_children_share_one_quota(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader("g", "--quota", "32K")
    one, two = (reader.call("map", nr_pages=64, writable=True) for _ in range(2))
    reader.call("write", no=one, page=0, nr_pages=4)
    reader.call("write", no=two, page=0, nr_pages=3)
    status = attached.daemon.guest_status("g")
    assert (status["private_bytes"], status["quota_bytes"]) == (7 * PAGE, 8 * PAGE)
    reader.start("write", no=two, page=10, nr_pages=2)
    wait_stopped(attached, "g")
    assert not reader.answered()
    attached.daemon.request("quota", guest="g", quota_bytes=24 * PAGE)
    reader.finish()
    assert attached.daemon.guest_status("g")["private_bytes"] == 9 * PAGE
    # A child inherits all nine, which are charged again, and writes one more.
    child = reader.call("child_write", no=one, page=20, nr_pages=1)
    assert attached.daemon.guest_status("g")["private_bytes"] == 19 * PAGE
    reader.start("write", no=one, page=30, nr_pages=6)
    wait_stopped(attached, "g")
    # What the child had is there to have again once it has gone.
    os.kill(child, signal.SIGKILL)
    reader.finish()
    assert attached.daemon.guest_status("g")["private_bytes"] == 15 * PAGE
    assert reader.call("check") == []
    assert attached.daemon.mismatches() == []


def test_a_policy_of_kill_ends_the_program(attached: Attached, start_reader: StartReader) -> None:
    reader = start_reader("g", "--quota", "8K", "--on-quota", "kill")
    no = reader.call("map", writable=True)
    reader.start("write", no=no, page=0, nr_pages=3)
    assert reader.process.wait() == -signal.SIGBUS


def test_no_quota_is_none(attached: Attached, start_reader: StartReader) -> None:
    reader = start_reader("g", "--quota", "none")
    no = reader.call("map", writable=True)
    reader.call("write", no=no, page=0, nr_pages=200)
    assert reader.call("check") == []


def test_a_dead_backend_means_a_stall_and_not_zeros(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    reader.call("map")
    attached.daemon.kill()
    reader.start("check")
    wchan = Path(f"/proc/{reader.pid}/wchan")
    until(lambda: reader.answered() or wchan.read_text() == "handle_userfault")
    assert not reader.answered(), reader.finish()
    reader.process.kill()
    assert reader.process.wait() == -signal.SIGKILL


def test_with_the_backend_gone_a_new_mapping_fails_and_a_child_is_told(
    attached: Attached, run_dir: Path
) -> None:
    script = """
import mmap, os, signal, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("mapped", flush=True)
sys.stdin.readline()
try:
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
except OSError as error:
    print(error.strerror, flush=True)
child = os.fork()
if child == 0:
    os.write(1, b"the child runs\\n")
    mapped[0]
    os.write(1, b"no\\n")
    os._exit(0)
print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS)
"""
    words = attached.words("python3", "-Wignore", "-c", script, "{image}")
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        attached.daemon.kill()
        shown, told = process.communicate("\n")
    assert shown.splitlines() == ["No such device", "the child runs", "True"]
    lines = told.splitlines()
    assert "no mapping of the image" in lines[0]
    assert "is without the image" in lines[-1]
    assert all(line.startswith("cowshed: attach: ") for line in lines)


def test_a_program_interrupted_while_it_asks_maps_nevertheless(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    proc = Path(f"/proc/{reader.pid}")
    os.kill(attached.daemon.pid, signal.SIGSTOP)
    try:
        reader.start("map")
        for _ in range(3):
            until(lambda: "skb_wait" in (proc / "wchan").read_text())
            # A receive with a time limit ends with EINTR after this, handler or not.
            os.kill(reader.pid, signal.SIGSTOP)
            until(lambda: "State:\tT" in (proc / "status").read_text())
            os.kill(reader.pid, signal.SIGCONT)
        until(lambda: "skb_wait" in (proc / "wchan").read_text())
    finally:
        os.kill(attached.daemon.pid, signal.SIGCONT)
    reader.finish()
    assert reader.call("check") == []


def test_a_program_that_closes_all_descriptors_keeps_its_mapping(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    reader.call("map")
    reader.call("close_fds")
    attached.daemon.request("evict", image="disk")
    assert reader.call("check") == []
    assert attached.daemon.guest_status("reader")["state"] == "running"


def test_a_program_that_closes_all_descriptors_by_bare_calls_reads_no_zeros(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    no = reader.call("map", writable=True)
    reader.call("write", no=no, page=3)
    reader.call("close_fds_bare")
    until(lambda: attached.daemon.guest_status("reader")["state"] == "parked")
    attached.daemon.request("evict", image="disk")
    assert reader.call("check") == []
    assert attached.daemon.mismatches() == []
    reader.process.kill()
    until(lambda: not attached.daemon.status()["guests"])


def test_a_killed_program_gives_everything_back(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    no = reader.call("map", writable=True)
    reader.call("write", no=no, page=0, nr_pages=20)
    child = reader.call("child_write", no=no, page=30, nr_pages=1)
    reader.process.kill()
    os.kill(child, signal.SIGKILL)
    until(lambda: not attached.daemon.status()["guests"])
    assert attached.daemon.mismatches() == []
