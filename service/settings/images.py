# SPDX-License-Identifier: Apache-2.0
"""The images to serve: name, source and domain. Opens nothing.

An option is ``NAME=SOURCE``, then ``,domain=DOMAIN``, ``,trim=image`` or ``,trim=zeros``, and
``,extent=SIZE`` if wanted. Only a known key ends the source, so it may contain commas; a file whose
name ends in ``,domain=x`` is ``file:///dir/name%2Cdomain=x``.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from cowshed.cache.errors import UsageError
from cowshed.cache.images import DEFAULT_DOMAIN, image_label
from cowshed.service.runtime.sizes import parse_size
from cowshed.service.settings.domains import DomainMembers, check_domain_name

_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OPTION = re.compile(r"(?P<source>.*),(?P<key>domain|trim|extent)=(?P<value>[^,]*)", re.DOTALL)
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):")

# How a range that an NBD client trimmed reads: as the image again, or as zeros.
TRIMS = ("image", "zeros")

EXTENT_MIN_BYTES = 4 << 10
EXTENT_MAX_BYTES = 2 << 20


@dataclass(frozen=True)
class ImageSpec:
    """One image to serve: its name, the absolute path of its source, and its domain.

    allowed is who of the domain may use it; None: everybody there. trim is one of TRIMS, and
    extent_bytes the size of its extents; None: the configuration's.
    """

    name: str
    source: str
    domain: str = DEFAULT_DOMAIN
    allowed: DomainMembers | None = None
    trim: str | None = None
    extent_bytes: int | None = None

    @property
    def label(self) -> str:
        """Its name where images of several domains may appear."""
        return image_label(self.domain, self.name)


def absolute(path: Path) -> Path:
    """Make `path` absolute, without ``..``; keeps symbolic links, which Path.resolve follows."""
    return Path(os.path.abspath(path))


def check_trim(trim: str, of: str = "") -> None:
    """Raise UsageError unless trim is one of TRIMS."""
    if trim not in TRIMS:
        raise UsageError(f"trim {trim!r}{of} is not {' or '.join(TRIMS)}: use one")


def check_extent(extent_bytes: int, of: str = "") -> None:
    """Raise UsageError unless extents may have that size."""
    if not EXTENT_MIN_BYTES <= extent_bytes <= EXTENT_MAX_BYTES or extent_bytes & (
        extent_bytes - 1
    ):
        raise UsageError(
            f"extent of {extent_bytes} bytes{of}: use a power of two, 4K to 2M, such as 64K"
        )


def parse_image(text: str) -> tuple[str, str, dict[str, str]]:
    """Split ``NAME=SOURCE[,domain=DOMAIN][,trim=WHAT][,extent=SIZE]``: name, source, and the rest.

    Later ``=`` belong to the source. Raises UsageError.
    """
    name, equals, source = text.partition("=")
    if not equals:
        raise UsageError(f"image {text!r} has no '=': write NAME=SOURCE, as debian=/srv/debian.raw")
    options: dict[str, str] = {}
    while match := _OPTION.fullmatch(source):
        source, key, value = match["source"], match["key"], match["value"]
        if key in options:
            raise UsageError(f"image {name!r} has {key}= twice: give it once")
        if not value:
            raise UsageError(f"image {name!r} has an empty {key}: write {key}=NAME or leave it out")
        options[key] = value
    return name, source, options


def image_spec(
    name: str,
    source: str,
    base_dir: Path,
    domain: str = DEFAULT_DOMAIN,
    allowed: DomainMembers | None = None,
    trim: str | None = None,
    extent: str | None = None,
) -> ImageSpec:
    """Check an image; a relative path starts at `base_dir`. Raises UsageError; opens nothing."""
    if not _IMAGE_NAME.fullmatch(name):
        raise UsageError(
            f"image name {name!r} is not usable: use up to 64 letters, digits, '.', '_' and "
            "'-', a letter or digit first"
        )
    check_domain_name(domain)
    if trim is not None:
        check_trim(trim, f" of image {name!r}")
    extent_bytes = None if extent is None else parse_size(extent, f"extent of image {name!r}")
    if extent_bytes is not None:
        check_extent(extent_bytes, f" of image {name!r}")
    path = _source_path(name, source)
    if not path or "\0" in path:
        raise UsageError(f"source {source!r} of image {name!r} names no file: give a path")
    return ImageSpec(name, os.path.abspath(base_dir / path), domain, allowed, trim, extent_bytes)


def _source_path(name: str, source: str) -> str:
    """Return the path of `source`, a plain path or an RFC 8089 ``file:`` URL."""
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
