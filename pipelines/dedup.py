"""`k2 dedup`: duplicate groups of a run, as an annotation."""

import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial

from tqdm import tqdm

from curation.dedup import Dedup, annotation_files, find_duplicates, made_by, read_basics
from curation.hamming import near_pairs
from curation.shards import read_fingerprint, write_table
from pipelines.cli import call


def dedup(run: str) -> int:
    """Write RUN/annotations/duplicates/all.parquet: exact and perceptual groups, mirrored copies too, each with a representative.

    Nothing is done where the groups of these very annotations are there; they are found again when an annotation has changed.

    Args:
        run: Run folder that `k2 annotate` wrote.
    """
    description, files = Dedup(), annotation_files(run)
    path, fingerprint = f"{run}/annotations/duplicates/all.parquet", made_by(files, description)
    if read_fingerprint(path) == fingerprint:
        print(json.dumps({"duplicates": path, "done": "before"}))
        return 0
    table = find_duplicates(read_basics(files), description, partial(near_pairs, watch=watch))
    write_table(table, path, fingerprint)
    kinds = table["kind"].to_pylist()
    not_needed = [kind for kind, representative in zip(kinds, table["representative"].to_pylist(), strict=True) if representative is False]
    summary = {
        "duplicates": path,
        "images": len(table),
        "broken": table["error"].length() - table["error"].null_count,
        "groups": len(set(table["group"].to_pylist()) - {None}),
        "exact": not_needed.count("exact"),
        "perceptual": not_needed.count("perceptual"),
    }
    print(json.dumps(summary))
    return 0


def watch(steps: tuple) -> Iterable[int]:
    """Progress on stderr, when the search takes longer than 5 seconds."""
    return tqdm(steps, desc="dedup", unit="step", file=sys.stderr, delay=5)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(dedup, argv, "k2 dedup")


if __name__ == "__main__":
    sys.exit(main())
