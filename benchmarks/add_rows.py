"""Put rows of finished benchmarks into a file of results/, saying once what they share.

Run as `python benchmarks/add_rows.py ROWS... --to results/NAME.jsonl`; ROWS may hold that file itself. Rows of a job
that comes twice are kept once, the later ones. The verdict on an adapted mask is that on the mask before, whose rows
lie beside, and is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anysite.judgement import ADAPTED, is_judgement
from anysite.rows import OF_A_RUN, Row, read_rows, write_rows


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
            adapted = row.get("adapt", "none") not in ("", "none")
            if adapted and is_judgement(row["metric"]) and row["metric"] != ADAPTED:
                continue
            key = tuple(
                sorted((k, str(v)) for k, v in row.items() if k not in ("value", "unit", "commit", "config"))
            )
            found[key] = row
    # Images of one corruption lie together, so that what they share is said once a training and not once a case.
    groups: dict[str, list[Row]] = {}
    for row in found.values():
        groups.setdefault(str([row.get(name) for name in OF_A_RUN]), []).append(row)
    write_rows(arguments.to, [row for group in groups.values() for row in group], shared=True)
    print(f"{len(found)} rows in {arguments.to}, {arguments.to.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
