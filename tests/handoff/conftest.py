# SPDX-License-Identifier: Apache-2.0
from small_disk import small_disk
from two_hosts import hosts, image, pair

__all__ = ["hosts", "image", "pair", "small_disk"]
