# SPDX-License-Identifier: Apache-2.0
"""The commands that move guests between backends: drain, export, import."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from cowshed.cache.errors import CowshedError, SourceError, UsageError
from cowshed.service.commands.handoff_files import (
    Pump,
    created,
    created_new,
    put_in_place,
    reopened,
)
from cowshed.service.commands.progress import progress_bar
from cowshed.service.commands.shell import WrongUsage, print_line, run_dir_option, same_version
from cowshed.service.operators.control_client import ControlClient
from cowshed.service.runtime.sizes import format_bytes

__all__ = ["add_commands"]

_SCHEMES = ("unix://", "tcp://", "tls://", "vsock://")


def add_commands(group: click.Group) -> None:
    """Add the commands to the group."""
    for command in (drain, export_command, import_command):
        group.add_command(command)


@click.command()
@click.option(
    "--to", "to", metavar="URI|FILE", help="unix://, tcp:// or tls:// of a backend, or a file."
)
@click.option("--dry-run", is_flag=True, help="Print what would move or block; move nothing.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.001), metavar="S", help="Roll back after S seconds."
)
@click.option(
    "--with-images",
    is_flag=True,
    help="Send the bytes of images that the target does not serve; the target needs --image-dir.",
)
@click.option(
    "--post-copy", is_flag=True, help="Resume guests at the target at once; their pages follow."
)
@click.option("--abort", is_flag=True, help="Roll back the drain in progress.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@run_dir_option
def drain(
    to: str | None,
    dry_run: bool,
    timeout: float | None,
    with_images: bool,
    post_copy: bool,
    abort: bool,
    as_json: bool,
    run_dir: Path,
) -> None:
    """Give every guest and working set to another backend.

    Guests run here until the last pages are sent, and are then redirected to the target. A
    failure before the target has everything leaves every guest as it was.

    With --post-copy guests resume at the target before it has their pages. The pages are sent
    meanwhile, those that a guest waits for first. This backend must live until all are sent.
    """
    if abort == bool(to) or (abort and (dry_run or timeout or with_images or post_copy)):
        raise WrongUsage("give --to URI|FILE to drain, or --abort alone to end a drain")
    with ExitStack() as stack:
        client = stack.enter_context(ControlClient(run_dir))
        if abort:
            reply = _last(client.stream("drain-abort"), as_json)["drain"]
            _print(reply, as_json, "aborted: every guest is as it was")
            return
        assert to is not None
        fields: dict[str, Any] = {"to": to, "dry_run": dry_run, "with_images": with_images}
        if post_copy:
            fields["post_copy"] = True
        if timeout is not None:
            fields["timeout_ms"] = max(1, int(timeout * 1000))
        fds = []
        if not to.startswith(_SCHEMES):
            if "://" in to:
                raise WrongUsage(f"--to {to!r}: use {', '.join(_SCHEMES)} or a file")
            if post_copy:
                raise WrongUsage(
                    f"--post-copy to the file {to!r}: a file cannot ask for pages later"
                )
            fields["to"] = f"file:{Path(to).absolute()}"
            opened = created(Path(os.devnull)) if dry_run else created_new(Path(to))
            fds.append(stack.enter_context(opened).fileno())
        reply = _last(client.stream("drain", fds=fds, **fields), as_json)["drain"]
    with same_version():
        if dry_run:
            _print_dry(reply, as_json)
            return
        line = (
            f"{reply['guests']} guests moved to {reply['to']}: {_sizes(reply)}, "
            f"frozen for {reply['frozen_seconds'] * 1000:.1f} ms"
        )
    _print(reply, as_json, line)


@click.command("export")
@click.argument("file", metavar="FILE|-")
@click.option("--with-images", is_flag=True, help="Write the bytes of images, too.")
@click.option("--resume", is_flag=True, help="Continue an interrupted export to FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@run_dir_option
def export_command(
    file: str, with_images: bool, resume: bool, as_json: bool, run_dir: Path
) -> None:
    """Write guests and working sets to FILE, or - for stdout.

    Guests keep running here. FILE is written as FILE.part and renamed when complete.
    """
    if resume and (with_images or file == "-"):
        raise WrongUsage(
            "--resume continues FILE.part with the images it was begun with: "
            "name the file, and omit --with-images"
        )
    fields = {"with_images": with_images, "resume": resume}
    with ExitStack() as stack:
        client = stack.enter_context(ControlClient(run_dir))
        if file == "-":
            reply = _through_pipe(client, "export", sys.stdout.fileno(), as_json, **fields)
        else:
            reply = _export(client, Path(file), fields, as_json)
    with same_version():
        kept = f", {format_bytes(reply['kept_bytes'])} of it from before" if resume else ""
        line = (
            f"{reply['guests']} guests exported: {_sizes(reply)}, "
            f"{format_bytes(reply['sent_bytes'])} in the file{kept}, "
            f"frozen for {reply['frozen_seconds'] * 1000:.1f} ms"
        )
    _print(reply, as_json, line, err=file == "-")


def _export(
    client: ControlClient, path: Path, fields: dict[str, bool], as_json: bool
) -> dict[str, Any]:
    part = path.with_name(f"{path.name}.part")
    if fields["resume"] and not part.exists():
        raise UsageError(
            f"no interrupted export to {str(path)!r}: there is no {part.name} beside it"
        )
    with reopened(part) if fields["resume"] else created(part) as out:
        try:
            reply = _last(client.stream("export", fds=[out.fileno()], **fields), as_json)
        except CowshedError as error:
            if os.fstat(out.fileno()).st_size == 0:
                part.unlink(missing_ok=True)
                raise
            if isinstance(error, UsageError):
                raise
            raise SourceError(
                f"{error}; 'cowshed export --resume {shlex.quote(str(path))}' continues {part.name}"
            ) from error
    put_in_place(part, path)
    return reply


def _through_pipe(
    client: ControlClient, op: str, fd: int, as_json: bool, **fields: bool
) -> dict[str, Any]:
    with Pump(fd, out=op == "export").running() as ours:
        return _last(client.stream(op, fds=[ours], **fields), as_json)


def _sizes(reply: dict[str, Any]) -> str:
    """Format what was sent."""
    image_bytes = reply["image_bytes"]
    private = f"{format_bytes(reply['done_bytes'] - image_bytes)} of private pages"
    return f"{private} and {format_bytes(image_bytes)} of images" if image_bytes else private


@click.command("import")
@click.argument("file", metavar="FILE|-")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@run_dir_option
def import_command(file: str, as_json: bool, run_dir: Path) -> None:
    """Take the guests of an exported FILE, or - for stdin."""
    with ExitStack() as stack:
        client = stack.enter_context(ControlClient(run_dir))
        if file == "-":
            reply = _through_pipe(client, "import", sys.stdin.fileno(), as_json)
        else:
            try:
                source = stack.enter_context(open(file, "rb"))
            except OSError as error:
                raise SourceError(f"cannot read {file!r}: {error.strerror}") from error
            reply = _last(client.stream("import", fds=[source.fileno()]), as_json)
    with same_version():
        private = f"{format_bytes(reply['private_bytes'])} of private pages"
        images = reply["image_bytes"]
        line = f"{len(reply['guests'])} guests imported: {private}" + (
            f" and {format_bytes(images)} of images" if images else ""
        )
    _print(reply, as_json, line)


def _last(replies: Iterator[dict[str, Any]], as_json: bool) -> dict[str, Any]:
    """Show progress on a terminal; return the last reply."""
    reply: dict[str, Any] = {}
    with progress_bar("connecting", is_wanted=not as_json, with_speed=True) as show_progress:
        for reply in replies:
            if progress := reply.get("progress"):
                waits_for = progress.get("waits_for")
                what = f"waiting for {waits_for}" if waits_for else "working"
                show_progress(what, progress["done_bytes"], progress["total_bytes"])
    return reply


def _print_dry(reply: dict[str, Any], as_json: bool) -> None:
    blockers = reply["blockers"]
    if as_json:
        click.echo(json.dumps(reply, indent=2))
    else:
        print_line(f"{reply['guests']} guests would move to {reply['to']}")
        for image in reply["images"]:
            print_line(f"the bytes of image {image} would be sent")
        for blocker in blockers:
            who = blocker.get("guest") or blocker.get("image") or "the target"
            print_line(f"blocked by {who}: {blocker['reason']}")
    if blockers:
        raise UsageError(f"the drain would not begin: {len(blockers)} blockers")


def _print(reply: dict[str, Any], as_json: bool, line: str, *, err: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(reply, indent=2), err=err)
    elif err:
        click.echo(line, err=True)
    else:
        print_line(line)
