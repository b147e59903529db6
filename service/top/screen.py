# SPDX-License-Identifier: Apache-2.0
"""The terminal of `cowshed top`: reads keys, draws frames, and restores everything at the end.

At each end that can be caught (a key, an error, Ctrl-C, SIGTERM, SIGHUP, SIGQUIT) it restores the
modes, the cursor and the screen's content; at Ctrl-Z too, until the process continues. Signals
write bytes to a pipe that the wait for keys watches too, so a resize is drawn at once.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rich.console import Console, RenderableType

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"
_LEAVE = "\x1b[?25h\x1b[?1049l"
_ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SEQUENCES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1b[5~": "pageup",
    b"\x1b[6~": "pagedown",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
    b"\x1bOH": "home",
    b"\x1bOF": "end",
    b"\x1b[1~": "home",
    b"\x1b[4~": "end",
    b"\t": "tab",
    b"\x1b": "escape",
}
_LONGEST = max(map(len, _SEQUENCES))


class Screen:
    """The terminal of `console`, taken over inside `with`, which must be in the main thread.

    Keys come from standard input; if that is not a terminal, there are none, and Ctrl-C ends.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._out = console.file.fileno()
        self._in = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
        self._before: list[Any] | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Screen":
        with contextlib.ExitStack() as opened:
            self._signals, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            opened.callback(os.close, writer)
            opened.callback(os.close, self._signals)
            opened.callback(self._give_back)  # also if _take() fails half way
            self._take()
            previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            opened.callback(signal.set_wakeup_fd, previous)
            for number, handler in (
                *((number, _end) for number in _ENDS),
                (signal.SIGTSTP, self._on_stop),
                (signal.SIGWINCH, _ignore),  # a handler makes it wake the wait
            ):
                opened.callback(signal.signal, number, signal.signal(number, handler))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines now; those of the environment if the terminal does not know."""
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(self._out)
            if columns > 0 and lines > 0:
                return columns, lines
        return self._console.size

    def draw(self, view: RenderableType) -> None:
        """Draw a frame, cut to the screen's lines."""
        columns, lines = self.size
        with self._console.capture() as capture:
            self._console.print(view, width=columns, crop=True, end="")
        shown = capture.get().split("\n")[:lines]
        # Overwrites the last frame and clears the rest of each line, so that nothing flickers.
        self._write("\x1b[H" + "\x1b[K\r\n".join(shown) + "\x1b[K\x1b[J")

    def wait(self, deadline_ns: int) -> list[str]:
        """Wait for keys and return them; none at a resize or the deadline.

        A terminal that is gone counts as the key ``q``.
        """
        watched = [self._signals] if self._in is None else [self._signals, self._in]
        left_ns = max(0, deadline_ns - time.monotonic_ns())
        readable, _, _ = select.select(watched, [], [], left_ns / 1e9)
        if self._signals in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._signals, 4096)
        if self._in not in readable or self._in is None:
            return []
        try:
            pressed = os.read(self._in, 1024)
        except OSError:
            pressed = b""
        return list(keys_of(pressed)) if pressed else ["q"]

    def _take(self) -> None:
        if self._in is not None:
            self._before = termios.tcgetattr(self._in)
            tty.setcbreak(self._in)
        self._write(_ENTER)

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._write(_LEAVE)
        if self._in is not None and self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)

    def _on_stop(self, _number: int, _at: FrameType | None) -> None:
        self._give_back()
        previous = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns after SIGCONT
        signal.signal(signal.SIGTSTP, previous)
        self._take()

    def _write(self, text: str) -> None:
        data = text.encode(self._console.encoding, "replace")
        while data:
            try:
                data = data[os.write(self._out, data) :]
            except BlockingIOError:  # another process made the terminal non-blocking
                select.select([], [self._out], [])


def keys_of(pressed: bytes) -> Iterator[str]:
    """Yield the names of the keys in a terminal's input; unknown sequences are skipped."""
    at = 0
    while at < len(pressed):
        for length in range(_LONGEST, 0, -1):
            name = _SEQUENCES.get(pressed[at : at + length])
            if name and not (name == "escape" and pressed[at + 1 : at + 2] in (b"[", b"O")):
                yield name
                at += length
                break
        else:
            if pressed[at : at + 1] == b"\x1b":  # skip to the letter or ~ that ends the sequence
                at += 2
                while at < len(pressed) and not 0x40 <= pressed[at] <= 0x7E:
                    at += 1
            elif 0x20 <= pressed[at] < 0x7F:
                yield chr(pressed[at])
            at += 1


def _end(number: int, _at: FrameType | None) -> None:
    sys.exit(128 + number)


def _ignore(_number: int, _at: FrameType | None) -> None:
    pass
