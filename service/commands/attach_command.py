# SPDX-License-Identifier: Apache-2.0
"""The command line of `cowshed attach`; attach.py implements it."""

from pathlib import Path

import click

from cowshed.cache.errors import UsageError
from cowshed.service.commands.shell import WrongUsage, run_dir_option


@click.command(
    epilog="Example: cowshed attach debian --quota 64M -- sqlite3 -readonly {image} .tables"
)
@click.argument("image")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--guest", metavar="NAME", help="The guest's name [default: COMMAND-PID].")
@click.option(
    "--quota",
    metavar="SIZE",
    help="The limit of private bytes, for all its mappings and children together, or 'none' "
    "[default: the daemon's].",
)
@click.option(
    "--on-quota",
    type=click.Choice(["stop", "kill", "allow"]),
    help="At the quota: block the writer, end it by SIGBUS, or only count [default: the daemon's].",
)
@click.option(
    "--populate",
    is_flag=True,
    help="Populate a mapping before mmap returns, as MAP_POPULATE does: for debuggers.",
)
@click.option(
    "--read-only",
    is_flag=True,
    help="Refuse writable mappings, private ones too: then no quota bounds what the kernel may map "
    "by itself.",
)
@run_dir_option
def attach(
    image: str,
    command: tuple[str, ...],
    guest: str | None,
    quota: str | None,
    on_quota: str | None,
    populate: bool,
    read_only: bool,
    run_dir: Path,
) -> None:
    """Run COMMAND with IMAGE as a file that it maps from the cache.

    {image}, anywhere in COMMAND, becomes the path of IMAGE's source. read() reads the source;
    mmap shares the cache's pages, and a write to such a mapping makes a private copy of the
    page. COMMAND can be any dynamically linked program, QEMU for instance
    (memory-backend-file,share=off), and its children share its quota. Shared writable mappings
    and changes of the source are refused. The exit status is COMMAND's.
    """
    # Imported here because it loads the C core, which `--help` and usage errors do not need.
    from cowshed.service.commands.attach import AttachOrder, become

    try:
        order = AttachOrder.parse(
            image, command, run_dir, guest, quota, on_quota, populate, read_only
        )
    except UsageError as error:
        raise WrongUsage(str(error)) from error
    become(order)
