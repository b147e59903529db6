# SPDX-License-Identifier: Apache-2.0
"""What the backend does to a program under `cowshed attach`: evict, stop at a quota, die."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from attached import ROOM, Attached, StartReader, serve_one
from domains import ANSWER_SECONDS, paused, plain_environment, until
from switches import switch

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
    # It goes on when one of the child's mappings has ended; the other may take a moment.
    until(lambda: attached.daemon.guest_status("g")["private_bytes"] == 15 * PAGE)
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


def test_a_backend_gone_for_good_means_sigbus_and_not_zeros(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    reader.call("map")
    reader.call("map", first=16, nr_pages=100, writable=True)
    attached.daemon.kill()
    reader.start("check")
    assert reader.process.wait() == -signal.SIGBUS


def test_a_program_without_python_is_told_in_one_line_what_its_sigbus_is(
    attached: Attached, orphan: Path
) -> None:
    with start_orphan(attached, orphan, "touch") as program:
        attached.daemon.kill()
        shown, told = program.communicate("\n", timeout=ANSWER_SECONDS)
    assert (program.returncode, shown) == (-signal.SIGBUS, "")
    (line,) = told.splitlines()
    assert line.startswith("cowshed: attach: ")
    assert "lost its backend, and none comes after it" in line


def test_a_program_that_ends_by_its_threads_ends_alone_ends(
    attached: Attached, orphan: Path
) -> None:
    with start_orphan(attached, orphan, "exit") as program:
        assert program.communicate("\n", timeout=ANSWER_SECONDS) == ("", "")
    assert program.returncode == 0


@pytest.fixture
def orphan(tmp_path: Path) -> Path:
    """The program of orphan.c."""
    program = tmp_path / "orphan"
    words = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program]
    subprocess.run([*words, ROOM / "orphan.c"], check=True)
    return program


def start(
    attached: Attached, *words: str | Path, options: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a program that says a line once it has mapped the image."""
    process = subprocess.Popen(
        attached.words(*words, options=options),
        env=plain_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() != ""
    return process


def start_orphan(attached: Attached, program: Path, what: str) -> subprocess.Popen[str]:
    return start(attached, program, what, "{image}")


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
        assert process.stderr is not None
        attached.daemon.kill()
        first = process.stderr.readline()
        shown, told = process.communicate("\n")
    assert shown.splitlines() == ["No such device", "the child runs", "True"]
    lines = [first, *told.splitlines()]
    assert "lost its backend" in lines[0]
    assert "no mapping of the image" in lines[1]
    assert "is without the image" in lines[-1]
    assert all(line.startswith("cowshed: attach: ") for line in lines)


def test_a_child_that_was_there_before_the_backend_went_is_sigbus_too(attached: Attached) -> None:
    script = """
import mmap, os, signal, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
wait, go_on = os.pipe()
child = os.fork()
if child == 0:
    os.write(1, b"forked\\n")  # and guarded
    os.read(wait, 1)
    mapped[0]
    os._exit(0)
sys.stdin.readline()
os.write(go_on, b"!")
print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS)
"""
    with start(attached, "python3", "-Wignore", "-c", script, "{image}") as program:
        attached.daemon.kill()
        shown, _ = program.communicate("\n", timeout=ANSWER_SECONDS)
    assert shown.splitlines() == ["True"]


def test_a_fault_that_waits_when_the_last_backend_dies_is_sigbus(
    run_dir: Path, orphan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWSHED_TEST_POINTS", "1")
    attached = serve_one(run_dir)
    try:
        with start_orphan(attached, orphan, "touch") as program:
            switch(attached.daemon, "LOAD_READ", "stop")
            assert program.stdin is not None
            program.stdin.write("\n")
            program.stdin.flush()
            until(lambda: attached.daemon.status()["images"][0]["source_wait_seconds"] > 0)
            attached.daemon.kill()
            assert program.wait(ANSWER_SECONDS) == -signal.SIGBUS
    finally:
        attached.daemon.kill()


def test_numbers_that_a_program_uses_for_other_files_say_nothing_of_the_backend(
    attached: Attached,
) -> None:
    script = """
import ctypes, mmap, os, socket, sys
file, copy = open(sys.argv[1], "rb"), open(sys.argv[2], "rb").read()
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
ended, other = socket.socketpair()
other.close()
dup3 = 24 if os.uname().machine == "aarch64" else 292
for fd in map(int, os.listdir("/proc/self/fd")):
    if fd > 2 and fd != ended.fileno():  # by a call that no library sees
        ctypes.CDLL(None).syscall(dup3, ended.fileno(), fd, 0)
os.write(1, b"replaced\\n")
os.read(0, 1)
os._exit(mapped[:] != copy)
"""
    words = ("python3", "-Wignore", "-c", script, "{image}", str(attached.copy))
    with start(attached, *words, options=("--guest", "g")) as program:
        until(lambda: attached.daemon.guest_status("g")["state"] == "parked")
        attached.daemon.request("evict", image="disk")
        assert program.communicate("\n", timeout=ANSWER_SECONDS) == ("", "")
    assert program.returncode == 0


def test_a_program_interrupted_while_it_asks_maps_nevertheless(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    with paused(attached.daemon.pid):
        reader.start("map")
        for _ in range(3):
            until(lambda: is_waiting(reader.pid))
            # A receive with a time limit ends with EINTR after this, handler or not.
            with paused(reader.pid):
                pass
        until(lambda: is_waiting(reader.pid))
    reader.finish()
    assert reader.call("check") == []


def is_waiting(pid: int) -> bool:
    """Whether it waits for a reply of its backend, or in the kernel for that to read an event."""
    place = Path(f"/proc/{pid}/wchan").read_text()
    return "skb_wait" in place or "userfaultfd_event_wait" in place


WAITER = """
import ctypes, mmap, os, signal, sys
what, file, copy = sys.argv[1], open(sys.argv[2], "rb"), open(sys.argv[3], "rb").read()
os.set_blocking(1, False)
signal.set_wakeup_fd(1, warn_on_full_buffer=False)
signal.signal(signal.SIGUSR1, lambda *_: None)
def map():
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
mapped = map() if what != "map" else None
if what == "unmap a part":
    copied = mmap.mmap(file.fileno(), 1 << 16, access=mmap.ACCESS_COPY)
    part = ctypes.addressof(ctypes.c_char.from_buffer(copied))
os.write(1, b".")
os.read(0, 1)
if what == "unmap":
    mapped.close()
elif what == "unmap a part":
    ctypes.CDLL(None).munmap(ctypes.c_void_p(part), ctypes.c_size_t(4096))
elif what == "discard":
    mapped.madvise(mmap.MADV_DONTNEED, 0, 4096)
elif what == "fork":
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
    else:
        os._exit(mapped[:] != copy)
else:
    assert map()[:] == copy
os.write(1, b".")
"""


@pytest.fixture
def start_waiter(attached: Attached) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a program that maps, unmaps or forks when told; its handlers write to its output."""
    started: list[subprocess.Popen[bytes]] = []

    def start(what: str) -> subprocess.Popen[bytes]:
        words = attached.words(
            "python3", "-Wignore", "-c", WAITER, what, "{image}", str(attached.copy)
        )
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=plain_environment()
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"!")


@pytest.mark.parametrize("what", ["map", "unmap", "unmap a part", "discard", "fork"])
def test_a_signal_ends_a_program_whose_backend_does_not_answer(
    attached: Attached, start_waiter: Callable[[str], subprocess.Popen[bytes]], what: str
) -> None:
    process = start_waiter(what)
    with paused(attached.daemon.pid):
        go_on(process)
        if what == "fork":  # its child waits, and it for that
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            until(lambda: children.read_text() != "" and is_waiting(int(children.read_text())))
            child = os.pidfd_open(int(children.read_text()))
            signal.pidfd_send_signal(child, signal.SIGTERM)
            assert select.select([child], [], [], ANSWER_SECONDS)[0]
            os.close(child)
        else:
            until(lambda: is_waiting(process.pid))
        process.terminate()
        ended = process.wait(ANSWER_SECONDS)
        # A parent that sees its child's end first says so.
        assert ended == -signal.SIGTERM or (what == "fork" and ended == 1)


@pytest.mark.parametrize("what", ["map", "unmap"])
def test_handlers_run_while_the_backend_does_not_answer(
    attached: Attached, start_waiter: Callable[[str], subprocess.Popen[bytes]], what: str
) -> None:
    process = start_waiter(what)
    assert process.stdout is not None
    with paused(attached.daemon.pid):
        go_on(process)
        for _ in range(3):
            until(lambda: is_waiting(process.pid))
            process.send_signal(signal.SIGUSR1)
            assert process.stdout.read(1) == bytes([signal.SIGUSR1])
    assert process.stdout.read(1) == b"."
    assert process.wait() == 0


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
