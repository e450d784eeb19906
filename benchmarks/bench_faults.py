"""Random kills of driver, worker and node during `k2 annotate` on a two-node Ray cluster of this machine: the same bytes each time?

    python benchmarks/bench_faults.py [--runs 20] [--shards 16]

A run is one command, started again until it ends by itself. Kills come at a state (so many annotation files are there), drawn from
the run's seed: SIGKILL to the driver, to one of Ray's worker processes, or to the second node's raylet, after which the node's other
processes are taken down and a new node joins. Every run is compared with an undisturbed one in one process (`--ray off`): the bytes
of every file, rows lost, rows twice. The tower is a made one of two lines, so that both pools start fast.
Appends one JSON line to benchmarks/results/faults.jsonl.
"""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.schema import ERROR, UID, column
from curation.stages.basics import Basics

ROOT = Path(__file__).parents[1]
KINDS = ("driver", "worker", "node")


@dataclass(frozen=True)
class Thumbnails:
    """A tower that needs no weights and imports nothing."""

    name: ClassVar[str] = "thumbnails"
    reads: ClassVar[str] = "view"

    def prepare(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 (N, 64, 64, 3)."""
        small = [np.asarray(Image.fromarray(image).resize((64, 64))) for image in images]
        return np.stack(small) if small else np.zeros((0, 64, 64, 3), np.uint8)


@dataclass(frozen=True)
class Brightness:
    """Mean of the thumbnail: a stage that infers."""

    towers: tuple[Thumbnails, ...] = (Thumbnails(),)
    reads: ClassVar[str] = "view"
    name: ClassVar[str] = "brightness"
    schema: ClassVar[pa.Schema] = pa.schema([UID, column("mean", pa.float32(), "mean, 0 to 255"), ERROR])

    def load(self, device: str) -> Any:
        return lambda batch: {"mean": batch.cache[self.towers[0], "inputs"].mean((1, 2, 3), np.float64)}


stages = (Basics(), Brightness())


def make_tars(folder: Path, num_shards: int, per_shard: int) -> int:
    """Crops of scikit-image's photographs as JPEG in tars, every tenth file cut off; returns the number of images."""
    from skimage import data

    rng = np.random.default_rng(0)
    pictures = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea()]
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(per_shard):
                picture = pictures[i % 4]
                top, left = (int(rng.integers(0, side - 128)) for side in picture.shape[:2])
                buffer = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(picture[top : top + 128, left : left + 128])).save(buffer, "JPEG", quality=85)
                content = buffer.getvalue()[: 900 if i % 10 == 9 else None]
                entry = tarfile.TarInfo(f"{i:05d}.jpg")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return num_shards * per_shard


def digests(run: Path) -> dict[str, str]:
    """sha256 of every annotation file."""
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.glob("annotations/*/*.parquet"))}


def uids(run: Path) -> Counter[tuple[str, str]]:
    """How often each (stage, uid) is there."""
    return Counter((p.parent.name, uid) for p in run.glob("annotations/*/*.parquet") for uid in pq.read_table(p)["uid"].to_pylist())


class TwoNodes:
    """A Ray cluster of two nodes on this machine; the second may be lost and comes back."""

    def __enter__(self) -> "TwoNodes":
        # Ray writes the address of a new cluster there, and every ray.init() on the machine would join this one.
        self.folder = tempfile.TemporaryDirectory(prefix="k2-", dir="/tmp", ignore_cleanup_errors=True)
        os.environ["RAY_TMPDIR"] = self.folder.name
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self.second = self.cluster.add_node(num_cpus=2)
        return self

    def __exit__(self, *_: Any) -> None:
        self.cluster.shutdown()
        self.folder.cleanup()

    def workers(self) -> list[int]:
        """Process ids of actors: what the two raylets have started and Ray has renamed to our classes."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in (self.cluster.head_node, self.second)}
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                name, parent = (place / "cmdline").read_bytes(), int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ProcessLookupError):
                continue
            if parent in raylets and name.startswith((b"ray::_Worker", b"ray::_Server")):
                found.append(int(place.name))
        return sorted(found)

    def lose_second(self) -> None:
        os.kill(self.second.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=2)


def disturbed(nodes: TwoNodes, command: list[str], run: Path, seed: int, kinds: tuple[str, ...]) -> Iterator[str]:
    """Run the command until it ends by itself, killing meanwhile; yields what was killed."""
    rng = random.Random(seed)
    num_files = 2 * len(list(Path(command[command.index("--source") + 1]).glob("*.tar")))
    places = sorted(rng.randrange(num_files * 3 // 4) for _ in kinds)
    plan = list(zip(places, rng.sample(kinds, len(kinds)), strict=True))
    said = run.with_suffix(".stderr")
    for _ in range(50):
        with open(said, "a") as words:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words, cwd=ROOT)
        while process.poll() is None:
            if plan and len(list(run.glob("annotations/*/*.parquet"))) >= plan[0][0]:
                kind = plan[0][1]
                workers = nodes.workers()
                if kind == "worker" and not workers:
                    continue  # they are just starting
                plan.pop(0)
                if kind == "driver":
                    process.kill()
                elif kind == "node":
                    nodes.lose_second()
                else:
                    os.kill(rng.choice(workers), signal.SIGKILL)
                yield kind
            time.sleep(0.02)  # polling: a kill comes at a state, not at a moment
        if process.returncode == 0:
            return
        assert process.returncode in (1, -signal.SIGKILL), f"seed {seed}: exit {process.returncode}: {said.read_text()[-3000:]}"
    raise AssertionError(f"seed {seed}: it never ended")


def main(runs: int = 20, shards: int = 16, per_shard: int = 40, first_seed: int = 0, record: bool = True) -> int:
    """Measure and record.

    Args:
        runs: Disturbed runs, a kill of each kind in each.
        shards: Tars.
        per_shard: Images in each.
        first_seed: Run i has seed first_seed + i.
        record: Append the line to benchmarks/results.
    """
    start, killed, outcomes = time.perf_counter(), Counter(), []
    with tempfile.TemporaryDirectory() as name, TwoNodes() as nodes:
        source, calm = Path(name, "tars"), Path(name, "calm")
        source.mkdir()
        num_images = make_tars(source, shards, per_shard)
        command = [sys.executable, "-m", "pipelines.annotate", "--source", str(source), "--recipe", f"{Path(__file__).resolve()}:stages"]
        subprocess.run([*command, "--out", str(calm), "--ray", "off"], check=True, capture_output=True, cwd=ROOT)
        expected, rows = digests(calm), uids(calm)
        assert len(expected) == 2 * shards and sum(rows.values()) == 2 * num_images
        for seed in range(first_seed, first_seed + runs):
            run = Path(name, f"run{seed}")
            address = ["--ray", nodes.cluster.address, "--infer-workers", "1"]
            kills = list(disturbed(nodes, [*command, "--out", str(run), *address], run, seed, KINDS))
            killed.update(kills)
            found = uids(run)
            outcomes.append(
                {
                    "seed": seed,
                    "kills": kills,
                    "same_bytes": digests(run) == expected,
                    "rows_lost": len(rows.keys() - found.keys()),
                    "rows_twice": sum(count > 1 for count in found.values()),
                }
            )
            print(json.dumps(outcomes[-1]), file=sys.stderr)
    from pipelines.run_folder import commit, versions

    line = {
        "runs": runs,
        "seeds": [first_seed, first_seed + runs - 1],
        "images": num_images,
        "shards": shards,
        "kills": dict(killed),
        "same_bytes": sum(outcome["same_bytes"] for outcome in outcomes),
        "rows_lost": sum(outcome["rows_lost"] for outcome in outcomes),
        "rows_twice": sum(outcome["rows_twice"] for outcome in outcomes),
        "seconds": round(time.perf_counter() - start, 1),
        "commit": commit(),
        "versions": versions(),
    }
    if record:
        with open(Path(__file__).parent / "results" / "faults.jsonl", "a") as results:
            results.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return 0 if line["same_bytes"] == runs else 1


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(main))
