# SPDX-License-Identifier: Apache-2.0
"""The C core is built with its assertions, whatever flags Python was built with."""

from pathlib import Path

from cowshed.cache import _core


def test_the_core_keeps_its_assertions() -> None:
    assert b"__assert_fail" in Path(str(_core.__file__)).read_bytes()
