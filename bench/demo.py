# SPDX-License-Identifier: Apache-2.0
"""`make demo`: many guests, one copy of an image, and not one wrong byte.

Makes an ext4 image of real files and serves it from less memory than it needs. Guest processes of
another user read all of it, write to it, and compare every byte: at first, after all have written,
and after everything was evicted under them. Then it prints the memory used.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
import time
from pathlib import Path
from typing import Any, Final

import click
from demo_command import fail, ignore_signals, one_line_failures, size_option, stop_on_signals
from demo_crowd import Backend, Crowd
from demo_folders import open_to_all, roomy, temporary_folder
from demo_image import MadeImage, make_image
from demo_report import Measured, pss_bytes, report, resident_frames_bytes
from demo_stage import Stage
from rich.console import Console

from cowshed.service.runtime.sizes import format_bytes
from cowshed.transport import connect

_WRITE_BYTES: Final = 8 << 20
_MIN_IMAGE_BYTES: Final = 8 << 20
_NOBODY: Final = 65534
_NR_STEPS: Final = 9


class Demo:
    """One run. Peaks are sampled twice a second, so they may be a little low."""

    def __init__(
        self, stage: Stage, nr_guests: int, size_bytes: int, capacity_bytes: int, seed: int
    ) -> None:
        self._stage = stage
        self._nr_guests = nr_guests
        self._size_bytes = size_bytes
        self._capacity_bytes = capacity_bytes
        self._seed = seed
        self._write_bytes = min(_WRITE_BYTES, size_bytes // 4)
        self._peak_resident_bytes = self._peak_saved_bytes = self._compared_bytes = 0
        self._answers: list[dict[str, Any]] = []
        self._problems: list[str] = []

    def run(self) -> tuple[Measured, list[str]]:
        """Run every step; return the figures, and the problems, a line each.

        Leaves no process and no file behind, however it ends. Raises DemoError or CowshedError.
        """
        with contextlib.ExitStack() as stack:
            try:
                measured = self._show(stack)
            finally:
                ignore_signals()
        self._stage.say()
        self._stage.console.print(report(measured))
        self._stage.say()
        return measured, self._problems

    def _show(self, stack: contextlib.ExitStack) -> Measured:
        """Run the steps; stack undoes their effects."""
        folder = stack.enter_context(temporary_folder(roomy(2 * self._size_bytes)))
        run_dir = stack.enter_context(temporary_folder(open_to_all()))
        run_dir.chmod(0o755)
        made = self._make_image(folder)
        image_fd = os.open(made.path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, image_fd)
        with self._stage.step(
            f"Start the backend, which may hold {format_bytes(self._capacity_bytes)} of it in "
            f"memory:\ncowshed serve --image demo={made.path.name} "
            f"--capacity {format_bytes(self._capacity_bytes)}"
        ) as step:
            self._backend = stack.enter_context(Backend(made.path, self._capacity_bytes, run_dir))
            self._backend.wait_ready()
            step.outcome = f"process {self._backend.pid}, as root"
        self._crowd = stack.enter_context(Crowd(self._backend, folder / "guests.log"))
        self._control = stack.enter_context(connect(self._backend.uri))
        self._start_guests(image_fd)
        self._check(
            "Each guest reads all of the image, in an order of its own, and compares\n"
            "every byte with the file's."
        )
        self._write()
        self._check(
            "Now that all have written, each compares everything again: its own bytes\n"
            "where it wrote, the file's everywhere else."
        )
        self._evict()
        self._check("And again: every page must come back as it was, private ones too.")
        measured = self._measure()
        self._crowd.order("end")
        self._crowd.gather()
        return measured

    def _make_image(self, folder: Path) -> MadeImage:
        with self._stage.step(
            f"Make an ext4 image of {format_bytes(self._size_bytes)} out of files from /usr.",
            self._size_bytes,
        ) as step:
            made = make_image(folder, self._size_bytes, step.reach)
            step.outcome = f"{made.nr_files} files, {format_bytes(made.content_bytes)} of content"
        return made

    def _start_guests(self, image_fd: int) -> None:
        user, uid = _nobody()
        with self._stage.step(
            f"Start {self._nr_guests} guests: processes of user {user}, which map the image."
        ) as step:
            terms = {
                "uri": self._backend.uri,
                "image": "demo",
                "uid": uid,
                "seed": self._seed,
                "write_bytes": self._write_bytes,
            }
            self._crowd.start(self._nr_guests, terms, image_fd)
            self._crowd.gather()
            step.outcome = "all attached"

    def _check(self, text: str) -> None:
        total_bytes = self._nr_guests * self._size_bytes
        with self._stage.step(text, total_bytes) as step:
            self._crowd.order("check")
            self._answers = self._crowd.gather(step.advance, self._look)
            self._look()
            self._compared_bytes += total_bytes
            step.outcome = (
                f"{format_bytes(total_bytes)} compared, wrong bytes so far: {self._wrong_bytes}"
            )

    def _write(self) -> None:
        with self._stage.step(
            f"Each guest writes {format_bytes(self._write_bytes)} of its own, partly where all "
            "others write too.\nThe pages it writes to become its private copies.",
            self._nr_guests * self._write_bytes,
        ) as step:
            self._crowd.order("write")
            self._crowd.gather(step.advance, self._look)
            nr_pages = sum(guest["private_bytes"] for guest in self._look()["guests"]) // 4096
            step.outcome = f"{nr_pages} pages copied"

    def _evict(self) -> None:
        with self._stage.step(
            "Evict all shared pages from under the guests: cowshed evict demo"
        ) as step:
            self._audit()
            reply = self._control.request("evict", image="demo")
            left_bytes = self._look()["resident_bytes"]
            step.outcome = (
                f"{format_bytes(reply['evicted_bytes'])} evicted, {format_bytes(left_bytes)} left"
            )
            if left_bytes:
                self._problems.append(
                    f"evict left {left_bytes} bytes resident ({reply['kept_why']})"
                )

    def _measure(self) -> Measured:
        with self._stage.step(
            "Compare the ledger with the kernel's page tables: cowshed audit"
        ) as step:
            audit = self._audit()
            status = self._look()
            step.outcome = f"{len(audit['mismatches'])} mismatches"
        if self._peak_resident_bytes > self._capacity_bytes:
            self._problems.append(
                f"{self._peak_resident_bytes} bytes were resident at one time, "
                f"and the capacity is {self._capacity_bytes}"
            )
        self._problems += wrong_answers(self._answers)
        return Measured(
            status=status,
            audit=audit,
            peak_resident_bytes=self._peak_resident_bytes,
            peak_saved_bytes=self._peak_saved_bytes,
            pss_bytes=pss_bytes(self._crowd.pids),
            frames_bytes=resident_frames_bytes(self._backend.pid, self._size_bytes),
            compared_bytes=self._compared_bytes,
            wrong_bytes=self._wrong_bytes,
        )

    @property
    def _wrong_bytes(self) -> int:
        return sum(answer["wrong_bytes"] for answer in self._answers)

    def _look(self) -> dict[str, Any]:
        """Request the status, and update the peaks."""
        status: dict[str, Any] = self._control.request("status")["status"]
        self._peak_resident_bytes = max(self._peak_resident_bytes, status["resident_bytes"])
        self._peak_saved_bytes = max(self._peak_saved_bytes, status["saved_bytes"])
        return status

    def _audit(self) -> dict[str, Any]:
        audit = self._control.request("audit")
        self._problems += [f"audit: {mismatch}" for mismatch in audit["mismatches"]]
        return audit


def wrong_answers(answers: list[dict[str, Any]]) -> list[str]:
    """Return a line for each guest that found wrong bytes."""
    return [
        f"guest {number} found {answer['wrong_bytes']} wrong bytes, the first at "
        f"{answer['first_wrong']}"
        for number, answer in enumerate(answers, 1)
        if answer["wrong_bytes"]
    ]


def _nobody() -> tuple[str, int]:
    """Return the name and uid of the guests' user, nobody."""
    try:
        return "nobody", pwd.getpwnam("nobody").pw_uid
    except KeyError:
        return str(_NOBODY), _NOBODY


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.option("--guests", type=click.IntRange(1, 200), default=16, show_default=True)
@click.option(
    "--size", callback=size_option, default="256M", show_default=True, help="Of the image."
)
@click.option(
    "--capacity",
    callback=size_option,
    default="96M",
    show_default=True,
    help="Memory for shared pages.",
)
@click.option("--seed", default=1, show_default=True, help="For orders, places and contents.")
def main(guests: int, size: int, capacity: int, seed: int) -> None:
    """Show many guests that share one copy of an image, write to it, and see no wrong byte."""
    console = Console(highlight=False)
    if os.geteuid() != 0:
        fail(
            "needs root: without it guests cannot be processes of another user than the backend's, "
            "so it could not show that users are kept apart; try: sudo make demo"
        )
    if size % 4096 or size < _MIN_IMAGE_BYTES:
        fail(
            f"--size of {size} bytes: give whole 4K pages, {format_bytes(_MIN_IMAGE_BYTES)} or more"
        )
    stop_on_signals()
    started = time.monotonic()
    stage = Stage(console, _NR_STEPS)
    stage.say(
        f"{guests} guests use one disk image of {format_bytes(size)} at the same time, in "
        f"{format_bytes(capacity)} of memory.\n"
        "The backend loads a page once, and maps it into every guest that touches it. It\n"
        "evicts pages when it needs room. A guest that writes to a page gets a copy.\n"
    )
    with one_line_failures():
        measured, problems = Demo(stage, guests, size, capacity, seed).run()
    for problem in problems:
        stage.say(f"WRONG: {problem}")
    wrong = f"wrong bytes: {measured.wrong_bytes}"
    verdict = "Something is wrong" if problems else "All is right"
    stage.say(f"{verdict}: {wrong}. It took {time.monotonic() - started:.0f} s; seed {seed}.")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
