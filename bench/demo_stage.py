# SPDX-License-Identifier: Apache-2.0
"""The demo's output: numbered steps with outcomes, and progress bars on terminals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["DemoError", "Stage", "Step"]

_INDENT: Final = "      "


class DemoError(Exception):
    """The demo cannot go on; the message has the reason and the cure, in a few lines."""


class Step:
    """A step in progress; without a progress bar if total_bytes is 0."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total_bytes or None)
        self.outcome = "done"

    def advance(self, nr_bytes: int) -> None:
        """Add nr_bytes to the progress."""
        self._progress.advance(self._task, nr_bytes)

    def reach(self, done_bytes: int) -> None:
        """Set the progress to done_bytes."""
        self._progress.update(self._task, completed=done_bytes)


class Stage:
    """Shows nr_steps steps, in order."""

    def __init__(self, console: Console, nr_steps: int) -> None:
        self.console: Final = console
        self._nr_steps = nr_steps
        self._step_no = 0

    @contextlib.contextmanager
    def step(self, text: str, total_bytes: int = 0) -> Iterator[Step]:
        """Announce a step, show its bar while the block runs, then its outcome and duration."""
        self._step_no += 1
        number, *more = text.splitlines()
        self._print(f"[{self._step_no}/{self._nr_steps}] {number}")
        for line in more:
            self._print(_INDENT + line)
        started = time.monotonic()
        columns = (
            (BarColumn(), DownloadColumn(binary_units=True)) if total_bytes else (BarColumn(),)
        )
        with Progress(
            TextColumn("     "),
            *columns,
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            step = Step(progress, total_bytes)
            yield step
        self._print(f"{_INDENT}-> {step.outcome}, {time.monotonic() - started:.1f} s")

    def say(self, line: str = "") -> None:
        """Print a line between steps."""
        self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)
