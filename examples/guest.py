# SPDX-License-Identifier: Apache-2.0
"""A guest in Python: reads an image, writes to it, and shows that the write is private.

Start a daemon first, then run this with the socket and the name of an image:

    cowshed serve --image disk=disk.raw --run-dir /tmp/cowshed
    python examples/guest.py unix:///tmp/cowshed/cowshed.sock disk
"""

import sys

from cowshed.transport import connect

PAGE_BYTES = 4096


def main(address: str, image: str) -> None:
    """Read and write one image as two guests; print what each sees."""
    with connect(address) as backend:
        # Two guests of one image. Neither has a private page yet.
        writer = backend.open(image, guest="writer", quota_bytes=1 << 20)
        reader = backend.open(image, guest="reader")
        with writer, reader:
            shared = reader.read(0, PAGE_BYTES)
            print(f"both read the same frame: {writer.read(0, PAGE_BYTES) == shared}")

            # The fault handler charges the writer one page and gives it a copy.
            writer.write(0, b"private")
            print(f"the writer reads its write: {writer.read(0, 7)!r}")
            print(f"the reader reads the image: {reader.read(0, PAGE_BYTES) == shared}")

            writer.discard(0, PAGE_BYTES)
            print(f"discarded, it is the image again: {writer.read(0, PAGE_BYTES) == shared}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} unix:///RUN_DIR/cowshed.sock IMAGE")
    main(*sys.argv[1:])
