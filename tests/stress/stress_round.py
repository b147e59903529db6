# SPDX-License-Identifier: Apache-2.0
"""One round of the stress test, from the backend's start to the count of what is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import guest as guest_module
from backend_process import BackendProcess, StressError
from guest import MAX_THREADS, SLOT_BYTES, Life, Slots
from operators import Commands, Operator, Quotas, Trouble
from rounds import make_image, make_life, make_round

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["guest"])


class GuestProcess:
    """The driver's end of a guest process."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.killed = False
        Path(life.slots).write_bytes(bytes(SLOT_BYTES * MAX_THREADS))
        Path(life.slots).chmod(0o666)
        self.slots = Slots(life.slots)
        self.orders: Connection
        self.orders, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=guest_module.live, args=(life, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.seen = self.slots.read()
        self.seen_at = time.monotonic()

    def kill(self) -> None:
        self.killed = True
        self.process.kill()

    def freeze(self, seconds: float) -> None:
        """Stop all its threads for a time, wherever they are."""
        pid = self.process.pid
        if pid is not None and self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(seconds)
                os.kill(pid, signal.SIGCONT)

    def news(self) -> list[tuple[str, str]]:
        """What it said since the last time; raises StressError for what it saw wrong."""
        said = []
        with contextlib.suppress(EOFError, ConnectionResetError):
            while self.orders.poll():
                kind, text = self.orders.recv()
                if kind == "wrong":
                    raise StressError(f"guest {self.life.name}: {text}\n  {self.life}")
                said.append((kind, text))
        return said

    def ended(self) -> bool:
        """Whether it is gone; raises StressError if it had no reason to go like that."""
        code = self.process.exitcode
        if code is None:
            return False
        self.news()
        fine = {0}
        if self.killed:
            fine |= {-signal.SIGKILL}
        if self.life.on_quota == "kill":
            fine |= {-signal.SIGBUS}
        if code not in fine:
            raise StressError(f"guest {self.life.name} ended with {code}: {self.life}")
        return True

    def moved(self, now: float) -> float:
        """Seconds since it was last seen to get on."""
        slots = self.slots.read()
        if slots != self.seen:
            self.seen, self.seen_at = slots, now
        return now - self.seen_at

    def send(self, order: str) -> None:
        with contextlib.suppress(OSError):
            self.orders.send(order)

    def close(self) -> None:
        self.process.join()
        self.process.close()
        self.orders.close()
        self.slots.close()
        os.unlink(self.life.slots)


class RoundRun:
    """Runs one round; patience is how many seconds anything may take before it hangs."""

    def __init__(
        self, rng: random.Random, no: int, run_dir: Path, env: dict[str, str], patience: float
    ) -> None:
        self.round = make_round(rng, no)
        self._rng = rng
        self._run_dir = run_dir
        self._env = env
        self._patience = patience
        self._guests: list[GuestProcess] = []
        self._nr_guests_ever = 0
        self._nr_killed = 0
        self._backend: BackendProcess
        self._operators: list[Operator] = []

    def run(self, seconds: float) -> str | None:
        """What was done; None, and why on stdout, if something was wrong."""
        for name, size in self.round.sizes.items():
            make_image(self._rng, self._run_dir / f"{name}.raw", size)
        try:
            self._backend = BackendProcess(self.round, self._run_dir, self._env, self._patience)
        except StressError as error:
            print(f"stress: {error}\n{(self._run_dir / 'log').read_text()}")
            return None
        try:
            return self._run(seconds)
        except BaseException as error:
            self._explain(error)
            if not isinstance(error, Exception):
                raise
            return None
        finally:
            for operator in self._operators:
                operator.end()
            for guest in self._guests:
                guest.kill()
            self._backend.kill()

    def _run(self, seconds: float) -> str:
        if not self._backend.order("wait_digests"):
            raise StressError("the digests are never ready")
        before = self._left_by_nobody()
        self._commands = Commands(self.round, self._backend, self._fork_rng("commands"))
        self._quotas = Quotas(self._backend, self._fork_rng("quotas"))
        trouble = Trouble(self.round, self._backend, self._fork_rng("trouble"))
        self._operators = [
            Operator("commands", self._commands.act, 0.02),
            Operator("quotas", self._quotas.act, 0.1),
            Operator("trouble", trouble.act, 0.01),
        ]
        for operator in self._operators:
            operator.start()
        for _ in range(2):
            deadline = time.monotonic() + seconds * 0.4
            while time.monotonic() < deadline:
                self._tick()
                time.sleep(0.03)
            self._checkpoint()
        self._end_guests()
        return self._end(before)

    def _left_by_nobody(self) -> dict[str, Any]:
        """What the backend has with nobody connected, which it notices in its own time."""
        deadline = time.monotonic() + self._patience
        left: dict[str, Any] = {}
        nr_same = 0
        while nr_same < 5:
            seen = dict(self._backend.order("left"))
            connected = "socket:" in seen["descriptors"] or "anon_inode:[pidfd]" in str(seen)
            nr_same = nr_same + 1 if seen == left and not connected else 0
            left = seen
            if time.monotonic() > deadline:
                raise StressError(f"a connection that was closed stays: {left}")
            time.sleep(0.01)
        return left

    def _fork_rng(self, name: str) -> random.Random:
        return random.Random(f"{self._rng.random()}:{name}")

    # While guests run.

    def _tick(self) -> None:
        """Keep the house full, strike some guests, and see that everybody gets on."""
        self._backend.check_alive()
        for operator in self._operators:
            if operator.error is not None:
                raise operator.error
        self._reap()
        while len(self._guests) < self.round.nr_guests:
            life = make_life(
                self._rng, self.round, self._nr_guests_ever, self._backend.uri, self._run_dir
            )
            self._nr_guests_ever += 1
            self._guests.append(GuestProcess(life))
        strike = self._rng.random()
        victim = self._rng.choice(self._guests)
        if strike < 0.06:
            self._nr_killed += 1
            victim.kill()
        elif strike < 0.1:
            victim.freeze(self._rng.random() * 0.03)
        self._look_for_hangs()

    def _reap(self) -> None:
        for guest in list(self._guests):
            guest.news()
            if guest.ended():
                self._guests.remove(guest)
                guest.close()

    def _look_for_hangs(self) -> None:
        now = time.monotonic()
        stuck = [guest for guest in self._guests if guest.moved(now) > self._patience]
        if stuck:
            raise StressError(f"guest {stuck[0].life.name} hangs: {stuck[0].life}")

    # At rest.

    def _checkpoint(self) -> None:
        for operator in self._operators:
            operator.pause(self._patience)
        self._backend.order("release_all")
        self._quotas.always_raise = True
        self._ask_all("pause", "paused")
        if not self._backend.order("wait_idle"):
            raise StressError("loads go on although every guest is at rest")
        self._audit("at rest")
        self._check()
        if self.round.errors:
            self._commands.unpin_all()
            self._commands.repair_all()
        self._ask_all("verify", "verified")
        self._audit("after every guest read everything")
        self._check()
        self._quotas.always_raise = False
        for guest in self._guests:
            guest.send("go")
        for operator in self._operators:
            operator.resume()

    def _ask_all(self, order: str, answer: str) -> None:
        """Wait for every guest's answer; those that stop at a quota meanwhile get more."""
        waiting = list(self._guests)
        for guest in waiting:
            guest.send(order)
        started = time.monotonic()
        while waiting:
            for guest in list(waiting):
                kinds = {kind for kind, _ in guest.news()}
                if answer in kinds or "end" in kinds or guest.ended():
                    waiting.remove(guest)
            self._quotas.act()
            # They may be slow as long as they get on.
            now = time.monotonic()
            if now - started > self._patience and all(
                guest.moved(now) > self._patience for guest in waiting
            ):
                raise StressError(f"guest {waiting[0].life.name} does not {order}: it hangs")
            time.sleep(0.01)
        self._reap()

    def _audit(self, when: str) -> None:
        with self._backend.connect() as backend:
            mismatches = backend.request("audit")["mismatches"]
            broken = backend.request("check")["broken"]
        if mismatches or broken:
            raise StressError(f"audit {when}: {mismatches[:8]}; broken: {broken}")

    def _check(self) -> None:
        problems = self._backend.order(
            "check", pins=self._commands.pins, pinned_stay=not self.round.errors
        )
        sampled = self._backend.order("sampled")
        if problems or sampled["violations"]:
            raise StressError(f"invariants: {problems} {sampled['violations']}")

    # At the end.

    def _end_guests(self) -> None:
        for operator in self._operators[:1] + self._operators[2:]:
            operator.end()
        for guest in self._guests:
            if self._rng.random() < 0.3:
                guest.kill()
            guest.send("end")
        started = time.monotonic()
        self._quotas.always_raise = True
        while self._guests:
            self._reap()
            if time.monotonic() - started > self._patience:
                raise StressError(f"guest {self._guests[0].life.name} does not end: it hangs")
            time.sleep(0.01)
        self._operators[1].end()
        for operator in self._operators:
            operator.join(self._patience)
            if operator.is_alive():
                raise StressError(f"operator {operator.name!r} hangs")
            if operator.error is not None:
                raise operator.error

    def _end(self, before: dict[str, Any]) -> str:
        self._backend.order("release_all")
        self._commands.unpin_all()
        requests = dict(self._commands.nr_requests)
        self._commands.close()
        self._quotas.close()
        self._wait_left(before)
        with self._backend.connect() as backend:
            status = backend.request("status")["status"]
            for name in self.round.sizes:
                backend.request("evict", image=name)
        self._audit("with nobody attached")
        if frames_bytes := self._backend.order("frames_bytes"):
            raise StressError(f"{frames_bytes} bytes of frames are left of what was evicted")
        self._check()
        sampled = self._backend.order("sampled")
        left = self._backend.stop()
        if left["before"] != left["after"]:
            raise StressError(f"the backend did not give everything back: {left}")
        faults = status["faults"]
        return (
            f"{self._nr_guests_ever} guests, {self._nr_killed} killed, "
            f"{self._quotas.nr_stops} seen stopped; faults {sum(faults.values())}, "
            f"loads {status['loads']}, load errors {status['load_errors']}, "
            f"evicted {status['evicted_extents']}, cow {status['cow_breaks']}; "
            f"regions opened {status['open_regions']['opens']}; requests {requests}; "
            f"{sampled['nr_samples']} samples, most {sampled['most_bytes']} "
            f"of {self.round.capacity_bytes} bytes"
        )

    def _wait_left(self, before: dict[str, Any]) -> None:
        deadline = time.monotonic() + self._patience
        while (left := self._backend.order("left")) != before:
            if time.monotonic() > deadline:
                raise StressError(f"guests left something behind: {left}, before them {before}")
            time.sleep(0.05)

    def _explain(self, error: BaseException) -> None:
        """Everything that may help, while it is still there."""
        print(f"stress: {type(error).__name__}: {error}")
        if not isinstance(error, StressError):
            traceback.print_exc(file=sys.stdout)
        for guest in self._guests:
            print(f"  {guest.life}\n    {guest.slots.read()[: guest.life.nr_threads]}")
            for task in sorted(Path(f"/proc/{guest.process.pid}/task").glob("*")):
                with contextlib.suppress(OSError):
                    wchan = (task / "wchan").read_text()
                    print(f"    {task.name} {wchan} {(task / 'syscall').read_text().strip()}")
        with contextlib.suppress(Exception), self._backend.connect() as backend:
            print("  status", backend.request("status")["status"])
        with contextlib.suppress(OSError):
            print("  log:", "\n    ".join((self._run_dir / "log").read_text().splitlines()[-40:]))
