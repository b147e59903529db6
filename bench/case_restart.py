# SPDX-License-Identifier: Apache-2.0
"""Guests' stalls at a backend's death, its upgrade and a drain.

Guests that never rest (steady.py) record the longest stall of each, during one event after another
of their backend, in an order drawn anew each round. One event is "nothing": it shows the stalls
that the machine itself causes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
from backend import BenchError
from cases import MIN_ROUNDS, Bench, CaseResult, Row
from kept import KeptBackend
from mappings import PAGE_BYTES
from restart_drain import drain_rows
from stats import Aim, compare
from steady import Terms
from steady_crowd import SteadyCrowd

__all__ = ["restart"]

MIB = 1 << 20
CRASH_MS, TAKEOVER_MS = 300.0, 20.0
# A span lasts at least so long, and so much longer than its event, since a successor's background
# work can stall guests too.
SPAN_SECONDS, AFTER_SECONDS = 1.0, 0.3


def restart(bench: Bench) -> CaseResult:
    """Measure kills, reloads and takeovers under guests, and drains between two backends."""
    size_bytes = (64 if bench.quick else 1024) * MIB
    nr_guests = 4 if bench.rounds == 1 else 8 if bench.quick else 16
    image = make_numbered(bench.build_dir, size_bytes)
    rows = [*_pauses(bench, image, nr_guests), *drain_rows(bench, image, nr_guests)]
    return CaseResult(
        f"guests of a backend that is killed, replaced and drained, {size_bytes // MIB} MiB "
        "resident",
        rows,
        [
            "ms: the longest time between two accesses of a guest, less its pace; of all guests",
            "nothing: as long a time in which nothing is done: what the machine does to guests",
            "an access fails if it is an error or returns a wrong byte",
        ],
    )


def make_numbered(out: Path, size_bytes: int) -> Path:
    """Make a file of which every page begins with its number, or reuse an earlier run's."""
    path = out / f"numbered-{size_bytes // MIB}M.raw"
    if not path.exists() or path.stat().st_size != size_bytes:
        piece_pages = MIB // PAGE_BYTES
        generator = np.random.default_rng(7)
        with path.open("wb") as file:
            for first in range(0, size_bytes // PAGE_BYTES, piece_pages):
                piece = np.frombuffer(bytearray(generator.bytes(MIB)), dtype="<u8")
                piece[:: PAGE_BYTES // 8] = np.arange(first, first + piece_pages)
                file.write(piece.tobytes())
    return path


class _Pauses:
    """Rounds of events of one backend, and the stalls of two crowds."""

    def __init__(self, bench: Bench, backend: KeptBackend, crowds: dict[str, SteadyCrowd]) -> None:
        self._bench = bench
        self._backend = backend
        self._crowds = crowds
        self._things: dict[str, Callable[[], None]] = {
            "crash": backend.crash,
            "reload": backend.reload,
            "takeover": backend.takeover,
            "nothing": lambda: None,
        }
        self.stalls: dict[str, dict[str, list[float]]] = {
            crowd: {thing: [] for thing in self._things} for crowd in crowds
        }
        self.where: dict[str, dict[str, dict[str, list[float]]]] = {
            crowd: {thing: {} for thing in self._things} for crowd in crowds
        }

    def run(self) -> None:
        """Run rounds until there are enough or the time is over."""
        bench = self._bench
        deadline = time.monotonic() + 4 * bench.row_seconds
        for number in range(bench.rounds):
            if number >= MIN_ROUNDS and time.monotonic() > deadline:
                break
            bench.say(f"restarts, round {number + 1}")
            for thing in bench.rng.sample(sorted(self._things), len(self._things)):
                self._measure(thing)

    def _measure(self, thing: str) -> None:
        crowds = self._crowds
        if thing == "crash":
            self._backend.outlive_quick_death()
        for crowd in crowds.values():
            crowd.wait_served()
        spans = {name: crowd.begin_span() for name, crowd in crowds.items()}
        began = time.monotonic()
        self._things[thing]()
        answers_ms = (time.monotonic() - began) * 1e3
        for crowd in crowds.values():
            crowd.wait_served()
        until = max(began + SPAN_SECONDS, time.monotonic() + AFTER_SECONDS)
        time.sleep(max(0.0, until - time.monotonic()))
        for name, crowd in crowds.items():
            crowd.begin_span()
            crowd.wait_served()  # every guest has recorded a stall that lasted until now
            stalls = crowd.stalls_ms(spans[name])
            self.stalls[name][thing].append(max(stalls))
            where = {"ms_median_guest": median(stalls), "ms_until_it_answers": answers_ms}
            for key, value in where.items():
                self.where[name][thing].setdefault(key, []).append(value)


def _pauses(bench: Bench, image: Path, nr_guests: int) -> list[Row]:
    size_bytes = image.stat().st_size
    with ExitStack() as stack:
        bench.say("a backend with its keeper, and its guests")
        backend = stack.enter_context(
            KeptBackend(image, size_bytes + 64 * MIB, "--listen=tcp://127.0.0.1:0")
        )
        common = {"image": "disk", "write_every": 8}
        terms = {
            f"{nr_guests} mapped guests": Terms(
                uri=backend.uri, name="mapped", nr_guests=nr_guests, pace_ms=1.0, **common
            ),
            "a guest over tcp": Terms(
                uri=backend.tcp_uri(), name="tcp", nr_guests=1, pace_ms=4.0, **common
            ),
        }
        crowds = {
            name: stack.enter_context(SteadyCrowd(bench.build_dir, each))
            for name, each in terms.items()
        }
        pauses = _Pauses(bench, backend, crowds)
        pauses.run()
        mismatches = backend.request("audit")["mismatches"]
        if mismatches:
            raise BenchError(f"the audit after the restarts: {mismatches}")
        return [
            *(_stall_row(name, pauses) for name in crowds),
            served_row("restarts, right answers", list(crowds.values())),
        ]


def _stall_row(name: str, pauses: _Pauses) -> Row:
    samples = {thing: list(stalls) for thing, stalls in pauses.stalls[name].items()}
    nr = len(samples["nothing"])
    where = {
        thing: {key: median(values) for key, values in figures.items()}
        for thing, figures in pauses.where[name].items()
    }
    samples |= {"300 ms": [CRASH_MS] * nr, "20 ms": [TAKEOVER_MS] * nr}
    ratios = [
        compare(samples, "crash", "300 ms", Aim(1.0)),
        compare(samples, "takeover", "20 ms", Aim(1.0)),
        compare(samples, "reload", "nothing"),
    ]
    return Row(f"restarts, {name}", "ms", samples, ratios, where)


def served_row(name: str, crowds: list[SteadyCrowd]) -> Row:
    """Return a row of the share of accesses that returned the right bytes; the aim is all."""
    made = float(sum(sum(crowd.made()) for crowd in crowds))
    samples = {"right": [made - sum(crowd.nr_failed() for crowd in crowds)], "made": [made]}
    return Row(name, "", samples, [compare(samples, "right", "made", Aim(1.0, at_least=True))])
