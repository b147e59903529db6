# SPDX-License-Identifier: Apache-2.0
"""A log that nobody reads loses lines, which are counted and told; nobody waits for its reader."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import ANSWER_SECONDS, MakeImage, command, until
from scraping import fetch

from cowshed.service.runtime.log_sink import LogSink
from cowshed.service.runtime.logs import (
    EventLog,
    logging_begin,
    logging_count_lost,
    logging_end,
    logging_report_lost,
)
from cowshed.transport import connect

MIB = 1 << 20
LINE = b"time=now level=notice event=said\n"


@pytest.fixture(params=["pipe", "socket", "terminal"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A reader, and a writer that blocks, as the daemon's stderr does."""
    if request.param == "pipe":
        reader, writer = os.pipe()
    elif request.param == "socket":
        reader, writer = (sock.detach() for sock in socket.socketpair())
    else:
        reader, writer = os.openpty()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read_all(fd: int, nr_bytes: int = 1 << 20) -> bytes:
    os.set_blocking(fd, False)
    text = b""
    while True:
        try:
            text += os.read(fd, nr_bytes).replace(b"\r", b"")
        except BlockingIOError:
            return text


def fill(writer: int) -> None:
    """Leave no room in a pipe; others have it open too, and it blocks for them."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.pwritev(writer, [b"." * 4096], -1, 8)  # RWF_NOWAIT


def test_what_is_not_read_is_lost_and_nobody_waits(ends: tuple[int, int]) -> None:
    reader, writer = ends
    sink = LogSink(writer)
    nr_written = 0
    while sink.write(LINE):
        nr_written += 1
    assert nr_written > 10
    assert not sink.write(LINE)
    assert os.get_blocking(writer)  # others have this open too
    text = read_all(reader)
    assert sink.write(LINE)
    text += read_all(reader)
    # The last may have been cut, and goes on where it was.
    assert text.replace(LINE, b"") == b""
    assert text.count(LINE) >= nr_written + 1
    sink.close()


def test_a_line_longer_than_the_room_is_whole_in_the_end() -> None:
    reader, writer = os.pipe()
    sink = LogSink(writer)
    line = b"x" * 100_000 + b"\n"
    assert sink.write(line)
    text = read_all(reader)
    assert 0 < len(text) < len(line)
    while not sink.write(LINE):
        text += read_all(reader)
    text += read_all(reader)
    assert text == line + LINE
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("log_format", ["logfmt", "json"])
def test_how_many_lines_were_lost_is_counted_and_told_before_the_next(log_format: str) -> None:
    reader, writer = os.pipe()
    log = EventLog("cowshed.test")
    counted: list[int] = []
    logging_begin(log_format, "notice", writer)
    try:
        fill(writer)
        log.notice("one")
        assert not logging_report_lost()
        logging_count_lost(counted.append)
        log.notice("two")
        assert counted == [1, 1]
        read_all(reader)
        log.notice("three")
        lost, three = read_all(reader).decode().splitlines()
        assert "log-lost" in lost
        assert "lines=2" in lost or '"lines": 2' in lost
        assert "three" in three
        assert logging_report_lost()
        assert read_all(reader) == b""
    finally:
        logging_end()
        os.close(reader)
        os.close(writer)


def test_a_death_is_followed_while_nobody_reads_the_log(
    run_dir: Path, make_image: MakeImage
) -> None:
    reader, writer = os.pipe()
    words = command("serve", "--run-dir", str(run_dir), f"--image=d={make_image(MIB)}")
    keeper = subprocess.Popen([*words, "--metrics=127.0.0.1:0"], stderr=writer)
    os.set_blocking(reader, False)
    text = ""

    def said(what: str) -> bool:
        nonlocal text
        text += read_all(reader).decode()
        return what in text

    try:
        until(lambda: said("event=metrics"))
        url = text.partition("event=metrics url=")[2].split()[0]
        backend = int((run_dir / "lock").read_text())
        with connect(f"unix://{run_dir}/cowshed.sock") as asked:
            asked.request("status")  # from then on a death is followed
        fill(writer)
        os.kill(backend, signal.SIGKILL)

        def successor() -> int:
            return int((run_dir / "lock").read_text() or 0)

        until(lambda: successor() not in (0, backend))
        wanted = r'^cowshed_log_lines_lost_total\{process="(keeper|backend)"\} [1-9]'
        until(lambda: len(re.findall(wanted, fetch(url), re.MULTILINE)) == 2)
        text = ""
        # The keeper's and the backend's.
        until(lambda: said("event=log-lost") and text.count("event=log-lost") == 2)
        keeper.terminate()
        assert keeper.wait(ANSWER_SECONDS) == 0
    finally:
        keeper.kill()
        keeper.wait()
        os.close(reader)
        os.close(writer)
