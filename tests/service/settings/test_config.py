# SPDX-License-Identifier: Apache-2.0
"""Configuration from a file and from options: who wins, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from cowshed.cache.errors import UsageError
from cowshed.service.runtime.sizes import format_bytes
from cowshed.service.settings.config import Config, config_load, socket_path
from cowshed.service.settings.images import ImageSpec, image_spec
from cowshed.service.settings.options import OPTIONS, RUN_DIR_DEFAULT
from cowshed.service.settings.quotas import parse_quota

WHOLE_FILE = """
capacity = "2G"
run_dir = "run"
state_dir = "sets"
extent = "128K"
loaders = 7
quota = "64M"
on_quota = "kill"
log = "json"
log_level = "error"

[images]
debian = "images/debian.raw"
alpine = "file:///srv/a%20b.raw"
"""


def refusal(tmp_path: Path, toml: str) -> str:
    """The one line that configuration `toml` is refused with."""
    path = tmp_path / "cowshed.toml"
    path.write_text(toml)
    with pytest.raises(UsageError) as caught:
        config_load(config_file=path, images=["i=/i"])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_of_a_file_is_read_and_its_paths_start_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "cowshed.toml"
    path.write_text(WHOLE_FILE)
    assert config_load(config_file=path) == Config(
        images=(
            ImageSpec("debian", str(tmp_path / "images/debian.raw")),
            ImageSpec("alpine", "/srv/a b.raw"),
        ),
        run_dir=tmp_path / "run",
        state_dir=tmp_path / "sets",
        capacity_bytes=2 << 30,
        extent_bytes=128 << 10,
        loaders=7,
        default_quota_bytes=64 << 20,
        default_on_quota="kill",
        network_quota_bytes=64 << 20,
        log_format="json",
        log_level="error",
    )


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cowshed.toml"
    path.write_text(WHOLE_FILE)
    config = config_load(
        config_file=path, images=["debian=/new", "c=/c=d"], capacity="1G", run_dir="/other"
    )
    assert config.images == (
        ImageSpec("debian", "/new"),
        ImageSpec("alpine", "/srv/a b.raw"),
        ImageSpec("c", "/c=d"),
    )
    assert config.capacity_bytes == 1 << 30
    assert config.run_dir == Path("/other")
    assert config.extent_bytes == 128 << 10


def test_defaults_hold_without_a_file() -> None:
    config = config_load(images=["a=/a"])
    assert config.run_dir == Path("/run/cowshed")
    assert config.state_dir == Path("/run/cowshed/state")
    assert config.extent_bytes == 64 << 10
    assert config.default_quota_bytes is None
    assert config.default_on_quota == "stop"
    assert (config.log_format, config.log_level) == ("logfmt", "notice")


def test_what_guests_of_networks_may_ask_for_is_the_default_quota_unless_said(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cowshed.toml"
    for text, expected in (
        ("", None),
        ('quota = "1M"', 1 << 20),
        ('quota = "1M"\nnetwork_quota = "2M"', 2 << 20),
        ('quota = "1M"\nnetwork_quota = "none"', None),
        ('network_quota = "2M"', 2 << 20),
    ):
        path.write_text(text)
        assert config_load(config_file=path, images=["a=/a"]).network_quota_bytes == expected
    assert refusal(tmp_path, 'network_quota = "1"').endswith(
        "give 4K or more, or 'none' for no limit"
    )


def test_verbose_raises_a_log_level_and_never_lowers_it(tmp_path: Path) -> None:
    assert config_load(images=["a=/a"], verbose=True).log_level == "info"
    path = tmp_path / "cowshed.toml"
    for level, verbose_level in (("error", "info"), ("info", "info"), ("debug", "debug")):
        path.write_text(f'log_level = "{level}"')
        for verbose, expected in ((False, level), (True, verbose_level)):
            config = config_load(config_file=path, images=["a=/a"], verbose=verbose)
            assert config.log_level == expected


def test_relative_paths_of_options_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/cowshed.toml").write_text('[images]\nx = "../x.raw"')
    monkeypatch.chdir(tmp_path)
    config = config_load(config_file=Path("etc/cowshed.toml"), images=["y=y.raw"], run_dir="run")
    assert config.images == (
        ImageSpec("x", str(tmp_path / "x.raw")),
        ImageSpec("y", str(tmp_path / "y.raw")),
    )
    assert config.run_dir == tmp_path / "run"
    assert config.state_dir == tmp_path / "run/state"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("/srv/a.raw", "/srv/a.raw"),
        ("a.raw", "/base/a.raw"),
        ("./nbd:a", "/base/nbd:a"),
        ("file:/srv/a.raw", "/srv/a.raw"),
        ("file:///srv/a%3Fb", "/srv/a?b"),
        ("FILE://localhost/srv/a", "/srv/a"),
        ("/srv/what?#", "/srv/what?#"),
    ],
)
def test_sources_are_paths_or_file_urls(source: str, path: str) -> None:
    assert image_spec("a", source, Path("/base")).source == path


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "names no file"),
        ("a\0b", "names no file"),
        ("nbd://host/a", "nbd: is not supported"),
        ("https://host/a", "https: is not supported"),
        ("file://elsewhere/a", "names no local path"),
        ("file:a.raw", "names no local path"),
        ("file:///a?b=c", "%3F"),
        ("file:///a?", "%3F"),
        ("file:///a#b", "%23"),
        ("file:///a%00b", "names no file"),
    ],
)
def test_other_sources_are_refused(source: str, says: str) -> None:
    with pytest.raises(UsageError, match=r"image 'a'") as caught:
        image_spec("a", source, Path("/base"))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "a\n", "\u00e4", "a" * 65])
def test_image_names_that_could_not_be_a_socket_or_label_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="image name"):
        image_spec(name, "/a", Path("/"))


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("capacity = ", "is not TOML"),
        ("capacity = " + "9" * 5000, "is not TOML"),
        ('capacty = "1G"', "did you mean 'capacity'?"),
        ("watermark = 1", "known keys are"),
        ('capacity = "lots"', "capacity 'lots' is not a size"),
        ("capacity = true", "capacity is True"),
        ("capacity = 1.5", "capacity is 1.5"),
        ("capacity = -1", "capacity '-1'"),
        ("capacity = 0x" + "f" * 5000, "is not a size"),
        ('capacity = "127K"', "give 128K or more"),
        ("extent = 65537", "power of two"),
        ('extent = "2K"', "power of two"),
        ('extent = "4M"', "power of two"),
        ("extent = 0", "power of two"),
        ("loaders = 0", "use 1 to 64"),
        ("loaders = 65", "use 1 to 64"),
        ("loaders = true", "whole number"),
        ('loaders = "4"', "whole number"),
        ("quota = 4095", "less than a page"),
        ('quota = "some"', "quota 'some' is not a size"),
        ('on_quota = "pause"', "stop, kill or allow"),
        ("on_quota = 1", "text in quotes"),
        ('log = "xml"', "log 'xml' is not logfmt or json"),
        ('log_level = "loud"', "debug, info, notice, warning or error"),
        ("log_level = 3", "text in quotes"),
        ('run_dir = ""', "text in quotes"),
        ("state_dir = 1", "text in quotes"),
        ("images = []", "write [images]"),
        ("[images]\na = 1", "a path in quotes"),
        ('[images]\n"a/b" = "/a"', "image name 'a/b'"),
    ],
)
def test_a_file_that_does_not_hold_is_refused_in_one_line(
    tmp_path: Path, toml: str, says: str
) -> None:
    assert says in refusal(tmp_path, toml)


def test_refusals_of_a_value_name_the_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, 'capacity = "lots"').startswith(f"{tmp_path}/cowshed.toml: ")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cowshed.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        config_load(config_file=path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory: check --config"):
        config_load(config_file=tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "no image to serve"),
        (["debian"], "has no '='"),
        (["a=/a", "a=/b"], "given twice"),
        (["a=/a,extent=3M"], "extent of 3145728 bytes of image 'a': use a power of two, 4K to 2M"),
        (["a=/a,extent=2K"], "extent of 2048 bytes of image 'a'"),
        (["a=/a,extent=lots"], "extent of image 'a' 'lots' is not a size"),
        (["a=/a,extent="], "image 'a' has an empty extent"),
        (["a=/a,extent=2M,extent=2M"], "image 'a' has extent= twice"),
        (["=/a"], "image name ''"),
    ],
)
def test_image_options_are_checked(images: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_load(images=images)
    assert says in str(caught.value)


def test_a_config_made_by_hand_is_checked_too() -> None:
    twice = (ImageSpec("a", "/a"), ImageSpec("a", "/b"))
    with pytest.raises(UsageError, match="given twice"):
        Config(images=twice, run_dir=Path("/run/x"), state_dir=Path("/run/x/state"))


def test_an_image_has_the_extents_that_it_names_or_the_configurations(tmp_path: Path) -> None:
    path = tmp_path / "cowshed.toml"
    path.write_text(
        'extent = "16K"\n[images]\na = "/a"\n[[image]]\nname = "b"\nsource = "/b"\n'
        'extent = "2M"\n[[image]]\nname = "c"\nsource = "/c"\nextent = 4096\n'
    )
    config = config_load(config_file=path, images=["d=/d,extent=8K"])
    sizes = {spec.name: config.extent_of(spec) for spec in config.images}
    assert sizes == {"a": 16 << 10, "b": 2 << 20, "c": 4 << 10, "d": 8 << 10}
    assert (config.least_extent_bytes, config.largest_extent_bytes) == (4 << 10, 2 << 20)
    assert config_load(images=["a=/a"], extent="2M").largest_extent_bytes == 2 << 20


def test_two_of_the_largest_extents_must_fit() -> None:
    images = ["a=/a,extent=2M", "b=/b"]
    assert config_load(images=images, capacity="4M").capacity_bytes == 4 << 20
    with pytest.raises(UsageError, match="less than 2 extents of 2M: give 4M or more"):
        config_load(images=images, capacity="4095K")


def test_capacity_of_exactly_two_extents_is_enough() -> None:
    assert config_load(images=["a=/a"], capacity="128K").capacity_bytes == 128 << 10


def test_run_dir_must_leave_room_for_a_socket_name() -> None:
    longest = "/" + "d" * (107 - len("//cowshed.sock"))
    assert len(str(socket_path(Path(longest)))) == 107
    with pytest.raises(UsageError, match="shorter --run-dir"):
        config_load(images=["a=/a"], run_dir=longest + "d")


def test_the_reference_is_made_from_the_table() -> None:
    script = Path(__file__).resolve().parents[3] / "tools/config_doc.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_is_a_field_with_the_default_that_is_told() -> None:
    made = config_load(images=["a=/a"])
    for option in OPTIONS:
        if option.key in ("handoff_from", "accept_handoff"):
            continue
        value = getattr(made, option.name)
        told = option.default.replace("RUN_DIR", RUN_DIR_DEFAULT)
        match value:
            case bool():
                assert told == str(value).lower(), option.key
            case int() if option.kind == "size":
                assert told == format_bytes(value), option.key
            case int() | str() | Path():
                assert told == str(value), option.key
            case _:
                assert not value, option.key


def test_a_setting_that_is_none_is_refused_by_its_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'capacity'"):
        config_load(images=["a=/a"], capacty="1G")


def test_quota_is_a_size_or_none() -> None:
    assert parse_quota("64M") == 64 << 20
    assert parse_quota("4K") == 4096
    assert parse_quota(" None ") is None
    for less in ("0", "4095"):
        with pytest.raises(UsageError, match="less than a page"):
            parse_quota(less)


def test_the_text_of_the_file_is_kept_whatever_the_options_say(tmp_path: Path) -> None:
    path = tmp_path / "cowshed.toml"
    path.write_text("loaders = 2\n")
    image = f"d={tmp_path}/d.raw"
    assert config_load(config_file=path, images=[image], run_dir="/r").text == "loaders = 2\n"
    assert config_load(images=[image], run_dir="/r").text is None
