# SPDX-License-Identifier: Apache-2.0
"""Who may use which image: domains, and the access lists within them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cowshed.cache.errors import UsageError
from cowshed.service.images.access import Access
from cowshed.service.settings.config import Config, config_load
from cowshed.service.settings.domains import Identity

CONFIG = """
[[image]]
name = "open"
source = "o.raw"

[[image]]
name = "listed"
source = "l.raw"
uids = [1001]
gids = [2002]
clients = ["vm7"]

[[image]]
name = "nobody"
source = "n.raw"
uids = []

[[image]]
name = "other"
source = "x.raw"
domain = "a"

[domains.a]
uids = [1007]
"""


@dataclass(frozen=True)
class Served:
    domain: str
    name: str


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG)
    return config_load(config_file=path, run_dir=str(tmp_path))


def names(config: Config, identity: Identity) -> list[str]:
    images = [Served(spec.domain, spec.name) for spec in config.images]
    return [image.name for image in Access(config.domains, config.images).usable(images, identity)]


@pytest.mark.parametrize(
    ("identity", "seen"),
    [
        (Identity(uid=1001, gid=5), ["open", "listed"]),
        (Identity(uid=5, gid=2002), ["open", "listed"]),
        (Identity(client_name="vm7"), ["open", "listed"]),
        (Identity(uid=5, gid=5), ["open"]),
        (Identity(client_name="vm8"), ["open"]),
        (Identity(), ["open"]),
        (Identity(uid=1007), ["other"]),
        (Identity(uid=0), ["open", "listed", "nobody", "other"]),
    ],
)
def test_an_image_is_for_those_its_list_names(
    config: Config, identity: Identity, seen: list[str]
) -> None:
    assert names(config, identity) == seen


def test_what_one_may_not_use_is_answered_as_what_is_not_there(config: Config) -> None:
    access = Access(config.domains, config.images)
    images = [Served(spec.domain, spec.name) for spec in config.images]
    answers = []
    for name in ("listed", "absent"):
        with pytest.raises(UsageError) as caught:
            access.find(images, name, Identity(uid=5))
        answers.append(str(caught.value).replace(name, "NAME"))
    assert answers[0] == answers[1] == "no image 'NAME'; there is open"
    assert access.find(images, "listed", Identity(uid=1001)).name == "listed"
    assert access.find(images, "a/other", Identity(uid=0)).domain == "a"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('uids = "alice"', "uids of image 'd' is 'alice': give a list"),
        ("uids = [-1]", "image 'd' lists uid -1"),
        ('uids = ["no-such-user"]', "image 'd' lists user 'no-such-user'"),
        ("clients = [7]", "image 'd' lists client 7"),
        ("allow = []", "image 'd' has unknown key 'allow'"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(tmp_path: Path, lines: str, words: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'[[image]]\nname = "d"\nsource = "d.raw"\n{lines}\n')
    with pytest.raises(UsageError) as caught:
        config_load(config_file=path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tls = 7", "tls is 7: write [tls]"),
        ("[tls]\ncert = 'a'\nkey = 'b'", 'tls lacks ca: write ca = "FILE"'),
        ("[tls]\ncert = 'a'\nkey = 'b'\nca = ''", "ca of tls is ''"),
        ("[tls]\ncrt = 'a'", "tls has unknown key 'crt'"),
        ("[tls]\ncert='a'\nkey='b'\nca='c'\nclients='maybe'", "clients of tls is 'maybe'"),
        ("nbd = 'localhost'", "nbd 'localhost' is not HOST:PORT"),
        ("overlay_dir = ''", "overlay_dir is ''"),
    ],
)
def test_wrong_words_about_networks_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"{text}\n")
    with pytest.raises(UsageError) as caught:
        config_load(config_file=path, images=["d=d.raw"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_of_the_file_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        "overlay_dir = 'o'\nnbd = '[::1]:0'\n[tls]\ncert='c'\nkey='/k'\nca='ca'\nclients='optional'"
    )
    config = config_load(config_file=path, images=["d=d.raw"])
    assert config.overlay_dir == tmp_path / "o"
    assert str(config.nbd) == "[::1]:0"
    assert config.tls is not None
    assert (config.tls.cert, config.tls.key) == (tmp_path / "c", Path("/k"))
    assert config.tls.clients == "optional"
