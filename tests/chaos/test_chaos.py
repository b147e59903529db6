# SPDX-License-Identifier: Apache-2.0
"""Everything at once: guests of every kind, and deaths, drains, faults and evictions under them.

COWSHED_CHAOS_SECONDS says how long (120 unless given); COWSHED_TEST_SEED repeats a schedule, though
not how threads and processes interleave.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from actors import OverError
from domains import new_run_dir, until
from events import EVENTS, choose, processes
from hosts import ChaosHost
from world import World

SECONDS = float(os.environ.get("COWSHED_CHAOS_SECONDS", "120"))
SHOWN_LOG_LINES = 60

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
            _report(world)
            if isinstance(error, OverError):
                pytest.fail(f"chaos with seed {seed}: {world.failed}", pytrace=False)
            raise
        finally:
            world.guest_log.close()
            for actor in world.actors:
                actor._end_process()
            for host in world.hosts:
                host.daemon.end()


def _run(world: World) -> None:
    deadline = time.monotonic() + SECONDS
    world.start()
    todo = [event for _, event in EVENTS]
    world.rng.shuffle(todo)
    nr_events = 0
    while time.monotonic() < deadline:
        event = todo.pop() if todo else choose(world)
        world.note(event.__name__)
        event(world)
        nr_events += 1
        if world.failed:
            raise OverError
    world.finish()
    print(f"{nr_events} events; " + ", ".join(f"{a.name} {a.nr_done}" for a in world.actors))


def _report(world: World) -> None:
    """All that may tell why, once: steps, who waits where, stacks, logs."""
    out = sys.stderr
    print(f"chaos failed: {world.failed}\nthe last steps:", file=out)
    for step in world.steps:
        print(f"  {step}", file=out)
    for actor in world.actors:
        print(f"{actor.name}: {actor.nr_done} orders done, at {actor.doing}", file=out)
    for name, pid in processes(world).items():
        print(f"{name}, {pid}: {_threads(pid)}", file=out)
    for host in world.hosts:
        lines = host.daemon.log().splitlines()[-SHOWN_LOG_LINES:]
        print(f"the log of {host.name}:", *lines, sep="\n  ", file=out)
        if "HANG" in world.failed or "never:" in world.failed:
            _print_stacks(host)
    print(world.guest_log_path.read_text()[-3000:], file=out)


def _print_stacks(host: ChaosHost) -> None:
    """Have its backend print them into its log, of which it dies."""
    nr_bytes = len(host.daemon.log())
    pid = host.backend_pid
    os.kill(pid, signal.SIGABRT)
    with contextlib.suppress(AssertionError):
        until(lambda: host.backend_pid != pid, 5)
    print(host.daemon.log()[nr_bytes:], file=sys.stderr)


def _threads(pid: int) -> str:
    told = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            told.append(
                f"{task.name} {(task / 'comm').read_text().strip()} {state} "
                f"{(task / 'wchan').read_text()}"
            )
        except OSError:
            continue
    return "; ".join(told)
