# SPDX-License-Identifier: Apache-2.0
"""Queries a database as workloads.py makes it, to record its reads: sqlite_reads.py PATH SEED."""

import random
import sqlite3
import sys

NR_QUERIES = 20_000
NR_ROWS = 400_000


def main() -> None:
    """Look up popular keys and names, and now and then a range."""
    path, seed = sys.argv[1:]
    rng = random.Random(int(seed))
    opened = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    opened.execute("pragma cache_size = -512")  # KiB: as if the program had no memory of its own
    for _ in range(NR_QUERIES):
        key = min(NR_ROWS - 1, int(rng.paretovariate(0.5)) * 31 % NR_ROWS)
        kind = rng.random()
        if kind < 0.6:
            opened.execute("select value from t where key = ?", (key,)).fetchall()
        elif kind < 0.95:
            opened.execute("select value from t where name = ?", (f"name {key}",)).fetchall()
        else:
            opened.execute(
                "select count(*) from t where key between ? and ?", (key, key + 500)
            ).fetchall()


main()
