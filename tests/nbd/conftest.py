# SPDX-License-Identifier: Apache-2.0
"""What the tests with NBD's clients share: a daemon to connect to, and somebody else to be."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from domains import NOBODY, MakeImage, StartDaemon
from nbd_site import SIZE, Site


@pytest.fixture
def make_site(make_image: MakeImage, start_daemon: StartDaemon) -> Callable[..., Site]:
    """Serve an image: make_site("--nbd", ..., size=...)."""

    def make(*arguments: str, size: int = SIZE, **how: Any) -> Site:
        path = make_image(size)
        return Site(start_daemon("--image", f"d={path}", *arguments, **how), path)

    return make


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site("--nbd", "127.0.0.1:0", "--verbose")


@pytest.fixture
def nobody() -> int:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else as well")
    return NOBODY
