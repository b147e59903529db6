# SPDX-License-Identifier: Apache-2.0
# The C core as Python sees it: the headers' cdef sections, through cffi's API mode. Each call gives
# the GIL up. Functions return >= 0 or -errno; cache/calls.py turns that into exceptions.
from typing import Any

ffi: Any
lib: Any
