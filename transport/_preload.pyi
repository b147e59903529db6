# SPDX-License-Identifier: Apache-2.0
# Written by tools/core_stub.py. This extension is the library that `cowshed attach` preloads into
# programs. It contains no Python: importing it fails, so nothing is declared.
