# SPDX-License-Identifier: Apache-2.0
"""A guest whose backend is gone for good gets SIGBUS and one line, and does not wait for ever."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import ANSWER_SECONDS, Daemon, MakeImage, StartDaemon, plain_environment, until

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096

# Reads what is there, and then in the way it was told to what is not.
GUEST = """
import ctypes, errno, sys
from cowshed.transport import connect
uri, how, follows = sys.argv[1:]
with connect(uri) as backend:
    disk = backend.open("d", guest="g", quota_bytes=8192, follow_moves=follows == "follows")
    disk.write(0, b"mine" * 1024)
    disk.read(4096, 4096)
    print("ready", flush=True)
    sys.stdin.readline()
    assert disk.read(0, 4096) == b"mine" * 1024
    if how == "view":
        disk.view[2 << 20]
    elif how == "thread":  # which holds the interpreter's lock until its fault is answered
        start = ctypes.addressof(ctypes.c_char.from_buffer(disk.view))
        ctypes.PyDLL(None).memset(ctypes.c_void_p(start + (2 << 20)), 1, 1)
    elif how == "write":
        disk.view[4096:4100] = b"gone"
        print(bytes(disk.view[4096:4100]).decode(), flush=True)
    else:
        try:
            disk.read(2 << 20, 4096)
        except OSError as error:
            print(errno.errorcode[error.errno], flush=True)
        disk.close()
"""


class Orphan:
    """A guest process that is told when to go on."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen(
            words,
            env=plain_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()

    def go_on(self) -> tuple[int, str, list[str]]:
        """Its status, what it printed, and the lines of the library on stderr."""
        out, err = self.process.communicate(b"\n", timeout=ANSWER_SECONDS)
        ours = [line for line in err.decode().splitlines() if line.startswith("cowshed: ")]
        return self.process.returncode, out.decode(), ours


@pytest.fixture
def daemon(start_daemon: StartDaemon, make_image: MakeImage) -> Daemon:
    return start_daemon("--image", f"d={make_image(4 * MIB)}", "--no-keeper")


@pytest.fixture
def orphan() -> Iterator[Callable[..., Orphan]]:
    guests: list[Orphan] = []

    def start(daemon: Daemon, how: str, follows: str = "follows") -> Orphan:
        guest = Orphan([sys.executable, "-c", GUEST, daemon.uri, how, follows])
        guests.append(guest)
        assert guest.first_line == b"ready\n"
        return guest

    yield start
    for guest in guests:
        guest.process.kill()
        if guest.process.returncode is None:
            guest.process.communicate()


@pytest.mark.parametrize("follows", ["follows", "stays"])
@pytest.mark.parametrize("end", [Daemon.kill, Daemon.stop])
def test_a_touch_of_what_is_not_there_is_sigbus_and_one_line(
    orphan: Callable[..., Orphan], daemon: Daemon, end: Callable[[Daemon], None], follows: str
) -> None:
    guest = orphan(daemon, "view", follows)
    end(daemon)
    status, _, (line,) = guest.go_on()
    assert status == -signal.SIGBUS
    assert "guest g lost its backend, and none comes after it" in line


@pytest.mark.parametrize(("how", "expected"), [("read", "EIO\n"), ("write", "gone\n")])
def test_calls_fail_and_what_is_there_can_be_read_and_written(
    orphan: Callable[..., Orphan], daemon: Daemon, how: str, expected: str
) -> None:
    guest = orphan(daemon, how)
    daemon.kill()
    status, said, lines = guest.go_on()
    assert (status, said, len(lines)) == (0, expected, 1)


def test_a_fault_that_waits_when_the_last_backend_dies_is_sigbus(
    orphan: Callable[..., Orphan],
    start_daemon: StartDaemon,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COWSHED_TEST_POINTS", "1")
    daemon = start_daemon("--image", f"d={make_image(4 * MIB)}", "--no-keeper")
    guest = orphan(daemon, "thread")
    # Every load, or readahead for what was read before might be who stops.
    daemon.request("point", name="LOAD_READ", action="stop", times=0)
    assert guest.process.stdin is not None
    guest.process.stdin.write(b"\n")
    guest.process.stdin.flush()
    task = Path(f"/proc/{guest.process.pid}/task")

    def waits() -> bool:
        with contextlib.suppress(OSError):  # of a thread that has just ended
            wchans = [(each / "wchan").read_text() for each in task.iterdir()]
            return "handle_userfault" in wchans
        return False

    until(waits)
    daemon.kill()
    status, _, lines = guest.go_on()
    assert (status, len(lines)) == (-signal.SIGBUS, 1)


def test_a_guest_waits_for_a_successor_and_is_no_orphan(
    orphan: Callable[..., Orphan], start_daemon: StartDaemon, make_image: MakeImage
) -> None:
    kept = start_daemon("--image", f"d={make_image(4 * MIB)}", kept=True)
    guest = orphan(kept, "read")
    os.kill(int((kept.run_dir / "lock").read_text()), signal.SIGKILL)
    status, said, lines = guest.go_on()
    assert (status, said, lines) == (0, "", [])
