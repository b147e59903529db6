# SPDX-License-Identifier: Apache-2.0
"""Look up names: several domains may each have an image, or a guest, of the same name.

An operator gives NAME, if only one domain has it, or DOMAIN/NAME. A guest gives NAME and gets its
own domain's; it cannot find out what other domains have, since it gets the same error as for a name
that does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from cowshed.cache.errors import UsageError
from cowshed.cache.images import DEFAULT_DOMAIN, image_label

__all__ = ["Named", "find_for_guest", "find_for_operator", "image_socket_path"]


class Named(Protocol):
    """Something with a domain and a name: an image, the configuration of one, a guest."""

    @property
    def domain(self) -> str:
        """The domain."""

    @property
    def name(self) -> str:
        """The name, unique in the domain."""


N = TypeVar("N", bound=Named)


def find_for_operator(things: Iterable[N], text: str, what: str = "image") -> N:
    """Return the one called NAME or DOMAIN/NAME; UsageError, with the choices, if not just one."""
    things = list(things)
    # Domain names have no slash; a full name wins over a name that looks like it.
    found = [each for each in things if text == _full(each)] or [
        each for each in things if text == each.name
    ]
    if not found:
        raise _none(what, text, map(_label, things))
    if len(found) > 1:
        choices = ", ".join(sorted(map(_full, found)))
        raise UsageError(f"{what} {text!r} is in several domains: name one of {choices}")
    return found[0]


def find_for_guest(images: Iterable[N], text: str, domain: str, *, is_operator: bool = False) -> N:
    """Return the image of that name in a guest's domain; UsageError lists only those there.

    An operator's guest may name another domain's image only as DOMAIN/NAME: sharing frames across
    domains must be explicit.
    """
    images = list(images)
    own = [image for image in images if image.domain == domain]
    for image in own:
        if text == image.name:
            return image
    for image in images if is_operator else own:
        if text == _full(image):
            return image
    raise _none("image", text, map(_label, images) if is_operator else (one.name for one in own))


def image_socket_path(run_dir: Path, image: Named) -> Path:
    """Return the path of an image's socket: images/NAME.sock, or images/DOMAIN/NAME.sock."""
    folder = run_dir / "images"
    if image.domain != DEFAULT_DOMAIN:
        folder /= image.domain
    return folder / f"{image.name}.sock"


def _full(image: Named) -> str:
    return f"{image.domain}/{image.name}"


def _label(image: Named) -> str:
    return image_label(image.domain, image.name)


def _none(what: str, text: str, there: Iterable[str]) -> UsageError:
    return UsageError(f"no {what} {text!r}; there is {', '.join(sorted(there)) or 'none'}")
