# SPDX-License-Identifier: Apache-2.0
"""The start and end of a demo: sizes as options, signals, and failures in one line."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

import click
from demo_stage import DemoError

from cowshed.cache.errors import CowshedError, UsageError
from cowshed.service.runtime.sizes import parse_size

__all__ = ["fail", "ignore_signals", "one_line_failures", "size_option", "stop_on_signals"]

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def size_option(_ctx: click.Context, param: click.Parameter, text: str) -> int:
    """Read an option's size, such as 64M, for click."""
    try:
        return parse_size(text, f"--{param.name}")
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def stop_on_signals() -> None:
    """Turn stop signals into an exception from now on, so that the demo cleans up."""
    for number in _STOP_SIGNALS:
        signal.signal(number, _stop)


def ignore_signals() -> None:
    """Ignore stop signals, so that none disturbs the cleanup."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def one_line_failures() -> Iterator[None]:
    """Exit with one line on stderr if the block fails or is interrupted."""
    try:
        yield
    except (DemoError, CowshedError, OSError) as error:
        fail(error)
    except SystemExit as stop:
        if stop.code in {128 + number for number in _STOP_SIGNALS}:
            click.echo("demo: interrupted; what it made is removed", err=True)
        raise


def fail(why: object, status: int = 1) -> NoReturn:
    """Print the reason in one line on stderr and exit."""
    click.echo(f"demo: {why}", err=True)
    sys.exit(status)


def _stop(number: int, _frame: object) -> NoReturn:
    ignore_signals()
    raise SystemExit(128 + number)
