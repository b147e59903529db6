# SPDX-License-Identifier: Apache-2.0
"""`cowshed top`: the daemon's counters as rates, once a second, until q.

`History` turns successive status objects into rates and holds no clock: its caller says when each
was taken. `top_view` is pure as well. `watch` alone touches the terminal and the time.
"""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cowshed.service.render import (
    STOPPED,
    Answer,
    add_row,
    format_quota,
    guest_state,
    heading,
    new_table,
)
from cowshed.service.sizes import format_bytes
from cowshed.service.text import format_count, format_share

REFRESH_SECONDS = 1.0
NR_SAMPLES = 40
_BARS = " ▁▂▃▄▅▆▇█"  # the blank is for a moment without faults; 0 % is the lowest bar
_HEADER_LINES = 6
_COUNTERS = ("loads", "evicted_extents")
_GUEST_COUNTERS = ("hits", "misses", "cow_breaks")


class History:
    """Rates between the two newest status objects, and the hit rate of each moment before.

    Invariants: `hit_rates` holds at most NR_SAMPLES, oldest first, None where nothing faulted;
    rates are of one daemon: counters that went back, or another pid, start afresh.
    """

    def __init__(self) -> None:
        self.hit_rates: deque[float | None] = deque(maxlen=NR_SAMPLES)
        self._older: dict[str, int] = {}
        self._newer: dict[str, int] = {}
        self._seconds = 0.0
        self._newer_ns = 0
        self._pid: int | None = None

    def observe(self, status: Answer, now_ns: int) -> None:
        """Take in `status` as it was at `now_ns` of a clock that never goes back."""
        counters = {name: status[name] for name in (*_COUNTERS, "hits", "misses")}
        for guest in status["guests"]:
            for name in _GUEST_COUNTERS:
                counters[f"{name} {guest['name']}"] = guest[name]
        restarted = self._pid != status["pid"] or counters["hits"] < self._newer.get("hits", 0)
        if restarted:
            self.hit_rates.clear()
        self._older = {} if restarted else self._newer
        self._seconds = (now_ns - self._newer_ns) / 1e9
        self._newer, self._newer_ns, self._pid = counters, now_ns, status["pid"]
        if self._older:
            hits, misses = self._gained("hits"), self._gained("misses")
            self.hit_rates.append(hits / (hits + misses) if hits + misses else None)

    def rate(self, *names: str, guest: str | None = None) -> float | None:
        """How fast the sum of these counters grows, a second; None until there are two samples."""
        if not self._older or self._seconds <= 0:
            return None
        keys = names if guest is None else [f"{name} {guest}" for name in names]
        return sum(self._gained(key) for key in keys) / self._seconds

    def _gained(self, key: str) -> int:
        """How much a counter grew; one that is new, or went back, counts from 0."""
        newer, older = self._newer.get(key, 0), self._older.get(key, 0)
        return newer - older if newer >= older else newer


def sparkline(shares: Sequence[float | None]) -> str:
    """One bar for each share of 0 to 1; a blank for None."""
    nr_heights = len(_BARS) - 1
    return "".join(
        _BARS[0] if share is None else _BARS[1 + min(int(share * nr_heights), nr_heights - 1)]
        for share in shares
    )


def top_view(status: Answer, history: History, nr_lines: int | None = None) -> RenderableType:
    """One frame: totals, then guests, stopped and busiest first, as many as fit in `nr_lines`."""
    resident_bytes, capacity_bytes = status["resident_bytes"], status["capacity_bytes"]
    hits, misses = status["hits"], status["misses"]
    now = history.hit_rates[-1] if history.hit_rates else None
    nr_stopped = sum(guest["state"] == STOPPED for guest in status["guests"])
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, line in {
        "Memory": f"{format_bytes(resident_bytes)} of {format_bytes(capacity_bytes)} "
        f"({format_share(resident_bytes, capacity_bytes)}), "
        f"{format_bytes(status['saved_bytes'])} saved by sharing",
        "Hits": f"{'-' if now is None else format_share(now, 1)} now, "
        f"{format_share(hits, hits + misses)} in all  {sparkline(history.hit_rates)}",
        "Rates": f"{_rounded(history.rate('hits', 'misses'))} faults, "
        f"{_rounded(history.rate('loads'))} loads, "
        f"{_rounded(history.rate('evicted_extents'))} evictions a second",
        "Guests": f"{format_count(len(status['guests']))}, {format_count(nr_stopped)} stopped",
    }.items():
        grid.add_row(Text(label, style="bold"), Text(line, no_wrap=True))

    def urgency(guest: Answer) -> tuple[bool, float, str]:
        busy = history.rate(*_GUEST_COUNTERS, guest=guest["name"]) or 0.0
        return (guest["state"] != STOPPED, -busy, str(guest["name"]))

    guests = sorted(status["guests"], key=urgency)
    nr_rows = len(guests) if nr_lines is None else max(0, nr_lines - _HEADER_LINES - 2)
    table = new_table("GUEST", "IMAGE", "=STATE", ">PRIVATE", ">FAULTS/s", ">COPIES/s", ">HITS")
    for guest in guests[:nr_rows]:
        name = guest["name"]
        add_row(
            table,
            name,
            guest["image"],
            guest_state(guest),
            format_quota(guest),
            _rounded(history.rate("hits", "misses", guest=name)),
            _rounded(history.rate("cow_breaks", guest=name)),
            format_share(guest["hits"], guest["hits"] + guest["misses"]),
            one_line=True,
        )
    parts: list[RenderableType] = [heading(status), grid, Text(), table]
    if len(guests) > nr_rows:
        parts.append(Text(f"and {format_count(len(guests) - nr_rows)} more", style="dim"))
    return Group(*parts)


def watch(take_status: Callable[[], Answer], console: Console) -> None:
    """Show a frame a second on `console` until q is pressed, or `take_status` raises."""
    history = History()
    with _keys() as wait_for_quit, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            status = take_status()
            history.observe(status, time.monotonic_ns())
            live.update(top_view(status, history, console.height), refresh=True)
            if wait_for_quit(REFRESH_SECONDS):
                return


def frame(status: Answer) -> RenderableType:
    """The frame of a single status object: totals, and no rates."""
    history = History()
    history.observe(status, 0)
    return top_view(status, history)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A wait of so many seconds that says whether q was pressed; keys come at once and unechoed.

    Without a terminal to read from it only waits.
    """
    if not sys.stdin.isatty():

        def wait_only(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield wait_only
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def wait_for_quit(seconds: float) -> bool:
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
        while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            readable, _, _ = select.select([stdin], [], [], left_ns / 1e9)
            # Not through sys.stdin: what its buffer holds, select does not see. Empty is a hang-up.
            if readable and (not (pressed := os.read(stdin, 64)) or b"q" in pressed.lower()):
                return True
        return False

    try:
        tty.setcbreak(stdin)
        yield wait_for_quit
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _rounded(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.1f}" if 0 < rate < 10 else format_count(round(rate))
