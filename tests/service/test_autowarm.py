# SPDX-License-Identifier: Apache-2.0
from domains import MakeImage, StartDaemon, StartGuest, until


def test_what_guests_touched_is_resident_again_after_a_restart(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest
) -> None:
    image = make_image(4 << 20)
    arguments = ("--image", f"d={image}", "--capacity", "64M", "--verbose")
    daemon = start_daemon(*arguments)
    until(lambda: bool(daemon.status()["images"][0]["digest"]))
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    guest.call("fill", offset=1 << 20, length=4096, byte=1)
    resident = daemon.status()["resident_bytes"]
    touched = daemon.status()["images"][0]["working_set_bytes"]
    assert 0 < touched <= resident
    guest.kill()
    assert daemon.stop() == 0
    daemon = start_daemon(*arguments)
    until(lambda: "event=autowarmed" in daemon.log())
    assert daemon.status()["resident_bytes"] >= touched
    assert daemon.stop() == 0
    config = image.with_name("cold.toml")
    config.write_text("autowarm = false\n")
    daemon = start_daemon("--config", str(config), *arguments)
    until(lambda: bool(daemon.status()["images"][0]["digest"]))
    assert daemon.status()["resident_bytes"] == 0
    assert "autowarm" not in daemon.log()
