# SPDX-License-Identifier: Apache-2.0
"""A disk in a guest, against a backend in another process. What the guests do is in guests.py."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

NOBODY = "65534"
Start = Callable[..., str]
Run = Callable[..., str]

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root: it runs a guest as nobody")


@pytest.mark.parametrize(
    "name",
    [
        "reads_and_writes",
        "reads_all_in_one_call",
        "bad_page_is_eio",
        "ranges_are_checked",
        "discard_reverts_to_the_image",
        "views_hold_the_disk",
        "child_is_refused",
        "no_thread_and_no_descriptor_is_left",
        "close_does_not_wait_for_a_dead_backend",
        "replies_are_understood",
        "waiting_read_never_gives_zeros",
    ],
)
def test_guest(name: str, start_backend: Start, run_guest: Run) -> None:
    assert run_guest(name, start_backend()) == "done\n"


def test_waiting_read_lets_others_run_and_ends_by_kill(
    start_backend: Start, run_guest: Run
) -> None:
    output = run_guest(
        "pages_come_in_while_a_thread_waits", start_backend(), status=-signal.SIGKILL
    )
    assert output == "waiting\n"


@needs_root
def test_nobody_works_through_the_lent_device(start_backend: Start, run_guest: Run) -> None:
    assert run_guest("works", start_backend(), NOBODY) == "done\n"


@needs_root
@pytest.mark.skipif(
    Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n"
    or os.stat("/dev/userfaultfd").st_mode & 0o6,
    reason="needs a machine that refuses userfaultfd to nobody",
)
def test_without_userfaultfd_nobody_is_told_the_cure(start_backend: Start, run_guest: Run) -> None:
    assert run_guest("is_told_the_cure", start_backend("no-device"), NOBODY) == "done\n"


def test_nobody_listening_is_one_clear_line(run_guest: Run, tmp_path: object) -> None:
    with pytest.raises(AssertionError, match=r"PeerError: cannot connect .* backend running"):
        run_guest("works", f"unix://{tmp_path}/none")
