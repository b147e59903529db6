# SPDX-License-Identifier: Apache-2.0
"""This program's version; pyproject.toml has it from here.

A constant: importlib.metadata, which parses it out of the installation as if it were an e-mail,
takes a tenth of a daemon's start.
"""

from typing import Final

VERSION: Final = "0.1.0"
