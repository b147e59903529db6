# SPDX-License-Identifier: Apache-2.0
"""What people see of a daemon's answers, on 80 columns and without a terminal."""

import io
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cowshed.service.reports.render import audit_view, status_view
from cowshed.service.reports.wording import quota_command
from cowshed.service.runtime.text import (
    format_seconds,
    format_share,
    format_us,
    one_line,
    printable,
)
from cowshed.service.settings.quotas import parse_quota

Body = dict[str, Any]


def text_of(view: RenderableType, width: int = 80) -> str:
    """What a pipe would get."""
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(view)
    return out.getvalue()


def line_with(text: str, words: str) -> str:
    lines = [line for line in text.splitlines() if words in line]
    assert len(lines) == 1, f"{words!r} is in {len(lines)} lines of\n{text}"
    return lines[0]


def words_of(text: str, words: str) -> str:
    """The one line of `text` that holds `words`, its columns a blank apart."""
    return " ".join(line_with(text, words).split())


def test_status_fits_80_columns_and_loses_no_name(status: Body) -> None:
    text = text_of(status_view(status))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\u2026" not in text
    together = "".join(text.split())
    for whole in ("sandbox-", "debian-12", "-amd64-", "ab12cd34ab12", "/srv/alpine.raw"):
        assert whole in together


def test_status_shows_totals_in_human_units(status: Body) -> None:
    text = text_of(status_view(status))
    assert "cowshed 0.1.0, pid 4242, up 1h 02m, /run/cowshed" in text
    flat = " ".join(text.split())
    assert "1.2G of 2G resident (60%), 100M in standby, 5.4G saved by sharing" in flat
    assert "Hit rate 75% (71% to 80%) of uses, estimated over 60 s; working set 700M" in flat
    assert "hit rate 50% with half of it, 75% with all, 90% with twice as much" in flat
    assert "4,321 of 5,432 unmapped extents were touched in time; 456 of 654 samples" in flat
    assert words_of(text, "debian-12    2G").startswith("debian-12 2G 1G 50% 75% 64M")
    assert words_of(text, "alpine       5M").startswith("alpine 5M 0 0% - 0")
    assert "2,345 (7 failed)" in text
    assert "123 extents (100 under pressure, 23 on request)" in text
    assert words_of(text, "1,234,567  ") == "hit 1,234,567 3.1us 12us 85us 1.21ms"
    assert words_of(text, " 0      -") == "write 0 - - - -"


def test_what_is_not_known_of_use_is_said_with_its_reason(status: Body) -> None:
    for use in status["use"]:
        use.update(hit_rate=None, working_set_bytes=None, hit_rate_at=None)
    flat = " ".join(text_of(status_view(status)).split())
    assert "Hit rate unknown: no guest used anything By capacity hit rate unknown Faults" in flat


def test_the_status_of_an_older_daemon_is_shown_as_far_as_it_tells(status: Body) -> None:
    older = {key: value for key, value in status.items() if not key.startswith(("use", "standby"))}
    older["images"] = [{k: v for k, v in image.items() if k != "use"} for image in status["images"]]
    flat = " ".join(text_of(status_view(older)).split())
    assert "Hit rate unknown: this daemon is older and does not tell" in flat


def test_a_guest_stopped_by_its_quota_is_marked_with_who_why_and_the_cure(status: Body) -> None:
    text = text_of(status_view(status))
    assert line_with(text, "STOPPED").split()[:4] == ["build-7", "debian-12", "41234", "STOPPED"]
    told = " ".join(text.split())
    assert "build-7 is stopped (pid 41234, uid 1000, for 3m 12s): it wrote 64M of 64M" in told
    assert line_with(text, "cowshed quota") == "  cowshed quota build-7 128M"


def test_status_says_how_guests_are_and_how_they_came(status: Body) -> None:
    status["guests"][0].update(transport="tcp", state="away", mappings=0)
    status["guests"][1].update(mappings=3)
    text = text_of(status_view(status), width=120)
    told = "Guests 1 away, 1 stopped, 1 detached, 1 running (3 unix, 1 tcp; 5 mappings)"
    assert words_of(text, "5 mappings") == told
    assert words_of(text, "web-1 ").split()[3:5] == ["away", "tcp"]
    assert " unix x3 " in words_of(text, "STOPPED")
    status["guests"] = []
    assert words_of(text_of(status_view(status)), "none") == "Guests none"


def test_status_says_how_far_a_warming_is(status: Body) -> None:
    assert "Warming" not in text_of(status_view(status))
    warming = {"why": ["autowarm"], "done_bytes": 48 << 20, "total_bytes": 64 << 20}
    status["images"][0]["warming"] = warming
    told = words_of(text_of(status_view(status)), "Warming")
    assert told == "Warming debian-12 48M of 64M (75%, autowarm)"


def test_a_running_guest_brings_no_warning(status: Body) -> None:
    status["guests"] = status["guests"][:1]
    status["images"] = status["images"][:1]
    text = text_of(status_view(status))
    assert "stopped" not in text.lower()
    assert "changed" not in text


def test_pages_that_could_not_be_loaded_are_told(status: Body) -> None:
    assert "could not be loaded" not in text_of(status_view(status))
    status["guests"][0]["poisoned_pages"] = 3
    told = " ".join(text_of(status_view(status)).split())
    assert "web-1 has 3 pages of debian-12 that could not be loaded" in told


def test_a_changed_source_is_told(status: Body) -> None:
    assert "alpine: its source changed" in text_of(status_view(status))


def test_a_guest_without_a_quota_has_no_limit_shown(status: Body) -> None:
    status["guests"] = [guest for guest in status["guests"] if guest["quota_bytes"] is None]
    row = words_of(text_of(status_view(status), width=120), "sandbox-")
    assert row == "sandbox-0a1b2c3d4e5f debian-12 41234 detached unix 512M 12M -"


def test_names_can_neither_move_the_cursor_nor_style_the_text(status: Body) -> None:
    text = text_of(status_view(status), width=120)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"evil\x1b[2J[red]\u202e" in text


def test_an_idle_daemon_says_so(status: Body) -> None:
    status["guests"] = []
    for latency in status["latency_us"].values():
        latency["count"] = 0
    text = text_of(status_view(status))
    assert "No guests." in text
    assert "P50" not in text


@pytest.mark.parametrize("quota_bytes", [0, 4096, 100_000, 64 << 20, 3 << 40])
@pytest.mark.parametrize("name", ["g1", "-g", "two words"])
def test_the_command_offered_is_one_the_shell_takes_and_raises_the_quota(
    new_guest: Callable[..., Body], quota_bytes: int, name: str
) -> None:
    guest = new_guest(name, quota_bytes=quota_bytes)
    words = shlex.split(quota_command(guest, {"run_dir": "/tmp/my run", "images": []}))
    assert words[:4] == ["cowshed", "quota", "--run-dir", "/tmp/my run"]
    assert words[-2] == name
    assert ("--" in words) == name.startswith("-")
    suggested = parse_quota(words[-1])
    assert suggested is not None
    assert suggested > quota_bytes
    assert "--run-dir" not in quota_command(guest, {"run_dir": "/run/cowshed", "images": []})


def test_names_carry_their_domain_where_there_is_more_than_the_default_one(
    status: Body, new_guest: Callable[..., Body]
) -> None:
    assert "default" not in text_of(status_view(status))
    slashed = new_guest("tenant-a/web-1")
    assert quota_command(slashed, status) == "cowshed quota default/tenant-a/web-1 128M"
    status["images"].append({**status["images"][0], "domain": "tenant-a"})
    status["guests"].append(new_guest("web-1", domain="tenant-a"))
    status["guests"][1]["image"] = "alpine"
    text = text_of(status_view(status), 120)
    assert [line.split()[0] for line in text.splitlines() if "ab12cd34ab12" in line] == [
        "debian-12",
        "tenant-a/debian-12",
    ]
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("web-1 ")] == [
        ["web-1", "debian-12"],
        ["web-1", "tenant-a/debian-12"],
    ]
    assert line_with(text, "cowshed quota") == "  cowshed quota default/build-7 128M"


def test_a_clean_audit_says_what_was_checked() -> None:
    text = text_of(audit_view({"mismatches": [], "checked": {"images": 1, "private_pages": 4000}}))
    assert text == "No mismatches. Checked 1 image, 4,000 private pages.\n"


def test_every_mismatch_is_a_row() -> None:
    mismatches = [
        {"check": "refs", "domain": "default", "image": "debian", "guest": "", "extent": 0},
        {"check": "private", "domain": "a", "image": "debian", "guest": "g\x1b[m", "page": 7},
    ]
    for mismatch in mismatches:
        mismatch.update({"expected": 2, "found": 3})
    text = text_of(audit_view({"mismatches": mismatches, "checked": {"images": 2}}))
    assert text.startswith("2 mismatches. Checked 2 images.")
    assert words_of(text, "refs") == "refs image debian, extent 0 2 3"
    assert words_of(text, "private") == r"private image a/debian, guest g\x1b[m, page 7 2 3"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m 00s"),
        (3599, "59m 59s"),
        (3725, "1h 02m"),
        (9e5, "10d 10h"),
    ],
)
def test_times_are_shown_in_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0, "0us"), (3.14, "3.14us"), (999.4, "999us"), (999.6, "1ms"), (1e6, "1s"), (2.5e6, "2.5s")],
)
def test_latencies_are_shown_in_three_digits(microseconds: float, text: str) -> None:
    assert format_us(microseconds) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 9, "0%"),
        (9, 9, "100%"),
        (1, 3, "33.3%"),
        (99_999, 100_000, ">99.9%"),
        (1, 100_000, "<0.1%"),
        (999, 1000, "99.9%"),
    ],
)
def test_shares_are_not_rounded_to_all_or_nothing(part: int, whole: int, text: str) -> None:
    assert format_share(part, whole) == text


def test_text_becomes_one_printable_line() -> None:
    assert one_line("a\n  b\tc\x07") == r"a b c\x07"
    assert printable("\ud800\u2028é") == "\\ud800\\u2028é"
