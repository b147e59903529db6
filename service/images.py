# SPDX-License-Identifier: Apache-2.0
"""Which images to serve: a name, and the file its bytes come from. Opens nothing."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from cowshed.cache.errors import UsageError

_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True)
class ImageSpec:
    """One image to serve: its name and the absolute path its bytes come from."""

    name: str
    source: str


def absolute(path: Path) -> Path:
    """`path` without ``..``, symbolic links left alone (Path.resolve would follow them)."""
    return Path(os.path.abspath(path))


def parse_image(text: str) -> tuple[str, str]:
    """Name and source of an option's ``NAME=SOURCE``; later ``=`` are the source's.

    Raises UsageError.
    """
    name, equals, source = text.partition("=")
    if not equals:
        raise UsageError(f"image {text!r} has no '=': write NAME=SOURCE, as debian=/srv/debian.raw")
    return name, source


def image_spec(name: str, source: str, base_dir: Path) -> ImageSpec:
    """A checked image; a relative path starts at `base_dir`. Raises UsageError; opens nothing."""
    if not _IMAGE_NAME.fullmatch(name):
        raise UsageError(
            f"image name {name!r} is not usable: use up to 64 letters, digits, '.', '_' and "
            "'-', a letter or digit first"
        )
    path = _source_path(name, source)
    if not path or "\0" in path:
        raise UsageError(f"source {source!r} of image {name!r} names no file: give a path")
    return ImageSpec(name, os.path.abspath(base_dir / path))


def _source_path(name: str, source: str) -> str:
    """The path `source` names, as a plain path or as an RFC 8089 ``file:`` URL."""
    match = _SCHEME.match(source)
    if match is None:
        return source
    if match["scheme"].lower() != "file":
        raise UsageError(
            f"source {source!r} of image {name!r}: {match['scheme']}: is not supported: "
            f"give a path or a file: URL (a file of that name is './{source}')"
        )
    if "?" in source or "#" in source:
        raise UsageError(
            f"source {source!r} of image {name!r} has a '?' or '#': write %3F or %23, or a path"
        )
    path = source[match.end() :]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        path = slash + rest if host in ("", "localhost") else ""
    if not path.startswith("/"):
        raise UsageError(
            f"source {source!r} of image {name!r} names no local path: write file:///absolute/path"
        )
    return unquote(path, errors="surrogateescape")
