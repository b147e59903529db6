# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces and a link between them that is slow, loses packets, and can be cut.

Uses veth and tc's netem where the kernel has netem; elsewhere two tun devices and a thread that
carries packets between them as netem would. The kernel's TCP is at both ends either way.
"""

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x0001 | 0x1000


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def can_make_links() -> bool:
    """Return whether this process may make network namespaces and a link between them."""
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        return False
    name = f"cs{os.getpid()}probe"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "del", name)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class FarLink:
    """near and far are namespaces; near_address and far_address, their ends of the link."""

    near_address, far_address = "10.213.7.1", "10.213.7.2"

    def __init__(self, delay_ms: float, loss_percent: float, rng: random.Random) -> None:
        tag = f"cs{os.getpid() % 100000}"
        self.near, self.far = f"{tag}n", f"{tag}f"
        self._delay, self._loss, self._rng = delay_ms / 1000, loss_percent / 100, rng
        self._stop, self._stopper = os.pipe()
        self._thread: threading.Thread | None = None
        self._fds: list[int] = []
        self._is_up = True
        for space in (self.near, self.far):
            _run("ip", "netns", "add", space)
        try:
            self._join(delay_ms, loss_percent)
        except BaseException:
            self.close()
            raise

    def inside(self, space: str) -> list[str]:
        """Return the prefix of a command line that runs it in a namespace."""
        return ["ip", "netns", "exec", space]

    def _join(self, delay_ms: float, loss_percent: float) -> None:
        ends = [(self.near, self.near_address), (self.far, self.far_address)]
        try:
            _run("ip", "link", "add", self.near, "type", "veth", "peer", "name", self.far)
            for space, _ in ends:
                terms = f"delay {delay_ms}ms loss {loss_percent}%".split()
                _run("tc", "qdisc", "add", "dev", space, "root", "netem", *terms)
        except subprocess.CalledProcessError:
            subprocess.run(["ip", "link", "del", self.near], capture_output=True, check=False)
            self._fds = [_tun(space) for space, _ in ends]
            self._thread = threading.Thread(target=self._carry, daemon=True)
            self._thread.start()
        for space, address in ends:
            _run("ip", "link", "set", space, "netns", space)
            ip = [*self.inside(space), "ip"]
            _run(*ip, "address", "add", f"{address}/30", "dev", space)
            _run(*ip, "link", "set", space, "up")
            _run(*ip, "link", "set", "lo", "up")

    def set_up(self, is_up: bool) -> None:
        """Cut or restore the link, without notice at either end."""
        self._is_up = is_up
        if self._thread is None:
            loss = "100%" if not is_up else f"{self._loss * 100}%"
            for space in (self.near, self.far):
                words = ["qdisc", "change", "dev", space, "root", "netem", "loss", loss]
                _run(*self.inside(space), "tc", *words, "delay", f"{self._delay * 1000}ms")

    def _carry(self) -> None:
        due: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            timeout = max(0.0, due[0][0] - time.monotonic()) if due else None
            ready = select.select([self._stop, *self._fds], [], [], timeout)[0]
            if self._stop in ready:
                return
            now = time.monotonic()
            for fd in ready:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        packet = os.read(fd, 65536)
                        if self._is_up and self._rng.random() >= self._loss:
                            other = self._fds[1 - self._fds.index(fd)]
                            number += 1
                            heapq.heappush(due, (now + self._delay, number, other, packet))
            while due and due[0][0] <= time.monotonic():
                _, _, fd, packet = heapq.heappop(due)
                with contextlib.suppress(OSError):
                    os.write(fd, packet)

    def close(self) -> None:
        os.write(self._stopper, b"x")
        if self._thread is not None:
            self._thread.join()
        for fd in [*self._fds, self._stop, self._stopper]:
            os.close(fd)
        for space in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    return fd


@contextlib.contextmanager
def far_link(delay_ms: float, loss_percent: float, rng: random.Random) -> Iterator[FarLink]:
    """Yield a link that lasts as long as the block."""
    link = FarLink(delay_ms, loss_percent, rng)
    try:
        yield link
    finally:
        link.close()
