# SPDX-License-Identifier: Apache-2.0
"""Machines restored as Firecracker does it: memory that is theirs, populated page by page."""

import os
import signal
from pathlib import Path

import pytest
from domains import NOBODY, Daemon, MakeImage, StartDaemon, StartGuest, until
from machine_guests import MIB, PAGE, new_machine, restore, socket_of, status_of
from siege import still_serves

SIZE = 8 * MIB
SIZES = [3 * MIB, 5 * MIB]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.access("/dev/userfaultfd", os.R_OK | os.W_OK),
        reason="needs /dev/userfaultfd: a machine's memory is touched by the kernel, too",
    ),
]


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture(params=["", ",extent=2M"])
def small(image: Path, start_daemon: StartDaemon, request: pytest.FixtureRequest) -> Daemon:
    """Holds half of the image."""
    return start_daemon("--image", f"d={image}{request.param}", "--capacity", "4M")


def test_memory_reads_as_its_snapshot_from_many_threads(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, SIZES)
    assert machine.call("compare", nr_threads=6, seed=1) == []
    status = status_of(small, machine)
    assert status["transport"] == "firecracker"
    assert status["name"] == f"fc-{machine.pid}"
    assert status["state"] == "running"
    assert status["private_bytes"] == SIZE
    assert status["granted_bytes"] == 0
    assert small.mismatches() == []
    assert small.status()["resident_bytes"] <= 4 * MIB


def test_two_machines_share_loads_and_no_byte(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}", "--capacity", "16M")
    first = restore(daemon, start_guest, image, SIZES)
    first.call("compare")
    loads = daemon.status()["loads"]
    second = restore(daemon, start_guest, image, [SIZE])
    first.call("fill", page=5, nr_pages=600, byte=9)
    assert second.call("compare", nr_threads=3) == []
    assert first.call("compare") == []
    assert daemon.status()["loads"] == loads
    assert daemon.mismatches() == []


def test_a_balloon_leaves_zeros_and_gives_the_charge_back(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, SIZES)
    machine.call("fill", page=0, nr_pages=64, byte=3)
    machine.call("compare")
    machine.call("balloon", page=16, nr_pages=700)
    until(lambda: status_of(small, machine)["private_bytes"] == SIZE - 700 * PAGE)
    machine.call("balloon", page=768, nr_pages=100)
    assert machine.call("compare", nr_threads=4, seed=7) == []
    until(lambda: status_of(small, machine)["private_bytes"] == SIZE)
    assert small.mismatches() == []


def test_pages_ballooned_before_they_were_ever_read_are_zeros(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, [SIZE])
    machine.call("balloon", page=100, nr_pages=900)
    assert machine.call("compare", nr_threads=4, seed=3) == []
    assert small.mismatches() == []


def test_balloons_race_with_faults_and_evictions(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machines = [restore(small, start_guest, image, SIZES) for _ in range(2)]
    for no, machine in enumerate(machines):
        machine.start("churn", rounds=400, seed=no, nr_pages=500)
    while not all(machine.answered(0.02) for machine in machines):
        small.request("evict", image="d")
    assert [machine.finish() for machine in machines] == [[], []]
    assert [machine.call("compare", nr_threads=2) for machine in machines] == [[], []]
    assert small.mismatches() == []


def test_a_killed_machine_leaves_nothing(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    fds = small.nr_fds_now()
    machine = restore(small, start_guest, image, SIZES)
    machine.call("begin_compare", nr_threads=3)
    until(lambda: status_of(small, machine)["private_bytes"] > 0)
    os.kill(machine.pid, signal.SIGKILL)
    until(lambda: small.status()["guests"] == [])
    until(lambda: small.nr_fds_now() <= fds)
    assert small.mismatches() == []


def test_closing_the_connection_ends_the_guest_and_the_process_lives(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, [SIZE])
    machine.call("compare")
    machine.call("close")
    until(lambda: small.status()["guests"] == [])
    assert machine.call("compare") == []


def test_at_the_quota_a_machine_waits_and_goes_on_when_it_is_raised(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest, tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('quota = "2M"\n')
    daemon = start_daemon("--config", str(config), "--image", f"d={image}")
    machine = restore(daemon, start_guest, image, SIZES)
    machine.call("begin_compare", nr_threads=3)
    until(lambda: status_of(daemon, machine)["state"] == "stopped-quota")
    assert status_of(daemon, machine)["private_bytes"] == 2 * MIB
    assert machine.call("is_busy")
    assert daemon.mismatches() == []
    daemon.request("quota", guest=f"fc-{machine.pid}", quota_bytes=2 * SIZE)
    assert machine.call("end_compare") == []
    assert status_of(daemon, machine)["state"] == "running"
    daemon.wait_logged("event=quota-stop")
    assert daemon.mismatches() == []


def test_ballooning_makes_room_at_the_quota(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest, tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('quota = "2M"\n')
    daemon = start_daemon("--config", str(config), "--image", f"d={image}")
    machine = restore(daemon, start_guest, image, [SIZE])
    machine.call("fill", page=0, nr_pages=512, byte=1)
    machine.call("begin_touch", pages=[1000])
    until(lambda: status_of(daemon, machine)["state"] == "stopped-quota")
    machine.call("balloon", page=0, nr_pages=256)
    assert machine.call("end_compare") == []
    assert daemon.mismatches() == []


def test_a_second_machine_starts_with_what_the_first_touched(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    """Its memory is there before it asks: what was recorded is copied in the thread's idle time."""
    daemon = start_daemon("--image", f"d={image}")
    first = restore(daemon, start_guest, image, [SIZE])
    for page in (7, 900, 1700, 333):
        first.call("read", page=page)
    second = restore(daemon, start_guest, image, [SIZE])
    until(lambda: status_of(daemon, second)["private_bytes"] == 4 * 16 * PAGE)
    assert status_of(daemon, second)["faults"]["missing"] == 0
    for page in (7, 900, 1700, 333):
        second.call("read", page=page)
    assert status_of(daemon, second)["faults"]["missing"] == 0
    assert second.call("compare") == []


def test_a_machine_without_remove_events_is_served(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, [SIZE], features=0)
    assert machine.call("compare", nr_threads=2) == []
    assert small.mismatches() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the machine runs as another user")
def test_an_unprivileged_machine_is_served_by_a_privileged_daemon(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = new_machine(small, start_guest, [SIZE])
    machine.call("become", uid=NOBODY)
    machine.call("restore", image=str(image))
    assert machine.call("compare", nr_threads=2) == []
    assert status_of(small, machine)["uid"] == NOBODY
    assert small.mismatches() == []


def test_failing_sources_kill_who_touches_and_nobody_else(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}")
    machine = restore(daemon, start_guest, image, [SIZE])
    with image.open("r+b") as file:
        file.truncate(SIZE // 2)
    assert machine.call("compare", nr_pages=0)  # EFAULT there, which is SIGBUS for plain loads
    assert status_of(daemon, machine)["poisoned_pages"] > 0
    assert daemon.pid == daemon.status()["pid"]


GARBAGE = [
    ("garbage", "GET / HTTP/1.1\r\n\r\n", 0),
    ("no regions", "[]", 1),
    ("no descriptor", '[{"base_host_virt_addr":%d,"size":%d,"offset":0,"page_size":4096}]', 0),
    ("20 descriptors", '[{"base_host_virt_addr":%d,"size":%d,"offset":0,"page_size":4096}]', 20),
    ("60 descriptors", '[{"base_host_virt_addr":%d,"size":%d,"offset":0,"page_size":4096}]', 60),
    ("past the image", '[{"base_host_virt_addr":%d,"size":%d,"offset":8388608}]', 1),
    ("a page past", '[{"base_host_virt_addr":%d,"size":%d,"offset":4096,"page_size":4096}]', 1),
    ("too large", '[{"base_host_virt_addr":%d,"size":%d00000,"offset":0}]', 1),
    ("no number", '[{"base_host_virt_addr":"%d","size":%d,"offset":0}]', 1),
    ("deep", "[" * 4000, 1),
    ("endless", '["' + "x" * 100_000, 0),
]


@pytest.mark.parametrize(
    ("text", "nr_fds"), [case[1:] for case in GARBAGE], ids=[c[0] for c in GARBAGE]
)
def test_a_bad_handshake_costs_its_sender_alone(
    small: Daemon, image: Path, start_guest: StartGuest, text: str, nr_fds: int
) -> None:
    good = restore(small, start_guest, image, [SIZE])
    until(lambda: len(small.status()["guests"]) == 1)
    fds = small.nr_fds_now()
    bad = start_guest(socket_of(small), script="machine_client.py")
    (address,) = bad.call("map", sizes=[SIZE])
    bad.call("connect")
    bad.call("send", text=text % (address, SIZE) if "%d" in text else text, nr_fds=nr_fds)
    bad.call("wait_dropped")
    assert good.call("compare", nr_threads=2) == []
    until(lambda: small.nr_fds_now() <= fds)
    assert [one["pid"] for one in small.status()["guests"]] == [good.pid]
    small.wait_logged("event=dropped")
    assert small.mismatches() == []


def test_what_is_no_userfaultfd_is_refused(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    bad = new_machine(small, start_guest, [SIZE])
    bad.call("connect")
    text = '[{"base_host_virt_addr":65536,"size":65536,"offset":0}]'
    bad.call("send", text=text, nr_fds=1, what="null")
    bad.call("wait_dropped")
    small.wait_logged("must be a userfaultfd")


def test_regions_of_memory_that_is_not_there_harm_nobody(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    good = restore(small, start_guest, image, [SIZE])
    bad = new_machine(small, start_guest, [SIZE])
    elsewhere = {"base_host_virt_addr": 1 << 40, "size": SIZE, "offset": 0, "page_size": PAGE}
    bad.call("connect")
    bad.call("handshake", regions=[elsewhere])
    until(lambda: len(small.status()["guests"]) == 2)
    assert good.call("compare", nr_threads=2) == []
    bad.kill()
    until(lambda: len(small.status()["guests"]) == 1)
    assert small.mismatches() == []


def test_several_connections_of_one_process_are_told_apart(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    machine = restore(small, start_guest, image, [SIZE])
    machine.call("restore_again", image=str(image))
    until(lambda: len(small.status()["guests"]) == 2)
    names = {one["name"] for one in small.status()["guests"]}
    assert names == {f"fc-{machine.pid}", f"fc-{machine.pid}-2"}


def test_silence_is_bounded_and_holds_up_nobody(
    small: Daemon, image: Path, start_guest: StartGuest
) -> None:
    silent = start_guest(socket_of(small), script="machine_client.py")
    silent.call("connect")
    silent.start("wait_dropped")
    good = restore(small, start_guest, image, [SIZE])
    assert good.call("compare", nr_threads=2) == []
    assert silent.finish() == 0
    small.wait_logged("no handshake in time")


def test_other_guests_are_served_beside_machines(daemon: Daemon, start_guest: StartGuest) -> None:
    image = daemon.run_dir / "image.raw"
    machine = restore(daemon, start_guest, image, [image.stat().st_size])
    machine.call("begin_compare", nr_threads=3)
    assert still_serves(daemon, start_guest)
    assert machine.call("end_compare") == []


def test_sockets_are_removed_at_the_end_and_taken_over_after_a_crash(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}")
    daemon.kill()
    assert Path(socket_of(daemon)).is_socket()
    again = start_daemon("--image", f"d={image}")
    machine = restore(again, start_guest, image, [SIZE])
    assert machine.call("compare") == []
    assert again.stop() == 0
    assert not Path(socket_of(again)).exists()
