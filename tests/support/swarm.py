# SPDX-License-Identifier: Apache-2.0
"""Many guests, a process each, that all do one job at once; forked, so that they start quickly.

    swarm.py URI JOB NR_GUESTS SEED ARGUMENTS

JOB is a function below, called with the guest's number, its random numbers and the JSON object
ARGUMENTS. Each guest prints one line of JSON: {"no": its number, "ok": result} or {"no", "error"}.
Guests that wait do so until standard input ends.
"""

import contextlib
import json
import os
import random
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

from cowshed.cache._core import ffi, lib
from cowshed.transport import Backend, Disk, connect
from cowshed.transport.channels.exchange import ask_for_fds, close_all, greet
from cowshed.transport.guest.attach import attach

PAGE = 4096
uri = ""


def wait_for_end() -> None:
    os.read(0, 1)


def differing(disk: Disk, wanted: bytes, offset: int) -> int:
    found = disk.read(offset, len(wanted))
    return 0 if found == wanted else sum(a != b for a, b in zip(found, wanted, strict=True))


def hold(no: int, rng: random.Random, path: str) -> dict[str, int]:
    """Read all of the image, report the number of wrong bytes, and stay."""
    image = Path(path).read_bytes()
    with connect(uri) as backend, backend.open("d", guest=f"g{no}") as disk:
        steps = list(range(0, len(image), 1 << 18))
        rng.shuffle(steps)
        wrong = sum(differing(disk, image[at : at + (1 << 18)], at) for at in steps)
        say({"no": no, "ok": {"wrong": wrong}})
        wait_for_end()
    os._exit(0)


def read_randomly(
    no: int, rng: random.Random, path: str, nr_reads: int, name: str = "d"
) -> dict[str, int]:
    """Read the image of that name at random offsets; return the number of wrong bytes."""
    with open(path, "rb", buffering=0) as image, connect(uri) as backend:
        size = os.fstat(image.fileno()).st_size
        wrong = 0
        with backend.open(name, guest=f"{name}{no}") as disk:
            for _ in range(nr_reads):
                offset = rng.randrange(size)
                length = min(rng.choice((1, 100, PAGE, 20_000, 100_000)), size - offset)
                wrong += differing(disk, os.pread(image.fileno(), length, offset), offset)
    return {"wrong": wrong}


def churn(no: int, rng: random.Random, path: str, span_bytes: int = 1 << 62) -> dict[str, int]:
    """Read, write and discard without pause until standard input ends; return the errors.

    Uses the first span_bytes of the image only.
    """
    image = Path(path).read_bytes()[:span_bytes]
    mine = bytearray(image)
    wrong = steps = 0
    os.set_blocking(0, False)
    with connect(uri) as backend, backend.open("d", guest=f"g{no}") as disk:
        while True:
            with contextlib.suppress(BlockingIOError):
                if os.read(0, 1) == b"":
                    break
            offset = rng.randrange(len(image))
            length = min(rng.choice((1, PAGE, 3 * PAGE, 60_000)), len(image) - offset)
            kind = rng.randrange(10)
            if kind < 6:
                wrong += differing(disk, bytes(mine[offset : offset + length]), offset)
            elif kind < 9:
                mine[offset : offset + length] = data = rng.randbytes(length)
                disk.write(offset, data)
            else:
                start = offset // PAGE * PAGE
                end = min(len(image), start + (length + PAGE - 1) // PAGE * PAGE)
                disk.discard(start, end - start)
                mine[start:end] = image[start:end]
            steps += 1
    return {"wrong": wrong, "steps": steps}


# Ways to attach and to leave, for `rounds`.


def orderly(backend: Backend, rng: random.Random) -> None:
    with backend.open("d") as disk:
        disk.read(rng.randrange(disk.size_bytes - 9), 9)
        disk.write(rng.randrange(disk.size_bytes - 9), b"my own")


def abrupt(backend: Backend, rng: random.Random) -> None:
    connection = greet(uri)
    attached = attach(connection, {"image": "d", "guest": f"abrupt-{os.getpid()}"})
    connection.close()
    lib.region_deinit(attached.region)


def silent(backend: Backend, rng: random.Random) -> None:
    address = uri.removeprefix("unix://")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address)


def half_a_message(backend: Backend, rng: random.Random) -> None:
    address = uri.removeprefix("unix://")
    piece = (65536 - 24) * b" "
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(address)
        header = struct.pack("<IHHIHHII", 0x44485343, 1, 1, 1, 1, 0, len(piece) + 1, len(piece))
        with open("/dev/null") as file, contextlib.suppress(OSError):
            socket.send_fds(sock, [header + piece], [file.fileno()])


def only_hello(backend: Backend, rng: random.Random) -> None:
    greet(uri).close()


def only_open(backend: Backend, rng: random.Random) -> None:
    connection = greet(uri)
    request = {"image": "d", "guest": f"only-{os.getpid()}"}
    _, fds = ask_for_fds(connection, "open", request)
    close_all(fds)
    connection.close()


def gone_before_the_reply(backend: Backend, rng: random.Random) -> None:
    connection = greet(uri)
    request = {"image": "d", "guest": f"gone-{os.getpid()}"}
    reply, fds = ask_for_fds(connection, "open", request)
    region, stage = ffi.new("struct region *"), ffi.new("int *")
    features = reply["uffd_features"]
    assert lib.region_init(region, fds[0], reply["map_bytes"], fds[1], features, stage) == 0
    where = {"address": int(ffi.cast("uintptr_t", region.address)), "length": reply["map_bytes"]}
    own = (region.uffd, region.pagemap_fd, region.mem_fd)
    connection.send({"op": "region", **where}, own)
    connection.close()
    lib.region_deinit(region)
    close_all(fds)


def killed(backend: Backend, rng: random.Random) -> None:
    child = os.fork()
    if child == 0:
        with connect(uri) as own, own.open("d", guest=f"killed-{os.getpid()}") as disk:
            disk.write(rng.randrange(disk.size_bytes - 9), b"my own")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


WAYS = [orderly] * 6 + [abrupt] * 5 + [silent, half_a_message, only_hello, only_open]
WAYS += [gone_before_the_reply, killed]


def rounds(no: int, rng: random.Random, nr_rounds: int) -> int:
    """Attach and detach in every way there is."""
    with connect(uri) as backend:
        for _ in range(nr_rounds):
            rng.choice(WAYS)(backend, rng)
    return nr_rounds


def say(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def main() -> None:
    global uri
    uri, job, nr_guests, seed, arguments = sys.argv[1:]
    children = []
    for no in range(int(nr_guests)):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            call = globals()[job]
            say({"no": no, "ok": call(no, random.Random(f"{seed}:{no}"), **json.loads(arguments))})
        except BaseException:
            say({"no": no, "error": traceback.format_exc()})
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
