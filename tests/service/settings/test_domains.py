# SPDX-License-Identifier: Apache-2.0
"""Who is in which domain, what an image's name means for whom, and what is refused."""

import grp
import os
import pwd
from pathlib import Path

import pytest

from cowshed.cache.errors import UsageError
from cowshed.service.images.access import Access
from cowshed.service.settings.config import config_load
from cowshed.service.settings.domains import DomainMembers, Domains, Identity, parse_domains
from cowshed.service.settings.images import ImageSpec
from cowshed.service.settings.names import find_for_guest, find_for_operator, image_socket_path

A = ImageSpec("debian", "/d", "tenant-a")
B = ImageSpec("debian", "/d", "tenant-b")
NOBODY = pwd.getpwnam("nobody").pw_uid
ONLY_B = ImageSpec("secret", "/s", "tenant-b")
PLAIN = ImageSpec("alpine", "/a")
IMAGES = [A, B, ONLY_B, PLAIN]


@pytest.fixture
def domains() -> Domains:
    return Domains(
        {
            "tenant-a": DomainMembers(frozenset({1001}), frozenset({50}), frozenset({"vm.a"})),
            "tenant-b": DomainMembers(frozenset({1002}), frozenset({60}), frozenset({"vm.b"})),
        }
    )


@pytest.mark.parametrize(
    ("identity", "domain"),
    [
        (Identity(), "default"),
        (Identity(0, 0), "default"),
        (Identity(1001, 1001), "tenant-a"),
        (Identity(1003, 60), "tenant-b"),
        (Identity(1001, 60), "tenant-a"),  # the user before the group
        (Identity(client_name="vm.b"), "tenant-b"),
        (Identity(client_name="vm.c"), "default"),
        (Identity(client_name=""), "default"),
        (Identity(1001, 50, "vm.b"), "tenant-b"),
    ],
)
def test_identity_decides_the_domain(domains: Domains, identity: Identity, domain: str) -> None:
    assert domains.domain_of(identity) == domain


def test_a_domain_admits_its_own_guests_and_operators(domains: Domains) -> None:
    assert domains.admits(Identity(1001, 1), "tenant-a")
    assert not domains.admits(Identity(1001, 1), "tenant-b")
    assert not domains.admits(Identity(1001, 1), "default")
    assert domains.admits(Identity(0, 0), "tenant-b")
    assert domains.admits(Identity(os.geteuid(), 1), "tenant-b")
    assert not domains.admits(Identity(client_name="vm.a"), "tenant-b")


def test_a_certificate_is_known_by_the_name_that_is_listed(domains: Domains) -> None:
    assert domains.client_name(["host", "vm.a"]) == "vm.a"
    assert domains.client_name(["host", "other"]) == "host"
    assert domains.client_name([]) is None
    with pytest.raises(UsageError, match=r"several domains \(tenant-a, tenant-b\)"):
        domains.client_name(["vm.a", "vm.b"])


def test_a_guest_finds_its_own_domains_images_and_no_others() -> None:
    assert find_for_guest(IMAGES, "debian", "tenant-a") is A
    assert find_for_guest(IMAGES, "debian", "tenant-b") is B
    assert find_for_guest(IMAGES, "tenant-a/debian", "tenant-a") is A
    for name in ("secret", "nobodys", "tenant-b/secret", "tenant-b/debian", "alpine", ""):
        with pytest.raises(UsageError) as caught:
            find_for_guest(IMAGES, name, "tenant-a")
        assert str(caught.value) == f"no image {name!r}; there is debian"
    with pytest.raises(UsageError, match="there is none"):
        find_for_guest(IMAGES, "debian", "tenant-c")


def test_an_operators_guest_crosses_domains_by_the_full_name_only() -> None:
    assert find_for_guest(IMAGES, "tenant-b/debian", "default", is_operator=True) is B
    with pytest.raises(UsageError, match="there is alpine, tenant-a/debian, tenant-b/debian"):
        find_for_guest(IMAGES, "secret", "default", is_operator=True)


def test_only_a_guests_own_images_are_listed_to_it(domains: Domains) -> None:
    access = Access(domains, IMAGES)
    assert access.usable(IMAGES, Identity(1001, 1)) == [A]
    assert access.usable(IMAGES, Identity(client_name="vm.b")) == [B, ONLY_B]
    assert access.usable(IMAGES, Identity(7, 7)) == [PLAIN]
    assert access.usable(IMAGES, Identity(0, 0)) == IMAGES


def test_an_operator_names_what_is_unique_and_is_told_the_choices_else() -> None:
    assert find_for_operator(IMAGES, "alpine") is PLAIN
    assert find_for_operator(IMAGES, "default/alpine") is PLAIN
    assert find_for_operator(IMAGES, "secret") is ONLY_B
    assert find_for_operator(IMAGES, "tenant-b/debian") is B
    with pytest.raises(UsageError, match="several domains: name one of tenant-a/debian, tenant-b/"):
        find_for_operator(IMAGES, "debian")
    with pytest.raises(UsageError, match="no image 'x'; there is alpine, tenant-a/debian, ten"):
        find_for_operator(IMAGES, "x")


def test_nobodys_name_stands_in_for_anothers_full_one() -> None:
    mine, forged = ImageSpec("x", "/x", "tenant-a"), ImageSpec("tenant-a/x", "/y")
    assert find_for_operator([forged, mine], "tenant-a/x", "guest") is mine
    assert find_for_operator([forged, mine], "default/tenant-a/x", "guest") is forged
    with pytest.raises(UsageError, match=r"no guest 'y'; there is tenant-a/x, tenant-a/x$"):
        find_for_operator([forged, mine], "y", "guest")


def test_each_image_has_a_socket_of_its_own() -> None:
    assert image_socket_path(Path("/run/c"), PLAIN) == Path("/run/c/images/alpine.sock")
    assert image_socket_path(Path("/run/c"), A) == Path("/run/c/images/tenant-a/debian.sock")


# Configuration.

TENANTS = """
[images]
alpine = "/a.raw"

[[image]]
name = "debian"
source = "d.raw"
domain = "tenant-a"

[[image]]
name = "debian"
source = "d.raw"
domain = "tenant-b"

[[image]]
name = "debian"
source = "/d.raw"

[domains.tenant-a]
uids = [1001, "nobody"]
gids = [50, "nogroup"]
clients = ["vm.a"]

[domains.tenant-b]
"""


def write(folder: Path, toml: str) -> Path:
    path = folder / "cowshed.toml"
    path.write_text(toml)
    return path


def test_a_file_says_images_and_members_of_domains(tmp_path: Path) -> None:
    config = config_load(config_file=write(tmp_path, TENANTS))
    source = str(tmp_path / "d.raw")
    assert config.images == (
        ImageSpec("alpine", "/a.raw"),
        ImageSpec("debian", source, "tenant-a"),
        ImageSpec("debian", source, "tenant-b"),
        ImageSpec("debian", "/d.raw"),
    )
    nogroup = grp.getgrnam("nogroup").gr_gid
    assert config.domains.members == {
        "tenant-a": DomainMembers(
            frozenset({1001, NOBODY}), frozenset({50, nogroup}), frozenset({"vm.a"})
        ),
        "tenant-b": DomainMembers(),
    }


def test_an_option_takes_the_place_of_the_image_in_its_domain_only(tmp_path: Path) -> None:
    config = config_load(
        config_file=write(tmp_path, TENANTS),
        images=["debian=/new,domain=tenant-a", "debian=/other,domain=tenant-c"],
    )
    by_label = {image.label: image.source for image in config.images}
    assert by_label == {
        "alpine": "/a.raw",
        "tenant-a/debian": "/new",
        "tenant-b/debian": str(tmp_path / "d.raw"),
        "debian": "/d.raw",
        "tenant-c/debian": "/other",
    }


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("a=/x", ImageSpec("a", "/x")),
        ("a=/x,y", ImageSpec("a", "/x,y")),
        ("a=/x,y=z", ImageSpec("a", "/x,y=z")),
        ("a=/x,y,domain=d", ImageSpec("a", "/x,y", "d")),
        ("a=/x,domain=d,y", ImageSpec("a", "/x,domain=d,y")),
        ("a=/x,domain=default", ImageSpec("a", "/x")),
        ("a=/x\ny,domain=d", ImageSpec("a", "/x\ny", "d")),
        ("a=file:///x%2Cdomain=e", ImageSpec("a", "/x,domain=e")),
        ("a=file:///x%2Cdomain=e,domain=d", ImageSpec("a", "/x,domain=e", "d")),
        ("a=/x,extent=2M", ImageSpec("a", "/x", extent_bytes=2 << 20)),
        ("a=/x,extent=1K,domain=d,y", ImageSpec("a", "/x,extent=1K,domain=d,y")),
        (
            "a=/x,extent=4K,trim=zeros,domain=d",
            ImageSpec("a", "/x", "d", trim="zeros", extent_bytes=4096),
        ),
    ],
)
def test_only_a_trailing_known_key_ends_a_source(option: str, expected: ImageSpec) -> None:
    assert config_load(images=[option]).images == (expected,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a=/x,domain="], "image 'a' has an empty domain: write domain=NAME or leave it out"),
        (["a=/x,domain=b,domain=c"], "image 'a' has domain= twice: give it once"),
        (["a=/x,domain=b/c"], "domain name 'b/c' is not usable"),
        (["a=/x,domain=.."], "domain name '..' is not usable"),
        (["a=/x,domain=a.sock"], "domain name 'a.sock' is not usable"),
        (["a=/x,domain=" + "d" * 33], "is not usable: use up to 32"),
        (["a=,domain=b"], "source '' of image 'a' names no file"),
        (
            ["a=/x,domain=b", "a=/y,domain=b"],
            "'b/a' is given twice: use each name once in a domain",
        ),
        (["a=/x", "a=/y,domain=default"], "image 'a' is given twice: use each name once"),
    ],
)
def test_wrong_option_is_one_line(options: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_load(images=options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("domains = 1", "domains is 1: write [domains.NAME]"),
        ("[domains]\na = 1", "domain 'a' is 1: write [domains.a]"),
        ("[domains.'a b']", "domain name 'a b' is not usable"),
        ("[domains.default]\nuids = [1]", "domain 'default' is for guests that no other lists"),
        ("[domains.a]\nuid = [1]", "domain 'a' has unknown key 'uid': did you mean 'uids'?"),
        ("[domains.a]\nuids = 1", "uids of domain 'a' is 1: give a list, as uids = [...]"),
        ("[domains.a]\nuids = [-1]", "domain 'a' lists uid -1: give a whole number from 0"),
        ("[domains.a]\nuids = [4294967295]", "domain 'a' lists uid 4294967295: give a whole"),
        ("[domains.a]\nuids = [true]", "domain 'a' lists uid True: give a whole number"),
        ("[domains.a]\ngids = [1.5]", "domain 'a' lists gid 1.5: give a whole number"),
        ("[domains.a]\nuids = ['no such']", "lists user 'no such', which this host does not know"),
        ('[domains.a]\nuids = ["a\\u0000b"]', "which this host does not know"),
        ("[domains.a]\ngids = ['no such']", "lists group 'no such', which this host does not"),
        ("[domains.a]\nclients = ['']", "domain 'a' lists client '': give a certificate's name"),
        ("[domains.a]\nclients = [1]", "domain 'a' lists client 1: give a certificate's name"),
        (
            "[domains.a]\nuids = [7]\n[domains.b]\nuids = [7]",
            "uid 7 is in domains 'a' and 'b': list it in one of them",
        ),
        ("[domains.a]\ngids = [7]\n[domains.b]\ngids = [7]", "gid 7 is in domains 'a' and 'b'"),
        (
            "[domains.a]\nclients = ['c']\n[domains.b]\nclients = ['c']",
            "client 'c' is in domains 'a' and 'b'",
        ),
        (
            f"[domains.a]\nuids = ['nobody']\n[domains.b]\nuids = [{NOBODY}]",
            "is in domains 'a' and 'b'",
        ),
        ("[image]\nname = 'a'", "write [[image]], and name and source below it"),
        ("image = [1]", "image is [1]: write [[image]]"),
        ("[[image]]\nname = 'a'", 'an [[image]] has no source: write source = "..."'),
        ("[[image]]\nsource = 'a'", 'an [[image]] has no name: write name = "..."'),
        (
            "[[image]]\nname = 'a'\nsource = '/a'\ndomian = 'b'",
            "image 'a' has unknown key 'domian': did you mean 'domain'?",
        ),
        ("[[image]]\nname = 'a'\nsource = '/a'\ndomain = ''", "domain is '': give text in quotes"),
        ("[[image]]\nname = 'a'\nsource = 1", "source is 1: give text in quotes"),
        (
            "[images]\na = '/a'\n[[image]]\nname = 'a'\nsource = '/b'",
            "image 'a' is given twice: use each name once",
        ),
    ],
)
def test_wrong_file_is_one_line_that_names_the_file(
    tmp_path: Path, toml: str, message: str
) -> None:
    path = write(tmp_path, toml)
    with pytest.raises(UsageError) as caught:
        config_load(config_file=path, images=["i=/i"])
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_members_may_be_listed_twice_in_their_own_domain() -> None:
    assert parse_domains({"a": {"uids": [7, 7]}}).domain_of(Identity(7)) == "a"
