# SPDX-License-Identifier: Apache-2.0
"""The progress bar that a command shows on a terminal while the daemon works."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["ShowProgress", "progress_bar"]

# (description, done_bytes, total_bytes)
ShowProgress = Callable[[str, int, int], None]


@contextmanager
def progress_bar(
    beginning: str, *, is_wanted: bool = True, with_speed: bool = False
) -> Iterator[ShowProgress]:
    """Yield a function that shows progress on stderr; it does nothing unless that is a terminal.

    beginning describes the work until the first call. The bar is erased afterwards.
    """
    if not (is_wanted and sys.stderr.isatty()):
        yield lambda _what, _done_bytes, _total_bytes: None
        return
    # Not at the top, as in cli.py.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    terminal = Console(stderr=True, highlight=False)
    with Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(binary_units=True),
        *([SpeedColumn()] if with_speed else []),
        TimeRemainingColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    ) as bar:
        task = bar.add_task(beginning, total=None)

        def show(what: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, description=what, completed=done_bytes, total=total_bytes)

        yield show
