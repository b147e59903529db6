# SPDX-License-Identifier: Apache-2.0
"""What comes while nobody can hold it is held as soon as somebody can, and outlives the backend."""

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, kill_backend, paused, until
from machine_guests import restore, status_of
from nbd_site import Site

pytestmark = pytest.mark.slow

PAGE = 4096
MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def caller() -> Iterator[socket.socket]:
    """A machine that has not connected."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        yield sock


@pytest.fixture
def settings(run_dir: Path, image: Path) -> Path:
    path = run_dir / "cowshed.toml"
    path.write_text(f'images = {{ d = "{image}" }}\nmetrics = "127.0.0.1:0"\n')
    return path


@pytest.fixture
def kept(start_daemon: StartDaemon, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setenv("COWSHED_TEST_STOP_AT", "keeper-begins")
    return start_daemon("--config", str(settings), "--verbose", kept=True)


@pytest.fixture
def let_keeper_begin(kept: Daemon) -> Callable[[], None]:
    """Has no keeper until it is called: the next one stops as it begins."""
    backend = int((kept.run_dir / "lock").read_text())
    kept.kill()
    until(lambda: "event=keeper-died" in kept.log())

    def let() -> None:
        (keeper,) = Path(f"/proc/{backend}/task/{backend}/children").read_text().split()
        until(lambda: ") T " in Path(f"/proc/{keeper}/stat").read_text())
        os.kill(int(keeper), signal.SIGCONT)
        until(lambda: "event=held " in kept.log())

    return let


def not_held(kept: Daemon) -> int:
    return int(kept.status()["not_held"])


def test_every_kind_of_guest_that_came_without_a_keeper_outlives_the_backend(
    kept: Daemon,
    image: Path,
    start_guest: StartGuest,
    caller: socket.socket,
    let_keeper_begin: Callable[[], None],
) -> None:
    nr_before = not_held(kept)
    assert nr_before > 0  # the image, its listeners, the counters
    guest, parked = start_guest(kept.uri), start_guest(kept.uri, script="hostile_guest.py")
    guest.call("open", image="d", guest="g", quota_bytes=MIB)
    guest.call("write", offset=PAGE, hex="ab" * PAGE)
    parked.call("open", image="d", guest="p", follow_moves=False)
    parked.call("fill", offset=5 * PAGE, length=PAGE, byte=7)
    parked.call("close_quietly")
    until(lambda: kept.guest_status("p")["state"] == "parked")
    machine = restore(kept, start_guest, image, [SIZE])
    machine.call("fill", page=20, nr_pages=8, byte=7)
    caller.connect(str(kept.run_dir / "images/d.sock"))
    site = Site(kept, image)
    site.nbdsh("h.pwrite(b'mine' * 1024, 8192)", "d@n")
    until(lambda: not_held(kept) == nr_before + 5)
    assert f"{nr_before + 5} groups are NOT HELD" in " ".join(site.cowshed("status").split())
    kept.wait_logged("event=not-held ", 6)  # a machine is first a caller
    let_keeper_begin()
    assert not_held(kept) == 0
    kill_backend(kept)
    assert guest.call("compare", path=str(image), offset=2 * PAGE, length=MIB) == 0
    assert bytes.fromhex(guest.call("read", offset=PAGE, length=PAGE)) == b"\xab" * PAGE
    assert parked.call("read", offset=5 * PAGE, length=PAGE) == "07" * PAGE
    assert machine.call("compare") == []
    assert status_of(kept, machine)["private_bytes"] >= 8 * PAGE
    read = "print(h.pread(4096, 8192) == b'mine' * 1024)"
    assert site.nbdsh(read, "d@n") == "True\n"
    assert kept.mismatches() == []


def test_a_reload_without_a_keeper_that_holds_all_is_refused_and_loses_nobody(
    kept: Daemon, image: Path, start_guest: StartGuest, let_keeper_begin: Callable[[], None]
) -> None:
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    pid = kept.status()["pid"]
    os.kill(pid, signal.SIGUSR1)  # what a keeper asks a backend to leave by
    until(lambda: "event=reload-refused" in kept.log())
    assert kept.status()["pid"] == pid
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0
    let_keeper_begin()
    kill_backend(kept)
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0


def test_a_keeper_without_room_says_so_and_holds_once_it_has(
    kept: Daemon, image: Path, start_guest: StartGuest
) -> None:
    pid = kept.pid
    # It reads what it is sent in order: once it holds the first guest, it holds all before it.
    start_guest(kept.uri).call("open", image="d", guest="first")
    until(lambda: nr_held_guests(pid) == 1)
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    nr_fds = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (nr_fds + 3, hard))
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    until(lambda: "no room for more descriptors" in kept.log())
    until(lambda: not_held(kept) == 1)  # it is sent again now and then, and refused again
    assert len(os.listdir(f"/proc/{pid}/fd")) <= nr_fds + 3  # and none of a part of it
    assert nr_held_guests(pid) == 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    until(lambda: nr_held_guests(pid) == 2)
    until(lambda: not_held(kept) == 0)
    kept.wait_logged("event=held groups=")
    kill_backend(kept)
    assert guest.call("compare", path=str(image), offset=0, length=SIZE) == 0


def test_a_keeper_started_with_a_low_limit_raises_it_for_what_it_holds(
    start_daemon: StartDaemon, settings: Path, image: Path, start_guest: StartGuest
) -> None:
    kept = start_daemon(
        "--config", str(settings), kept=True, before=["prlimit", "--nofile=64:4096"]
    )
    guests = [start_guest(kept.uri) for _ in range(6)]
    for guest in guests:
        guest.call("open", image="d", guest=f"g{guest.pid}")
    kill_backend(kept)
    for guest in guests:
        assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0


def nr_held_guests(keeper: int) -> int:
    """Of how many guests that map a keeper holds the descriptors."""
    links = []
    for fd in Path(f"/proc/{keeper}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(fd))
    return links.count("anon_inode:[userfaultfd]")


def leave_no_room(kept: Daemon) -> None:
    """Fill the queue of the keeper's socket with what it will not obey."""
    (path,) = kept.run_dir.glob("keeper.*")
    with contextlib.ExitStack() as strangers:
        while True:  # one alone may find its own buffer full before the queue is
            stranger = strangers.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            stranger.setblocking(False)
            nr_sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    stranger.sendto(b"STATUS=nothing", str(path))
                    nr_sent += 1
            if nr_sent == 0:
                return


def test_a_keeper_that_reads_nothing_holds_nobody_up_and_gets_all_in_the_end(
    kept: Daemon, image: Path, start_guest: StartGuest
) -> None:
    guests = [start_guest(kept.uri) for _ in range(4)]
    with paused(kept.pid):
        leave_no_room(kept)
        for guest in guests:
            guest.call("open", image="d", guest=f"g{guest.pid}")
        assert not_held(kept) == 4
    until(lambda: not_held(kept) == 0)
    kept.wait_logged("event=held ")
    kill_backend(kept)
    for guest in guests:
        assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0
