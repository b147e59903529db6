# SPDX-License-Identifier: Apache-2.0
"""Every query of dashboards, rules and runbooks has an answer from a real Prometheus and backend.

The backend is put through what operators may see: guests that fault, write and discard, a cache
too small for them, one guest stopped at its quota, pins, commands, an audit, a source that is cut
short, and a client that talks nonsense.
"""

import contextlib
import math
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from board_files import (
    ROOT,
    Query,
    boards,
    names_in,
    panel_queries,
    records,
    rule_queries,
    runbook_queries,
)
from domains import Daemon, Guest, new_run_dir, until, write_image
from observed import Prometheus, free_port, get

from cowshed.service.metrics.catalog import CATALOG
from cowshed.transport import connect

pytestmark = pytest.mark.slow

IMAGE_BYTES = 8 << 20
EXTENT_BYTES = 16 << 10
# Extents that the sampler may have unmapped at a moment.
OUT_BYTES = 8 * EXTENT_BYTES
# However long these tests take, what was done before them is a part of each rate.
VARIABLES = {"$__rate_interval": "10m", "$__range": "10m"}
EVERYTHING = dict.fromkeys(("$job", "$instance", "$domain", "$image", "$guest"), ".+")
# Names that tests themselves make, or that only some states have.
FROM_PROMETHEUS = {"up", "ALERTS"}


class Scene:
    """A backend under load, and the Prometheus that watches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.small = write_image(folder / "small.raw", IMAGE_BYTES)
        self.torn = write_image(folder / "torn.raw", IMAGE_BYTES)
        settings = f"guest_metrics = 10\nextent = {EXTENT_BYTES}\n"
        (folder / "cowshed.toml").write_text(settings)
        target = f"127.0.0.1:{free_port()}"
        self.daemon = Daemon(
            folder,
            [
                *("--config", str(folder / "cowshed.toml"), "--metrics", target),
                *("--capacity", "5M", "--image", f"small={self.small}"),
                *("--image", f"torn={self.torn},domain=tenant"),
            ],
        )
        self.metrics_url = f"http://{target}/metrics"
        self.prometheus = Prometheus(folder, target)
        self.guests: list[Guest] = []
        self._is_over = threading.Event()
        self._reading = threading.Thread(target=self._read_on, daemon=True)

    def open(self, image: str, **terms: object) -> Guest:
        guest = Guest(self.daemon.uri)
        self.guests.append(guest)
        guest.call("open", image=image, **terms)
        return guest

    def wait_scraped(self, expr: str) -> None:
        """Wait until Prometheus has what this asks for."""
        until(lambda: bool(self.prometheus.values(expr)))

    def wait_ready(self) -> None:
        """Wait until both serve."""
        self.daemon.wait_ready()
        self.prometheus.wait_ready()

    def play(self) -> None:
        """Be ready, then have Prometheus see everything before and after the load."""
        self.wait_ready()
        readers = [self.open("small", guest=f"r{nr}", quota_bytes=1 << 20) for nr in range(2)]
        stopped = self.open("small", guest="stopped", quota_bytes=16 << 12)
        torn = self.open("tenant/torn", guest="torn")
        self.wait_scraped('count(cowshed_guest_requests_total{image="small"}) == 3')
        self.wait_scraped('cowshed_load_errors_total{image="torn"}')

        for _ in range(3):
            for reader in readers:
                assert (
                    reader.call("compare", path=str(self.small), offset=0, length=IMAGE_BYTES) == 0
                )
        for reader in readers:
            reader.call("fill", offset=0, length=64 << 12, byte=1)
            reader.call("discard", offset=0, length=8 << 12)
        # The next write after its quota waits for ever; the guest goes on existing.
        stopped.start("fill", offset=0, length=32 << 12, byte=2)
        self.tear(torn)
        self.command()
        self._reading.start()
        self.wait_scraped('cowshed_guests{image="small", state="stopped-quota"} == 1')
        self.wait_scraped('cowshed_load_errors_total{image="torn"} > 0')
        self.wait_scraped("cowshed_source_changed == 1")
        # Two readers gave 8 pages back of 64, known when discards are read and charges settled.
        self.wait_scraped(f'sum(cowshed_guest_private_bytes{{guest=~"r."}}) == {2 * 56 * 4096}')
        self.wait_scraped("cowshed_audit_timestamp_seconds > 0")
        self.wait_scraped("sum(cowshed_connections_dropped_total) > 0")
        self.wait_scraped("instance:cowshed_pinned:ratio > 0")
        self.wait_scraped('ALERTS{alertstate="firing"}')
        for estimate in ("hit_ratio", "estimated_working_set_bytes", "hit_ratio_at_capacity"):
            self.wait_scraped(f'cowshed_{estimate}{{window="10s"}}')

    def _read_on(self) -> None:
        """Use most of what is resident, so that most probes are touched, and estimates soon known.

        It fits beside what is pinned and the standby list: probes of a list that overflows end
        when they are dropped, and tell nothing.
        """
        while not self._is_over.wait(0.02):
            self.guests[0].call("hash", offset=0, length=3 << 20)

    def tear(self, guest: Guest) -> None:
        """Cut the source short under its guest, who gets an I/O error and not a wrong byte."""
        os.truncate(self.torn, IMAGE_BYTES // 2)
        with pytest.raises(AssertionError, match="OSError"):
            guest.call("read", offset=IMAGE_BYTES - 4096, length=4096)

    def command(self) -> None:
        """What operators do, and what strangers do."""
        self.daemon.request("pin", image="small", offset=0, length=256 << 10)
        self.daemon.request("evict", image="small")
        with connect(self.daemon.uri) as backend:
            backend.request("warm", image="small", offset=0, length=1 << 20)
        assert self.daemon.mismatches() == []
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(self.folder / "cowshed.sock"))
            stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            while stranger.recv(4096):
                pass

    def close(self) -> None:
        self._is_over.set()
        if self._reading.is_alive():
            self._reading.join()
        for guest in self.guests:
            guest.close()
        self.prometheus.kill()
        self.daemon.kill()


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with new_run_dir() as folder:
        made = Scene(folder)
        try:
            made.play()
            yield made
        finally:
            made.close()


def filled_in(expr: str) -> str:
    """The query as Grafana sends it, with all of every variable chosen."""
    for name, value in {**VARIABLES, **EVERYTHING}.items():
        expr = expr.replace(name, value)
    # Of longer windows nothing is known yet.
    expr = re.sub(r'window="\d+s"', 'window="10s"', expr)
    assert "$" not in expr, f"a variable that the test does not know: {expr}"
    return expr


def exported(scene: Scene) -> dict[str, set[str]]:
    """The samples' names of each metric in the backend's own answer, estimates known or not."""
    found: dict[str, set[str]] = {}
    family = ""
    for line in get(scene.metrics_url).splitlines():
        if line.startswith("# TYPE "):
            family = line.split()[2]
            is_estimate = family in CATALOG and CATALOG[family].is_estimate
            found[family] = {family} if is_estimate else set()
        elif not line.startswith("#"):
            found[family].add(re.split(r"[ {]", line)[0])
    return found


def unanswered(scene: Scene, queries: list[Query]) -> list[str]:
    """The queries that get no answer, or nothing but NaN, however often they are asked.

    A scrape that takes longer than there is between two fails, and there is nothing until the next.
    """
    left = list(queries)

    def are_answered() -> bool:
        left[:] = [
            query
            for query in left
            if all(map(math.isnan, scene.prometheus.values(filled_in(query.expr))))
        ]
        return not left

    with contextlib.suppress(AssertionError):
        until(are_answered)
    return [f"{query.place}: {query.expr}" for query in left]


def test_every_panel_has_an_answer(scene: Scene) -> None:
    assert len(panel_queries()) > 100
    assert unanswered(scene, panel_queries()) == []


def shown(scene: Scene, place: str) -> list[float]:
    """What a panel's first query shows now, in order."""
    (query,) = [query for query in panel_queries() if query.place == f"{place}: A"]
    return sorted(scene.prometheus.values(filled_in(query.expr)))


def test_figures_say_what_was_done(scene: Scene) -> None:
    status = scene.daemon.status()
    wanted = {
        "overview: Guests": [4],
        "overview: Guests stopped": [1],
        "overview: Sources changed": [1],
        "overview: Audit mismatches": [0],
        "overview: Backends down": [0],
        "overview: Capacity": [status["capacity_bytes"]],
        "overview: Resident": [pytest.approx(status["resident_bytes"], abs=OUT_BYTES)],
        "overview: Saved by sharing": [pytest.approx(status["saved_bytes"], abs=4 * OUT_BYTES)],
        "guest: Guests with figures": [4],
        # torn wrote nothing; r0 and r1 gave 8 of 64 pages back, of 256; stopped has all of its 16.
        "guest: Private bytes, of the quota": [0, 56 / 256, 56 / 256, 1],
        "drain: State": [0],
        "drain: Time left": [0],
    }

    found: dict[str, list[float]] = {}

    def are_shown() -> bool:
        found.update((place, shown(scene, place)) for place in wanted)
        return found == wanted

    with contextlib.suppress(AssertionError):  # the next scrape shows what a late one does not
        until(are_shown)
    assert found == wanted
    until(lambda: any(nr > 0 for nr in shown(scene, "overview: Load errors")))
    until(lambda: any(0 < rate <= 1 for rate in shown(scene, "overview: Hit rate")))


def test_every_label_that_a_panel_names_is_there(scene: Scene) -> None:
    for query in panel_queries():
        for series in scene.prometheus.series(filled_in(query.expr)):
            named = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
            assert named <= set(series["metric"]), query


def test_every_variable_has_values_to_choose_from(scene: Scene) -> None:
    wanted = {
        "job": ["cowshed"],
        "image": ["small", "torn"],
        "guest": ["r0", "r1", "stopped", "torn"],
    }
    for board in boards().values():
        for variable in board["templating"]["list"]:
            if variable["type"] != "query":
                continue
            label = variable["name"]
            metric = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert metric
            values = scene.prometheus.api(
                f"label/{label}/values", **{"match[]": filled_in(metric[1])}
            )
            assert values == wanted.get(label, values)
            assert values


def test_every_rule_is_evaluated_and_every_record_has_values(scene: Scene) -> None:
    until(lambda: all(rule["health"] != "unknown" for rule in scene.prometheus.rules()))
    assert {rule["name"]: rule.get("lastError", "") for rule in scene.prometheus.rules()} == {
        query.place: "" for query in rule_queries()
    }
    assert unanswered(scene, [Query(name, name) for name in records()]) == []


def test_alerts_see_what_happened_and_nothing_else(scene: Scene) -> None:
    wanted = {
        "CowshedSourceChanged": "firing",
        "CowshedSourceErrors": "firing",
        "CowshedGuestStopped": "seen",
        **{f"Cowshed{quiet}": "inactive" for quiet in ("BackendDown", "AuditMismatch")},
        **{f"Cowshed{quiet}": "inactive" for quiet in ("DrainStuck", "PinsNearCapacity")},
    }

    found: dict[str, str] = {}

    def are_seen() -> bool:
        states = scene.prometheus.alert_states()
        if states["CowshedGuestStopped"] in ("pending", "firing"):  # firing after a minute
            states["CowshedGuestStopped"] = "seen"
        found.update((name, states[name]) for name in wanted)
        return found == wanted

    with contextlib.suppress(AssertionError):
        until(are_seen)
    assert found == wanted


def test_every_query_of_a_runbook_is_valid(scene: Scene) -> None:
    assert len(runbook_queries()) > 40
    for query in runbook_queries():
        scene.prometheus.values(query.expr)


def test_every_metric_that_is_asked_for_is_exported(scene: Scene) -> None:
    samples = set().union(*exported(scene).values(), FROM_PROMETHEUS, records())
    queries = [*panel_queries(), *rule_queries(), *runbook_queries()]
    missing = {name: query.place for query in queries for name in names_in(query.expr) - samples}
    assert missing == {}


def test_every_metric_of_ours_that_is_exported_is_shown(scene: Scene) -> None:
    shown = {name for query in [*panel_queries(), *rule_queries()] for name in names_in(query.expr)}
    families = exported(scene).items()
    unseen = {name for name, samples in families if not samples & shown}
    assert {name for name in unseen if name.startswith("cowshed_")} == set()


def test_every_exported_metric_is_documented_and_the_other_way_round(scene: Scene) -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    documented = set(re.findall(r"`((?:cowshed|process|python)_\w+)", page))
    families = {name for name in exported(scene) if name.startswith("cowshed_")}
    assert families <= documented
    known = set().union(*exported(scene).values(), exported(scene))
    assert {name for name in documented if name.startswith("cowshed_")} <= known


def test_backend_that_goes_is_noticed() -> None:
    with new_run_dir() as folder, contextlib.closing(Scene(folder)) as alone:
        alone.wait_ready()
        alone.wait_scraped("up == 1")
        # Prometheus may have come before the backend.
        until(lambda: alone.prometheus.alert_states()["CowshedBackendDown"] == "inactive")
        alone.daemon.kill()
        until(lambda: alone.prometheus.alert_states()["CowshedBackendDown"] != "inactive")
        (down,) = [query for query in panel_queries() if "Backends down" in query.place]
        assert alone.prometheus.values(filled_in(down.expr)) == [1.0]
