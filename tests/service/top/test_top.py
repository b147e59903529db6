# SPDX-License-Identifier: Apache-2.0
"""`cowshed top`: what it counts, what its keys do, what it shows, and what it leaves behind."""

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import MakeImage, StartDaemon, StartGuest, cowshed, until
from rich.console import Console, RenderableType
from terminals import Terminal

from cowshed.service.reports.wording import key_of
from cowshed.service.top.history import NR_SAMPLES, History
from cowshed.service.top.screen import Screen, keys_of
from cowshed.service.top.state import ORDERS, TopState
from cowshed.service.top.view import ScreenFrame, rows_of, sparkline

Body = dict[str, Any]
COMMAND = [sys.executable, "-m", "cowshed.service.cli"]
SECOND_NS = 10**9
MIB = 1 << 20


def text_of(view: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(view)
    return out.getvalue()


def frame(status: Body, history: History | None = None, **how: Any) -> list[str]:
    """The lines of a frame; without `history`, of the first there is."""
    if history is None:
        history = History()
        history.observe(status, 0)
    how.setdefault("state", TopState())
    width = how.get("columns", 80)
    return text_of(ScreenFrame(status, history, **how).view(), width).splitlines()


def line_with(lines: list[str], words: str) -> str:
    (line,) = [line for line in lines if words in line]
    return line


def later(status: Body, *, hits: int, misses: int, **changes: object) -> Body:
    """`status` after so many more hits and misses, all of its first guest."""
    first = status["guests"][0]
    grown = {**first, "hits": first["hits"] + hits, "misses": first["misses"] + misses}
    return {
        **status,
        "hits": status["hits"] + hits,
        "misses": status["misses"] + misses,
        "guests": [grown, *status["guests"][1:]],
        **changes,
    }


# Rates.


def test_rates_are_growth_over_the_time_between_samples(status: Body) -> None:
    history = History()
    history.observe(status, 5 * SECOND_NS)
    assert history.rate("hits") is None
    history.observe(later(status, hits=90, misses=10), 7 * SECOND_NS)
    assert history.rate("hits", "misses") == 50
    assert history.rate("hits", guest="default/web-1") == 45
    assert history.rate("hits", guest="default/build-7") == 0
    assert list(history.hit_rates) == [0.75]
    assert list(history.fault_rates) == [50]
    assert {name: list(rates) for name, rates in history.guest_faults.items() if any(rates)} == {
        "default/web-1": [50]
    }


def test_an_image_and_a_guest_of_one_name_are_counted_apart(
    status: Body, new_guest: Callable[..., Body]
) -> None:
    status["guests"] = [new_guest("alpine", cow_breaks=5)]
    history = History()
    history.observe(status, 0)
    status["guests"] = [new_guest("alpine", cow_breaks=9)]
    history.observe(status, SECOND_NS)
    assert history.rate("cow_breaks", guest="default/alpine") == 4
    assert history.rate("loads", image="default/alpine") == 0


def test_a_moment_without_an_estimate_has_no_hit_rate(status: Body) -> None:
    for use in status["use"]:
        use["hit_rate"] = None
    history = History()
    history.observe(status, 0)
    history.observe(status, SECOND_NS)
    assert list(history.hit_rates) == [None]
    assert list(history.fault_rates) == [0]


@pytest.mark.parametrize("changes", [{"pid": 1}, {"hits": 5}])
def test_a_restarted_daemon_starts_rates_afresh(status: Body, changes: Body) -> None:
    history = History()
    history.observe(status, 0)
    history.observe(later(status, hits=1, misses=1), SECOND_NS)
    history.observe({**later(status, hits=1, misses=1), **changes}, 2 * SECOND_NS)
    assert not history.hit_rates
    assert not history.fault_rates
    assert not any(history.guest_faults.values())
    assert history.rate("hits") is None


def test_a_guest_that_comes_back_under_its_name_counts_from_nothing(
    status: Body, new_guest: Callable[..., Body]
) -> None:
    history = History()
    history.observe(status, 0)
    history.observe({**status, "guests": [new_guest("web-1", hits=30)]}, SECOND_NS)
    assert history.rate("hits", guest="default/web-1") == 30
    assert list(history.guest_faults) == ["default/web-1"]


def test_history_keeps_a_bounded_number_of_samples(status: Body) -> None:
    history = History()
    for second in range(NR_SAMPLES + 100):
        history.observe(later(status, hits=second, misses=0), second * SECOND_NS)
    assert len(history.hit_rates) == len(history.fault_rates) == NR_SAMPLES
    assert max(map(len, history.guest_faults.values())) == 40


def test_sparkline_tells_nothing_from_none() -> None:
    assert sparkline([None, 0.0, 0.5, 0.999, 1.0]) == " ▁▅██"
    assert sparkline([None, 0.0, 0.5, 1.0], blocks=False) == " _=#"


# Keys.


@pytest.mark.parametrize(
    ("pressed", "keys"),
    [
        (b"qjS? ", ["q", "j", "S", "?", " "]),
        (
            b"\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[H\x1b[4~\t",
            ["up", "down", "pageup", "pagedown", "home", "end", "tab"],
        ),
        (b"\x1b", ["escape"]),
        (b"\x1b[1;5Cj", ["j"]),
        (b"\x1b[Zj", ["j"]),
        (b"\xc3\xa4\x00\x7fj", ["j"]),
        (b"\x1b[", []),
        (b"", []),
    ],
)
def test_keys_are_told_from_what_a_terminal_sends(pressed: bytes, keys: list[str]) -> None:
    assert list(keys_of(pressed)) == keys


def test_selection_stays_within_the_rows_and_with_its_name() -> None:
    state, names = TopState(), list("abcdefghijklmnopqrstuvwxyz")
    for key, expected in [
        ("up", "a"),
        ("down", "b"),
        ("j", "c"),
        ("k", "b"),
        ("pagedown", "l"),
        ("end", "z"),
        ("down", "z"),
        ("pageup", "p"),
        ("home", "a"),
    ]:
        state.press(key, names)
        assert names[state.row("guests", names)] == expected
    state.press("j", names)
    assert state.row("guests", ["z", "b"]) == 1
    assert state.row("guests", ["z", "y"]) == 0
    assert state.row("images", names) == 0
    state.press("j", [])
    assert state.row("guests", []) == 0


def test_keys_choose_table_order_pause_help_and_end() -> None:
    state = TopState()
    for key, focus in [
        ("i", "images"),
        ("i", "images"),
        ("tab", "guests"),
        ("tab", "images"),
        ("g", "guests"),
    ]:
        state.press(key, [])
        assert state.focus == focus
    seen = []
    for _ in ORDERS["guests"]:
        seen.append(state.order["guests"])
        state.press("s", [])
    assert seen == list(ORDERS["guests"])
    assert state.order == {"guests": "busy", "images": "busy"}
    state.press("S", [])
    assert state.order["guests"] == ORDERS["guests"][-1]
    for key in ("p", " "):
        state.press(key, [])
        assert state.paused is (key == "p")
    state.press("?", [])
    assert state.helping
    state.press("s", [])
    assert not state.helping
    assert state.order["guests"] == ORDERS["guests"][-1]
    state.press("?", [])
    assert state.press("q", [])
    assert state.quitting


# What is shown.


@pytest.fixture
def crowd(status: Body, new_guest: Callable[..., Body]) -> tuple[Body, History]:
    """51 guests of long names, one of them stopped, and five minutes of history."""
    history = History()
    status["guests"] = [new_guest(f"a-very-long-guest-name-indeed-{no}") for no in range(50)]
    status["guests"] += [new_guest("zz", state="stopped-quota", private_bytes=64 << 20)]
    history.observe(status, 0)
    for second in range(300):
        history.observe(later(status, hits=9 * second, misses=0), (second + 1) * SECOND_NS)
    return status, history


@pytest.mark.parametrize("focus", ["images", "guests"])
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 30), (132, 43), (200, 60)])
def test_a_frame_fills_its_terminal_and_no_more(
    crowd: tuple[Body, History], columns: int, lines: int, focus: Any
) -> None:
    shown = frame(*crowd, state=TopState(focus=focus), columns=columns, lines=lines)
    assert len(shown) == lines
    assert max(map(len, shown)) <= columns
    assert "zz" in line_with(shown, "STOPPED")
    assert "Guests 51, 1 stopped, by busy" in "\n".join(shown)
    assert shown[-1].startswith("q quit ")
    assert sum(line.startswith(("zz  ", "a-very")) for line in shown) >= lines - 20


@pytest.mark.parametrize(("focus", "most"), [("images", "i"), ("guests", "a-very")])
def test_the_table_in_focus_has_most_of_the_rows_and_the_other_some(
    crowd: tuple[Body, History], focus: Any, most: str
) -> None:
    status, history = crowd
    image = {**status["images"][0], "source_changed": False}
    status["images"] = [{**image, "name": f"i{no:02}"} for no in range(40)]
    status["guests"] = status["guests"][:50]
    shown = frame(status, history, state=TopState(focus=focus), lines=40)
    assert len(shown) == 40
    rows = {start: sum(line.startswith(start) for line in shown) for start in ("i", "a-very")}
    rows[most] -= 1  # the line about the one selected
    least = min(rows.values())
    assert 6 <= least <= rows[most] // 2 + 1


def test_the_wider_a_terminal_the_more_columns(crowd: tuple[Body, History]) -> None:
    for columns, absent, present in [
        (50, ["HITS", "SAVED"], ["STATE", "PRIVATE"]),
        (80, ["PID", "UID", "SOURCE"], ["STATE", "PRIVATE", "HITS"]),
        (110, ["UID", "SOURCE"], ["PID", "GRANTED"]),
        (200, [], ["PID", "UID", "SOURCE", "TOUCHED", "FAULTS/s BEFORE"]),
    ]:
        shown = "\n".join(frame(*crowd, columns=columns, lines=50))
        assert [word for word in absent if word in shown] == []
        assert [word for word in present if word not in shown] == []


@pytest.mark.parametrize("focus", ["images", "guests"])
@pytest.mark.parametrize("lines", range(8, 18))
def test_a_low_terminal_has_the_table_in_focus_and_the_keys(
    crowd: tuple[Body, History], lines: int, focus: Any
) -> None:
    shown = frame(*crowd, state=TopState(focus=focus), columns=60, lines=lines)
    assert len(shown) == lines
    assert shown[0].startswith("cowshed")
    assert shown[-1].startswith("q quit")
    assert sum(line.startswith("▸ ") for line in shown) == 1
    first = "alpine" if focus == "images" else "zz"
    assert any(line.startswith(first) for line in shown)


@pytest.mark.parametrize(("columns", "lines"), [(1, 1), (10, 3), (30, 6), (79, 10), (500, 2)])
@pytest.mark.parametrize("helping", [False, True])
def test_a_terminal_too_small_is_no_failure(
    crowd: tuple[Body, History], columns: int, lines: int, helping: bool
) -> None:
    shown = frame(*crowd, state=TopState(helping=helping), columns=columns, lines=lines)
    assert max(map(len, shown)) <= columns


def test_rows_that_need_somebody_come_first_then_the_busiest(
    status: Body, new_guest: Callable[..., Body]
) -> None:
    history = History()
    status["guests"] = [new_guest("busy"), new_guest("a"), new_guest("z", state="stopped-quota")]
    status["images"][1]["source_changed"] = False
    history.observe(status, 0)
    status = later(status, hits=1000, misses=0)
    history.observe(status, SECOND_NS)
    names = [row["name"] for row in rows_of("guests", status, history, TopState())]
    assert names == ["z", "busy", "a"]
    assert "1,000" in line_with(frame(status, history), "busy ")
    for busy, changed, names in [
        ("debian-12", None, ["debian-12", "alpine"]),
        ("alpine", None, ["alpine", "debian-12"]),
        ("alpine", 0, ["debian-12", "alpine"]),
    ]:
        status["guests"][0]["image"] = busy
        if changed is not None:
            status["images"][changed]["source_changed"] = True
        images = [row["name"] for row in rows_of("images", status, history, TopState())]
        assert images == names


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("name", ["z", "a", "b", "c"]),
        ("private", ["z", "b", "a", "c"]),
        ("hits", ["z", "c", "a", "b"]),
    ],
)
def test_rows_come_in_the_order_chosen(
    status: Body, new_guest: Callable[..., Body], order: str, names: list[str]
) -> None:
    status["guests"] = [
        new_guest("c", private_bytes=1, hits=1, misses=9),
        new_guest("b", private_bytes=9, hits=9, misses=1),
        new_guest("a", private_bytes=5, hits=5, misses=5),
        new_guest("z", state="stopped-quota", private_bytes=0),
    ]
    state = TopState()
    state.order["guests"] = order
    assert [row["name"] for row in rows_of("guests", status, History(), state)] == names


def test_the_selected_row_is_in_view_and_told_about(crowd: tuple[Body, History]) -> None:
    status, history = crowd
    state = TopState()
    rows = rows_of("guests", status, history, state)
    names = [key_of(row) for row in rows]
    for key in ("end", "up", "up"):
        state.press(key, names)
    name = rows[48]["name"]
    shown = frame(status, history, state=state, columns=120, lines=24)
    assert shown[-3].startswith(f"{name}: pid 41234, uid 1000, via unix, 512M of debian-12 granted")
    assert any(line.startswith(name) for line in shown[:-3])
    state.press("home", names)
    shown = frame(status, history, state=state, lines=24)
    assert shown[-3].startswith("zz: stopped for 0s at its quota; resume it:")
    assert shown[-2].split() == ["cowshed", "quota", "zz", "128M"]
    state.press("i", names)
    shown = frame(status, history, state=state, lines=24)
    assert shown[-3].startswith("alpine: 0 pinned, touched 0, 7 loads failed, digest not known")
    assert "CHANGED after it was opened" in shown[-2]


def test_guests_and_images_of_one_name_in_two_domains_are_rows_of_their_own(
    status: Body, new_guest: Callable[..., Body]
) -> None:
    status["images"].append({**status["images"][0], "domain": "tenant-a", "loads": 5})
    status["guests"].append(new_guest("web-1", domain="tenant-a", hits=0, misses=0))
    history = History()
    history.observe(status, 0)
    after = later(status, hits=0, misses=0)
    after["guests"][-1] = new_guest("web-1", domain="tenant-a", hits=70, misses=0)
    history.observe(after, SECOND_NS)
    assert history.rate("hits", guest="tenant-a/web-1") == 70
    assert history.rate("hits", guest="default/web-1") == 0
    state = TopState()
    state.selected["guests"] = "tenant-a/web-1"
    shown = frame(after, history, state=state, columns=120, lines=40)
    assert shown[-3].startswith(
        "tenant-a/web-1: pid 41234, uid 1000, via unix, 512M of tenant-a/debian-12"
    )
    guests_of = {
        line.split()[0]: line.split()[7]
        for line in shown
        if re.match(r" *(tenant-a/)?debian-12 ", line)
    }
    assert guests_of == {"debian-12": "3", "tenant-a/debian-12": "1"}


def test_names_can_neither_move_the_cursor_nor_style_the_text(status: Body) -> None:
    state = TopState()
    state.order["guests"] = "name"
    for lines in (None, 40):
        for guest in status["guests"]:
            state.selected["guests"] = key_of(guest)
            text = "\n".join(frame(status, state=state, columns=120, lines=lines))
            assert "\x1b" not in text
            assert "\u202e" not in text
            assert r"evil\x1b[2J[red]\u202e" in text


def test_a_pipe_gets_every_guest_and_image_whole(crowd: tuple[Body, History]) -> None:
    shown = frame(*crowd, lines=None)
    assert sum(line.startswith(("zz", "a-very")) for line in shown) == 51
    assert "…" not in "".join(shown)
    assert "q quit" not in shown[-1]
    assert "1.2G of 2G (60%), 5.4G saved by sharing" in line_with(shown, "Memory")


def test_the_first_frame_has_totals_and_no_rates(status: Body) -> None:
    shown = frame(status)
    assert "- faults, - copies, - loads, - evictions" in line_with(shown, "A second")
    assert "75% of uses in a minute, estimated" in line_with(shown, "Hits")
    assert "hit 3.1us/85us, miss 140us/1.9ms" in line_with(shown, "P50/P99")


def test_a_daemon_without_guests_or_answers_is_shown(status: Body) -> None:
    status["guests"] = []
    for latency in status["latency_us"].values():
        latency["count"] = 0
    shown = frame(status, lines=24)
    assert len(shown) == 24
    assert "Guests 0" in "\n".join(shown)
    assert "nothing answered yet" in line_with(shown, "P50/P99")


def test_a_terminal_of_ascii_gets_ascii(crowd: tuple[Body, History]) -> None:
    for state in (TopState(), TopState(helping=False, focus="images")):
        assert "\n".join(frame(*crowd, state=state, columns=200, lines=40, blocks=False)).isascii()


# On a terminal.


@pytest.fixture
def watch() -> Iterator[Callable[..., Terminal]]:
    """Start `cowshed top` of a run-dir on a terminal."""
    with contextlib.ExitStack() as stack:

        def start(run_dir: Path, **how: Any) -> Terminal:
            words = [*COMMAND, "top", "--run-dir", str(run_dir)]
            return stack.enter_context(contextlib.closing(Terminal(*words, **how)))

        yield start


def left_as_it_was(terminal: Terminal) -> bool:
    """Whether the modes are those of before, the cursor shows and the first screen is back."""
    last = {
        switch: terminal.drawn.rfind(f"\x1b[?{switch}")
        for switch in ("1049h", "1049l", "25h", "25l")
    }
    return (
        terminal.modes() == terminal.modes_before
        and last["1049h"] < last["1049l"]
        and last["25l"] < last["25h"]
        and "Traceback" not in terminal.drawn
    )


def test_top_draws_until_q_and_gives_the_screen_back(
    stand_in: Callable[..., Any], status: Body, watch: Callable[..., Terminal]
) -> None:
    terminal = watch(stand_in(status=[{"ok": True, "status": status}]).run_dir)
    terminal.show("STOPPED")
    assert terminal.modes() != terminal.modes_before
    terminal.press(b"xq")
    assert terminal.end() == 0
    assert left_as_it_was(terminal)


@pytest.mark.parametrize(
    ("number", "exit_status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
)
def test_top_gives_the_screen_back_when_a_signal_ends_it(
    stand_in: Callable[..., Any],
    status: Body,
    watch: Callable[..., Terminal],
    number: signal.Signals,
    exit_status: int,
) -> None:
    terminal = watch(stand_in(status=[{"ok": True, "status": status}]).run_dir)
    terminal.show("STOPPED")
    terminal.process.send_signal(number)
    assert terminal.end() == exit_status
    assert left_as_it_was(terminal)
    assert "cowshed: " not in terminal.drawn


def test_top_that_loses_its_daemon_leaves_the_screen_and_says_why(
    stand_in: Callable[..., Any], status: Body, watch: Callable[..., Terminal]
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    terminal = watch(peer.run_dir)
    terminal.show("STOPPED")
    peer.close()
    assert terminal.end() == 1
    assert left_as_it_was(terminal)
    # It looked for a successor first.
    assert "cowshed: no daemon at" in terminal.drawn.rpartition("\x1b[?1049l")[2]


def test_top_that_meets_an_answer_it_does_not_know_gives_the_screen_back(
    stand_in: Callable[..., Any], status: Body, watch: Callable[..., Terminal]
) -> None:
    del status["guests"][0]["quota_stops"]
    terminal = watch(stand_in(status=[{"ok": True, "status": status}]).run_dir)
    terminal.show("q quit")
    terminal.press(b"s" + b"j" * 4)  # to the last of them by name
    assert terminal.end() == 1
    assert left_as_it_was(terminal)
    assert "is of another version than this command" in terminal.drawn


def test_top_gives_the_terminal_back_while_it_is_stopped_and_goes_on_after(
    stand_in: Callable[..., Any], status: Body
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    # With a job control of its own, as a shell that somebody types into.
    shell = 'set -m; "$@"; ' + 2 * "echo stopped:$?; read -r line; fg; " + "echo ended:$?"
    words = ["bash", "-c", shell, "-", *COMMAND, "top", "--run-dir", str(peer.run_dir)]
    with contextlib.closing(Terminal(*words)) as terminal:
        terminal.show("STOPPED")
        at = 0
        for _ in range(2):
            terminal.press(b"\x1a")
            terminal.read_until("stopped:148", since=at)
            assert left_as_it_was(terminal)
            at = len(terminal.drawn)
            terminal.press(b"\n")
            terminal.read_until("\x1b[?1049h", since=at)
            terminal.read_until("STOPPED", since=at)
            assert terminal.modes() != terminal.modes_before
        terminal.press(b"q")
        terminal.read_until("ended:0", since=at)
        assert left_as_it_was(terminal)


def fits(shown: list[str], columns: int) -> bool:
    """Whether a screen has a frame of so many columns on it, down to its last line."""
    is_wide = "FAULTS/s BEFORE" in "\n".join(shown)
    return shown[-1].startswith("q quit") and is_wide is (columns == 200)


def test_top_follows_the_size_of_its_terminal(
    stand_in: Callable[..., Any], status: Body, watch: Callable[..., Terminal]
) -> None:
    terminal = watch(stand_in(status=[{"ok": True, "status": status}]).run_dir)
    terminal.show("STOPPED")
    for columns, lines in ((200, 60), (60, 12), (80, 24)):
        terminal.drawn = ""
        terminal.resize(columns, lines)
        # A frame of the size before may be on its way.
        while not fits(terminal.show("q quit"), columns):
            terminal.read_more()


def test_a_resize_ends_the_wait_for_keys() -> None:
    ours, theirs = os.openpty()
    with open(theirs, "w") as out, Screen(Console(file=out)) as screen:
        os.kill(os.getpid(), signal.SIGWINCH)
        deadline_ns = time.monotonic_ns() + 60 * SECOND_NS
        assert screen.wait(deadline_ns) == []
        assert time.monotonic_ns() < deadline_ns
    os.close(ours)


def test_keys_are_answered_at_once(
    stand_in: Callable[..., Any], status: Body, watch: Callable[..., Terminal]
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    terminal = watch(peer.run_dir)
    terminal.show("▸ Guests 4, 1 stopped, by busy")
    for keys, words in [
        (b"s", "Guests 4, 1 stopped, by name"),
        (b"i", "▸ Images 2, by busy"),
        (b"\x1b[B", "debian-12: 64M pinned"),
        (b"?", "Keys"),
        (b"x", "▸ Images 2"),
        (b"p", "PAUSED"),
    ]:
        terminal.press(keys)
        terminal.show(words)
    nr_asked = len(peer.asked)
    at = len(terminal.drawn)
    for _ in range(3):  # frames, each a second apart
        terminal.read_until("\x1b[J", since=at)
        at = terminal.drawn.index("\x1b[J", at) + 1
    assert len(peer.asked) == nr_asked
    terminal.press(b" ")
    until(lambda: len(peer.asked) > nr_asked)
    terminal.press(b"q")
    assert terminal.end() == 0


def test_top_draws_a_real_daemon_as_it_changes(
    make_image: MakeImage,
    start_daemon: StartDaemon,
    start_guest: StartGuest,
    watch: Callable[..., Terminal],
) -> None:
    daemon = start_daemon("--image", f"d={make_image(4 * MIB)}", "--capacity", "8M")
    terminal = watch(daemon.run_dir)
    terminal.show("Memory")
    terminal.show("▸ Guests 0")  # a frame may come in several pieces
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest='g"\u00e4')
    guest.call("touch", pages=list(range(MIB // 4096 * 4)))
    terminal.show("4M of 8M (50%)")
    terminal.show('g"ä')
    until(lambda: daemon.request("evict", image="d")["kept_bytes"] == 0)
    terminal.show("0 of 8M (0%)")
    guest.call("close")
    terminal.show("▸ Guests 0")
    terminal.press(b"q")
    assert terminal.end() == 0


# Not on a terminal.


def test_one_frame_for_a_pipe_has_the_rates_of_a_second(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(MIB)}")
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    done = cowshed("top", "--once", "--run-dir", daemon.run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    shown = done.stdout.splitlines()
    assert "0 faults, 0 copies, 0 loads (0), 0 evictions" in line_with(shown, "A second")
    assert line_with(shown, "running").split()[:2] == ["g", "d"]


def test_without_a_terminal_top_says_what_to_use_instead(tmp_path: Path) -> None:
    done = cowshed("top", "--run-dir", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "cowshed: top needs a terminal: use 'cowshed top --once' or 'cowshed status'\n"
    )


def test_top_whose_keys_come_from_nowhere_still_shows_and_ends_on_ctrl_c(
    stand_in: Callable[..., Any], status: Body
) -> None:
    peer = stand_in(status=[{"ok": True, "status": status}])
    words = [
        "sh",
        "-c",
        'exec "$@" </dev/null',
        "-",
        *COMMAND,
        "top",
        "--run-dir",
        str(peer.run_dir),
    ]
    with contextlib.closing(Terminal(*words)) as terminal:
        terminal.show("STOPPED")
        terminal.press(b"\x03")
        assert terminal.end() == 130
        assert left_as_it_was(terminal)
        assert os.get_terminal_size(terminal._theirs) == (80, 24)
