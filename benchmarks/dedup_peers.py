"""Peers of bench_dedup.py, each run by the Python of its own environment: prints groups of file names that it says are the same."""

import contextlib
import json
import os
import sys
from pathlib import Path


def imagededup(folder: str) -> list[list[str]]:
    """PHash, Hamming distance of at most 8 of 64 bits."""
    from imagededup.methods import PHash

    hasher = PHash(verbose=False)
    names = {str(path.relative_to(folder)): str(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    codes = {name: code for name, path in names.items() if (code := hasher.encode_image(image_file=path))}
    found = hasher.find_duplicates(encoding_map=codes, max_distance_threshold=8)
    return [[name, other] for name, others in found.items() for other in others]


def cleanvision(folder: str) -> list[list[str]]:
    """Its exact and near duplicates."""
    from cleanvision import Imagelab

    lab = Imagelab(data_path=folder)
    lab.find_issues({"exact_duplicates": {}, "near_duplicates": {}})
    sets = [group for kind in ("exact_duplicates", "near_duplicates") for group in lab.info[kind]["sets"]]
    return [[os.path.relpath(path, folder) for path in group] for group in sets]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        groups = {"imagededup": imagededup, "cleanvision": cleanvision}[sys.argv[1]](sys.argv[2])
    print(json.dumps(groups))
