# SPDX-License-Identifier: Apache-2.0
"""The daemon's log: lines that hold whatever is in them, say little, and cannot be flooded."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from domains import MakeImage, StartDaemon, StartGuest, until
from hypothesis import given
from hypothesis import strategies as st

from cowshed.service.runtime.logs import (
    EventLog,
    FloodLimit,
    LogFormat,
    format_event,
    logging_begin,
    logging_end,
    logging_report_suppressed,
)

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[3]
# A value in quotes with escapes, or one without any blank, quote or '='.
FIELD = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s"=]+)(?: |$)')
EVIL = 'a"b=c d\\\n\r\x1b[2J\u202e\u00e4\ud800\U0001f404 event=serving'


def fields_of(line: str) -> dict[str, str]:
    """A logfmt line read back; AssertionError unless it is one from end to end."""
    fields, at = {}, 0
    while at < len(line):
        match = FIELD.match(line, at)
        assert match, f"no field at {at} of {line!r}"
        name, value = match.groups()
        fields[name] = json.loads(value) if value.startswith('"') else value
        at = match.end()
    return fields


Lines = Callable[..., list[str]]


@pytest.fixture
def lines(tmp_path: Path) -> Any:
    """Log to a file: lines() are those there; lines(format, level) begins."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begin(log_format: LogFormat | None = None, level: Any = "debug") -> list[str]:
        if log_format:
            logging_begin(log_format, level, fd)
        return path.read_text("utf-8").split("\n")[:-1]

    yield begin
    logging_end()
    os.close(fd)


@given(st.text())
def test_any_value_can_be_read_back_from_its_one_line(value: str) -> None:
    line = format_event({"event": "x", "guest": value, "uid": 7}, "logfmt")
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert fields_of(line) == {"event": "x", "guest": value, "uid": "7"}
    line = format_event({"event": "x", "guest": value, "uid": 7}, "json")
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == {"event": "x", "guest": value, "uid": 7}


def test_plain_words_stand_without_quotes_and_letters_as_themselves() -> None:
    line = format_event({"a": "/run/x.sock", "b": "gänse", "c": "", "d": None, "e": True}, "logfmt")
    assert line == 'a=/run/x.sock b="gänse" c="" e=true'


def test_a_line_begins_with_time_level_and_event_and_ends_with_the_message(lines: Lines) -> None:
    lines("logfmt")
    EventLog("t").warning("quota-stop", f"of {EVIL}", guest=EVIL, image="debian", uid=None)
    (line,) = lines()
    time, level, event, *_ = line.split()
    assert re.fullmatch(r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert (level, event) == ("level=warning", "event=quota-stop")
    said = fields_of(line)
    assert list(said)[3:] == ["guest", "image", "message"]
    assert said["guest"] == EVIL
    assert said["message"] == f"of {EVIL}"


def test_a_json_line_is_an_object_with_numbers_as_numbers(lines: Lines) -> None:
    lines("json")
    EventLog("t").notice("attached", guest=EVIL, pid=42)
    (line,) = lines()
    said = json.loads(line)
    assert list(said) == ["time", "level", "event", "guest", "pid"]
    assert (said["level"], said["guest"], said["pid"]) == ("notice", EVIL, 42)


def test_a_traceback_is_in_the_line_of_its_event(lines: Lines) -> None:
    lines("logfmt")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        EventLog("t").crash("request-failed")
    (line,) = lines()
    assert "ValueError: two\nlines" in fields_of(line)["traceback"]


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("debug", ["debug", "info", "notice", "warning", "error"]),
        ("info", ["info", "notice", "warning", "error"]),
        ("notice", ["notice", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_a_level_leaves_out_what_is_below_it(lines: Lines, level: str, said: list[str]) -> None:
    lines("logfmt", level)
    for name in ("debug", "info", "notice", "warning", "error"):
        getattr(EventLog("t"), name)(name)
    assert [fields_of(line)["level"] for line in lines()] == said


def test_what_was_left_out_is_counted_in_the_next_line_or_told_by_itself(lines: Lines) -> None:
    lines("logfmt")
    log = EventLog("t")
    for uid in (1000, 1000, 1001):
        for _ in range(15):
            log.warning("dropped", uid=uid)
    by_uid = [fields_of(line)["uid"] for line in lines()]
    assert by_uid == ["1000"] * 20 + ["1001"] * 15
    logging_report_suppressed()
    logging_report_suppressed()
    *_, last = lines()
    assert len(lines()) == 36
    said = fields_of(last)
    assert (said["event"], said["of"], said["uid"], said["lines"]) == (
        "suppressed",
        "dropped",
        "1000",
        "10",
    )


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        logging_begin("logfmt", "info", fd)
        EventLog("t").error("x")
    finally:
        logging_end()
        os.close(fd)


# The limit by itself.


def test_one_users_flood_leaves_the_others_their_lines() -> None:
    limit = FloodLimit()
    said = [limit.admit("dropped", 1000, verbose=False, now=5.0) for _ in range(500)]
    assert said == [0] * 20 + [None] * 480
    assert limit.admit("dropped", 1001, verbose=False, now=5.0) == 0
    assert limit.admit("turned-away", 1000, verbose=False, now=5.0) == 0
    assert limit.admit("dropped", 1000, verbose=False, now=14.9) is None
    assert limit.admit("dropped", 1000, verbose=False, now=15.1) == 481
    assert limit.admit("dropped", 1000, verbose=False, now=25.2) == 0


def test_what_was_asked_for_may_be_much_and_is_bounded_too() -> None:
    limit = FloodLimit()
    said = [limit.admit("attached", 0, verbose=True, now=0.0) for _ in range(3000)]
    assert said.count(0) == 2000
    said = [limit.admit("attached", 0, verbose=True, now=1.0) for _ in range(100)]
    assert len(said) - said.count(None) == 50


def test_the_limit_remembers_a_bounded_number_of_users() -> None:
    limit = FloodLimit()
    for uid in range(100_000):
        limit.admit("dropped", uid, verbose=False, now=0.0)
    assert len(limit._buckets) == 1024
    assert limit.take_suppressed() == []


# A real daemon.


def events(log: str) -> list[str]:
    return [fields_of(line)["event"] for line in log.splitlines()]


def use(start_guest: StartGuest, uri: str, name: str) -> None:
    """Attach, have faults of every kind, and detach."""
    guest = start_guest(uri)
    guest.call("open", image="d", guest=name)
    guest.call("touch", pages=list(range(0, 512, 3)))
    guest.call("poke", pages=list(range(0, 512, 5)), byte=1)
    guest.call("close")


def test_a_quiet_log_says_start_and_stop_and_nothing_of_guests(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(2 * MIB)}", "--capacity", "1M")
    use(start_guest, daemon.uri, "g")
    assert daemon.stop() == 0
    assert events(daemon.log()) == ["serving", "stopping"]
    serving = fields_of(daemon.log().splitlines()[0])
    assert serving["images"] == "d (2M)"
    assert serving["capacity"] == "1M"
    assert (serving["pid"], serving["run_dir"]) == (str(daemon.pid), str(daemon.run_dir))


def test_a_verbose_log_has_one_line_for_each_guest_that_comes_or_goes_and_none_for_faults(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={make_image(2 * MIB)}", "--capacity", "1M", "--verbose")
    name = 'gä"n se='
    use(start_guest, daemon.uri, name)
    killed = start_guest(daemon.uri)
    killed.call("open", image="d", guest="killed")
    killed.kill()
    until(lambda: events(daemon.log()).count("detached") == 2)
    until(lambda: "digest" in events(daemon.log()))
    assert daemon.stop() == 0
    said = [fields_of(line) for line in daemon.log().splitlines()]
    of_guests = [line for line in said if "guest" in line]
    assert [(line["event"], line["guest"]) for line in of_guests] == [
        ("attached", name),
        ("detached", name),
        ("attached", "killed"),
        ("detached", "killed"),
    ]
    assert {(line["image"], line["uid"]) for line in of_guests} == {("d", str(os.geteuid()))}
    assert of_guests[2]["pid"] == str(killed.pid)
    assert sorted(set(events(daemon.log()))) == [
        "attached",
        "detached",
        "digest",
        "serving",
        "stopping",
    ]


def test_a_guest_at_its_quota_is_told_once_and_so_is_its_going_on(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    config = run_dir / "c.toml"
    config.write_text('log = "json"\n')
    image = make_image(MIB)
    daemon = start_daemon("--config", str(config), "--image", f"d={image}")
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g\u00e4", quota_bytes=4096)
    guest.start("poke", pages=[1, 2], byte=1)
    until(lambda: "quota-stop" in daemon.log())
    daemon.request("quota", guest="g\u00e4", quota_bytes=8192)
    guest.finish()
    until(lambda: "quota-resume" in daemon.log())
    assert daemon.stop() == 0
    said = [json.loads(line) for line in daemon.log().splitlines()]
    stop, resume = (line for line in said if "guest" in line)
    assert (stop["level"], stop["event"], stop["quota"]) == ("warning", "quota-stop", "4K")
    assert "cowshed quota" in stop["message"]
    assert (resume["level"], resume["event"]) == ("notice", "quota-resume")
    for line in (stop, resume):
        assert (line["guest"], line["image"], line["pid"]) == ("g\u00e4", "d", guest.pid)


def test_a_flood_of_bad_packets_is_a_few_lines(
    run_dir: Path, make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--image", f"d={make_image(MIB)}")
    for _ in range(300):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.connect(str(run_dir / "cowshed.sock"))
            peer.send(b"no header at all")
            while peer.recv(1 << 16):
                pass
    assert daemon.status()["guests"] == []
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.stop() == 0
    said = [fields_of(line) for line in daemon.log().splitlines()]
    dropped = [line for line in said if line["event"] == "dropped"]
    assert 20 <= len(dropped) <= 25
    assert {(line["pid"], line["uid"]) for line in dropped} == {
        (str(os.getpid()), str(os.geteuid()))
    }
    told = [line for line in said if line["event"] == "suppressed"]
    told_of = sum(int(line["lines"]) for line in told)
    counted = sum(int(line.get("suppressed", 0)) for line in dropped)
    assert len(dropped) + counted + told_of == 300


def test_every_event_is_in_the_documentation() -> None:
    said = re.compile(r'\b_?[lL]og(?:\("\w+"\))?\.[a-z]+\(\s*"([a-z-]+)"')
    named = {
        event
        for path in (ROOT / "service").rglob("*.py")
        for event in said.findall(path.read_text().replace("EventLog", "log"))
    }
    assert {"serving", "attached", "suppressed", "request-failed"} <= named
    table = (ROOT / "docs/logs.md").read_text().partition("## Events")[2]
    listed = set(
        re.findall(r"`([a-z-]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    )
    assert named - listed == set()
    assert listed - named == {"message"}
