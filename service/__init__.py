# SPDX-License-Identifier: Apache-2.0
"""The composition root: configuration, daemon, command line; knows all the other packages."""

from cowshed.service.runtime.sizes import format_bytes, parse_size
from cowshed.service.settings.config import Config, OnQuota
from cowshed.service.settings.images import ImageSpec

__all__ = ["Config", "ImageSpec", "OnQuota", "format_bytes", "parse_size"]
