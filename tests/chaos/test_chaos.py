# SPDX-License-Identifier: Apache-2.0
"""Everything at once: guests of every kind, and deaths, drains, faults and evictions under them.

COWSHED_CHAOS_SECONDS says how long (30 unless given); COWSHED_TEST_SEED repeats a schedule, though
not how threads and processes interleave.
"""

from __future__ import annotations

import faulthandler
import os
import random
import time
from pathlib import Path

import pytest
from actors import OverError
from domains import new_run_dir
from events import EVENTS, choose
from report import report
from world import World

SECONDS = float(os.environ.get("COWSHED_CHAOS_SECONDS", "30"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: userfaultfd and points"),
]


@pytest.mark.timeout(2 * SECONDS + 600)
def test_no_guest_sees_a_wrong_byte_an_error_or_an_endless_wait(
    rng: random.Random, tmp_path: Path
) -> None:
    faulthandler.cancel_dump_traceback_later()  # the suite's bound is below ours
    seed = str(rng.random())
    with new_run_dir() as one, new_run_dir() as two:
        world = World(tmp_path, (one, two), seed)
        try:
            _run(world)
        except BaseException as error:
            world.fail(repr(error))
            report(world)
            if isinstance(error, OverError):
                pytest.fail(f"chaos with seed {seed}: {world.failed}", pytrace=False)
            raise
        finally:
            world.guest_log.close()
            for actor in world.actors:
                actor._end_process()
            for host in world.hosts:
                host.end()


def _run(world: World) -> None:
    deadline = time.monotonic() + SECONDS
    world.start()
    todo = [event for _, event in EVENTS]
    world.rng.shuffle(todo)
    nr_events = 0
    while time.monotonic() < deadline:
        event = todo.pop() if todo else choose(world)
        world.begin(event.__name__)
        event(world)
        world.check()
        nr_events += 1
        if world.failed:
            raise OverError
    world.finish()
    print(f"{nr_events} events; " + ", ".join(f"{a.name} {a.nr_done}" for a in world.actors))
