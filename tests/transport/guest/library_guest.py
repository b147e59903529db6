# SPDX-License-Identifier: Apache-2.0
"""A guest that uses the C library by ctypes, as other languages do: LIBRARY, then orders by line.

Each line is a JSON list of a function's name and its arguments; the answer is a line too: what it
returned and what cowshed_error() says.
"""

import ctypes
import json
import os
import sys


class Options(ctypes.Structure):
    """struct cowshed_options."""

    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest", ctypes.c_char_p),
        ("token", ctypes.c_char_p),
        ("on_quota", ctypes.c_char_p),
        ("quota_bytes", ctypes.c_int64),
        ("window_bytes", ctypes.c_int64),
        ("write_window_bytes", ctypes.c_int64),
    )


library = ctypes.CDLL(sys.argv[1])
library.cowshed_error.restype = ctypes.c_char_p
library.cowshed_guest.restype = ctypes.c_char_p
library.cowshed_digest.restype = ctypes.c_char_p
library.cowshed_size.restype = ctypes.c_uint64
library.cowshed_address.restype = ctypes.c_void_p
library.cowshed_read.restype = library.cowshed_write.restype = ctypes.c_int64
disk = ctypes.c_void_p()


def do_open(path: str, image: str, **fields: object) -> object:
    options = Options(ctypes.sizeof(Options), 0, None, None, None, -1, -1, -1)
    for name, value in fields.items():
        setattr(options, name, value.encode() if isinstance(value, str) else value)
    return library.cowshed_open(
        path.encode(), image.encode(), ctypes.byref(options), ctypes.byref(disk)
    )


def do_read(offset: int, length: int) -> object:
    room = ctypes.create_string_buffer(length + 1)
    nr = library.cowshed_read(disk, ctypes.c_uint64(offset), room, ctypes.c_uint64(length))
    return nr if nr < 0 else room.raw[:nr].hex()


def do_write(offset: int, given_hex: str) -> object:
    given = bytes.fromhex(given_hex)
    return library.cowshed_write(disk, ctypes.c_uint64(offset), given, ctypes.c_uint64(len(given)))


def do_discard(offset: int, length: int) -> object:
    return library.cowshed_discard(disk, ctypes.c_uint64(offset), ctypes.c_uint64(length))


def do_look(offset: int) -> object:
    """A byte of the mapping itself."""
    return ctypes.c_ubyte.from_address(library.cowshed_address(disk) + offset).value


def do_about() -> object:
    return [
        library.cowshed_size(disk),
        library.cowshed_guest(disk).decode(),
        library.cowshed_digest(disk).decode(),
        library.cowshed_is_alive(disk),
        library.cowshed_api(),
    ]


def do_fork() -> object:
    """A child forgets the disk, and has none of its memory; its exit status."""
    pid = os.fork()
    if pid == 0:
        nr_before = len(os.listdir("/proc/self/fd"))
        library.cowshed_forget(disk)
        os._exit(nr_before - len(os.listdir("/proc/self/fd")))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def do_close() -> object:
    return library.cowshed_close(disk)


for line in sys.stdin:
    name, arguments, fields = json.loads(line)
    returned = globals()[f"do_{name}"](*arguments, **fields)
    print(json.dumps([returned, library.cowshed_error().decode()]), flush=True)
