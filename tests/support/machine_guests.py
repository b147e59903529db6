# SPDX-License-Identifier: Apache-2.0
"""Clients of an image's own socket, in processes of their own, for tests."""

from pathlib import Path
from typing import Any

from domains import Daemon, Guest, StartGuest

PAGE = 4096
MIB = 1 << 20


def socket_of(daemon: Daemon, name: str = "d") -> str:
    """Return the path of an image's own socket."""
    return str(daemon.run_dir / "images" / f"{name}.sock")


def new_machine(daemon: Daemon, start_guest: StartGuest, sizes: list[int], **how: Any) -> Guest:
    """Start a process with its memory mapped and nothing sent yet."""
    machine = start_guest(socket_of(daemon), script="machine_client.py")
    machine.call("map", sizes=sizes, **how)
    return machine


def restore(
    daemon: Daemon, start_guest: StartGuest, image: Path, sizes: list[int], **how: Any
) -> Guest:
    """Start a machine that has handed its memory over as Firecracker does."""
    machine = new_machine(daemon, start_guest, sizes, **how)
    machine.call("restore", image=str(image))
    return machine


def status_of(daemon: Daemon, machine: Guest) -> dict[str, Any]:
    """Return the status of a machine's first guest."""
    (guest,) = [one for one in daemon.status()["guests"] if one["pid"] == machine.pid]
    return dict(guest)
