# SPDX-License-Identifier: Apache-2.0
"""Post-copy with the bytes of images, and targets of an older program that know neither."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from domains import in_thread, is_stopped, kill_backend, until
from two_hosts import PAGE, SIZE, Host, Model

from cowshed.transport.handoff.sections import ControlMessage, StateReader, StateWriter
from cowshed.transport.links.stream_ends import listen

pytestmark = pytest.mark.slow

Pair = tuple[Host, Host]


def _bare(host: Host) -> Host:
    """It serves no image of its own."""
    host.serves = list  # type: ignore[method-assign]
    return host


def _state(host: Host) -> dict[str, Any]:
    return dict(host.the_daemon.request("drain-state")["drain"] or {})


def _written(a: Host, image: Path, seed: int) -> Model:
    model = Model(image, seed)
    with a.open("g") as disk:
        model.write(disk, 100)
        disk.flush()
    return model


def test_a_guest_whose_image_comes_along_goes_on_before_its_pages_do(
    hosts: Pair, image: Path, tmp_path: Path
) -> None:
    a, b = hosts
    a.start(before=("env", "COWSHED_TEST_STOP_AT=source-push"))
    _start_bare(b, tmp_path, kept=True)
    model = _written(a, image, 1)
    drain = in_thread(lambda: a.run("drain", "--post-copy", "--with-images", "--to", b.unix))
    until(lambda: is_stopped(a.the_daemon.pid))
    plain = image.read_bytes()
    shared = next(
        no
        for no in range(SIZE // PAGE)
        if model.bytes[no * PAGE : (no + 1) * PAGE] == plain[no * PAGE : (no + 1) * PAGE]
    )
    with b.open("g") as disk:
        assert disk.read(shared * PAGE, PAGE) == plain[shared * PAGE : (shared + 1) * PAGE]
        assert b.the_daemon.guest_status("g")["late_bytes"] > 0
        os.kill(a.the_daemon.pid, signal.SIGCONT)
        drain.join()
        model.check(disk)
        model.write(disk)
    assert (_state(a)["phase"], _state(a)["images"]) == ("moved", ["d"])
    a.kill()
    kill_backend(b.the_daemon)
    with b.open("g") as disk:
        model.check(disk)
    assert b.the_daemon.mismatches() == []


def _start_bare(b: Host, tmp_path: Path, **how: Any) -> None:
    """It has a place for images; Host.start() waits for digests, of which it has none."""
    _bare(b).start(f"--image-dir={tmp_path / 'arrived'}", **how)


PHASES = ["source-commit", "source-push", "source-pushed", "target-ready", "target-owner"]


@pytest.mark.parametrize("phase", PHASES)
def test_wherever_one_end_is_killed_the_image_and_every_byte_come_to_one_owner(
    hosts: Pair, image: Path, phase: str, tmp_path: Path
) -> None:
    a, b = hosts
    is_source = phase.startswith("source")
    stop = ("env", f"COWSHED_TEST_STOP_AT={phase}")
    arrived = tmp_path / "arrived"
    a.start(f"--overlay-dir={tmp_path / 'a'}", before=stop if is_source else ())
    _bare(b).start(
        f"--overlay-dir={tmp_path / 'b'}",
        f"--image-dir={arrived}",
        before=() if is_source else stop,
    )
    model = _written(a, image, PHASES.index(phase))
    drain = in_thread(lambda: a.run("drain", "--post-copy", "--with-images", "--to", b.unix))
    killed = a if is_source else b
    until(lambda: is_stopped(killed.the_daemon.pid))
    killed.kill()
    killed.start()
    drain.join()
    until(lambda: _state(a).get("phase", "aborted") in ("moved", "aborted"))
    owner = b if _state(a).get("phase") == "moved" else a
    if phase in ("source-push", "source-pushed"):
        assert owner is b
    with owner.open("g") as disk:
        model.check(disk)
        model.write(disk)
        disk.flush()
    if owner is a:
        until(lambda: b.the_daemon.status()["images"] == [])
        until(lambda: os.listdir(arrived) == [])
        a.wait_movable("--with-images", "--to", b.unix)
        a.drain("--post-copy", "--with-images", "--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)
    assert a.guests() == set()
    assert b.the_daemon.mismatches() == []


@contextlib.contextmanager
def _old_target(answer: dict[str, Any] | None) -> Iterator[tuple[str, list[str]]]:
    """A backend of an older program: it takes handoffs by tcp, and answers that to a question.

    None: it does not know the question, says so and hangs up, as one without post-copy does.
    """
    heard: list[str] = []
    with listen("tcp://127.0.0.1:0") as listener:
        is_over = threading.Event()

        def serve() -> None:
            while not is_over.is_set():
                if (connection := listener.accept()) is None:
                    is_over.wait(0.01)
                    continue
                for reply in ({"version": 1, "features": [], "pid": 1}, {}):
                    _, _, tag = connection.recv(30)
                    connection.send({"ok": True, **reply}, tag=tag)
                sock, _ = connection.take_stream()
                with sock:
                    sock.settimeout(30)
                    reader, writer = StateReader(messages=True), StateWriter()
                    while raw := sock.recv(1 << 16):
                        for section in reader.feed(raw):
                            assert isinstance(section, ControlMessage)
                            heard.append(section.kind)
                            why = f"no message {section.kind!r} is known here"
                            said = answer or {"say": "failed", "why": why}
                            sock.sendall(writer.write(ControlMessage(said)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.uri, heard
        is_over.set()
        thread.join()


@pytest.mark.parametrize("with_images", [[], ["--with-images"]], ids=["guests", "images"])
@pytest.mark.parametrize(
    "answer",
    [None, {"say": "features", "has": []}, {"say": "features"}, {"say": "features", "has": 7}],
    ids=["unknown", "none", "empty", "nonsense"],
)
def test_a_target_that_does_not_know_post_copy_is_said_and_the_guests_go_on(
    pair: Pair, image: Path, answer: dict[str, Any] | None, with_images: list[str]
) -> None:
    a, b = pair
    model = _written(a, image, 3)
    with _old_target(answer) as (uri, heard):
        done = a.run("drain", "--post-copy", *with_images, "--to", uri)
    assert done.returncode == 1
    assert f"{uri} does not know post-copy" in done.stderr
    assert "upgrade it, or drain without --post-copy" in done.stderr
    assert done.stderr.count("\n") == 1
    assert ("no message 'features' is known here" in done.stderr) == (answer is None)
    # Nothing of the guests was told to it, and they are as they were.
    assert heard == ["features"]
    assert (_state(a)["phase"], a.guests()) == ("aborted", {"g"})
    with a.open("g") as disk:
        model.check(disk)
        model.write(disk)
        disk.flush()
    a.drain("--post-copy", "--to", b.unix)
    with b.open("g") as disk:
        model.check(disk)
