# SPDX-License-Identifier: Apache-2.0
"""A process with few descriptors or threads left fails at one thing, and goes on with the rest."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from domains import MakeImage, StartDaemon, StartGuest, kill_backend, until

pytestmark = pytest.mark.slow

MIB = 1 << 20


def limit_files(pid: int, nr_free: int) -> tuple[int, int]:
    """Leave a process that many numbers for descriptors; its limit before, for prlimit."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1 << 20) if number not in taken)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    limit = [next(free) for _ in range(nr_free + 1)][-1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    return before


def run(script: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


RENUMBER = """
import os, random, resource, sys
from cowshed.service.supervise.keeper import _number_from
seed = int(sys.argv[1]) if sys.argv[1:] else random.randrange(1 << 32)
names = [f"m{no}" for no in range(40)]
fds = [os.memfd_create(name) for name in names]
order = random.Random(seed).sample(range(40), 30)
for no in set(range(40)) - set(order):
    os.close(fds[no])
spare = os.open("/dev/null", os.O_RDONLY)
while True:  # fill the gaps, but for one
    filler = os.open("/dev/null", os.O_RDONLY)
    if filler > max(fds):
        os.close(filler)
        break
resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 1,) * 2)
os.close(spare)
_number_from(3, [fds[no] for no in order])
for number, no in enumerate(order, 3):
    assert f"m{no} " in os.readlink(f"/proc/self/fd/{number}"), f"seed {seed}"
    assert not os.get_inheritable(number)
print("done")
"""


def test_descriptors_are_renumbered_with_one_free_number() -> None:
    assert run(RENUMBER) == ["done"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP])
def test_guests_outlive_a_backend_whose_limit_is_low(
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    make_image: MakeImage,
    run_dir: Path,
    end: signal.Signals,
) -> None:
    image, settings = make_image(MIB), run_dir / "cowshed.toml"
    settings.write_text(f'images = {{ d = "{image}" }}\n')
    low = ["prlimit", "--nofile=300:300"]
    kept = start_daemon("--config", str(settings), kept=True, before=low)
    guests = [start_guest(kept.uri) for _ in range(8)]
    for guest in guests:
        guest.call("open", image="d", guest=f"g{guest.pid}")
    kill_backend(kept, end)
    for guest in guests:
        assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0
    assert kept.mismatches() == []


CHECK = """
import os, resource
from cowshed.cache.errors import UsageError
from cowshed.service.supervise.reload_check import ReloadCheck
def open_now():
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
before, lowest = open_now(), os.open("/dev/null", os.O_RDONLY)
os.close(lowest)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for nr_free in range(64):
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + nr_free, hard))
    try:
        check = ReloadCheck()
    except UsageError as error:
        assert "Too many open files" in str(error), error
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert open_now() == before, nr_free
    else:
        check.cancel()
        break
print("refused" if nr_free else "never")
"""


def test_a_check_before_a_reload_without_descriptors_is_refused_and_leaves_none() -> None:
    assert run(CHECK) == ["refused"]


def test_a_backend_without_descriptors_has_a_keeper_again_once_it_has_some(
    start_daemon: StartDaemon, start_guest: StartGuest, make_image: MakeImage, run_dir: Path
) -> None:
    image, settings = make_image(MIB), run_dir / "cowshed.toml"
    settings.write_text(f'images = {{ d = "{image}" }}\n')
    kept = start_daemon("--config", str(settings), kept=True)
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    backend = int((kept.run_dir / "lock").read_text())
    _, hard = resource.prlimit(backend, resource.RLIMIT_NOFILE)
    resource.prlimit(backend, resource.RLIMIT_NOFILE, (3, hard))  # what it closes is no use to it
    kept.kill()
    until(lambda: "event=no-keeper" in kept.log())
    resource.prlimit(backend, resource.RLIMIT_NOFILE, (hard, hard))
    until(lambda: "event=held " in kept.log())
    assert kept.status()["pid"] == backend
    kill_backend(kept)
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0


def test_a_backend_without_descriptors_leaves_as_any_other(
    start_daemon: StartDaemon, start_guest: StartGuest, make_image: MakeImage
) -> None:
    image = make_image(MIB)
    kept = start_daemon(f"--image=d={image}", kept=True)
    guest = start_guest(kept.uri)
    guest.call("open", image="d", guest="g")
    with kept.connect() as backend:  # a conversation that is at rest, and would be carried over
        limit_files(backend.request("status")["status"]["pid"], 0)
        os.kill(kept.pid, signal.SIGHUP)
        until(lambda: kept.log().count("event=serving") == 2)
    kept.wait_logged("event=leaving")
    assert "event=backend-died" not in kept.log()
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0


def test_an_image_that_there_are_no_descriptors_for_is_served_once_there_are(
    start_daemon: StartDaemon, start_guest: StartGuest, make_image: MakeImage, run_dir: Path
) -> None:
    image, settings, late = make_image(MIB), run_dir / "cowshed.toml", run_dir / "late.raw"
    settings.write_text(f'[images]\nd = "{image}"\n')
    kept = start_daemon("--config", str(settings), kept=True)
    settings.write_text(f'[images]\nd = "{image}"\nlate = "{late}"\n')
    kill_backend(kept, signal.SIGHUP)
    with kept.connect() as backend:

        def status() -> dict[str, Any]:
            return dict(backend.request("status")["status"])

        def reasons() -> list[str]:
            return [each["why"] for each in status()["unserved_images"]]

        # From here on nothing that it does takes a descriptor, or gives one back.
        until(lambda: all(each["digest"] for each in status()["images"]))
        pid = status()["pid"]
        # Its source, that without the page cache, and three of its memory; not for its record.
        before = limit_files(pid, 4 + takes_direct(image))
        late.with_suffix(".new").write_bytes(image.read_bytes())
        late.with_suffix(".new").rename(late)
        until(lambda: reasons() == ["[Errno 24] Too many open files"])
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        until(lambda: reasons() == [])
    guest = start_guest(kept.uri)
    guest.call("open", image="late")
    assert guest.call("compare", path=str(image), offset=0, length=MIB) == 0
    assert kept.mismatches() == []


def takes_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


STARVED = """
import resource, sys, threading
from cowshed.cache import CapacityError, FileSource, PageStore
from cowshed.service.images.reopening import Reopened, Reopener
from pathlib import Path
posted = []
came = threading.Event()
def post(call):
    posted.append(call)
    came.set()
with PageStore(1 << 20) as store:
    image = store.open_image("d", FileSource.open(Path(sys.executable)))
    reopener, got = Reopener(post), []
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    threading.stack_size(256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    reopener.reopen(image, got.append)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    came.clear()
    reopener.reopen(image, got.append)
    assert came.wait(60)
    for call in posted:
        call()
    print(*(type(each).__name__ for each in got))
"""


def test_a_source_is_opened_again_once_there_can_be_a_thread_for_it() -> None:

    assert run(STARVED) == ["CapacityError", "Reopened"]
