"""Reading samples: our readers beside tarfile, the webdataset package, bare pyarrow and open().read(), on the same bytes in one run.

    python benchmarks/bench_sources.py --images DIR [--megabytes 400] [--rounds 3]

Rates are MB of images per second of CPU time (process_time) of one core with the files in the page cache; medians of interleaved
rounds. Appends one JSON line to benchmarks/results/sources.jsonl.
"""

import io
import json
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
import webdataset

from curation.sources import list_shards, read_samples
from pipelines.run_folder import commit, versions


def ours(path: Path) -> int:
    """Bytes of images in the RecordBatches of samples."""
    batches = (batch for shard in list_shards(str(path)) for batch in read_samples(shard, 64))
    return sum(len(image.as_buffer()) for batch in batches for image in batch["image"])


def with_tarfile(path: Path, mode: str) -> int:
    """The images of a tar by the standard library."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode=mode) as archive:
        return sum(len(archive.extractfile(member).read()) for member in archive if member.name.endswith("jpg"))


def with_webdataset(path: Path) -> int:
    """The samples of a tar by the webdataset package."""
    return sum(len(sample["jpg"]) for sample in webdataset.WebDataset(str(path), shardshuffle=False))


def with_pyarrow(path: Path) -> int:
    """The image column as Python bytes."""
    batches = pq.ParquetFile(path).iter_batches(64, columns=["image", "caption"])
    return sum(len(image) for batch in batches for image in batch["image"].to_pylist())


def with_open(path: Path) -> int:
    """Every file of a folder."""
    return sum(len(file.read_bytes()) for file in path.rglob("*.jpg"))


def write(images: str, megabytes: int, folder: Path) -> int:
    """The same samples as a tar, a gzipped tar, a Parquet file and a folder; returns how many."""
    pictures = [path.read_bytes() for path in sorted(Path(images).rglob("*.jpg"))]
    mean = sum(map(len, pictures)) / len(pictures)
    chosen = list(islice(cycle(pictures), int(megabytes * 1e6 / mean)))
    (folder / "files").mkdir()
    with tarfile.open(folder / "x.tar", "w") as plain:
        for i, picture in enumerate(chosen):
            (folder / "files" / f"{i:06d}.jpg").write_bytes(picture)
            for suffix, data in (("jpg", picture), ("txt", b"a photograph of something")):
                entry = tarfile.TarInfo(f"{i:06d}.{suffix}")
                entry.size = len(data)
                plain.addfile(entry, io.BytesIO(data))
    table = pa.table({"image": chosen, "caption": ["a photograph of something"] * len(chosen)})
    pq.write_table(table, folder / "x.parquet", row_group_size=500, compression="none")
    return len(chosen)


def main(images: str, megabytes: int = 400, rounds: int = 3) -> None:
    """Measure and record.

    Args:
        images: A folder of JPEG files.
        megabytes: How much to read.
        rounds: How often each is run; the median counts.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count = write(images, megabytes, folder)
        runs: dict[str, Callable[[], int]] = {
            "tar, tarfile stream": lambda: with_tarfile(folder / "x.tar", "r|"),
            "tar, tarfile seek": lambda: with_tarfile(folder / "x.tar", "r:"),
            "tar, webdataset": lambda: with_webdataset(folder / "x.tar"),
            "tar, ours": lambda: ours(folder / "x.tar"),
            "parquet, pyarrow": lambda: with_pyarrow(folder / "x.parquet"),
            "parquet, ours": lambda: ours(folder / "x.parquet"),
            "folder, open": lambda: with_open(folder / "files"),
            "folder, ours": lambda: ours(folder / "files"),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.process_time()
                size = run()
                rates[name].append(size / 1e6 / (time.process_time() - start))
    line = {
        "images": count,
        "mean_bytes": size // count,
        "mb_per_cpu_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "spread": {name: [round(min(values)), round(max(values))] for name, values in rates.items()},
        "machine": platform.processor() or platform.machine(),
        "commit": commit(),
        "versions": versions(),
    }
    with open(Path(__file__).parent / "results" / "sources.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    tyro.cli(main)
