# SPDX-License-Identifier: Apache-2.0
"""This program's version; pyproject.toml reads it from here.

A constant, because importlib.metadata takes a tenth of the daemon's start to parse it out of the
installation.
"""

from typing import Final

VERSION: Final = "0.1.0"
