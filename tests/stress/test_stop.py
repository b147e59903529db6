# SPDX-License-Identifier: Apache-2.0
"""The backend's end while loads are under way: nothing is pulled from under a loader's feet."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_process import BackendProcess
from domains import StartGuest
from rounds import KIB, Round, make_image

pytestmark = pytest.mark.slow

ROUND = Round(
    no=0,
    extent_bytes=64 * KIB,
    large_extent_bytes=64 * KIB,
    capacity_extents=8,
    loaders=1,
    nr_guests=3,
    errors=False,
    sizes={"disk": 1000 * KIB},
)
PATIENCE_SECONDS = 60.0


@pytest.fixture
def backend(run_dir: Path, rng: random.Random) -> Iterator[BackendProcess]:
    make_image(rng, run_dir / "disk.raw", ROUND.sizes["disk"])
    backend = BackendProcess(ROUND, run_dir, {}, PATIENCE_SECONDS)
    yield backend
    backend.kill()


def test_a_backend_ends_clean_while_guests_wait_for_loads_in_the_queue(
    backend: BackendProcess, start_guest: StartGuest
) -> None:
    backend.order("wait_digests")
    backend.order("arm", point="LOAD_READ", action="STOP", arg=0, nr_times=0)
    guests = [start_guest(backend.uri) for _ in range(ROUND.nr_guests)]
    for no, guest in enumerate(guests):
        guest.call("open", image="disk", guest=f"g{no}")
        guest.start("read", offset=no * ROUND.extent_bytes, length=1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while backend.order("queued") < ROUND.nr_guests - 1:
        assert time.monotonic() < deadline
    backend.begin_stop()
    while backend.order("queued"):  # the store forgets them, and waits for the one being read
        assert time.monotonic() < deadline
    backend.order("release", point="LOAD_READ")
    left = backend.stop()
    assert left["before"] == left["after"]


def test_a_backend_ends_only_after_its_loaders_have_answered(
    backend: BackendProcess, start_guest: StartGuest
) -> None:
    backend.order("wait_digests")
    backend.order("arm", point="LOAD_ANSWER", action="STOP", arg=0, nr_times=1)
    guest = start_guest(backend.uri)
    guest.call("open", image="disk", guest="g")
    guest.start("read", offset=0, length=1)
    assert backend.order("wait_point", point="LOAD_ANSWER", nr_threads=1)
    backend.begin_stop()
    assert not backend.ends_within(0.5), backend.log_path.read_text()
    backend.order("release", point="LOAD_ANSWER")
    left = backend.stop()
    assert left["before"] == left["after"]
