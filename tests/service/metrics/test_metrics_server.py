# SPDX-License-Identifier: Apache-2.0
"""The metrics server: where it listens, who can hold it up (nobody), and how it ends."""

import contextlib
import http.client
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, cowshed, until
from scraping import ANY_PORT, fetch, metrics_url

from cowshed.service.settings.endpoint import Endpoint
from cowshed.service.web import http_server
from cowshed.service.web.http_messages import Answer, HttpRequest
from cowshed.service.web.http_server import HttpServer

MIB = 1 << 20
LONG = b"x" * (8 * MIB)
PATIENCE_SECONDS = 600.0


class Pages:
    """Routes to test with; /wait is answered when `go` is set, `asked` once it was asked for."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.go = threading.Event()

    def echo(self, request: HttpRequest) -> Answer:
        return 200, "text/plain", f"{request.path} {dict(request.query)}".encode()

    def wait(self, _: HttpRequest) -> Answer:
        self.asked.set()
        assert self.go.wait(60)
        return 200, "text/plain", b"waited"

    def fail(self, _: HttpRequest) -> Answer:
        raise ValueError("on purpose")

    def long(self, _: HttpRequest) -> Answer:
        return 200, "text/plain", LONG


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def server(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """One that gives up no client that is only slow, as any is on a busy machine."""
    routes = {"/": pages.echo, "/wait": pages.wait, "/fail": pages.fail, "/long": pages.long}
    for name in ("_SEND_SECONDS", "_LINGER_SECONDS", "_STOP_SECONDS"):
        monkeypatch.setattr(http_server, name, PATIENCE_SECONDS)
    server = HttpServer(Endpoint("127.0.0.1", 0), routes, read_seconds=PATIENCE_SECONDS)
    server.start()
    yield server
    pages.go.set()
    server.stop()


def ask(server: HttpServer, request: str) -> bytes:
    """Everything that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", server.endpoint.port), timeout=60) as sock:
        sock.sendall(request.encode("latin-1"))
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=60).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def test_a_page_is_asked_for_by_path_with_a_query(server: HttpServer) -> None:
    answer = ask(server, "GET /?a=1&b=%20&a=2 HTTP/1.1\r\nHost: h\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"/ {'a': '1', 'b': ' '}"
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Connection: close" in head
    assert ask(server, "HEAD / HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        ("GET /none HTTP/1.1\r\n\r\n", 404),
        ("POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        ("GET / HTTP/2.0\r\n\r\n", 400),
        ("nonsense\r\n\r\n", 400),
        ("GET http://[ HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        ("\x16\x03\x01\x02\n\n", 400),
        ("GET / HTTP/1.1\r\nX: " + 9000 * "x", 431),
        ("GET /fail HTTP/1.1\r\n\r\n", 500),
    ],
)
def test_what_cannot_be_answered_gets_a_status_that_says_why(
    server: HttpServer, request_text: str, code: int
) -> None:
    assert status(ask(server, request_text)) == code
    assert status(ask(server, "GET / HTTP/1.0\n\n")) == 200


def test_silent_connections_make_room_for_who_asks(pages: Pages) -> None:
    server = HttpServer(Endpoint("127.0.0.1", 0), {"/": pages.echo}, read_seconds=PATIENCE_SECONDS)
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        address = ("127.0.0.1", server.endpoint.port)
        silent = [
            stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(80)
        ]
        for _ in range(5):
            assert status(ask(server, "GET / HTTP/1.1\r\n\r\n")) == 200
        assert silent[0].recv(1) == b""  # the oldest went
        silent[-1].sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert status(read_all(silent[-1])) == 200


def test_a_request_that_comes_in_drips_holds_nobody_up(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", server.endpoint.port), timeout=60) as sock:
        sock.send(b"GET / HT")
        assert status(ask(server, "GET / HTTP/1.1\r\n\r\n")) == 200
        sock.send(b"TP/1.1\r\n\r\n")
        assert status(read_all(sock)) == 200


def test_a_request_that_comes_in_drips_is_out_of_time(pages: Pages) -> None:
    server = HttpServer(Endpoint("127.0.0.1", 0), {"/": pages.echo}, read_seconds=0.5)
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        address = ("127.0.0.1", server.endpoint.port)
        sock = stack.enter_context(socket.create_connection(address, timeout=60))
        with contextlib.suppress(ConnectionError):  # it may be out of time before this is there
            sock.send(b"GET / HT")
            assert sock.recv(1) == b""


def test_slow_answers_do_not_hold_up_the_loop_and_slow_readers_get_all(
    server: HttpServer, pages: Pages
) -> None:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.endpoint.port)
        waiting = stack.enter_context(socket.create_connection(address, timeout=60))
        waiting.sendall(b"GET /wait HTTP/1.1\r\n\r\n")
        assert pages.asked.wait(30)
        reader = stack.enter_context(socket.create_connection(address, timeout=60))
        reader.sendall(b"GET /long HTTP/1.1\r\n\r\n")
        assert reader.recv(1) == b"H"  # under way, and more than the socket holds
        assert status(ask(server, "GET / HTTP/1.1\r\n\r\n")) == 200
        assert read_all(reader).endswith(b"\r\n\r\n" + LONG)
        pages.go.set()
        assert read_all(waiting).endswith(b"waited")


def test_stopping_finishes_the_answer_under_way_and_refuses_what_comes_then(
    server: HttpServer, pages: Pages
) -> None:
    address = ("127.0.0.1", server.endpoint.port)
    with socket.create_connection(address, timeout=60) as sock:
        sock.sendall(b"GET /wait HTTP/1.1\r\n\r\n")
        assert pages.asked.wait(30)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: is_refused(address))
        pages.go.set()
        assert read_all(sock).endswith(b"waited")
    stopping.join(60)  # it has lingered until we closed
    assert not stopping.is_alive()


# The daemon's.


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    return start_daemon("--image", f"d={make_image(MIB)}", *ANY_PORT)


def test_without_the_option_nothing_listens(
    make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--image", f"d={make_image(MIB)}")
    assert "event=metrics" not in daemon.log()


def test_a_port_in_use_is_one_line_before_anything_is_served(
    daemon: Daemon, make_image: MakeImage, run_dir: Path
) -> None:
    place = re.sub(r"http://(.*)/metrics", r"\1", metrics_url(daemon))
    other = run_dir / "other"
    image = make_image(MIB, "other.raw")
    ended = cowshed("serve", "--run-dir", other, "--image", f"d={image}", "--metrics", place)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"cowshed: cannot serve metrics at {place}: Address already in use; "
        "give another address with --metrics\n"
    )
    assert not (other / "cowshed.sock").exists()
    assert "cowshed_build_info" in fetch(metrics_url(daemon))


@pytest.mark.parametrize(
    ("place", "status_code", "words"),
    [
        ("9432", 2, "is not HOST:PORT"),
        (":9432", 2, "is not HOST:PORT"),
        ("::1:9432", 2, "is not HOST:PORT"),
        ("localhost:", 2, "has no port from 0 to 65535"),
        ("localhost:65536", 2, "has no port from 0 to 65535"),
        ("localhost:http", 2, "has no port from 0 to 65535"),
        ("localhost:-1", 2, "has no port from 0 to 65535"),
        ("192.0.2.1:9432", 1, "Cannot assign requested address"),
        ("no-such-host.invalid:9432", 1, "cannot serve metrics at no-such-host.invalid:9432"),
    ],
)
def test_a_place_to_listen_that_cannot_be_is_one_line(
    place: str, status_code: int, words: str, make_image: MakeImage, run_dir: Path
) -> None:
    image = make_image(MIB)
    ended = cowshed("serve", "--run-dir", run_dir, "--image", f"d={image}", "--metrics", place)
    assert ended.returncode == status_code
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("metrics = 9432", "metrics is 9432: give text in quotes"),
        ('metrics = "nowhere"', "is not HOST:PORT"),
        ("guest_metrics = -1", "guest_metrics is -1: use 0 (none) to 100000 guests"),
        ("guest_metrics = true", "guest_metrics is True: give a whole number of guests"),
    ],
)
def test_a_wrong_setting_is_one_line(
    line: str, words: str, make_image: MakeImage, run_dir: Path
) -> None:
    config = run_dir / "config.toml"
    config.write_text(f'{line}\n[images]\nd = "{make_image(MIB)}"\n')
    ended = cowshed("serve", "--run-dir", run_dir, "--config", config)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_scrape_during_the_shutdown_is_answered_in_full_or_not_at_all(daemon: Daemon) -> None:
    url = metrics_url(daemon)
    answers: list[str] = []
    enough = threading.Event()

    def scrape_until_refused() -> None:
        with contextlib.suppress(OSError, http.client.BadStatusLine):
            while True:
                answers.append(fetch(url))  # IncompleteRead, for an answer in part, is let through
                enough.set()

    errors: list[BaseException] = []

    def thread() -> None:
        try:
            scrape_until_refused()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for one in threads:
        one.start()
    assert enough.wait(60)
    daemon.process.send_signal(signal.SIGTERM)
    for one in threads:
        one.join(60)
        assert not one.is_alive()
    assert daemon.stop() == 0
    assert errors == []
    assert all("cowshed_retries_total" in answer for answer in answers)
    assert "level=error" not in daemon.log()
