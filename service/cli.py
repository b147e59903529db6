# SPDX-License-Identifier: Apache-2.0
"""The command line: `cowshed serve`, and the commands that ask a running daemon.

Only commands that draw import rich, where they draw: the import takes longer than the rest of most
commands.
"""

import gc
import json
from pathlib import Path
from typing import Any, NoReturn

import click

from cowshed.cache.errors import CowshedError, UsageError
from cowshed.service.commands.attach_command import attach
from cowshed.service.commands.completion import completion
from cowshed.service.commands.handoff import add_commands
from cowshed.service.commands.progress import progress_bar
from cowshed.service.commands.setting_options import setting_options
from cowshed.service.commands.shell import (
    EXIT_MISMATCHES,
    OneLineGroup,
    WrongUsage,
    extent_arguments,
    print_line,
    quota_argument,
    run_dir_option,
    same_version,
    show,
)
from cowshed.service.operators.control_client import ControlClient
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.runtime.stdio import occupy_stdio
from cowshed.service.runtime.version import VERSION
from cowshed.service.settings.config import config_load


@click.group(
    name="cowshed",
    cls=OneLineGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(VERSION)
def cli() -> None:
    """Keep one copy of read-only images in memory for every guest on this host.

    `cowshed serve` is the daemon; the other commands ask it. Sizes are bytes or 64K, 64M, 2G.
    """


@cli.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file of settings; options override it.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="NAME=SOURCE[,domain=D][,trim=T][,extent=E]",
    help="Serve SOURCE, a path or file: URL, as NAME, with separate frames for each domain; "
    "trim=zeros or image as --trim, extent=2M as --extent. Repeatable.",
)
@setting_options
@click.option(
    "--no-keeper", is_flag=True, help="Do not restart a dead backend (systemd still will)."
)
@click.option("--check", is_flag=True, help="Check the configuration and exit.")
@click.option(
    "--takeover",
    is_flag=True,
    help="Replace the run-dir's running daemon; its guests notice nothing.",
)
@click.option("--keeper-of", type=int, hidden=True)
@click.option("--verbose", is_flag=True, help="Also log guests coming and going.")
def serve(
    config_file: Path | None,
    images: tuple[str, ...],
    no_keeper: bool,
    check: bool,
    takeover: bool,
    keeper_of: int | None,
    verbose: bool,
    **given: Any,
) -> int:
    """Run the daemon in the foreground, serving images to guests.

    The TOML file of --config has a key for each of these options, and more settings:
    docs/configuration.md lists them all.
    """
    try:
        config = config_load(
            config_file=config_file,
            images=images,
            no_keeper=no_keeper,
            verbose=verbose,
            **given,
        )
    except UsageError as error:
        raise WrongUsage(str(error)) from error
    if check:
        from cowshed.service.supervise.layouts import ALL_LAYOUTS, LAYOUTS
        from cowshed.service.supervise.reload_check import answer_check

        answer_check(LAYOUTS, ALL_LAYOUTS, config.text)
        print_line("the configuration is right")
        return 0
    # Imported here because this is all of the daemon, which the other commands do not need.
    from cowshed.service.commands.keeping import run_keeper_of, run_kept, run_taking_over
    from cowshed.service.daemon import import_for, run

    import_for(config)
    try:
        if keeper_of is not None:
            return run_keeper_of(config, keeper_of)
        if takeover:
            return run_taking_over(config)
        return run_kept(config) if config.keeper else run(config)
    except OSError as error:
        raise CowshedError(f"cannot serve at {config.run_dir}: {error}") from error


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@run_dir_option
def status(as_json: bool, run_dir: Path) -> None:
    """Show images, their resident memory, and guests."""
    with ControlClient(run_dir) as client, same_version():
        answer = client.request("status")["status"]
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        from cowshed.service.reports.render import status_view

        show(lambda: status_view(answer))


@cli.command()
@click.option("--once", is_flag=True, help="Print one frame and exit.")
@run_dir_option
def top(once: bool, run_dir: Path) -> None:
    """Watch the daemon, refreshed every second; q quits, ? helps.

    For a pipe, --once prints all guests, with the rates of one second.
    """
    from rich.console import Console

    from cowshed.service.top.command import one_frame, watch

    console = Console(highlight=False)
    if not once and not console.is_terminal:
        raise WrongUsage("top needs a terminal: use 'cowshed top --once' or 'cowshed status'")
    with ControlClient(run_dir) as client, same_version():

        def take_status() -> dict[str, Any]:
            return dict(client.request("status")["status"])

        if once:
            console.print(one_frame(take_status, console))
        else:
            watch(take_status, console)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@run_dir_option
def audit(as_json: bool, run_dir: Path) -> int:
    """List where the ledger differs from the kernel's page tables.

    Exit status 3 if there is any difference.
    """
    with ControlClient(run_dir) as client:
        reply = client.request("audit")
    with same_version():
        answer = {key: reply[key] for key in ("mismatches", "checked")}
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        from cowshed.service.reports.render import audit_view

        show(lambda: audit_view(answer))
    return EXIT_MISMATCHES if answer["mismatches"] else 0


@cli.command()
@extent_arguments
@run_dir_option
def pin(image: str, extent: dict[str, int | None], run_dir: Path) -> None:
    """Forbid eviction of IMAGE, or LENGTH bytes of it from OFFSET."""
    with ControlClient(run_dir) as client:
        reply = client.request("pin", image=image, **extent)
    with same_version():
        print_line(f"{image}: {format_bytes(reply['pinned_bytes'])} pinned")


@cli.command()
@extent_arguments
@run_dir_option
def unpin(image: str, extent: dict[str, int | None], run_dir: Path) -> None:
    """Take back a pin of the same extents."""
    with ControlClient(run_dir) as client:
        reply = client.request("unpin", image=image, **extent)
    with same_version():
        print_line(f"{image}: {format_bytes(reply['pinned_bytes'])} still pinned")


@cli.command()
@extent_arguments
@click.option("--abort", is_flag=True, help="Abort all warming of IMAGE: autowarm and warm.")
@run_dir_option
def warm(image: str, extent: dict[str, int | None], abort: bool, run_dir: Path) -> None:
    """Load IMAGE, or LENGTH bytes of it from OFFSET, in advance."""
    if abort:
        _abort_warming(image, extent, run_dir)
        return
    with ControlClient(run_dir) as client, same_version(), progress_bar("warming") as show_progress:
        reply: dict[str, Any] = {}
        for reply in client.stream("warm", fds=(), image=image, **extent):
            if progress := reply.get("progress"):
                show_progress("warming", progress["done_bytes"], progress["total_bytes"])
    with same_version():
        loaded, already = format_bytes(reply["loaded_bytes"]), format_bytes(reply["already_bytes"])
        line = f"{image}: {loaded} loaded, {already} already resident"
        if reply["left_out_bytes"]:
            line += (
                f", {format_bytes(reply['left_out_bytes'])} left out: more than the capacity holds"
            )
    print_line(line)


def _abort_warming(image: str, extent: dict[str, int | None], run_dir: Path) -> None:
    if any(given is not None for given in extent.values()):
        raise click.UsageError("--abort is for a whole image: give no OFFSET and LENGTH")
    with ControlClient(run_dir) as client:
        reply = client.request("warm-abort", image=image)
    with same_version():
        done, total = format_bytes(reply["done_bytes"]), format_bytes(reply["total_bytes"])
        line = f"{image}: warming aborted, with {done} of {total} done"
    print_line(line)


@cli.command()
@extent_arguments
@run_dir_option
def evict(image: str, extent: dict[str, int | None], run_dir: Path) -> None:
    """Evict IMAGE, or LENGTH bytes of it from OFFSET.

    Guests never notice. Pinned or busy extents are kept, which is not a failure.
    """
    with ControlClient(run_dir) as client:
        reply = client.request("evict", image=image, **extent)
    with same_version():
        line = f"{image}: {format_bytes(reply['evicted_bytes'])} evicted"
        if reply["kept_bytes"]:
            line += f", {format_bytes(reply['kept_bytes'])} kept ({reply['kept_why']})"
    print_line(line)


@cli.command()
@click.argument("guest")
@quota_argument
@run_dir_option
def quota(guest: str, quota_bytes: int | None, run_dir: Path) -> None:
    """Limit GUEST to SIZE private bytes, or 'none' for no limit.

    A guest that is stopped at its quota resumes if the new quota has room.
    """
    with ControlClient(run_dir) as client:
        reply = client.request("quota", guest=guest, quota_bytes=quota_bytes)
    with same_version():
        granted_bytes = reply["quota_bytes"]
    limit = "no quota" if granted_bytes is None else f"quota {format_bytes(granted_bytes)}"
    print_line(f"{guest}: {limit}")


@cli.command()
@click.argument("overlay", metavar="IMAGE@GUEST")
@run_dir_option
def discard(overlay: str, run_dir: Path) -> None:
    """Discard the overlay of a guest without mappings.

    It must have no clients. The next client of IMAGE@GUEST begins with the unchanged image.
    """
    with ControlClient(run_dir) as client:
        reply = client.request("discard", overlay=overlay)
    with same_version():
        print_line(f"{overlay}: {format_bytes(reply['private_bytes'])} discarded")


cli.add_command(attach)
cli.add_command(completion)


add_commands(cli)


def main() -> NoReturn:
    """Run the command line of this process."""
    occupy_stdio()
    # Exempt the imported modules, which live until the end, from all garbage collections.
    gc.freeze()
    cli.main()
    raise AssertionError("cli.main() ends the process")


if __name__ == "__main__":
    main()
