# SPDX-License-Identifier: Apache-2.0
"""A guest that uses libnbd: one JSON order a line in, one JSON answer a line out.

    /usr/bin/python3 block_guest.py

Orders are those of scripted_guest.py that a block device has. It uses no code of cowshed and does
not reconnect by itself.
"""

import contextlib
import errno
import json
import sys

import nbd  # type: ignore[import-not-found,unused-ignore]


class Script:
    def __init__(self):
        self.handle = None

    def do_open(self, uri):
        self.do_close()
        handle = nbd.NBD()
        handle.connect_uri(uri)
        self.handle = handle
        return handle.get_size()

    def do_close(self):
        if self.handle is not None:
            handle, self.handle = self.handle, None
            with contextlib.suppress(nbd.Error):
                handle.shutdown()

    def do_read(self, offset, length):
        return self.handle.pread(length, offset).hex()

    def do_write(self, offset, hex):  # noqa: A002
        self.handle.pwrite(bytes.fromhex(hex), offset)

    def do_discard(self, offset, length):
        self.handle.trim(length, offset)

    def do_flush(self):
        self.handle.flush()


def main():
    script = Script()
    print(json.dumps({"ok": None}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": getattr(script, "do_" + order.pop("do"))(**order)}
        except nbd.Error as error:
            number = error.errno if isinstance(error.errno, int) else 0
            if isinstance(error.errno, str):
                number = getattr(errno, error.errno, 0)
            answer = {"error": "Error", "errno": number, "message": str(error)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
