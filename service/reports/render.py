# SPDX-License-Identifier: Apache-2.0
"""Render status and audit for people: a daemon's answer in, a rich renderable out.

Pure: no terminal, no clock. No meaning is in a colour alone, since a pipe has none. Tables are laid
out for 80 columns; long names fold instead of being cut off, and text that a guest chose passes
through `printable`. Programs read ``--json`` instead.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cowshed.service.reports.wording import (
    STOPPED,
    Answer,
    counted,
    format_curve,
    format_drain,
    format_hit_rate,
    format_milliseconds,
    format_quota,
    format_use,
    format_users,
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

# The values of source_at_path for a path that no longer names the served file.
_AT_PATH = {"other": "another file", "gone": "no file"}
_HUNG_SECONDS = 3.0  # as SourceWatch has it
# The keys of a mismatch in `audit --json`, and their names in the text.
_MISMATCH_PLACES = {"extent": "extent", "page": "page", "purse": "quota", "ledger": "ledger"}


def status_view(status: Answer) -> RenderableType:
    """Render everything that `cowshed status` shows."""
    parts: list[RenderableType] = [heading(status), descent(status), Text(), _totals(status)]
    if any(latency["count"] for latency in status["latency_us"].values()):
        parts += [Text(), _latencies(status["latency_us"])]
    parts += [Text(), _images(status["images"]), Text()]
    parts.append(_guests(status["guests"]) if status["guests"] else Text("No guests."))
    for warning in warnings(status):
        parts += [Text(), warning]
    return Group(*parts)


def audit_view(audit: Answer) -> RenderableType:
    """Render the number of checks and every mismatch."""
    checked = ", ".join(
        f"{format_count(count)} {counted(printable(what).replace('_', ' '), count)}"
        for what, count in audit["checked"].items()
    )
    mismatches = audit["mismatches"]
    if not mismatches:
        return Text(f"No mismatches. Checked {checked}.")
    table = new_table("=CHECK", "WHERE", ">EXPECTED", ">FOUND")
    for mismatch in mismatches:
        where = [f"image {label_of(mismatch, 'image')}" if mismatch["image"] else "standby list"]
        where += [f"guest {mismatch['guest']}"] if mismatch.get("guest") else []
        where += [
            f"{name} {mismatch[key]}"
            for key, name in _MISMATCH_PLACES.items()
            if key in mismatch and mismatch["image"]
        ]
        add_row(
            table,
            mismatch["check"],
            ", ".join(where),
            mismatch["expected"],
            mismatch["found"],
            style="bold red",
        )
    nr_mismatches = len(mismatches)
    verdict = "1 mismatch" if nr_mismatches == 1 else f"{format_count(nr_mismatches)} mismatches"
    return Group(Text(f"{verdict}. Checked {checked}.", style="bold red"), Text(), table)


def heading(status: Answer) -> Text:
    """Render one line that identifies the daemon."""
    return Text.assemble(
        ("cowshed", "bold"),
        f" {printable(status['version'])}, pid {status['pid']}, "
        f"up {format_seconds(status['uptime_seconds'])}, {printable(status['run_dir'])}",
    )


def descent(status: Answer) -> Text:
    """Render one line with the restart history and the keeper."""
    restarts = [f"{nr} {how}" for how, nr in status["restarts"].items() if nr]
    keeper = {
        "own": "kept by a keeper",
        "systemd": "kept by systemd",
        "none": "NOT KEPT: its death would be final",
    }[status["keeper"]]
    line = f"Backend no. {status['generation']} here"
    if restarts:
        adopted = format_milliseconds(status["adoption_seconds"])
        line += f" (after {', '.join(restarts)}; the last adopted in {adopted})"
    text = Text(f"{line}, {keeper}")
    if nr := status.get("not_held", 0):
        what = "1 group of descriptors is" if nr == 1 else f"{format_count(nr)} groups are"
        text.append(f"; {what} NOT HELD: they would end with it", style="bold red")
    return text


def guest_state(guest: Answer) -> Text:
    """Render a guest's state in a word; STOPPED stands out without colour, too."""
    if guest["state"] == STOPPED:
        return Text("STOPPED", style="bold red")
    is_dim = guest["state"] in ("detached", "away")
    return Text(printable(guest["state"]), style="dim" if is_dim else "")


def warnings(status: Answer) -> list[Text]:
    """Render what an operator must act on, each with its cause and cure."""
    found = [
        Text.assemble(
            (f"{label_of(guest)} is stopped", "bold red"),
            f" (pid {guest['pid']}, uid {guest['uid']}, for "
            f"{format_seconds(guest['stopped_seconds'])}): "
            f"it wrote {format_quota(guest)} private bytes. To resume it:\n"
            f"  {quota_command(guest, status)}",
        )
        for guest in status["guests"]
        if guest["state"] == STOPPED
    ]
    found += [
        Text.assemble(
            (
                f"{label_of(guest)} has {format_count(guest['poisoned_pages'])} pages",
                "bold red",
            ),
            f" of {label_of(guest, 'image')} that could not be loaded, and gets SIGBUS or EIO for "
            "them until a later load succeeds: make sure that the source can be read.",
        )
        for guest in status["guests"]
        if guest["poisoned_pages"]
    ]
    found += [
        Text.assemble(
            (f"{label_of(image)}: its source changed", "bold red"),
            " after it was opened, and an image must not change: restore "
            f"{printable(image['source'])}, or restart the daemon to serve the new bytes.",
        )
        for image in status["images"]
        if image["source_changed"]
    ]
    found += [
        Text.assemble(
            (f"{label_of(image)}: {printable(image['source'])} names {_AT_PATH[at]} now", "bold"),
            ". Guests keep using the old file, until the daemon is stopped.",
        )
        for image in status["images"]
        if image.get("source_wait_seconds", 0) < _HUNG_SECONDS
        and (at := image.get("source_at_path", "same")) in _AT_PATH
    ]
    found += [
        Text.assemble(
            (f"{label_of(image)}: its source does not answer", "bold red"),
            f" for {format_seconds(image['source_wait_seconds'])}: guests of this image wait for "
            f"{printable(image['source'])}; check its file system.",
        )
        for image in status["images"]
        if image.get("source_wait_seconds", 0) >= _HUNG_SECONDS
    ]
    found += [
        Text.assemble(
            (f"{label_of(image)} is not served", "bold red"), f": {printable(image['why'])}."
        )
        for image in status.get("unserved_images", ())
    ]
    found += [
        Text.assemble(
            (f"{printable(each['address'])} is not served", "bold red"),
            f": {printable(each['why'])}.",
        )
        for each in status.get("unserved_listeners", ())
    ]
    return found


def _standby(status: Answer) -> str:
    kept = status.get("standby")
    if kept is None:
        return "not told by this daemon, which is older"
    return (
        f"{format_count(kept['victim_hits'])} of {format_count(kept['victims'])} unmapped extents "
        f"were touched in time; {format_count(kept['sample_hits'])} of "
        f"{format_count(kept['samples'])} samples"
    )


def _regions(status: Answer) -> str:
    regions = status.get("open_regions")
    if regions is None:
        return "not told by this daemon, which is older"
    closes = ", ".join(
        f"{format_count(nr)} {reason}" for reason, nr in regions["closes"].items() if nr
    )
    line = (
        f"{format_count(regions['open'])} open, "
        f"{format_bytes(regions['reserved_bytes'])} reserved; "
        f"{format_count(regions['opens'])} opened, "
        f"{format_count(sum(regions['closes'].values()))} closed"
    )
    line += f" ({closes})" if closes else ""
    if nr := regions["collapse_failures"]:
        line += f"; {format_count(nr)} times no huge page"
    if nr := regions["lost"]:
        line += f"; {format_count(nr)} lost"
    return line


def _totals(status: Answer) -> Table:
    resident_bytes, capacity_bytes = status["resident_bytes"], status["capacity_bytes"]
    hits, misses = status["hits"], status["misses"]
    faults, evictions = status["faults"], status["evictions"]
    lines = {
        "Memory": f"{format_bytes(resident_bytes)} of {format_bytes(capacity_bytes)} resident "
        f"({format_share(resident_bytes, capacity_bytes)}), "
        f"{format_bytes(status.get('standby', {}).get('bytes', 0))} in standby, "
        f"{format_bytes(status['saved_bytes'])} saved by sharing",
        "Hit rate": format_use(status, 60),
        "By capacity": f"hit rate {format_curve(status, 300)}",
        "Faults": ", ".join(f"{format_count(faults[kind])} {kind}" for kind in faults)
        + f"; {format_count(hits)} found their extent resident, {format_count(misses)} did not",
        "Loads": f"{format_count(status['loads'])} ({format_count(status['load_errors'])} failed)",
        "Standby": _standby(status),
        "Regions": _regions(status),
        "Evicted": f"{format_count(status['evicted_extents'])} extents "
        f"({format_count(evictions['pressure'])} under pressure, "
        f"{format_count(evictions['request'])} on request)",
        "Guests": format_users(status["guests"]),
    }
    if being_warmed := format_warming(status):
        lines["Warming"] = being_warmed
    if drained := format_drain(status):
        lines["Drain"] = drained
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, line in lines.items():
        grid.add_row(Text(label, style="bold"), Text(line))
    return grid


def _latencies(latency_us: Mapping[str, Answer]) -> Table:
    table = new_table("=ANSWERED", ">COUNT", ">P50", ">P90", ">P99", ">MAX")
    for kind, latency in latency_us.items():
        times = (latency[key] if latency["count"] else None for key in ("p50", "p90", "p99", "max"))
        shown = ("-" if time is None else format_us(time) for time in times)
        add_row(table, kind, format_count(latency["count"]), *shown)
    return table


def _images(images: Sequence[Answer]) -> Table:
    table = new_table(
        "IMAGE", ">SIZE", ">RESIDENT", ">", ">HIT RATE", ">PINNED", "=DIGEST", "SOURCE"
    )
    for image in sorted(images, key=key_of):
        digest = str(image["digest"] or "-")
        add_row(
            table,
            label_of(image),
            format_bytes(image["size_bytes"]),
            format_bytes(image["resident_bytes"]),
            format_share(image["resident_bytes"], image["size_bytes"]),
            format_hit_rate(image, 60),
            format_bytes(image["pinned_bytes"]),
            digest.rpartition(":")[2][:12],
            image["source"],
        )
    return table


def _guests(guests: Iterable[Answer]) -> Table:
    table = new_table("GUEST", "IMAGE", ">PID", "=STATE", "=VIA", ">GRANTED", ">PRIVATE", "=POLICY")
    for guest in sorted(guests, key=key_of):
        add_row(
            table,
            guest["name"],
            label_of(guest, "image"),
            guest["pid"],
            guest_state(guest),
            format_via(guest),
            format_bytes(guest["granted_bytes"]),
            format_quota(guest),
            guest["policy"] if guest["quota_bytes"] is not None else "-",
        )
    return table


def new_table(*headers: str) -> Table:
    """Make a table without rules, its columns named by `headers`.

    A header that starts with ``>`` is of numbers, with ``=`` of words: both columns keep their
    width. The other columns, of names, shrink when the line is short.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(
            header.lstrip(">="),
            justify="right" if header.startswith(">") else "left",
            no_wrap=header.startswith((">", "=")),
        )
    return table


def add_row(table: Table, *cells: object, style: str = "", one_line: bool = False) -> None:
    """Add `cells` to `table`, as printable text without markup.

    A name that does not fit is folded or, with `one_line`, cut off with an ellipsis.
    """
    shown = [cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells]
    for cell in shown:
        cell.no_wrap, cell.overflow = one_line or None, "ellipsis" if one_line else "fold"
    table.add_row(*shown, style=style)
