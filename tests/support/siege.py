# SPDX-License-Identifier: Apache-2.0
"""A daemon under attack: guests that must not notice it, and checks that new ones are served.

Every test can use the fixtures, like those of domains.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from domains import NOBODY, Daemon, Guest, MakeImage, StartDaemon, StartGuest, until
from swarms import Swarm

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    return start_daemon("--image", f"d={make_image(SIZE)}", "--capacity", "2M")


@pytest.fixture
def victim(daemon: Daemon, start_guest: StartGuest, rng: random.Random) -> Iterator[Swarm]:
    """Guests that read, write and discard all the while, and must not notice anything."""
    image = str(daemon.run_dir / "image.raw")
    with Swarm(daemon.uri, "churn", 2, rng, path=image) as swarm:
        until(lambda: len(daemon.status()["guests"]) == 2)
        yield swarm
        swarm.end()
        results = swarm.results()
        assert [result["wrong"] for result in results] == [0, 0]
        assert min(result["steps"] for result in results) > 0
    # The audit still matches after the hostile guests, and the daemon ends cleanly.
    assert "traceback" not in daemon.log()
    until(lambda: daemon.mismatches() == [])
    assert daemon.stop() == 0


@pytest.fixture
def hostile(daemon: Daemon, victim: Swarm, start_guest: StartGuest) -> Guest:
    uid = NOBODY if os.geteuid() == 0 else None
    return start_guest(daemon.uri, uid, script="hostile_guest.py")


def guests_are(daemon: Daemon, *names: str) -> bool:
    return {guest["name"] for guest in daemon.status()["guests"]} == {"g0", "g1", *names}


def still_serves(daemon: Daemon, start_guest: StartGuest) -> bool:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="newcomer")
    image = str(daemon.run_dir / "image.raw")
    assert guest.call("compare", path=image, offset=0, length=SIZE) == 0
    guest.call("close")
    return True
