"""What a run does with a base beside a merge: `python -m pipeline.bench.hashing BASE OUT`."""

import sys
from pathlib import Path

from pipeline.run import hash_files, write_json


def write_hashes(base: Path, out: Path) -> None:
    """The sha256 of each of its files."""
    out.mkdir()
    write_json(out / "hashes.json", hash_files(sorted(base.iterdir()), base, {}))


if __name__ == "__main__":
    write_hashes(Path(sys.argv[1]), Path(sys.argv[2]))
