# SPDX-License-Identifier: Apache-2.0
"""What others see of a program's mapping: /proc/PID/mem, as debuggers do, and process_vm_readv."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from attached import Attached, AttachedReader, StartReader

PAGE = 4096
# More than one touch brings along, less than the daemon may keep.
NR_PAGES = 100


def address_of_mapping(reader: AttachedReader) -> int:
    lines = Path(f"/proc/{reader.pid}/maps").read_text().splitlines()
    (line,) = [line for line in lines if "/memfd:cowshed-image" in line]
    return int(line.partition("-")[0], 16)


def peek(reader: AttachedReader, address: int) -> bytes:
    """Read a page as a debugger does."""
    fd = os.open(f"/proc/{reader.pid}/mem", os.O_RDONLY)
    try:
        return os.pread(fd, PAGE, address)
    finally:
        os.close(fd)


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_remotely(reader: AttachedReader, address: int) -> bytes:
    room = ctypes.create_string_buffer(PAGE)
    ours = Iovec(ctypes.addressof(room), PAGE)
    theirs = Iovec(address, PAGE)
    copied = ctypes.CDLL(None).process_vm_readv(
        reader.pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0
    )
    assert copied == PAGE
    return room.raw


def page_of(attached: Attached, no: int) -> bytes:
    return attached.copy.read_bytes()[no * PAGE : (no + 1) * PAGE]


def test_a_page_that_is_not_there_is_an_error_to_a_debugger_and_never_zeros(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader()
    reader.call("map", nr_pages=NR_PAGES)
    address = address_of_mapping(reader) + 50 * PAGE
    with pytest.raises(OSError, match="Input/output error"):
        peek(reader, address)
    # This waits for the backend, as the program itself would.
    assert read_remotely(reader, address) == page_of(attached, 50)
    assert peek(reader, address) == page_of(attached, 50)


def test_populate_has_all_of_a_mapping_present(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader("g", "--populate", "--quota", "8K")
    reader.call("map", nr_pages=NR_PAGES, writable=True)
    address = address_of_mapping(reader)
    for no in range(NR_PAGES):
        assert peek(reader, address + no * PAGE) == page_of(attached, no)
    assert attached.daemon.guest_status("g")["private_bytes"] == 0


def test_populate_of_more_than_the_capacity_is_a_hint(
    attached: Attached, start_reader: StartReader
) -> None:
    reader = start_reader("g", "--populate")
    reader.call("map")
    assert reader.call("check") == []
    assert attached.daemon.mismatches() == []
