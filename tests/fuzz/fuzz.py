# SPDX-License-Identifier: Apache-2.0
"""Fuzz one target, guided by coverage: fuzz.py TARGET SECONDS [FOLDER-OF-FINDINGS].

Starts from the corpus beside this file. A defect ends it with a stack, and the input in hex, to be
put into the corpus with its cure. Needs atheris.
"""

import sys
import tempfile
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"


def main(name: str, seconds: str, found: str | None = None) -> None:
    with atheris.instrument_imports(include=["cowshed.transport"]):
        sys.path.insert(0, str(Path(__file__).parent))
        import targets

    def one(said: bytes) -> None:
        try:
            targets.run(name, said)
        except BaseException:
            print(f"{name}: defect with input {said.hex()}", file=sys.stderr, flush=True)
            raise

    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(found or folder)
        seeds.mkdir(exist_ok=True)
        for seed in (CORPUS / name).glob("*.hex"):
            (seeds / seed.stem).write_bytes(bytes.fromhex(seed.read_text()))
        # On a busy machine an input takes seconds because others run.
        options = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=2048"]
        options += ["-max_len=4096", "-print_final_stats=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(seeds)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
