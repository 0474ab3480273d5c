"""Put rows of finished benchmarks into a file of results/, saying once what they share.

Run as `python benchmarks/add_rows.py ROWS... --to results/NAME.jsonl`; ROWS may hold that file itself. Rows of a job
that comes twice are kept once, the later ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anysite.rows import Row, read_rows, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[tuple[object, ...], Row] = {}
    for path in arguments.rows:
        for row in read_rows(path):
            key = tuple(
                sorted((k, str(v)) for k, v in row.items() if k not in ("value", "unit", "commit", "config"))
            )
            found[key] = row
    write_rows(arguments.to, list(found.values()), shared=True)
    print(f"{len(found)} rows in {arguments.to}, {arguments.to.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
