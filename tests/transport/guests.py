# SPDX-License-Identifier: Apache-2.0
"""What guests do in test_disk.py; run as a script, so that a guest that hangs can be killed.

guests.py NAME URI
"""

import ctypes
import errno
import gc
import os
import select
import signal
import sys
import threading
import warnings

from cowshed.cache._core import ffi, lib
from cowshed.cache.errors import CowshedError, PeerError, UsageError
from cowshed.transport import Backend, connect

PAGE = 4096
BAD = 3000
SIZE = 4096 * PAGE - 100


def content(page_no: int) -> bytes:
    return bytes([(page_no + 1) % 256]) * PAGE


def fails(kind: type[BaseException], call: object, *words: str) -> BaseException:
    """Check that a call raises kind with one line that has these words."""
    assert callable(call)
    try:
        call()
    except kind as error:
        caught = error
    else:
        raise AssertionError(f"no {kind.__name__} with {words}")
    assert all(word in str(caught) for word in words), f"{words} not in {caught}"
    assert "\n" not in str(caught)
    return caught


def reads_and_writes(backend: Backend) -> None:
    with backend.open("tiny", guest="g") as disk:
        assert (disk.mapped, disk.alive, disk.size_bytes) == (True, True, SIZE)
        assert (disk.extent_bytes, disk.digest, disk.guest) == (65536, "tiny", "g")
        assert disk.read(0, PAGE) == content(0)
        assert disk.read(5 * PAGE - 1, PAGE + 2) == b"\x05" + content(5) + b"\x07"
        assert disk.read(SIZE - 3, 3) == b"\0\0\0"  # page 4095 is filled with 4096 % 256
        assert (disk.read(7, 0), disk.write(7, b"")) == (b"", 0)
        for length in (1, 2, 3):
            assert disk.read(PAGE, length) == b"\x02" * length
        assert disk.write(10 * PAGE - 2, b"abcd") == 4
        assert disk.read(10 * PAGE - 3, 6) == b"\x0aabcd\x0b"
        with backend.open("tiny", guest="h") as other:
            assert other.read(10 * PAGE - 3, 6) == b"\x0a\x0a\x0a\x0b\x0b\x0b"
        assert disk.write(20 * PAGE, memoryview(bytearray(b"xyz")).cast("B")) == 3
        assert disk.read(20 * PAGE, 4) == b"xyz\x15"
        # A view is the same memory.
        with disk.view as view:
            assert (len(view), view.readonly, view.format) == (SIZE, False, "B")
            assert view[10 * PAGE - 3 : 10 * PAGE + 3] == b"\x0aabcd\x0b"
            view[30 * PAGE] = 7
        assert disk.read(30 * PAGE, 2) == b"\x07\x1f"
    counts = backend.request("count")["counts"]
    # Pages 0, 4..6, 9, 10, 20, 30 and the last were first touched by g; 9 and 10 by h too.
    assert counts == {"missing": 10, "minor": 2, "write": 4, "close": 2}


def reads_all_in_one_call(backend: Backend) -> None:
    with backend.open("tiny") as disk:
        whole = disk.read(0, BAD * PAGE)
        assert whole == b"".join(content(page_no) for page_no in range(BAD))
        assert disk.write(PAGE, whole[:-PAGE]) == len(whole) - PAGE
        assert disk.read(0, len(whole)) == content(0) + whole[:-PAGE]
        # One call in C is several of the kernel's.
        buffer = bytearray(len(whole))
        ours = ffi.from_buffer(buffer)
        assert lib.region_read(disk._region, 0, ours, len(whole)) == len(whole)
        assert buffer == content(0) + whole[:-PAGE]
        assert lib.region_write(disk._region, 0, ours, len(whole)) == len(whole)


def bad_page_is_eio(backend: Backend) -> None:
    with backend.open("tiny") as disk:
        start = (BAD - 2) * PAGE + 5
        error = fails(OSError, lambda: disk.read(start, 4 * PAGE), str(BAD * PAGE), "'tiny'")
        assert getattr(error, "errno", None) == errno.EIO
        assert f"after {2 * PAGE - 5}" in str(error)
        error = fails(OSError, lambda: disk.write(start, b"w" * 4 * PAGE), str(BAD * PAGE))
        assert getattr(error, "errno", None) == errno.EIO
        # What was before the bad page is written, what is behind it is whole, and the disk lives.
        assert disk.read(start - 1, 3) == bytes([(BAD - 1) % 256]) + b"ww"
        assert disk.read((BAD + 1) * PAGE, PAGE) == content(BAD + 1)
        # In C: bytes done if there were some, the error if it is the very first.
        buffer = bytearray(4 * PAGE)
        ours = ffi.from_buffer(buffer)
        region = disk._region
        assert lib.region_read(region, start, ours, 4 * PAGE) == 2 * PAGE - 5
        assert lib.region_read(region, BAD * PAGE + 9, ours, 1) == -errno.EIO
        assert lib.region_write(region, start, ours, 4 * PAGE) == 2 * PAGE - 5
        assert lib.region_write(region, BAD * PAGE + 9, ours, 1) == -errno.EIO


def ranges_are_checked(backend: Backend) -> None:
    with backend.open("tiny") as disk:
        for offset, length in (
            (-1, 1),
            (0, -1),
            (SIZE, 1),
            (0, SIZE + 1),
            (1 << 70, 1),
            (SIZE + 1, 0),
        ):
            fails(UsageError, lambda o=offset, n=length: disk.read(o, n), "outside", str(SIZE))
        fails(UsageError, lambda: disk.write(SIZE - 1, b"ab"), "outside")
        fails(UsageError, lambda: disk.discard(1, PAGE), "whole")
        fails(UsageError, lambda: disk.discard(0, 1), "whole")
        assert disk.read(SIZE, 0) == b""
        region, nothing = disk._region, ffi.NULL
        for offset, length in ((SIZE + 101, 0), (0, SIZE + 101), (PAGE, (1 << 64) - PAGE)):
            assert lib.region_read(region, offset, nothing, length) == -errno.EINVAL
            assert lib.region_write(region, offset, nothing, length) == -errno.EINVAL
        assert lib.region_discard(region, 1, PAGE) == -errno.EINVAL
        assert lib.region_discard(region, 0, PAGE - 1) == -errno.EINVAL
        assert lib.region_discard(region, 0, 4097 * PAGE) == -errno.EINVAL


def discard_reverts_to_the_image(backend: Backend) -> None:
    with backend.open("tiny") as disk:
        disk.write(0, b"mine" * 2048)
        disk.write(SIZE - 4, b"mine")
        disk.discard(PAGE, PAGE)
        disk.discard(4095 * PAGE, SIZE - 4095 * PAGE)
        assert disk.read(0, PAGE) == b"mine" * 1024
        assert disk.read(PAGE, PAGE) == content(1)
        assert disk.read(SIZE - 4, 4) == b"\0\0\0\0"
    assert backend.request("count")["counts"]["remove"] == 2


def views_hold_the_disk(backend: Backend) -> None:
    disk = backend.open("tiny")
    view = disk.view
    part = view[:8]
    view.release()
    fails(UsageError, disk.close, "view", "release")
    assert bytes(part[:1]) == disk.read(0, 1) == b"\1"
    part.release()
    address = int(ffi.cast("uintptr_t", disk._region.address))
    assert is_mapped(address)
    disk.close()
    disk.close()
    assert not is_mapped(address)
    assert backend.request("count")["counts"]["close"] == 1
    fails(UsageError, lambda: disk.view, "closed")
    fails(UsageError, lambda: disk.read(0, 1), "closed")
    # A view outlives a disk that nobody holds; then the disk goes, with a warning.
    view = backend.open("tiny").view
    gc.collect()
    assert view[PAGE] == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del view
    assert [one.category for one in caught] == [ResourceWarning]
    assert backend.request("count")["guests"] == 0

    # An error on its way through a with statement is not hidden by its own views.
    def body() -> None:
        with backend.open("tiny") as disk:
            view = disk.view
            raise KeyError(len(view))

    fails(KeyError, body, str(SIZE))


def child_is_refused(backend: Backend) -> None:
    disk = backend.open("tiny")
    disk.write(0, b"parent")
    address = int(ffi.cast("uintptr_t", disk._region.address))
    assert is_mapped(address)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            fails(UsageError, lambda: disk.read(0, 1), "fork", "again")
            fails(UsageError, lambda: disk.write(0, b"x"), "fork")
            fails(UsageError, lambda: disk.view, "fork")
            fails(UsageError, lambda: backend.request("count"), "fork")
            disk.close()
            backend.close()
            assert (disk.alive, backend.alive) == (False, False)
            # Nothing of it is left here: no mapping, no descriptor.
            assert not is_mapped(address)
            names = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64) if is_open(fd)]
            assert not [n for n in names if "userfaultfd" in n or "socket" in n or "/proc" in n], (
                names
            )
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert disk.read(0, 6) == b"parent"
    assert backend.alive
    disk.close()


def waiting_read_never_gives_zeros(backend: Backend) -> None:
    """Even if the guard is taken off under a reader, which no caller of Disk can do."""
    disk = backend.open("tiny")
    backend.request("deaf")
    buffer = bytearray(b"untouched")
    results = []
    reader = threading.Thread(
        target=lambda: results.append(
            lib.region_read(disk._region, PAGE, ffi.from_buffer(buffer), len(buffer))
        )
    )
    reader.start()
    wait_for(disk._region.uffd, select.POLLIN)
    lib.region_deinit(disk._region)
    reader.join()
    assert (results, buffer) == ([-errno.EIO], b"untouched")
    disk.close()


def wait_for(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    assert poll.poll(50_000)


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        return any(line.startswith(f"{address:x}-") for line in maps)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def no_thread_and_no_descriptor_is_left(backend: Backend) -> None:
    def nr_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = nr_fds()
    for _ in range(3):
        with backend.open("tiny") as disk:
            disk.read(0, 1)
            assert len(os.listdir("/proc/self/task")) == 2  # one that listens
            uffd = os.readlink(f"/proc/self/fd/{disk._region.uffd}")
            assert "userfaultfd" in uffd
            for fd in (disk._region.uffd, disk._region.pagemap_fd, disk._region.mem_fd):
                assert not os.get_inheritable(fd)
            assert not os.get_blocking(disk._region.uffd)
        assert nr_fds() == before
        while len(os.listdir("/proc/self/task")) > 1:
            os.sched_yield()  # it is joined; the kernel has its last words
    fails(UsageError, lambda: backend.open("none"), "tiny")
    assert nr_fds() == before


def pages_come_in_while_a_thread_waits(backend: Backend) -> None:
    """A read that waits lets other threads run, and keeps the disk from being closed."""
    disk = backend.open("tiny")
    disk.read(0, 1)
    backend.request("deaf")
    reader = threading.Thread(target=lambda: disk.read(PAGE, 1), daemon=True)
    reader.start()
    wait_for(disk._region.uffd, select.POLLIN)  # its fault, which nobody takes
    assert disk.read(0, 1) == b"\1"  # resident: no fault
    fails(UsageError, disk.close, "in use")
    print("waiting", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def close_does_not_wait_for_a_dead_backend(backend: Backend) -> None:
    disk = backend.open("tiny")
    disk.write(0, b"x" * PAGE)
    os.kill(backend.request("hello", version=1, features=[])["pid"], signal.SIGKILL)
    wait_for(disk._connection.fileno(), select.POLLRDHUP)
    assert not disk.alive
    # Pages that are here stay readable and right.
    assert disk.read(0, 3) == b"xxx"
    disk.close()
    fails(PeerError, lambda: backend.request("count"), "count", "the backend ended")
    fails(UsageError, lambda: backend.request("count"), "closed", "connect")


def replies_are_understood(backend: Backend) -> None:
    assert [set(reply) for reply in backend.stream("spam")] == [{"ok", "progress"}] * 2 + [{"ok"}]
    assert backend.request("spam") == {"ok": True}
    assert len(backend.request("grow", length=1 << 20)["text"]) == 1 << 20
    fails(UsageError, lambda: backend.request("nonsense"), "nonsense")
    assert backend.request("count")["guests"] == 0
    stream = backend.stream("spam")
    next(stream)
    stream.close()
    fails(UsageError, lambda: backend.request("count"), "closed")


def is_told_the_cure(backend: Backend) -> None:
    line = fails(UsageError, lambda: backend.open("tiny"), "'tiny'", "root", "/dev/userfaultfd")
    assert "vm.unprivileged_userfaultfd=1" in str(line)


def works(backend: Backend) -> None:
    with backend.open("tiny") as disk:
        assert disk.read(PAGE, 2) == b"\2\2"
        disk.write(PAGE, b"x")
        assert disk.read(PAGE, 2) == b"x\2"


def become(uid: int) -> None:
    """Give up root for good, and be as dumpable as a process started by that user."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    pr_set_dumpable = 4
    assert ctypes.CDLL(None).prctl(pr_set_dumpable, 1, 0, 0, 0) == 0


if __name__ == "__main__":
    if len(sys.argv) > 3:
        become(int(sys.argv[3]))
    try:
        with connect(sys.argv[2]) as the_backend:
            globals()[sys.argv[1]](the_backend)
    except CowshedError as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
    print("done")
