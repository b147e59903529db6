# SPDX-License-Identifier: Apache-2.0
"""What all commands share: exit status, one-line errors, common parameters.

Exit status: 0 for success only; 1 when something failed; 2 when the command line or configuration
is wrong; 3 when audit found mismatches; 130 after Ctrl-C. An error is one line on stderr that
starts with ``cowshed:``; results go to stdout. A result that could not be written is a failure.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

from cowshed.cache.errors import CowshedError, PeerError, UsageError
from cowshed.service.runtime.sizes import parse_size
from cowshed.service.runtime.stdio import flush_stdout, silence_stdout
from cowshed.service.runtime.text import one_line, printable
from cowshed.service.settings.options import RUN_DIR_DEFAULT
from cowshed.service.settings.quotas import parse_quota

if TYPE_CHECKING:
    from rich.console import RenderableType

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_MISMATCHES: Final = 3
EXIT_INTERRUPTED: Final = 130

Command = TypeVar("Command", bound=Callable[..., Any])


class WrongUsage(click.UsageError):
    """A wrong parameter, with a message that has the cure; click's own only name the parameter."""


class OneLineGroup(click.Group):
    """A group whose every failure is one line on stderr and an exit status."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run as click.Group does, and end the process, also after success."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal that knows ASCII only
        extra["standalone_mode"] = False
        extra.setdefault("prog_name", "cowshed")  # also as `python -m cowshed.service.cli`
        try:
            status = super().main(*args, **extra) or 0
            flush_stdout()
            sys.exit(status)
        except WrongUsage as error:
            fail(error.format_message(), EXIT_USAGE)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "cowshed"
            message = one_line(error.format_message()).rstrip(".")
            fail(f"{message[:1].lower()}{message[1:]}: see '{command} --help'", EXIT_USAGE)
        except click.Abort:  # what click makes of Ctrl-C
            sys.exit(EXIT_INTERRUPTED)
        except click.ClickException as error:
            fail(error.format_message())
        except CowshedError as error:
            fail(error)
        except ImportError as error:
            fail(f"a part of cowshed is missing ({error}): install it again")
        except OSError as error:
            silence_stdout()
            fail(f"cannot write the answer: {error.strerror or error}")


def fail(message: object, status: int = EXIT_FAILED) -> NoReturn:
    """Print `message` as one line on stderr and exit with `status`."""
    click.echo(f"cowshed: {one_line(message)}", err=True)
    sys.exit(status)


def run_dir_option(command: Command) -> Command:
    """Add --run-dir, by which every command finds the daemon."""
    return click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        envvar="COWSHED_RUN_DIR",
        default=RUN_DIR_DEFAULT,
        metavar="DIR",
        help=f"Where the daemon's socket is; also $COWSHED_RUN_DIR [default: {RUN_DIR_DEFAULT}].",
    )(command)


def extent_arguments(command: Command) -> Command:
    """Add IMAGE and an optional OFFSET LENGTH, passed as the fields of a request."""
    command = click.argument("extent", nargs=-1, metavar="[OFFSET LENGTH]", callback=_parse_extent)(
        command
    )
    return click.argument("image")(command)


def quota_argument(command: Command) -> Command:
    """Add SIZE, a quota in bytes or None for no limit."""
    return click.argument("quota_bytes", metavar="SIZE", callback=_parse_quota)(command)


def print_line(line: str) -> None:
    """Print one line of result, escaped: names in it may come from a guest."""
    click.echo(printable(line))


def show(view: "Callable[[], RenderableType]") -> None:
    """Print what `view` renders from an answer."""
    from rich.console import Console

    with same_version():
        renderable = view()
    Console(highlight=False).print(renderable)


@contextmanager
def same_version() -> Iterator[None]:
    """Raise PeerError for an answer that lacks a field: the daemon has another version."""
    try:
        yield
    except KeyError as error:
        raise PeerError(
            f"the daemon's answer has no {error}: it is of another version than this command: "
            "restart it"
        ) from error


def _parse_extent(
    _ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]
) -> dict[str, int | None]:
    """Return offset and length in bytes; both None for the whole image."""
    if not texts:
        return {"offset": None, "length": None}
    if len(texts) != 2:
        raise WrongUsage("give both OFFSET and LENGTH, or neither for the whole image")
    try:
        offset, length = (
            parse_size(text, what) for text, what in zip(texts, ("OFFSET", "LENGTH"), strict=True)
        )
    except UsageError as error:
        raise WrongUsage(str(error)) from error
    if length == 0:
        raise WrongUsage("LENGTH is 0: give at least 1")
    return {"offset": offset, "length": length}


def _parse_quota(_ctx: click.Context, _param: click.Parameter, text: str) -> int | None:
    try:
        return parse_quota(text)
    except UsageError as error:
        raise WrongUsage(str(error)) from error
