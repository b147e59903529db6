# SPDX-License-Identifier: Apache-2.0
"""Clients of Nydus's typed protocol: frames told of and pinned, or copies, and the same bytes.

The client of tests/support follows that project's document and public test client. To run the
latter itself, give its checkout: COWSHED_NYDUS_SOURCE=/path/to/nydus (needs `go`).
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from domains import Daemon, MakeImage, StartDaemon, StartGuest, until
from machine_guests import MIB, PAGE, new_machine, status_of

SIZE = 8 * MIB
HUGE = 2 * MIB
ZEROCOPY, COPY = 0, 1
SOURCE = os.environ.get("COWSHED_NYDUS_SOURCE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.access("/dev/userfaultfd", os.R_OK | os.W_OK),
        reason="needs /dev/userfaultfd: a client's memory is touched by the kernel, too",
    ),
]


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE - PAGE + 100)


@pytest.fixture(params=["", ",extent=2M"])
def large(image: Path, start_daemon: StartDaemon, request: pytest.FixtureRequest) -> Daemon:
    """May pin all of the image for its clients."""
    return start_daemon("--image", f"d={image}{request.param}", "--capacity", "32M")


@pytest.mark.parametrize("policy", [ZEROCOPY, COPY])
@pytest.mark.parametrize("prefault", [False, True])
def test_every_byte_is_the_images(
    large: Daemon, image: Path, start_guest: StartGuest, policy: int, prefault: bool
) -> None:
    client = new_machine(large, start_guest, [SIZE], features=0)
    stat = client.call("nydus", image=str(image), policy=policy, enable_prefault=prefault)
    assert stat == {"type": 3, "size": SIZE, "block_size": PAGE, "flags": 0, "version": 1}
    assert client.call("compare", nr_threads=4) == []
    status = status_of(large, client)
    assert status["transport"] == "nydus"
    assert status["private_bytes"] == (SIZE if policy == COPY else 0)
    assert status["granted_bytes"] == (SIZE if policy == ZEROCOPY else 0)
    assert large.mismatches() == []


@pytest.mark.parametrize("policy", [ZEROCOPY, COPY])
def test_a_disk_that_is_mapped_past_its_end_is_zero_there(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, policy: int
) -> None:
    """As memory of a machine has to be, which is aligned to 2 MiB."""
    image = make_image(3 * PAGE)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "1M")
    client = new_machine(daemon, start_guest, [HUGE], features=0)
    client.call("nydus", image=str(image), policy=policy)
    assert client.call("compare", nr_threads=2) == []
    assert [client.call("read", page=page) for page in (3, 511)] == ["00" * 8] * 2
    assert client.call("read", page=2) == image.read_bytes()[2 * PAGE :][:8].hex()


def test_frames_are_shared_and_survive_eviction_while_the_client_is_connected(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    client = new_machine(large, start_guest, [SIZE], features=0)
    client.call("nydus", image=str(image), policy=ZEROCOPY)
    client.call("read", page=100)

    def pinned() -> int:
        return int(large.status()["images"][0]["pinned_bytes"])

    # Its thread may still be at work on the window: it pins first, tells then, and lets go last.
    until(lambda: pinned() == sum(length for _, length in client.call("told")))
    until(lambda: large.request("evict", image="d")["kept_bytes"] == pinned())
    until(lambda: large.status()["resident_bytes"] == pinned())
    assert client.call("compare") == []
    client.call("close")
    until(lambda: large.status()["guests"] == [])
    assert large.status()["images"][0]["pinned_bytes"] == 0
    until(lambda: large.request("evict", image="d")["kept_bytes"] == 0)
    assert large.status()["resident_bytes"] == 0
    assert large.mismatches() == []


def test_a_killed_client_gives_its_pins_back(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    client = new_machine(large, start_guest, [SIZE], features=0)
    client.call("nydus", image=str(image), policy=ZEROCOPY)
    client.call("begin_compare", nr_threads=2)
    until(lambda: large.status()["images"][0]["pinned_bytes"] > 0)
    client.kill()
    until(lambda: large.status()["images"][0]["pinned_bytes"] == 0)
    again = new_machine(large, start_guest, [SIZE], features=0)
    again.call("nydus", image=str(image), policy=ZEROCOPY)
    assert again.call("compare") == []
    assert status_of(large, again)["granted_bytes"] == SIZE


def test_beyond_the_allowance_pages_are_copied(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    daemon = start_daemon("--image", f"d={image}", "--capacity", "8M")
    clients = [new_machine(daemon, start_guest, [SIZE], features=0) for _ in range(2)]
    for client in clients:
        client.call("nydus", image=str(image), policy=ZEROCOPY)
        assert client.call("compare", nr_threads=2) == []
    first, second = (status_of(daemon, client) for client in clients)
    assert first["granted_bytes"] == 2 * MIB
    assert first["private_bytes"] == SIZE - 2 * MIB
    assert second["private_bytes"] == SIZE
    assert daemon.status()["images"][0]["pinned_bytes"] == 2 * MIB
    assert daemon.mismatches() == []


def test_prefault_tells_of_what_is_resident_before_anybody_asks(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    large.request("warm", image="d", offset=0, length=4 * MIB)
    client = new_machine(large, start_guest, [SIZE], features=0)
    client.call("nydus", image=str(image), policy=ZEROCOPY, enable_prefault=True)
    until(lambda: sum(length for _, length in client.call("told")) == 4 * MIB)
    assert status_of(large, client)["faults"]["missing"] == 0
    assert client.call("compare") == []


def test_units_of_two_mebibytes_are_told_of_whole(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    client = new_machine(large, start_guest, [SIZE], features=0, align=HUGE)
    client.call("nydus", image=str(image), policy=ZEROCOPY, page_size=HUGE)
    client.call("read", page=600)
    # A reader that is quicker than its mapping asks twice, and is told twice.
    assert {tuple(each) for each in client.call("told")} == {(HUGE, HUGE)}
    assert client.call("compare") == []
    assert large.mismatches() == []


def test_frames_in_a_huge_page_are_lent_together_and_lent_ones_made_none(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    """A huge page of which a part is lent could be neither evicted nor dissolved."""
    daemon = start_daemon("--image", f"d={image}", "--capacity", "32M", "--open-regions", "pinned")
    mapped = start_guest(daemon.uri)
    mapped.call("open", image="d", guest="mapped")
    for offset in (0, HUGE):
        daemon.request("warm", image="d", offset=offset, length=HUGE)
    daemon.request("pin", image="d", offset=0, length=HUGE)
    until(lambda: daemon.guest_status("mapped")["open_regions"] == 1)
    client = new_machine(daemon, start_guest, [SIZE], features=0)
    client.call("nydus", image=str(image), policy=ZEROCOPY)
    client.call("read", page=10)
    client.call("read", page=600)
    told = {tuple(each) for each in client.call("told")}
    assert told == {(0, HUGE), (600 // 16 * 16 * PAGE, 16 * PAGE)}
    daemon.request("pin", image="d", offset=HUGE, length=HUGE)
    busy = client.call("read", page=1000)
    assert busy == image.read_bytes()[1000 * PAGE :][:8].hex()
    daemon.request("unpin", image="d", offset=0, length=2 * HUGE)
    until(lambda: daemon.request("evict", image="d")["kept_bytes"] == HUGE + 2 * 16 * PAGE)
    assert daemon.guest_status("mapped")["open_regions"] == 0
    assert client.call("compare") == []
    assert daemon.mismatches() == []


def test_a_region_may_show_a_part_and_only_that_is_told_of(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    client = new_machine(large, start_guest, [MIB, 5 * PAGE], features=0, first_offset=7 * PAGE)
    client.call("nydus", image=str(image), policy=ZEROCOPY)
    assert client.call("compare") == []
    told = client.call("told")
    assert min(offset for offset, _ in told) == 7 * PAGE
    assert max(offset + length for offset, length in told) == MIB + 12 * PAGE


def test_a_disk_given_back_reads_as_the_image_again(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    client = new_machine(large, start_guest, [SIZE])
    client.call("nydus", image=str(image), policy=COPY)
    client.call("fill", page=4, nr_pages=40, byte=1)
    client.call("balloon", page=0, nr_pages=100, reads="image")
    assert client.call("compare", nr_threads=2) == []
    assert large.mismatches() == []


def test_a_size_may_be_asked_for_without_more(large: Daemon, start_guest: StartGuest) -> None:
    client = new_machine(large, start_guest, [SIZE])
    client.call("connect")
    for _ in range(3):
        client.call("send", text='{"type":2}')
    assert large.status()["guests"] == []


def test_messages_that_servers_send_and_second_handshakes_are_passed_over(
    large: Daemon, image: Path, start_guest: StartGuest
) -> None:
    client = new_machine(large, start_guest, [SIZE], features=0)
    client.call("nydus", image=str(image), policy=COPY)
    client.call("read", page=100)  # all of it has begun: a page has come
    fds = large.nr_fds_now()
    client.call("send", text='{"type":1,"ranges":[]}{"type":3}')
    region = '{"base_host_virt_addr":65536,"size":65536,"offset":0,"page_size":4096}'
    client.call("send", text=f'{{"type":0,"regions":[{region}]}}', nr_fds=1)
    assert client.call("compare", nr_threads=2) == []
    until(lambda: large.nr_fds_now() <= fds)
    assert len(large.status()["guests"]) == 1


@pytest.mark.parametrize(
    "text", ['{"type":7}', '{"type":0}', '{"regions":[]}', "{]", '{"type":[]}']
)
def test_what_no_document_tells_of_costs_the_connection(
    large: Daemon, start_guest: StartGuest, text: str
) -> None:
    client = new_machine(large, start_guest, [SIZE])
    client.call("connect")
    client.call("send", text=text)
    client.call("wait_dropped")
    large.wait_logged("event=dropped")


def flood(machine: Any) -> None:
    """Ask and ask, until it is hung up on."""
    for _ in range(400):
        machine.call("send", text='{"type":2}' * 20)


def test_a_client_that_reads_nothing_holds_up_nobody(
    image: Path, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    """Its extents wait as bits, and what it asks for is bounded."""
    daemon = start_daemon("--image", f"d={image}", "--capacity", "32M")
    deaf = new_machine(daemon, start_guest, [SIZE])
    deaf.call("connect")
    with pytest.raises(AssertionError, match=r"Broken pipe|reset by peer"):
        flood(deaf)
    until(lambda: "unread" in daemon.log() or "cannot send" in daemon.log())
    good = new_machine(daemon, start_guest, [SIZE], features=0)
    good.call("nydus", image=str(image), policy=ZEROCOPY)
    assert good.call("compare") == []


# What that project's test client does, with our own main in place of its test suite.
MAIN = """package main
import ("bytes"; "client/tool"; "os")
func must(err error) { if err != nil { panic(err) } }
func main() {
	want, err := os.ReadFile(os.Args[2])
	must(err)
	client, err := tool.NewUffdClient(os.Args[1])
	must(err)
	policy := tool.PolicyZerocopy
	if os.Args[3] == "copy" { policy = tool.PolicyCopy }
	must(client.Handshake(policy, os.Args[4] == "prefault"))
	for at := 0; at + 4096 <= len(want); at += 4096 {
		got, err := client.ReadAt(int64(at), 4096)
		must(err)
		if !bytes.Equal(got, want[at:at + 4096]) { panic(at) }
	}
	client.Close()
}
"""


@pytest.mark.skipif(not SOURCE, reason="COWSHED_NYDUS_SOURCE names no checkout of nydus")
@pytest.mark.skipif(not shutil.which("go"), reason="needs go, to build nydus's own client")
def test_the_public_client_of_nydus_works_unchanged(
    large: Daemon, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "tool").mkdir()
    shutil.copy(Path(SOURCE) / "smoke/tests/tool/uffd_client.go", tmp_path / "tool")
    (tmp_path / "main.go").write_text(MAIN)
    (tmp_path / "go.mod").write_text("module client\ngo 1.19\n")
    # A goroutine that faults keeps its P and holds up collections: the one that maps needs both.
    go = {
        **os.environ,
        "GOPROXY": "off",
        "GOCACHE": str(tmp_path / "cache"),
        "GOMAXPROCS": "8",
        "GOGC": "off",
    }
    subprocess.run(["go", "build", "-o", "client", "."], cwd=tmp_path, env=go, check=True)
    for policy in ("zerocopy", "copy"):
        for prefault in ("prefault", "no"):
            words = [tmp_path / "client", large.run_dir / "images/d.sock", image, policy, prefault]
            subprocess.run(words, env=go, check=True, timeout=50)
            until(lambda: large.status()["guests"] == [])
    assert large.mismatches() == []
