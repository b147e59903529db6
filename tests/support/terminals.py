# SPDX-License-Identifier: Apache-2.0
"""A command on a pseudo-terminal: keys in, output out, and a screen that shows the output."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping
from typing import Any

ANSWER_SECONDS = 60
_SIZES = ("COLUMNS", "LINES")
_LAST = "\x1e"  # no command prints it
_CSI = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it


class Terminal:
    """A command on a terminal of its own, and its output so far.

    The terminal outlives the command, so that modes() can be compared; close() it.
    """

    def __init__(
        self, *words: str, columns: int = 80, lines: int = 24, env: Mapping[str, str] | None = None
    ) -> None:
        self.drawn = ""
        self._is_all_read = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._keys, self._theirs = pty.openpty()
        self.resize(columns, lines)
        self.modes_before = self.modes()
        kept = {name: value for name, value in os.environ.items() if name not in _SIZES}
        self.process = subprocess.Popen(
            words,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={**kept, "TERM": "xterm", **(env or {})},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size; the command gets SIGWINCH."""
        self.columns, self.lines = columns, lines
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, size)

    def modes(self) -> list[Any]:
        """Return the terminal's modes: echo, canonical mode, and so on."""
        return termios.tcgetattr(self._theirs)

    def press(self, keys: bytes) -> None:
        os.write(self._keys, keys)

    def read_until(self, words: str, *, since: int = 0) -> None:
        """Read until words were printed, after the first `since` characters."""
        while words not in self.drawn[since:]:
            assert self._read(), f"ended without {words!r}: {self.drawn!r}"

    def show(self, words: str) -> list[str]:
        """Read until a line of the screen has words, and return all its lines."""
        while not any(words in line for line in self.screen()):
            assert self._read(), f"ended without {words!r} in {self.screen()}"
        return self.screen()

    def screen(self) -> list[str]:
        """Return the lines that a terminal of this size shows; only CSI that move text count."""
        rows = [[" "] * self.columns for _ in range(self.lines)]
        row = column = at = 0
        text = self.drawn
        while at < len(text):
            if match := _CSI.match(text, at):
                argument, letter = match.groups()
                if letter == "H":
                    row = column = 0
                elif letter == "K":
                    rows[row][column:] = [" "] * (self.columns - column)
                elif letter == "J":
                    first = 0 if argument == "2" else row + 1
                    for no in range(first, self.lines):
                        rows[no] = [" "] * self.columns
                elif argument == "?1049h":
                    rows = [[" "] * self.columns for _ in range(self.lines)]
                at = match.end()
                continue
            mark = text[at]
            at += 1
            if mark == "\r":
                column = 0
            elif mark == "\n":
                row = min(row + 1, self.lines - 1)
            elif mark.isprintable() and column < self.columns:
                rows[row][column] = mark
                column += 1
        return ["".join(each).rstrip() for each in rows]

    def read_more(self) -> None:
        """Read its next output."""
        assert self._read(), f"ended with {self.screen()}"

    def end(self) -> int:
        """Read until the command has ended, and return its exit status."""
        while self._read():
            pass
        return self.process.wait(timeout=ANSWER_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for fd in (self.pidfd, self._keys, self._theirs):
            os.close(fd)

    def _read(self) -> bool:
        """Read on; return False if it has ended and all its output was read."""
        readable, _, _ = select.select([self._keys, self.pidfd], [], [], ANSWER_SECONDS)
        assert readable, f"silent for {ANSWER_SECONDS} s after {self.drawn!r}"
        if self._keys not in readable:
            return self._read_rest()
        self.drawn += self._decoder.decode(os.read(self._keys, 65536))
        return True

    def _read_rest(self) -> bool:
        """Read output still in flight from a command that has ended; return whether there was any.

        A kernel thread carries a terminal's output to its other end, in order.
        """
        if self._is_all_read:
            return False
        self._is_all_read = True
        nr_drawn = len(self.drawn)
        os.write(self._theirs, _LAST.encode())
        while _LAST not in self.drawn[nr_drawn:]:
            assert select.select([self._keys], [], [], ANSWER_SECONDS)[0], "no end of what it drew"
            self.drawn += self._decoder.decode(os.read(self._keys, 65536))
        self.drawn = self.drawn.replace(_LAST, "")
        return len(self.drawn) > nr_drawn
