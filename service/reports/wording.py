# SPDX-License-Identifier: Apache-2.0
"""Format parts of a daemon's answers as text, the same in status, top and the page.

Pure, and without rich, because the daemon itself makes the page's state with these. Text that a
guest chose passes through `printable`.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cowshed.cache.images import DEFAULT_DOMAIN, image_label
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.runtime.text import format_count, format_share, printable
from cowshed.service.settings.options import RUN_DIR_DEFAULT

Answer = Mapping[str, Any]

STOPPED = "stopped-quota"
QUOTA_SUGGESTED_BYTES = 64 << 20  # for a guest whose quota was 0


def format_milliseconds(seconds: float) -> str:
    """Format a short time: ``12 ms``, ``1.3 s``."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def has_domains(status: Answer) -> bool:
    """Whether any image is in another than the default domain."""
    return any(image["domain"] != DEFAULT_DOMAIN for image in status["images"])


def key_of(one: Answer) -> str:
    """Return the key that is unique among guests, or among images."""
    return f"{one['domain']}/{one['name']}"


def label_of(one: Answer, key: str = "name") -> str:
    """Format the name and domain of a guest or image or, with "image", of a guest's image."""
    return printable(image_label(one["domain"], one[key]))


def format_quota(guest: Answer) -> str:
    """Format a guest's private bytes and quota: ``12M of 64M``; ``12M`` without a limit.

    With what open regions reserve beside them: ``12M, 4M reserved of 64M``.
    """
    private = format_bytes(guest["private_bytes"])
    if guest.get("reserved_bytes"):
        private += f", {format_bytes(guest['reserved_bytes'])} reserved"
    quota_bytes = guest["quota_bytes"]
    return private if quota_bytes is None else f"{private} of {format_bytes(quota_bytes)}"


def format_via(guest: Answer) -> str:
    """Format a guest's transport, and its number of mappings if several: ``unix x3``."""
    times = f" x{guest['mappings']}" if guest["mappings"] > 1 else ""
    return f"{printable(guest['transport'])}{times}"


def format_users(guests: Sequence[Answer]) -> str:
    """Format the guests by state and transport: ``2 running, 1 away (3 unix; 2 mappings)``."""
    if not guests:
        return "none"
    states = Counter(guest["state"] for guest in guests)
    words = ", ".join(
        f"{format_count(nr)} {'stopped' if state == STOPPED else printable(state)}"
        for state, nr in states.most_common()
    )
    via = Counter(guest["transport"] for guest in guests)
    how = ", ".join(f"{format_count(nr)} {printable(each)}" for each, nr in via.most_common())
    mappings = sum(guest["mappings"] for guest in guests)
    return f"{words} ({how}; {format_count(mappings)} {counted('mappings', mappings)})"


def format_warming(status: Answer) -> str:
    """Format the progress of warm-ups; "" if there are none."""
    return "; ".join(
        f"{label_of(image)} {format_bytes(warming['done_bytes'])} of "
        f"{format_bytes(warming['total_bytes'])} "
        f"({format_share(warming['done_bytes'], warming['total_bytes'])}, "
        f"{' and '.join(printable(why) for why in warming['why'])})"
        for image in status["images"]
        if (warming := image["warming"])
    )


def format_drain(status: Answer) -> str:
    """Format the drain's target, progress and what it waits for; "" if there is no drain."""
    drain = status.get("drain")
    if not drain or drain["dry_run"] or drain["phase"] in ("idle", "aborted"):
        return ""
    to = printable(drain["to"])
    guests = f"{format_count(drain['guests'])} {counted('guests', drain['guests'])}"
    if drain["phase"] == "moved":
        here = drain["guests_here"]
        followed = f", {format_count(here)} of them still here" if here else ""
        return f"moved to {to}: {guests}{followed}"
    left = max(0, drain["total_bytes"] - drain["done_bytes"])
    parts = [
        f"{format_bytes(drain['done_bytes'])} of {format_bytes(drain['total_bytes'])} sent",
        f"{format_bytes(left)} left at {format_bytes(drain['rate_bytes_per_second'])}/s",
    ]
    parts += [f"waits for {printable(drain['waits_for'])}"] if drain["waits_for"] else []
    parts += [f"{len(drain['blockers'])} blockers"] if drain["blockers"] else []
    return f"{printable(drain['phase'])} to {to}, {guests}: {', '.join(parts)}"


def hit_rate(one: Answer, window_seconds: int) -> float | None:
    """Return the estimated hit rate of all, or of an image, over a window; None: not known."""
    found = _use_within(one, window_seconds).get("hit_rate")
    return float(found["value"]) if found else None


def format_hit_rate(one: Answer, window_seconds: int) -> str:
    """Format that hit rate: ``82%``; ``-`` if it is not known."""
    found = hit_rate(one, window_seconds)
    return "-" if found is None else format_share(found, 1)


def format_use(status: Answer, window_seconds: int) -> str:
    """Format an estimate: ``82% (76% to 86%) of uses, of a working set of 12M (11M to 13M)``."""
    use = _use_within(status, window_seconds)
    hits, used = use.get("hit_rate"), use.get("working_set_bytes")
    because = status.get("use_unknown_because", "this daemon is older and does not tell")
    rate = f"unknown: {because}"
    if hits:
        value, low, high = (format_share(hits[key], 1) for key in ("value", "low", "high"))
        rate = f"{value} ({low} to {high}) of uses, estimated over {window_seconds} s"
    if not used:
        return rate
    value, low, high = (format_bytes(round(used[key])) for key in ("value", "low", "high"))
    return f"{rate}; working set {value} ({low} to {high})"


def format_curve(status: Answer, window_seconds: int) -> str:
    """Format hit rates: ``62% with half of it, 80% with all, 91% with twice as much``."""
    words = {"0.5": "with half of it", "1": "with all", "2": "with twice as much"}
    at = _use_within(status, window_seconds).get("hit_rate_at") or {}
    parts = [f"{format_share(at[key], 1)} {where}" for key, where in words.items() if key in at]
    return f"{', '.join(parts)}; estimated over {window_seconds} s" if parts else "unknown"


def _use_within(one: Answer, window_seconds: int) -> Answer:
    uses = [use for use in one.get("use", ()) if use["window_seconds"] == window_seconds]
    return uses[0] if uses else {}


def quota_command(guest: Answer, status: Answer) -> str:
    """Return the command that resumes a stopped guest: it doubles the quota."""
    run_dir = status["run_dir"]
    quota_bytes = 2 * (guest["quota_bytes"] or 0) or QUOTA_SUGGESTED_BYTES
    words = ["cowshed", "quota"]
    if run_dir != RUN_DIR_DEFAULT:
        words += ["--run-dir", printable(run_dir)]
    # With domains, another guest may have the name; and a name with a slash looks like DOMAIN/NAME.
    is_plain = not has_domains(status) and "/" not in guest["name"]
    name = printable(guest["name"] if is_plain else key_of(guest))
    words += ["--", name] if name.startswith("-") else [name]
    return shlex.join([*words, format_bytes(quota_bytes)])


def counted(plural: str, count: int) -> str:
    """Return the noun for `count`: "guests", or "guest" for one."""
    return plural.removesuffix("s") if count == 1 else plural
