# SPDX-License-Identifier: Apache-2.0
"""`cowshed top`: a frame a second, until q; or one frame, for a pipe.

This is the loop, the only part that reads the clock. view.py makes a frame from the rates of
history.py and the choices of state.py; screen.py owns the terminal.
"""

import time
from collections.abc import Callable

from rich.console import Console, RenderableType

from cowshed.service.reports.wording import Answer, key_of
from cowshed.service.top.history import History
from cowshed.service.top.screen import Screen
from cowshed.service.top.state import TopState
from cowshed.service.top.view import ScreenFrame, rows_of

REFRESH_NS = 1_000_000_000

TakeStatus = Callable[[], Answer]


def watch(take_status: TakeStatus, console: Console) -> None:
    """Show a frame a second on `console` until q is pressed, or `take_status` raises."""
    history, state = History(), TopState()
    status = take_status()  # raises before the screen is taken over
    with Screen(console) as screen:
        while not state.quitting:
            now_ns = time.monotonic_ns()
            if not state.paused:
                history.observe(status, now_ns)
            deadline_ns = now_ns + REFRESH_NS
            while not state.quitting and time.monotonic_ns() < deadline_ns:
                columns, lines = screen.size
                blocks = console.encoding.startswith("utf")
                screen.draw(ScreenFrame(status, history, state, columns, lines, blocks).view())
                for key in screen.wait(deadline_ns):
                    rows = rows_of(state.focus, status, history, state)
                    state.press(key, [key_of(row) for row in rows])
            if not (state.quitting or state.paused):
                status = take_status()


def one_frame(take_status: TakeStatus, console: Console) -> RenderableType:
    """Return a frame with every row and the rates of one second; takes that second."""
    history = History()
    for wait in (True, False):
        status = take_status()
        history.observe(status, time.monotonic_ns())
        if wait:
            time.sleep(REFRESH_NS / 1e9)
    blocks = console.encoding.startswith("utf")
    return ScreenFrame(status, history, TopState(), console.width, None, blocks).view()
