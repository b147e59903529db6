# SPDX-License-Identifier: Apache-2.0
"""What the figures say of guests that really read, write, stop, break and leave."""

import os
import random
import re
import socket
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, until
from machine_guests import restore
from nbd_site import Site
from scraping import ANY_PORT, Samples, scrape, value
from swarms import Swarm

from cowshed.transport import connect

pytestmark = pytest.mark.slow

MIB = 1 << 20
PAGE = 4096
EXTENT = 65536


def of_image(samples: Samples, name: str, **labels: str) -> float:
    return value(samples, name, image="d", **labels)


def outcomes(samples: Samples, *which: str) -> float:
    """Faults of these KIND/OUTCOME pairs."""
    pairs = [pair.split("/") for pair in which]
    return sum(of_image(samples, "faults_total", kind=kind, outcome=what) for kind, what in pairs)


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    return start_daemon("--image", f"d={make_image(4 * MIB)}", *ANY_PORT, "--open-regions", "off")


def test_faults_loads_and_durations_agree_with_each_other(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guests = [start_guest(daemon.uri) for _ in range(3)]
    for guest in guests:
        guest.call("open", image="d")
        guest.call("hash", offset=0, length=4 * MIB)
    guests[0].call("fill", offset=0, length=10 * PAGE, byte=7)
    for guest in guests:
        guest.call("close")  # a fault is counted after its guest has gone on
    samples, status = scrape(daemon), daemon.status()
    hits, requests = of_image(samples, "hits_total"), of_image(samples, "requests_total")
    assert (hits, requests - hits) == (status["hits"], status["misses"])
    assert hits == outcomes(samples, "missing/hit", "minor/hit")
    assert requests - hits == outcomes(samples, "missing/loaded", "minor/loaded")
    assert outcomes(samples, "missing/failed", "minor/failed") == 0
    assert value(samples, "fault_duration_seconds_count", kind="hit") == hits
    assert 0 < value(samples, "fault_duration_seconds_count", kind="miss") <= requests - hits
    assert value(samples, "fault_duration_seconds_sum", kind="miss") > 0
    nr_loads = sum(
        of_image(samples, "loads_total", reason=reason) for reason in ("demand", "prefetch")
    )
    assert nr_loads == 64
    assert of_image(samples, "loads_total", reason="demand") >= 1
    assert of_image(samples, "load_bytes_total", source="file") == 4 * MIB
    assert of_image(samples, "mapped_pages_total") >= 3 * 1024


def test_gauges_say_who_has_what(daemon: Daemon, start_guest: StartGuest) -> None:
    guests = [start_guest(daemon.uri) for _ in range(5)]
    for guest in guests:
        guest.call("open", image="d")
        guest.call("hash", offset=0, length=4 * MIB)
    guests[0].call("fill", offset=0, length=10 * PAGE, byte=7)
    daemon.request("pin", image="d", offset=0, length=3 * EXTENT)
    samples = scrape(daemon)
    assert of_image(samples, "resident_bytes") == 4 * MIB
    assert of_image(samples, "granted_bytes") == 5 * 4 * MIB
    assert of_image(samples, "saved_bytes") == 4 * 4 * MIB
    assert of_image(samples, "pinned_bytes") == 3 * EXTENT
    assert of_image(samples, "working_set_bytes") == 4 * MIB
    assert of_image(samples, "working_set_resident_bytes") == 4 * MIB
    assert of_image(samples, "extents", refs="4-7") == 64
    assert of_image(samples, "guests", transport="unix", state="running") == 5
    assert value(samples, "reserved_bytes") == 4 * MIB
    assert value(samples, "pinnable_bytes") < value(samples, "capacity_bytes") == 1 << 30
    # What was charged and not written is gone a scrape later.
    until(lambda: of_image(scrape(daemon), "private_bytes") == 10 * PAGE)
    assert of_image(scrape(daemon), "cow_pages_total") >= 10
    # All but what is pinned; an extent that a fault thread still maps is kept.
    until(lambda: daemon.request("evict", image="d")["kept_bytes"] == 3 * EXTENT)
    samples = scrape(daemon)
    assert of_image(samples, "resident_bytes") == 3 * EXTENT
    assert of_image(samples, "working_set_resident_bytes") == 3 * EXTENT
    assert of_image(samples, "evictions_total", reason="request") == 61
    assert of_image(samples, "evictions_total", reason="pressure") == 0


def test_an_extent_loaded_again_soon_after_its_eviction_is_a_reload(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 * MIB)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "1M", *ANY_PORT)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    guest.call("hash", offset=0, length=4 * MIB)
    samples = scrape(daemon)
    assert of_image(samples, "evictions_total", reason="pressure") >= 48
    assert of_image(samples, "reloads_total") == 0
    # The last to be evicted come first, as long as the policy remembers them.
    guest.call("compare", path=str(image), offset=3 * MIB, length=MIB // 2)
    guest.call("compare", path=str(image), offset=2 * MIB, length=MIB)
    until(lambda: of_image(scrape(daemon), "reloads_total") > 0)


def test_copies_do_not_fall_when_charges_turn_out_to_be_for_nothing(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    guest.call("hash", offset=0, length=MIB)
    guest.call("poke", pages=list(range(12)), byte=1)
    charged = of_image(scrape(daemon), "cow_pages_total")
    assert charged > 12  # a run of writes: what comes next was opened ahead
    until(lambda: of_image(scrape(daemon), "private_bytes") == 12 * PAGE)
    assert of_image(scrape(daemon), "cow_pages_total") >= charged


def test_time_at_the_quota_grows_while_a_guest_is_stopped(
    daemon: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g", quota_bytes=2 * PAGE)
    guest.start("poke", pages=[100, 300, 500], byte=1)
    stopped = {"transport": "unix", "state": "stopped-quota"}
    until(lambda: of_image(scrape(daemon), "guests", **stopped) == 1)
    samples = scrape(daemon)
    assert of_image(samples, "quota_stops_total") == 1
    assert of_image(samples, "guests", transport="unix", state="running") == 0
    assert outcomes(samples, "write/refused") >= 1
    before = of_image(samples, "quota_stopped_seconds_total")
    until(lambda: of_image(scrape(daemon), "quota_stopped_seconds_total") > before + 0.05)
    before = of_image(scrape(daemon), "quota_stopped_seconds_total")
    daemon.request("quota", guest="g", quota_bytes=MIB)
    guest.finish()
    samples = scrape(daemon)
    assert of_image(samples, "guests", transport="unix", state="running") == 1
    spent = of_image(samples, "quota_stopped_seconds_total")
    assert spent > before
    assert of_image(scrape(daemon), "quota_stopped_seconds_total") == spent
    guest.call("close")
    assert of_image(scrape(daemon), "quota_stopped_seconds_total") == spent


def test_a_source_that_fails_shows_as_errors_failed_faults_and_poisoned_pages(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 * MIB)
    daemon = start_daemon("--image", f"d={image}", *ANY_PORT)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d")
    os.truncate(image, 2 * MIB)
    with pytest.raises(AssertionError, match="OSError"):
        guest.call("read", offset=3 * MIB, length=1)
    until(lambda: outcomes(scrape(daemon), "missing/failed", "minor/failed") >= 1)
    samples = scrape(daemon)
    assert of_image(samples, "load_errors_total", source="file") >= 1
    assert of_image(samples, "poisoned_pages_total") >= 1
    until(lambda: of_image(scrape(daemon), "source_changed") == 1)


def test_an_audit_leaves_its_time_and_what_it_found(daemon: Daemon) -> None:
    assert value(scrape(daemon), "audit_timestamp_seconds") == 0
    assert daemon.mismatches() == []
    samples = scrape(daemon)
    started = value(samples, "start_timestamp_seconds")
    assert value(samples, "audit_timestamp_seconds") > started > 1.7e9
    assert value(samples, "audit_mismatches", check="refs") == 0


def test_a_connection_that_breaks_the_protocol_is_counted(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(daemon.uri.removeprefix("unix://"))
        sock.send(b"nonsense")
        sock.recv(65536)
    until(lambda: value(scrape(daemon), "connections_dropped_total", reason="protocol") == 1)


def test_no_counter_falls_while_guests_come_and_go(
    make_image: MakeImage, start_daemon: StartDaemon, rng: random.Random
) -> None:
    image = make_image(2 * MIB)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "1M", *ANY_PORT)
    before: Samples = {}
    nr_scrapes = 0
    while nr_scrapes <= 5:  # however much faster than we the guests are
        with Swarm(daemon.uri, "rounds", 3, rng, nr_rounds=200) as swarm:
            while swarm.running:
                now = scrape(daemon)
                for key, seen in before.items():
                    if key[0].endswith(("_total", "_bucket", "_count", "_sum")):
                        assert now[key] >= seen, (key, seen, now[key])
                before = now
                nr_scrapes += 1
            swarm.results()
    until(lambda: daemon.status()["guests"] == [])
    samples, status = scrape(daemon), daemon.status()
    assert of_image(samples, "hits_total") == status["hits"] > 0
    assert of_image(samples, "guest_attaches_total") > 100
    assert of_image(samples, "guests", transport="unix", state="running") == 0
    assert of_image(samples, "private_bytes") == 0


# Guests of their own series.


@pytest.fixture
def with_guests(make_image: MakeImage, start_daemon: StartDaemon, run_dir: Path) -> Daemon:
    config = run_dir / "config.toml"
    config.write_text(f'guest_metrics = 2\n[images]\nd = "{make_image(MIB)}"\n')
    return start_daemon("--config", str(config), *ANY_PORT)


NAMES = ['quo"te', "back\\slash\\n", "Kuhstall-Grüße-牛舎", "{a='b',c=\"d\"}"]


@pytest.mark.parametrize("name", NAMES)
def test_a_guests_name_is_its_label_whatever_it_holds(
    name: str, with_guests: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(with_guests.uri)
    guest.call("open", image="d", guest=name, quota_bytes=8 * PAGE)
    guest.call("read", offset=0, length=1)
    guest.call("poke", pages=[0], byte=1)
    samples = scrape(with_guests)
    who = {"guest": name, "image": "d"}
    assert value(samples, "guest_requests_total", **who) >= 1
    assert value(samples, "guest_private_bytes", **who) >= PAGE
    assert value(samples, "guest_cow_pages_total", **who) >= 1
    assert value(samples, "guest_quota_bytes", **who) == 8 * PAGE
    assert value(samples, "guest_granted_bytes", **who) >= EXTENT
    assert value(samples, "guest_stopped", **who) == 0


@pytest.mark.parametrize("name", ["two\nlines", "tab\t", "null\0", "bell\a", "\u202eback"])
def test_a_name_that_is_not_printable_is_refused_when_it_attaches(
    name: str, with_guests: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(with_guests.uri)
    with pytest.raises(AssertionError, match="printable characters"):
        guest.call("open", image="d", guest=name)
    assert not [key for key in scrape(with_guests) if key[0].startswith("cowshed_guest_hits")]


def test_a_dead_guests_series_are_gone_and_its_past_stays(
    with_guests: Daemon, start_guest: StartGuest
) -> None:
    guest = start_guest(with_guests.uri)
    guest.call("open", image="d", guest="short-lived")
    guest.call("read", offset=0, length=MIB)
    # A fault is counted after its guest has gone on.
    until(lambda: of_image(scrape(with_guests), "requests_total") > 0)
    requests = of_image(scrape(with_guests), "requests_total")
    assert value(scrape(with_guests), "guest_quota_bytes", guest="short-lived", image="d") == float(
        "inf"
    )
    guest.kill()
    until(lambda: not [key for key in scrape(with_guests) if ("guest", "short-lived") in key[1]])
    assert of_image(scrape(with_guests), "requests_total") >= requests


def test_guests_over_the_cap_have_no_series_and_are_counted(
    with_guests: Daemon, start_guest: StartGuest
) -> None:
    guests = [start_guest(with_guests.uri) for _ in range(5)]
    for no, guest in enumerate(guests):
        guest.call("open", image="d", guest=f"g{no}")

    def shown() -> set[str]:
        return {dict(key[1])["guest"] for key in scrape(with_guests) if "guest" in dict(key[1])}

    assert shown() == {"g0", "g1"}
    assert value(scrape(with_guests), "guest_metrics_left_out") == 3
    guests[0].call("close")
    assert shown() == {"g1", "g2"}
    assert value(scrape(with_guests), "guest_metrics_left_out") == 2


def test_guests_are_counted_by_how_they_came_and_how_they_are(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 * MIB)
    daemon = start_daemon(f"--image=d={image}", "--listen=tcp://127.0.0.1:0", *ANY_PORT)
    for _ in range(2):
        start_guest(daemon.uri).call("open", image="d", guest="twice", token="secret")
    stopped = start_guest(daemon.uri)
    stopped.call("open", image="d", guest="stops", quota_bytes=PAGE)
    stopped.start("poke", pages=[100, 300], byte=1)
    machine = restore(daemon, start_guest, image, [4 * MIB])
    site = Site(daemon, image)
    site.nbdsh("h.pwrite(b'x' * 4096, 0)", "d@nbd")
    (uri,) = re.findall(r"event=listening uri=\"?([^\"\s]+)", daemon.log())
    with connect(uri) as backend, backend.open("d", guest="far", token="t") as disk:
        disk.write(0, b"mine" * 1024)
        expected = {
            ("unix", "running"): 1,
            ("unix", "stopped-quota"): 1,
            ("firecracker", "running"): 1,
            ("nbd", "away"): 1,
            ("tcp", "running"): 1,
        }
        until(lambda: by_transport_and_state(scrape(daemon)) == expected)
        assert of_image(scrape(daemon), "mappings", transport="unix") == 3
        assert of_image(scrape(daemon), "mappings", transport="firecracker") == 1
        status = {each["name"]: each for each in daemon.status()["guests"]}
        assert {
            name: each["mappings"]
            for name, each in status.items()
            if each["transport"] != "firecracker"
        } == {
            "twice": 2,
            "stops": 1,
            "nbd": 0,
            "far": 0,
        }
    del expected["tcp", "running"], expected["firecracker", "running"]
    machine.kill()
    expected["tcp", "away"] = 1
    until(lambda: by_transport_and_state(scrape(daemon)) == expected)
    assert of_image(scrape(daemon), "mappings", transport="firecracker") == 0
    quiet = start_guest(daemon.uri, script="hostile_guest.py")
    quiet.call("open", image="d", guest="quiet", follow_moves=False)
    quiet.call("hash", offset=0, length=MIB)
    quiet.call("close_quietly")
    expected["unix", "parked"] = 1
    until(lambda: by_transport_and_state(scrape(daemon)) == expected)


def by_transport_and_state(samples: Samples) -> dict[tuple[str, str], float]:
    return {
        (dict(labels)["transport"], dict(labels)["state"]): nr
        for (name, labels), nr in samples.items()
        if name == "cowshed_guests" and nr
    }
