# SPDX-License-Identifier: Apache-2.0
"""A frame of `cowshed top`: status, rates and choices in, a rich renderable out.

Pure. From the top: the daemon's totals; the images; the guests; details of the selected row, and
the cure if it is stopped; keys. If space is short, names shrink first; from 110 and from 150
columns on there are more columns. Colour and bars only repeat words and numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cowshed.service.reports.render import add_row, guest_state, heading, new_table
from cowshed.service.reports.wording import (
    STOPPED,
    Answer,
    format_drain,
    format_hit_rate,
    format_quota,
    format_via,
    format_warming,
    key_of,
    label_of,
    quota_command,
)
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.runtime.text import (
    format_count,
    format_seconds,
    format_share,
    format_us,
    printable,
)
from cowshed.service.top.history import History
from cowshed.service.top.state import KEYS, Focus, TopState

__all__ = ["ScreenFrame", "rows_of", "sparkline"]

T = TypeVar("T")

_WIDE = 110
_WIDER = 150
# The least width of a terminal at which a column is shown.
_IMAGE_COLUMNS: Mapping[str, int] = {
    "IMAGE": 0,
    ">SIZE": 0,
    ">RESIDENT": 0,
    ">": 70,
    "=": 76,
    ">HIT RATE": 84,
    ">SAVED": 54,
    ">GUESTS": 64,
    ">FAULTS/s": 46,
    ">LOADS/s": 76,
    ">TOUCHED": _WIDER,
    "=SOURCE": _WIDER,
}
_GUEST_COLUMNS: Mapping[str, int] = {
    "GUEST": 0,
    "IMAGE": 60,
    ">PID": _WIDE,
    ">GRANTED": _WIDE,
    "=STATE": 0,
    "=VIA": 90,
    ">PRIVATE": 44,
    ">FAULTS/s": 0,
    ">COPIES/s": 70,
    ">FAULT HITS": 66,
    ">UID": _WIDER,
    "=FAULTS/s BEFORE": _WIDER,
}
_SMALL = 18  # with fewer lines only one table is shown, and no details of the selected row
_LINES_OF_SECTION = 3  # a blank, title and headers


@dataclass(frozen=True)
class ScreenFrame:
    """One frame of at most `columns` x `lines`; with lines None it has all rows, none cut off.

    `blocks` False restricts it to ASCII, for terminals that know nothing else.
    """

    status: Answer
    history: History
    state: TopState
    columns: int = 80
    lines: int | None = None
    blocks: bool = True

    def view(self) -> RenderableType:
        """Lay out the frame."""
        if self.state.helping:
            goes_on = Text("any key leaves this help", style="dim")
            return Group(self._heading(), Text(), *_help(), Text(), goes_on)
        is_small = self.lines is not None and self.lines < _SMALL
        head = [self._heading(), *self._totals()[: 2 if is_small else None]]
        foot = [] if is_small or self.lines is None else self._selected()
        foot += [] if self.lines is None else [self._keys()]
        sections: tuple[Focus, ...] = (self.state.focus,) if is_small else ("images", "guests")
        parts: list[RenderableType] = list(head)
        room = self._shares(sections, len(head) + len(foot) + _LINES_OF_SECTION * len(sections))
        for focus in sections:
            parts += [Text(), self._title(focus), self._section(focus)(room[focus])]
        if self.lines is not None:  # the foot stays at the bottom
            parts += [Text()] * (room[sections[-1]] - len(self.status[sections[-1]]))
        return Group(*parts, *foot)

    # The whole daemon.

    def _heading(self) -> Text:
        line = heading(self.status)
        if self.state.paused:
            line = Text.assemble(("PAUSED", "bold reverse"), "  ", line)
        return self._one_line(line)

    def _totals(self) -> list[Text]:
        status, history = self.status, self.history
        resident_bytes, capacity_bytes = status["resident_bytes"], status["capacity_bytes"]
        nr_bars = max(10, min(self.columns // 3, self.columns - 56))
        bar = self._bar(resident_bytes, capacity_bytes, 12 if self.columns < _WIDE else 30)
        loaded = history.rate("load_bytes")
        lines = {
            "Memory": f"{bar} {format_bytes(resident_bytes)} of {format_bytes(capacity_bytes)} "
            f"({format_share(resident_bytes, capacity_bytes)}), "
            f"{format_bytes(status['saved_bytes'])} saved by sharing",
            "Hits": f"{format_hit_rate(status, 60)} of uses in a minute, estimated  "
            f"{sparkline(_last(history.hit_rates, nr_bars), blocks=self.blocks)}",
            "A second": f"{rounded(history.rate('hits', 'misses'))} faults, "
            f"{rounded(history.rate('cow_breaks'))} copies, "
            f"{rounded(history.rate('loads'))} loads"
            f"{'' if loaded is None else f' ({format_bytes(round(loaded))})'}, "
            f"{rounded(history.rate('evicted_extents'))} evictions",
            "P50/P99": ", ".join(
                f"{kind} {format_us(latency['p50'])}/{format_us(latency['p99'])}"
                for kind, latency in status["latency_us"].items()
                if latency["count"]
            )
            or "nothing answered yet",
        }
        if being_warmed := format_warming(status):
            lines["Warming"] = being_warmed
        if drained := format_drain(status):
            lines["Drain"] = drained
        return [
            self._one_line(Text.assemble((f"{label:<10}", "bold"), line))
            for label, line in lines.items()
        ]

    # The tables.

    def _shares(self, sections: Sequence[Focus], nr_taken: int) -> dict[Focus, int]:
        """Return the rows of each table: the one in focus gets all that the other leaves."""
        wanted = {focus: len(self.status[focus]) for focus in sections}
        if self.lines is None:
            return wanted
        room = max(len(sections), self.lines - nr_taken)
        focus, lowest = self.state.focus, sections[-1]
        rows = {each: min(nr, room // 3) for each, nr in wanted.items()}
        rows[focus] = min(wanted[focus], room - sum(rows.values()) + rows[focus])
        rows[lowest] += room - sum(rows.values())
        return rows

    def _title(self, focus: Focus) -> Text:
        there = self.status[focus]
        title = f"{focus.capitalize()} {format_count(len(there))}"
        states = Counter(guest["state"] for guest in there if focus == "guests")
        nr_stopped = states[STOPPED]
        others = "".join(
            f", {format_count(states[state])} {state}"
            for state in ("frozen", "parked", "away")
            if states[state]
        )
        about = f", by {self.state.order[focus]}" if there else ""
        stopped = f", {format_count(nr_stopped)} stopped" if nr_stopped else ""
        mark = ""
        if self.lines is not None:
            mark = ("▸ " if self.blocks else "> ") if self.state.focus == focus else "  "
        return self._one_line(
            Text.assemble((f"{mark}{title}", "bold"), (stopped, "bold red"), others, (about, "dim"))
        )

    def _section(self, focus: Focus) -> Callable[[int], Table]:
        rows = rows_of(focus, self.status, self.history, self.state)
        selected = self.state.row(focus, [key_of(row) for row in rows])

        def table(nr_rows: int) -> Table:
            first = max(0, min(selected - nr_rows // 2, len(rows) - nr_rows))
            shown = list(enumerate(rows))[first : first + nr_rows]
            is_focus = self.lines is not None and self.state.focus == focus
            chosen = selected if is_focus else None
            return (self._images if focus == "images" else self._guests)(shown, chosen)

        return table

    def _images(self, rows: Iterable[tuple[int, Answer]], chosen: int | None) -> Table:
        table = self._table(_IMAGE_COLUMNS)
        for no, image in rows:
            guests = _guests_of(image, self.status)
            cells: list[object] = [
                label_of(image),
                format_bytes(image["size_bytes"]),
                format_bytes(image["resident_bytes"]),
                format_share(image["resident_bytes"], image["size_bytes"]),
                self._bar(image["resident_bytes"], image["size_bytes"], 6),
                format_hit_rate(image, 60),
                format_bytes(image["saved_bytes"]),
                format_count(len(guests)),
                rounded(_faults_of(guests, self.history)),
                rounded(self.history.rate("loads", image=key_of(image))),
                format_bytes(image["working_set_bytes"]),
                image["source"],
            ]
            style = "bold red" if image["source_changed"] else ""
            self._add(table, self._fitting(_IMAGE_COLUMNS, cells), style, is_chosen=no == chosen)
        return table

    def _guests(self, rows: Iterable[tuple[int, Answer]], chosen: int | None) -> Table:
        table = self._table(_GUEST_COLUMNS)
        for no, guest in rows:
            key = key_of(guest)
            rates = _last(self.history.guest_faults.get(key, ()), self.columns - 120)
            most = max(rates, default=0.0) or 1.0
            cells: list[object] = [
                guest["name"],
                label_of(guest, "image"),
                guest["pid"],
                format_bytes(guest["granted_bytes"]),
                guest_state(guest),
                format_via(guest),
                format_quota(guest),
                rounded(self.history.rate("hits", "misses", guest=key)),
                rounded(self.history.rate("cow_breaks", guest=key)),
                format_share(guest["hits"], guest["hits"] + guest["misses"]),
                guest["uid"],
                sparkline((rate / most if rate else None for rate in rates), blocks=self.blocks),
            ]
            self._add(table, self._fitting(_GUEST_COLUMNS, cells), "", is_chosen=no == chosen)
        return table

    def _table(self, columns: Mapping[str, int]) -> Table:
        return new_table(*self._fitting(columns, list(columns)))

    def _fitting(self, columns: Mapping[str, int], cells: list[Any]) -> list[Any]:
        """Return the cells of the columns for which this terminal is wide enough."""
        least = columns.values()
        return [cell for cell, wide in zip(cells, least, strict=True) if self.columns >= wide]

    def _add(self, table: Table, cells: list[object], style: str, *, is_chosen: bool) -> None:
        if is_chosen:
            style = f"{style} reverse".strip()
        add_row(table, *cells, style=style, one_line=self.lines is not None)

    # The foot.

    def _selected(self) -> list[Text]:
        """Return two lines about the selected row."""
        rows = rows_of(self.state.focus, self.status, self.history, self.state)
        if not rows:
            return [Text(), Text()]
        one = rows[self.state.row(self.state.focus, [key_of(row) for row in rows])]
        describe = _describe_image if self.state.focus == "images" else self._describe_guest
        name, *lines = describe(one)
        first = Text.assemble((name, "bold"), ": ", lines[0])
        return [self._one_line(first), self._one_line(Text(lines[1]))]

    def _describe_guest(self, guest: Answer) -> list[str]:
        who = f"pid {guest['pid']}, uid {guest['uid']}, via {format_via(guest)}, "
        who += f"{format_bytes(guest['granted_bytes'])} of "
        who += f"{label_of(guest, 'image')} granted, at its quota: {guest['policy']}"
        if guest["state"] == STOPPED:
            stopped = (
                f"stopped for {format_seconds(guest['stopped_seconds'])} at its quota; resume it:"
            )
            return [
                label_of(guest),
                stopped,
                f"  {quota_command(guest, self.status)}",
            ]
        about = [f"{format_count(guest['quota_stops'])} stops at its quota so far"]
        if guest["poisoned_pages"]:
            about.append(
                f"{format_count(guest['poisoned_pages'])} pages could not be loaded, and give "
                "SIGBUS or EIO: can the source be read?"
            )
        return [label_of(guest), who, "  " + ", ".join(about)]

    def _keys(self) -> Text:
        keys = "q quit  ↑↓ select  i images  g guests  s sort  p pause  ? help"
        if not self.blocks:
            keys = keys.replace("↑↓", "jk")
        return self._one_line(Text(keys, style="dim"))

    # Helpers.

    def _bar(self, part: int, whole: int, nr_marks: int) -> str:
        nr_full = 0 if not whole else min(nr_marks, -(-part * nr_marks // whole))
        full, rest = ("█", "░") if self.blocks else ("#", ".")
        return full * nr_full + rest * (nr_marks - nr_full)

    def _one_line(self, line: Text) -> Text:
        if self.lines is not None:
            line.no_wrap, line.overflow = True, "ellipsis"
        return line


def rows_of(focus: Focus, status: Answer, history: History, state: TopState) -> list[Answer]:
    """Return the images or guests in the chosen order, those that need action first."""

    def key(one: Answer) -> tuple[object, ...]:
        name = key_of(one)
        match state.order[focus]:
            case "name":
                by: object = name
            case "busy" if focus == "images":
                by = -(_faults_of(_guests_of(one, status), history) or 0.0)
            case "busy":
                by = -(history.rate("hits", "misses", "cow_breaks", guest=name) or 0.0)
            case "copies":
                by = -(history.rate("cow_breaks", guest=name) or 0.0)
            case "hits":  # the worst first, which wait for the disk
                by = one["hits"] / max(1, one["hits"] + one["misses"])
            case column:
                by = -one[f"{column}_bytes"]
        is_urgent = one["source_changed"] if focus == "images" else one["state"] == STOPPED
        return (not is_urgent, by, name)

    return sorted(status[focus], key=key)


def sparkline(shares: Iterable[float | None], *, blocks: bool = True) -> str:
    """Draw one bar for each share of 0 to 1, and a blank for None."""
    bars = "▁▂▃▄▅▆▇█" if blocks else "_.-~=+*#"
    return "".join(
        " " if share is None else bars[min(int(share * len(bars)), len(bars) - 1)]
        for share in shares
    )


def rounded(rate: float | None) -> str:
    """Format a rate as a short number; ``-`` if it is not known yet."""
    if rate is None:
        return "-"
    return f"{rate:.1f}" if 0 < rate < 10 else format_count(round(rate))


def _guests_of(image: Answer, status: Answer) -> list[Answer]:
    whose = (image["domain"], image["name"])
    return [each for each in status["guests"] if (each["domain"], each["image"]) == whose]


def _describe_image(image: Answer) -> list[str]:
    digest = str(image["digest"] or "digest not known yet")
    changed = "CHANGED after it was opened: restore it, or restart the daemon. "
    return [
        label_of(image),
        ", ".join(
            (
                f"{format_bytes(image['pinned_bytes'])} pinned",
                f"touched {format_bytes(image['working_set_bytes'])}",
                f"{format_count(image['load_errors'])} loads failed",
                digest[:19],
            )
        ),
        f"  {changed if image['source_changed'] else ''}{printable(image['source'])}",
    ]


def _faults_of(guests: Sequence[Answer], history: History) -> float | None:
    """Return the faults a second of these guests; None if one is unknown."""
    rates = [history.rate("hits", "misses", guest=key_of(guest)) for guest in guests]
    if None in rates:
        return None
    return sum(rate for rate in rates if rate is not None)


def _last(values: Iterable[T], nr: int) -> list[T]:
    """Return the last `nr` values at most."""
    return list(values)[-nr:] if nr > 0 else []


def _help() -> list[RenderableType]:
    table = Table.grid(padding=(0, 3, 0, 0))
    for keys, meaning in KEYS:
        table.add_row(Text(keys, style="bold"), Text(meaning))
    words = {
        "saved": "what the guests' mappings would take more if each had frames of its own",
        "faults": "reads or writes that trapped; fault hits found their extent resident",
        "hit rate": "uses of extents that found them in memory, with a fault or without: estimated",
        "copies": "pages a guest wrote first: its own from then on, within its quota",
        "P50/P99": "how long answers took since the start: half were faster; all but 1% were",
    }
    meanings = Table.grid(padding=(0, 3, 0, 0))
    for word, meaning in words.items():
        meanings.add_row(Text(word, style="bold"), Text(meaning))
    return [Text("Keys", style="bold underline"), table, Text(), meanings]
