# SPDX-License-Identifier: Apache-2.0
"""Writes the man pages from the commands' own help and the table of settings.

.venv/bin/python tools/man.py FOLDER      cowshed.1, cowshed-COMMAND.1 of each, cowshed.toml.5
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cowshed.service.cli import cli
from cowshed.service.runtime.version import VERSION
from cowshed.service.settings.options import OPTIONS

EXIT_STATUS = (
    ("0", "Success."),
    ("1", "The command failed; one line on stderr names the failure and the cure."),
    ("2", "Wrong usage."),
    ("3", "cowshed audit found mismatches."),
    ("130", "Interrupted."),
)
ENVIRONMENT = (("COWSHED_RUN_DIR", "The directory of the daemon's sockets, like --run-dir."),)


def escaped(text: str) -> str:
    """Return text escaped so that roff shows it literally."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in plain.split("\n"))


def header(name: str, section: int, about: str) -> Iterator[str]:
    """Yield the first lines of a page."""
    yield f'.TH "{name.upper()}" "{section}" "" "cowshed {VERSION}" "cowshed"'
    yield ".SH NAME"
    yield f"{escaped(name)} \\- {escaped(about.rstrip('.'))}"


def entries(pairs: Iterator[tuple[str, str]] | tuple[tuple[str, str], ...]) -> Iterator[str]:
    """Yield the lines of a list of terms, each with its text."""
    for term, text in pairs:
        yield ".TP"
        yield f"\\fB{escaped(term)}\\fR"
        yield escaped(" ".join(text.split()))


def paragraphs(text: str) -> Iterator[str]:
    """Yield the lines of a help text's paragraphs."""
    for part in text.split("\n\n"):
        yield ".PP"
        yield escaped(" ".join(part.split()))


def command_page(name: str, command: click.Command) -> str:
    """Return the page of one command."""
    ctx = click.Context(command, info_name=name.replace("cowshed-", "cowshed "))
    first, _, rest = (command.help or "").partition("\n\n")
    lines = [*header(name, 1, first.split(". ")[0]), ".SH SYNOPSIS"]
    pieces = " ".join(command.collect_usage_pieces(ctx))
    lines.append(f"\\fB{escaped(ctx.command_path)}\\fR {escaped(pieces)}")
    lines += [".SH DESCRIPTION", *paragraphs(f"{first}\n\n{rest}".strip())]
    if command.epilog:
        lines += paragraphs(command.epilog)
    if isinstance(command, click.Group):
        lines += [".SH COMMANDS"]
        found = ((f"cowshed {key}", command.commands[key]) for key in command.list_commands(ctx))
        lines += entries(tuple((key, each.get_short_help_str(200)) for key, each in found))
        lines += [".SH ENVIRONMENT", *entries(ENVIRONMENT)]
    records = [each.get_help_record(ctx) for each in command.get_params(ctx)]
    if shown := tuple(record for record in records if record):
        lines += [".SH OPTIONS", *entries(shown)]
    lines += [".SH EXIT STATUS", *entries(EXIT_STATUS), ".SH SEE ALSO"]
    others = ["cowshed(1)", "cowshed.toml(5)"]
    lines.append(escaped(", ".join(each for each in others if each != f"{name}(1)")))
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page of the configuration file."""
    lines = [*header("cowshed.toml", 5, "the configuration of cowshed serve"), ".SH DESCRIPTION"]
    lines += paragraphs(
        "A TOML file, given by cowshed serve --config FILE. Each key is optional, and an unknown "
        "one is an error. An option of the command line wins over the file.\n\n"
        "Sizes are bytes, or a number with K, M, G or T. Relative paths start at the file's "
        'directory. Besides the settings below, [images] has a line NAME = "SOURCE" for each '
        "image, [[image]] has name, source, domain, trim, extent, uids, gids and clients, "
        "[domains.NAME] has uids, gids and clients, and [tls] has cert, key, ca and clients."
    )
    lines.append(".SH SETTINGS")
    for option in OPTIONS:
        about = f"{option.about} {option.more}".strip()
        bounds = f", {option.bounds[0]} to {option.bounds[1]}" if option.bounds else ""
        told = f"{about} Value: {option.kind}{bounds}. Default: {option.default}."
        told += f" Option: {option.flag}." if option.flag else ""
        lines += entries(((option.key, told),))
    lines += [".SH EXAMPLE", ".nf"]
    lines += [escaped('capacity = "2G"'), "", "[images]", escaped('debian = "/srv/debian.raw"')]
    lines += [".fi", ".SH SEE ALSO", escaped("cowshed-serve(1)")]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return every page by its file name."""
    made = {"cowshed.1": command_page("cowshed", cli), "cowshed.toml.5": settings_page()}
    for name, command in cli.commands.items():
        made[f"cowshed-{name}.1"] = command_page(f"cowshed-{name}", command)
    return made


def main() -> int:
    """Write all pages into a folder."""
    if len(sys.argv) != 2:
        print("usage: man.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
