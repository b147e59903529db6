# SPDX-License-Identifier: Apache-2.0
from two_hosts import hosts, image, pair

__all__ = ["hosts", "image", "pair"]
