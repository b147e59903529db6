# SPDX-License-Identifier: Apache-2.0
"""The page at / of the metrics port: the state it is drawn from, and what Chromium makes of it."""

import json
import re
import tomllib
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import Browser, needs_browser, new_browser
from domains import Daemon, MakeImage, StartDaemon, StartGuest, until
from hypothesis import given
from hypothesis import strategies as st

from cowshed.cache import FileSource, Image, PageStore
from cowshed.service.web.state import MOST_CELLS, PageStateReader, image_map, run_lengths

pytestmark = pytest.mark.slow

Body = dict[str, Any]
MIB = 1 << 20
EXTENT = 64 << 10
ROOT = Path(__file__).resolve().parents[3]
SCREENSHOTS = ROOT / "build/screenshots"


def values(encoded: list[int]) -> list[int]:
    pairs = zip(encoded[::2], encoded[1::2], strict=True)
    return [value for value, run in pairs for _ in range(run)]


# The state.


@given(st.lists(st.integers(0, 3), max_size=200))
def test_run_lengths_can_be_read_back_and_are_never_long(numbers: list[int]) -> None:
    encoded = run_lengths(numbers)
    assert values(encoded) == numbers
    assert len(encoded) <= 2 * len(numbers)
    assert all(a != b for a, b in zip(encoded[::2], encoded[2::2], strict=False))


@pytest.fixture
def store() -> Iterator[PageStore]:
    with PageStore(64 * MIB) as opened:
        yield opened


def open_image(store: PageStore, path: Path, size_bytes: int, name: str = "d") -> Image:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return store.open_image(name, FileSource.open(path))


def load(image: Image, first: int, nr: int) -> None:
    assert image.prefetch(first, nr) == nr
    assert image.wait_loaded(first, nr, 20_000)


def test_a_small_image_has_a_cell_for_each_extent(store: PageStore, tmp_path: Path) -> None:
    image = open_image(store, tmp_path / "d", 10 * EXTENT + 1)
    load(image, 3, 4)
    load(image, 10, 1)
    image.pin(0, 4, 100)
    encoded = image_map(image)
    assert (encoded["nr_extents"], encoded["extents_per_cell"], encoded["nr_cells"]) == (11, 1, 11)
    assert values(encoded["resident"]) == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]
    assert values(encoded["pinned"]) == [1] * 4 + [0] * 7
    assert values(encoded["refs"]) == values(encoded["heat"]) == [0] * 11
    image.unpin(0, 4)


def test_a_large_image_has_a_bounded_number_of_cells(store: PageStore, tmp_path: Path) -> None:
    nr_extents = 64 * MOST_CELLS + 1
    image = open_image(store, tmp_path / "d", nr_extents * EXTENT)
    load(image, 60, 10)
    load(image, nr_extents - 1, 1)
    encoded = image_map(image)
    per_cell = encoded["extents_per_cell"]
    assert per_cell == 65
    assert encoded["nr_cells"] <= MOST_CELLS
    assert encoded["nr_cells"] * per_cell >= nr_extents
    resident = values(encoded["resident"])
    assert len(resident) == encoded["nr_cells"]
    assert resident[:2] == [5, 5]
    assert resident[-1] == 1
    assert sum(resident) == 11


def status_of(names: list[str], guests: list[Body]) -> Body:
    images = [{"name": name, "domain": "default"} for name in names]
    return {"run_dir": "/r", "images": images, "guests": guests}


def test_the_state_is_bounded_whatever_there_is(store: PageStore, tmp_path: Path) -> None:
    names = [f"i{no}" for no in range(40)]
    images = [open_image(store, tmp_path / name, 4096 * EXTENT, name) for name in names]
    for no in range(0, 1000, 2):  # the worst for run lengths
        load(images[no % 7], no, 1)
    guests: list[Body] = [
        {"name": f"g{no:04}", "domain": "default", "image": "i3", "state": "running"}
        for no in range(2000)
    ]
    guests[1777].update(state="stopped-quota", quota_bytes=4096)
    reader = PageStateReader(lambda: images, lambda: status_of(names, guests))
    body = reader.read()
    assert len(body) < 300_000
    state = json.loads(body)
    assert sum(image["map"]["nr_cells"] for image in state["images"]) <= 4 * MOST_CELLS
    assert (state["nr_guests"], state["nr_stopped"], len(state["guests"])) == (2000, 1, 500)
    assert state["images"][3]["nr_guests"] == 2000
    assert state["guests"][0]["name"] == "g1777"
    assert state["guests"][0]["cure"] == "cowshed quota --run-dir /r g1777 8K"


def test_browsers_that_ask_at_once_cost_one_look(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    now_ns = 0
    clock = SimpleNamespace(monotonic_ns=lambda: now_ns)
    monkeypatch.setattr("cowshed.service.web.state.time", clock)

    def status() -> Body:
        asked.append(1)
        return status_of([], [])

    reader = PageStateReader(list, status)
    first = reader.read()
    assert all(reader.read() is first for _ in range(100))
    assert len(asked) == 1
    now_ns += 500_000_000
    assert all(reader.read() is not first for _ in range(100))
    assert len(asked) == 2


# The page. A daemon each, one browser for all.


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    with new_browser() as started:
        yield started


@pytest.fixture
def browser(one_browser: Browser) -> Browser:
    one_browser.open("about:blank")  # the test before may have left a page that asks in vain
    one_browser.complaints()
    return one_browser


def page_url(daemon: Daemon) -> str:
    until(lambda: "event=metrics " in daemon.log())
    match = re.search(r"url=(http://\S+/)metrics", daemon.log())
    assert match
    return match[1]


def get(url: str) -> tuple[bytes, Any]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read(), answer.headers


def state_of(daemon: Daemon) -> Body:
    state: Body = json.loads(get(page_url(daemon) + "state.json")[0])
    return state


# The colours that the canvas shows at the middle of each cell's left edge, by class of the legend.
COLOURS = """
const canvas = document.querySelector(`canvas.map[data-image="${arguments[0]}"]`);
if (!canvas || !canvas.layout || canvas.dataset.layer !== arguments[1]) return null;
const at = (canvas, x, y) => {
  const ratio = canvas.width / canvas.clientWidth;
  const pen = canvas.getContext("2d");
  return pen.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data.join();
};
const classes = {};
for (const swatch of document.querySelectorAll("#legend canvas")) {
  if (swatch.dataset.class !== "pinned") classes[at(swatch, 1, 1)] = swatch.dataset.class;
}
const { size, columns, rows } = canvas.layout;
const shown = [];
for (let cell = 0; cell < rows * columns; cell++) {
  const x = (cell % columns) * size + 1;
  const y = Math.floor(cell / columns) * size + 1;
  const colour = at(canvas, x, y);
  if (colour !== "0,0,0,0") shown.push(classes[colour] ?? `unknown ${colour}`);
}
return { shown, counts: JSON.parse(canvas.dataset.counts) };
"""


def shown(browser: Browser, layer: str, image: str = "d") -> list[str]:
    """The class of each cell by its colour; the counts that the page tells are those."""
    browser.run(f"document.querySelector('input[value={layer}]').click()")
    found = browser.until(COLOURS, image, layer)
    counts = {name: count for name, count in found["counts"].items() if count}
    assert counts == Counter(found["shown"])
    return list(found["shown"])


def wait_for(browser: Browser, daemon: Daemon) -> None:
    """Until the page shows a state that was read after this call."""
    now = daemon.status()["uptime_seconds"]
    browser.until("return Number(document.body.dataset.uptime) > arguments[0]", now + 0.01)


def class_of_refs(resident: int, refs: int) -> str:
    if not resident:
        return "none"
    for least, name in ((16, "16+"), (8, "8-15"), (4, "4-7"), (2, "2-3"), (1, "1")):
        if refs >= least:
            return name
    return "0"


@needs_browser
def test_the_map_shows_what_the_daemon_has_before_and_after_an_evict(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, browser: Browser
) -> None:
    image = make_image(8 * MIB - 5)
    daemon = start_daemon("--image", f"d={image}", "--capacity", "16M", "--metrics", "127.0.0.1:0")
    guests = [start_guest(daemon.uri) for _ in range(3)]
    for no, guest in enumerate(guests):
        guest.call("open", image="d", guest=f"g{no}", window_bytes=EXTENT)
    guests[0].call("hash", offset=0, length=4 * MIB)
    for guest in guests[1:]:
        guest.call("hash", offset=0, length=MIB)
    # What readahead asked for has come then, and goes but for what a guest's thread still holds.
    daemon.request("warm", image="d", offset=4 * MIB)
    until(lambda: daemon.request("evict", image="d", offset=6 * MIB)["kept_bytes"] == 0)
    daemon.request("pin", image="d", offset=0, length=MIB // 2)
    browser.become(1280, 900)
    browser.open(page_url(daemon))
    wait_for(browser, daemon)

    status, encoded = daemon.status()["images"][0], state_of(daemon)["images"][0]["map"]
    resident, refs, heat = (values(encoded[layer]) for layer in ("resident", "refs", "heat"))
    assert len(resident) == 128
    assert sum(resident) == -(-status["resident_bytes"] // EXTENT) >= 64
    assert sum(refs) == status["refs"]
    assert shown(browser, "resident") == ["all" if each else "none" for each in resident]
    by_refs = shown(browser, "refs")
    assert by_refs == [class_of_refs(*each) for each in zip(resident, refs, strict=True)]
    assert set(by_refs) >= {"none", "1", "2-3"}
    by_heat = shown(browser, "heat")
    assert by_heat == [
        str(hot) if there else "none" for there, hot in zip(resident, heat, strict=True)
    ]
    assert len(set(by_heat)) >= 3
    browser.run("document.querySelector('input[value=resident]').click()")
    browser.screenshot(SCREENSHOTS / "before-evict.png")
    later = state_of(daemon)["images"][0]["map"]
    assert values(later["heat"]) == heat, "looking takes no touch away"

    until(lambda: daemon.request("evict", image="d")["kept_bytes"] == MIB // 2)
    assert daemon.request("evict", image="d")["kept_why"] == "pinned"
    wait_for(browser, daemon)
    assert shown(browser, "resident") == ["all"] * 8 + ["none"] * 120
    assert shown(browser, "refs") == ["2-3"] * 8 + ["none"] * 120
    heat = values(state_of(daemon)["images"][0]["map"]["heat"])
    assert min(heat[:8]) > 0
    assert heat[8:] == [0] * 120
    browser.screenshot(SCREENSHOTS / "after-evict.png")
    assert [guest.call("compare", path=str(image), offset=0, length=MIB) for guest in guests] == [
        0,
        0,
        0,
    ]
    assert daemon.mismatches() == []
    assert browser.complaints() == []


@needs_browser
def test_a_cell_of_several_extents_says_how_many_are_there(
    run_dir: Path, start_daemon: StartDaemon, start_guest: StartGuest, browser: Browser
) -> None:
    image = run_dir / "large.raw"
    with image.open("wb") as file:
        file.truncate(4 * MOST_CELLS * EXTENT)
    daemon = start_daemon("--image", f"d={image}", "--metrics", "127.0.0.1:0")
    daemon.request("warm", image="d", offset=0, length=4 * EXTENT)
    for cell, nr in ((1, 1), (2, 2), (3, 3)):
        daemon.request("warm", image="d", offset=4 * cell * EXTENT, length=nr * EXTENT)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", window_bytes=4096)
    guest.call("touch", pages=[3 * 4 * EXTENT // 4096])
    browser.become(1280, 900)
    browser.open(page_url(daemon))
    wait_for(browser, daemon)
    assert shown(browser, "refs")[:5] == ["0", "0", "0", "1", "none"]
    assert shown(browser, "heat")[:5] == ["0", "0", "0", "2", "none"]
    cells = shown(browser, "resident")
    assert len(cells) == MOST_CELLS
    assert cells[:5] == ["all", "quarter", "half", "most", "none"]
    assert set(cells[4:]) == {"none"}
    x, y = browser.run(
        "const canvas = document.querySelector('canvas.map'); canvas.scrollIntoView();"
        "const at = canvas.getBoundingClientRect(); const size = canvas.layout.size;"
        "return [at.x + 3.5 * size, at.y + 0.5 * size];"
    )
    browser.point(x, y)
    told = browser.until(
        "const tip = document.getElementById('tip'); return !tip.hidden && tip.textContent"
    )
    assert told.splitlines()[:2] == ["extents 12–15, 768K to 1M", "3 of 4 resident"]


@needs_browser
def test_names_are_text_and_nothing_comes_from_elsewhere(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, browser: Browser
) -> None:
    daemon = start_daemon("--image", f"d={make_image(MIB)}", "--metrics", "127.0.0.1:0")
    names = ["<img src=x onerror=document.title='no'>", "&lt;b&gt;\"'`${1}", "gänse 鵝 \\n"]
    guests = [start_guest(daemon.uri) for _ in names]
    for guest, name in zip(guests, names, strict=True):
        guest.call("open", image="d", guest=name, quota_bytes=4096)
    guests[0].start("poke", pages=[1, 2], byte=1)
    until(lambda: daemon.status()["guests"][0]["state"] == "stopped-quota")
    url = page_url(daemon)
    browser.open(url)
    wait_for(browser, daemon)
    cells = "document.querySelectorAll('#guests tbody td:first-child')"
    shown_names = browser.run(f"return [...{cells}].map((cell) => cell.textContent)")
    assert sorted(shown_names) == sorted(names)
    assert browser.run("return document.querySelector('#alerts').textContent").startswith(names[0])
    assert browser.run("return document.querySelectorAll('img, iframe, #guests b').length") == 0
    assert browser.run("return document.title") == "cowshed"
    resources = browser.run(
        "return performance.getEntriesByType('resource').map(each => each.name)"
    )
    assert len(resources) >= 4
    assert all(resource.startswith(url) for resource in resources)
    assert browser.complaints() == []

    # What a hole in the page would be used for is refused all the same.
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'document.title = 1';"
        "document.body.append(script);"
        "const image = document.createElement('img'); image.src = 'http://192.0.2.1/x.png';"
        "document.body.append(image);"
    )
    complaints: list[str] = []

    def refused() -> bool:
        complaints.extend(browser.complaints())
        return len([each for each in complaints if "Content Security Policy" in each]) >= 2

    until(refused)
    assert browser.run("return document.title") == "cowshed"


@needs_browser
def test_images_and_guests_of_one_name_in_two_domains_are_shown_apart(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, browser: Browser
) -> None:
    image = make_image(MIB)
    images = ("--image", f"d={image}", "--image", f"d={image},domain=tenant")
    daemon = start_daemon(*images, "--metrics", "127.0.0.1:0")
    for name, length in (("d", 4 * EXTENT), ("tenant/d", 8 * EXTENT)):
        start_guest(daemon.uri).call("open", image=name, guest="g")
        daemon.request("warm", image=f"default/{name}" if name == "d" else name, length=length)
    assert [each["nr_guests"] for each in state_of(daemon)["images"]] == [1, 1]
    browser.open(page_url(daemon))
    wait_for(browser, daemon)
    titles = "return [...document.querySelectorAll('#images h3')].map((each) => each.textContent)"
    assert browser.run(titles) == ["d", "tenant/d"]
    cells = "return [...document.querySelectorAll('#images canvas')].map((each) => "
    cells += "JSON.parse(each.dataset.counts).all)"
    assert browser.run(cells) == [4, 8]
    column = "return [...document.querySelectorAll('#guests tbody tr')].map((row) => "
    column += "row.cells[1].textContent)"
    assert browser.run(column) == ["d", "tenant/d"]
    assert browser.complaints() == []


# The page's width once the latencies, which a slow machine makes long, are as long as they get.
FIT = """
for (const cell of document.querySelectorAll("#latency td + td")) cell.textContent = "88.8 ms";
return document.documentElement.scrollWidth;
"""


@needs_browser
def test_the_page_fits_a_phone_and_both_colour_schemes(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, browser: Browser
) -> None:
    daemon = start_daemon(
        "--image", f"d={make_image(4 * MIB)}", "--capacity", "3M", "--metrics", "127.0.0.1:0"
    )
    guests = [start_guest(daemon.uri) for _ in range(4)]
    for no, guest in enumerate(guests):
        guest.call(
            "open", image="d", guest=f"a-guest-with-a-rather-long-name-{no}", quota_bytes=MIB
        )
        guest.call("touch", pages=list(range(0, 900, 1 + 7 * no)))
        guest.call("poke", pages=list(range(0, 200, 1 + no)), byte=1)
    browser.open(page_url(daemon))
    backgrounds = set()
    for columns, lines, ratio in ((360, 740, 2.0), (820, 1180, 1.0), (1280, 900, 1.0)):
        for dark in (False, True):
            browser.become(columns, lines, dark=dark, ratio=ratio)
            wait_for(browser, daemon)
            assert browser.run(FIT) == columns
            backgrounds.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
            for layer in ("resident", "refs", "heat"):
                cells = shown(browser, layer)
                assert len(cells) == 64
                assert "unknown" not in "".join(cells)
            name = f"page-{columns}-{'dark' if dark else 'light'}.png"
            browser.screenshot(SCREENSHOTS / name)
    assert len(backgrounds) == 2
    assert browser.complaints() == []


@needs_browser
def test_rates_are_drawn_and_a_daemon_that_is_gone_is_told(
    make_image: MakeImage, start_daemon: StartDaemon, start_guest: StartGuest, browser: Browser
) -> None:
    image = make_image(4 * MIB)
    settings = image.with_name("cowshed.toml")
    settings.write_text('extent = "16K"\n')  # enough are resident for an estimate
    options = ["--config", str(settings), "--capacity", "16M", "--metrics", "127.0.0.1:0"]
    daemon = start_daemon("--image", f"d={image}", *options)
    guest = start_guest(daemon.uri)
    guest.call("open", image="d", guest="g")
    browser.become(1280, 900)
    browser.open(page_url(daemon))
    wait_for(browser, daemon)
    # A page or a daemon that was kept from running for a while said something else meanwhile.
    browser.until("return document.getElementById('live').textContent === 'live'")
    for at in range(4):
        guest.call("touch", pages=[256 * at])
        wait_for(browser, daemon)
    inked = """
    const canvas = document.getElementById(arguments[0]);
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.some((value, at) => at % 4 === 3 && value);
    """
    for spark in ("fault-spark", "load-spark"):
        browser.until(inked, spark)

    def is_hit_rate_drawn() -> bool:
        guest.call("hash", offset=0, length=4 * MIB)
        return bool(browser.run(inked, "hit-spark"))

    until(is_hit_rate_drawn)
    assert daemon.stop() == 0
    told = browser.until(
        "const live = document.getElementById('live');"
        "return live.className === 'stale' && live.textContent"
    )
    assert told.startswith("no answer for ")


def test_the_pages_files_are_in_the_package_and_their_types_are_told(
    make_image: MakeImage, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--image", f"d={make_image(MIB)}", "--metrics", "127.0.0.1:0")
    url = page_url(daemon)
    page, headers = get(url)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for name in re.findall(r'(?:src|href)="([^"]+)"', page.decode()):
        assert re.fullmatch(r"[a-z.-]+", name), "only what this daemon serves"
        body, headers = get(url + name)
        assert body
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"\bstyle=|\bon[a-z]+=|<script>|<style>", page.decode())
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "web/page/*" in package_data["package-data"]["cowshed.service"]
    for path in (ROOT / "service/web/page").iterdir():
        assert "http://" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in path.read_text()
