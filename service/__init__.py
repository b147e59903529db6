# SPDX-License-Identifier: Apache-2.0
"""The composition root: configuration, daemon, command line; knows all the other packages."""

from cowshed.service.config import Config, OnQuota
from cowshed.service.images import ImageSpec
from cowshed.service.sizes import format_bytes, parse_size

__all__ = ["Config", "ImageSpec", "OnQuota", "format_bytes", "parse_size"]
