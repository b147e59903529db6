# SPDX-License-Identifier: Apache-2.0
"""What is held for a successor, and how it reads what it was left."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowshed.cache import InvariantError, UsageError
from cowshed.service.persist.fd_store import (
    FdStore,
    kind_of,
    listen_environment,
    take_inherited,
)
from cowshed.service.persist.inherited import InheritedFds, record_make, record_read
from cowshed.service.persist.notice import Notice


def heard(supervisor: socket.socket) -> tuple[dict[str, str], int]:
    """One datagram: its fields, and how many descriptors came with it."""
    datagram, fds, _, _ = socket.recv_fds(supervisor, 4096, 16)
    for fd in fds:
        os.close(fd)
    return dict(Notice.parse(datagram).fields), len(fds)


@pytest.fixture(params=["abstract", "path"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    path = str(tmp_path / "notify")
    sock.bind("\0" + path if request.param == "abstract" else path)
    sock.setblocking(False)
    with sock:
        yield sock


def address_of(supervisor: socket.socket) -> str:
    name = supervisor.getsockname()
    return "@" + name[1:].decode() if isinstance(name, bytes) else str(name)


def test_a_group_is_sent_once_and_released_by_its_name(supervisor: socket.socket) -> None:
    reader, writer = os.pipe()
    store = FdStore(address_of(supervisor))
    assert store.kept
    store.keep("guest/7", [reader, writer])
    assert heard(supervisor) == ({"FDSTORE": "1", "FDNAME": "guest/7", "FDPOLL": "0"}, 2)
    store.keep("guest/7", [reader, writer])
    store.release("guest/7")
    assert heard(supervisor) == ({"FDSTOREREMOVE": "1", "FDNAME": "guest/7"}, 0)
    store.release("guest/7")
    store.notify(READY="1")
    assert heard(supervisor) == ({"READY": "1"}, 0)
    store.close()
    os.close(reader)
    os.close(writer)


def test_what_was_held_for_the_predecessor_is_not_sent_again(supervisor: socket.socket) -> None:
    reader, writer = os.pipe()
    store = FdStore(address_of(supervisor), {"a": [reader]})
    store.keep("a", [writer])
    with pytest.raises(BlockingIOError):
        supervisor.recv(1)
    assert store.groups == {"a": [writer]}
    store.close()
    os.close(reader)
    os.close(writer)


def test_another_supervisor_is_told_everything(supervisor: socket.socket) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    store = FdStore(None)
    assert not store.kept
    store.keep("a", fds[:1])
    store.keep("b", fds[1:])
    store.move(address_of(supervisor))
    assert store.nr_not_held == 2
    assert store.reconcile()
    assert store.nr_not_held == 0
    told = {fields["FDNAME"]: nr for fields, nr in (heard(supervisor), heard(supervisor))}
    assert told == {"a": 1, "b": 2}
    store.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("address", ["relative", "", "vsock:2:1"])
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    with pytest.raises(UsageError, match="NOTIFY_SOCKET"):
        FdStore(address)


def test_descriptors_are_taken_from_the_environment_once() -> None:
    groups = {"a": [10, 11], "b": [12]}
    variables, fds = listen_environment(groups, os.getpid())
    assert fds == [10, 11, 12]
    assert variables["LISTEN_FDS"] == "3"
    assert variables["LISTEN_FDNAMES"] == "a:a:b"
    assert listen_environment({}, 1) == ({}, [])
    variables["LISTEN_PID"] = "1"
    assert take_inherited(variables) == {}  # they are for somebody else
    assert variables == {}


@pytest.mark.parametrize(
    ("nr", "names"), [("x", "a"), ("2", "a"), ("1", ""), ("1", "a:b"), ("-1", "a")]
)
def test_an_environment_that_makes_no_sense_is_one_line(nr: str, names: str) -> None:
    said = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": nr, "LISTEN_FDNAMES": names}
    with pytest.raises(UsageError, match="one name for each"):
        take_inherited(said)


def test_a_datagram_that_makes_no_sense_says_nothing() -> None:
    assert Notice.parse(b"\xff\xfe\nno equals\nA=1\nA=2\nB=x=y").fields == {"A": "2", "B": "x=y"}


def test_each_kind_of_descriptor_is_known_by_itself() -> None:
    image = os.memfd_create("cowshed-image")
    read_only = os.open(f"/proc/self/fd/{image}", os.O_RDONLY)
    record = record_make({"a": 1})
    ours, theirs = socket.socketpair()
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDONLY)
    alien = os.memfd_create("alien")
    fds = [image, read_only, record, ours.fileno(), pagemap, null, alien]
    assert [kind_of(fd) for fd in fds] == [
        *("image", "guest", "record", "socket", "pagemap", "file", "")
    ]
    assert kind_of(9999) == ""
    assert record_read(record) == {"a": 1}
    with pytest.raises(InvariantError):
        record_read(image)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("raw", "a.pages", "mem"):
            path = f"{folder}/{name}"
            direct = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_DIRECT)
            assert kind_of(direct) == "direct"
            os.close(direct)
    for fd in (image, read_only, record, pagemap, null, alien):
        os.close(fd)
    ours.close()
    theirs.close()


def test_inherited_groups_are_taken_once_and_what_is_not_ours_is_closed() -> None:
    record, twin = record_make({}), record_make({})
    null, kept = os.memfd_create("alien"), record_make({})
    inherited = InheritedFds(
        {"a": [record], "twins": [twin, os.dup(twin)], "null": [null], "b": [kept]}
    )
    assert sorted(inherited) == ["a", "b"]
    assert inherited.take("a") == {"record": record}
    assert inherited.take("a") is None
    inherited.close()
    for closed in (twin, null, kept):
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(closed)
    os.close(record)
