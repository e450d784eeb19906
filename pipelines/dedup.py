"""`k2 dedup`: duplicate groups, semantic groups and concepts of a run, as annotations."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from curation import cells, concepts, semantic
from curation.dedup import Dedup, annotation_files, by_uid, bytes_of, find_duplicates, made_by, read_basics
from curation.groups import ranks
from curation.hamming import near_pairs, plan_for
from curation.partitions import COPIES, ROW_BYTES, HashSearch, VectorSearch, write_hashes
from curation.shards import read_fingerprint, write_table
from pipelines import cluster
from pipelines.cli import call

GROUP_ROWS = 1 << 20  # of a row group: readers skip and stream by them
TOWERS = ("siglip", "effnet")  # the first one that the run has is used


class Unfinished(Exception):
    """Some tasks failed twice."""


def dedup(
    run: str,
    tower: str | None = None,
    cosine: float | None = None,
    levels: tuple[int, ...] = (),
    ray: str = "off",
    workers: int | None = None,
    memory_gb: float = 8.0,
) -> int:
    """Write RUN/annotations/duplicates/all.parquet: exact and perceptual groups, mirrored copies too, each with a representative; and
    where the run has embeddings, annotations/semantic (images of nearly the same content) and annotations/concepts (clusters, and
    weights that balance them).

    Nothing is done where the groups of these very annotations are there; they are found again when an annotation has changed.

    Args:
        run: Run folder that `k2 annotate` wrote.
        tower: Embeddings for semantic groups and concepts: effnet, siglip or any other annotation of vectors; default siglip, else effnet.
        cosine: Smallest cosine of two images of one semantic group; default the measured one of the tower.
        levels: Clusters per level of concepts, the finest first (512 64 8); default one leaf per 64 images, at most 4 sqrt(images), and
            8 times fewer above it.
        ray: off (this process), auto (a running Ray cluster, else this machine) or a Ray address.
        workers: Ray workers; default one per CPU.
        memory_gb: Memory of one worker. A search that needs more is cut into partitions, on disk under RUN/dedup until it ends.
    """
    how = How(run, ray, workers, memory_gb)
    try:
        duplicates = _duplicates(how)
        tower = tower or next((name for name in TOWERS if Path(run, "annotations", name).is_dir()), None)
        if tower is None:
            print(json.dumps({"semantic": None, "concepts": None, "why": "the run has no embeddings; annotate with a tower"}))
            return 0
        _semantic(how, duplicates, semantic.description_for(tower, cosine))
        _concepts(how, tower, levels)
    except Unfinished as error:
        print(f"k2 dedup: {error}; run the same command again", file=sys.stderr)
        return 1
    return 0


class How:
    """Where tasks run, and how much memory each may take."""

    def __init__(self, run: str, ray: str, workers: int | None, memory_gb: float):
        if memory_gb <= 0:
            raise ValueError(f"--memory-gb {memory_gb}: give the gigabytes that one worker may use")
        self.run, self.ray, self.workers, self.memory = run, ray, workers, memory_gb * 1e9

    def out(self, name: str) -> str:
        return f"{self.run}/annotations/{name}/all.parquet"

    def partitions(self, num_bytes: float) -> int:
        """How many partitions a search of so many bytes needs; 0 when it can run here at once."""
        if self.ray == "off" and num_bytes <= self.memory:
            return 0
        return max(int(-(-num_bytes // self.memory)), 2 * (self.workers or 2))

    def tasks(self, function: Any, items: Sequence, desc: str) -> Iterator[tuple[Any, Any]]:
        """(item, value) of each item, in any order.

        Raises:
            Unfinished: after the others, when an item failed.
        """
        failed = []
        outcomes = cluster.run(partial(_same, function), items, self.ray, self.workers)
        for outcome in tqdm(outcomes, total=len(items), desc=desc, file=sys.stderr, delay=5):
            if outcome.error:
                failed.append(f"{getattr(outcome.item, 'name', outcome.item)}: {outcome.error}")
            else:
                yield outcome.item, outcome.value
        if failed:
            raise Unfinished(f"{len(failed)} of {len(items)} tasks failed ({failed[0]})")

    def search(self, job: HashSearch | VectorSearch, desc: str) -> Any:
        """Both passes of a search in partitions, and its result."""
        for items in job.items():
            for _ in self.tasks(job.run, items, desc):
                pass
        found = job.result()
        shutil.rmtree(job.folder)
        with contextlib.suppress(OSError):  # another search is under way there
            job.folder.parent.rmdir()
        return found


def _same(function: Any) -> Any:
    return function


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _duplicates(how: How) -> pa.Table:
    description, files = Dedup(), annotation_files(how.run)
    path, fingerprint, start = how.out("duplicates"), made_by(files, description), time.perf_counter()
    if read_fingerprint(path) == fingerprint:
        print(json.dumps({"duplicates": path, "done": "before"}))
        return pq.read_table(path)

    def search(hashes: np.ndarray, max_bits: int, num_asked: int) -> tuple[np.ndarray, np.ndarray]:
        count = how.partitions(len(hashes) * ROW_BYTES)
        if not count or not len(hashes):
            return near_pairs(hashes, max_bits, num_asked, watch)
        plan = plan_for(len(hashes), max_bits)
        most = plan.most_partitions
        if len(hashes) * ROW_BYTES / most > 2 * how.memory:
            raise ValueError(f"--memory-gb: {len(hashes)} hashes need {len(hashes) * ROW_BYTES / most / 1e9:.1f} GB per worker")
        folder = Path(how.run, "dedup", f"duplicates-{fingerprint}")
        chunks = write_hashes(hashes, folder, f"{fingerprint}-{min(count, most)}")
        job = HashSearch(folder, plan, chunks, min(count, most), num_asked, f"{fingerprint}-{min(count, most)}")
        return how.search(job, "near hashes")

    table = find_duplicates(read_basics(files), description, search)
    write_table(table, path, fingerprint, GROUP_ROWS)
    extra = pc.equal(table["representative"], False)
    kinds = table["kind"].filter(extra).to_pylist()
    summary = {
        "duplicates": path,
        "images": len(table),
        "broken": len(table) - table["error"].null_count,
        "groups": pc.count_distinct(table["group"]).as_py(),
        "exact": kinds.count("exact"),
        "perceptual": kinds.count("perceptual"),
        "seconds": _since(start),
    }
    print(json.dumps(summary))
    return table


def _semantic(how: How, duplicates: pa.Table, description: semantic.Semantic) -> None:
    files, basics = annotation_files(how.run, description.tower), annotation_files(how.run)
    path, fingerprint = how.out("semantic"), made_by([*basics, *files], {"semantic": description, "duplicates": Dedup()})
    start = time.perf_counter()
    if read_fingerprint(path) == fingerprint:
        print(json.dumps({"semantic": path, "done": "before"}))
        return
    vectors = Vectors(how, files, duplicates)
    rows = by_uid(read_basics(basics))
    good = rows["error"].is_null().to_numpy()
    rows, place = rows.filter(good), np.cumsum(good) - 1
    kept = semantic.stand_ins(duplicates)
    compare = vectors.known & (kept == np.arange(len(kept)))
    compare[good] &= semantic.comparable(rows, description)
    total = int(compare.sum())
    found = _near_vectors(how, vectors, compare, description, fingerprint) if total else semantic.merged([])
    hashes = (bytes_of(rows[name])[place] for name in ("phash", "phash_mirror"))
    found = semantic.confirmed(found, *hashes, description)
    rank = np.empty(len(good), np.int64)
    rank[good], rank[~good] = ranks(rows), np.arange(len(rows), len(good))
    table = semantic.semantic_table(duplicates, vectors.known, rank, kept, found, description.tower)
    write_table(table, path, fingerprint, GROUP_ROWS)
    extra = pc.sum(pc.equal(table["representative"], False)).as_py() or 0
    summary = {"semantic": path, "tower": description.tower, "cosine": description.cosine, "compared": total, "pairs": len(found.left)}
    print(json.dumps(summary | {"groups": pc.count_distinct(table["group"]).as_py(), "extra": extra, "seconds": _since(start)}))


def _near_vectors(how: How, vectors: "Vectors", compare: np.ndarray, description: semantic.Semantic, fingerprint: str) -> semantic.Found:
    total = int(compare.sum())
    count = cells.num_cells(total)
    cut = cells.fit_cells(vectors.sample(cells.num_samples(total), compare), count)
    partitions = min(how.partitions(total * cut.mean.size * 2 * COPIES), count)
    rows = [row[compare[ids]] for row, ids in zip(vectors.rows, vectors.ids, strict=True)]
    compared = [ids[compare[ids]] for ids in vectors.ids]
    folder, made = Path(how.run, "dedup", f"semantic-{fingerprint}"), f"{fingerprint}-{partitions}"
    job = VectorSearch(folder, vectors.files, rows, compared, cut, description, partitions, made)
    return how.search(job, "near vectors") if partitions else job.here()


def _concepts(how: How, tower: str, levels: tuple[int, ...]) -> None:
    files = annotation_files(how.run, tower)
    kept = [Path(how.out("duplicates")), Path(how.out("semantic"))]
    path, wanted = how.out("concepts"), {"concepts": tower, "levels": levels, "version": concepts.Concepts.version}
    fingerprint, start = made_by([*files, *kept], wanted), time.perf_counter()
    if read_fingerprint(path) == fingerprint:
        print(json.dumps({"concepts": path, "done": "before"}))
        return
    duplicates, groups = (pq.read_table(each, columns=["uid", "representative", "error"]) for each in kept)
    vectors = Vectors(how, files, duplicates)
    counted = duplicates["representative"].fill_null(False).to_numpy() & groups["representative"].fill_null(False).to_numpy()
    total = int((counted & vectors.known).sum())
    if not total:
        print(json.dumps({"concepts": None, "why": f"no image has a vector of {tower}"}))
        return
    description = concepts.Concepts(tower, levels or concepts.levels_for(total))
    concepts.check_levels(description.levels, total)
    tree = concepts.fit_tree(vectors.sample(min(total, description.levels[0] * concepts.SAMPLE), counted), description)
    leaf = np.zeros(len(duplicates), np.int64)
    task = partial(_leaves, files, vectors.rows, tree)
    for number, found in how.tasks(task, range(len(files)), "concepts"):
        leaf[vectors.ids[number]] = found
    known = vectors.known
    table = concepts.concepts_table(duplicates["uid"], duplicates["error"], known, leaf[known], counted[known], vectors.draw, tree, tower)
    write_table(table, path, fingerprint, GROUP_ROWS)
    weight = table["weight"].drop_null().to_numpy()
    summary = {"concepts": path, "tower": tower, "levels": description.levels, "counted": total}
    print(
        json.dumps(summary | {"weights": [round(float(value), 3) for value in np.quantile(weight, (0, 0.5, 1))], "seconds": _since(start)})
    )


def _leaves(files: list[Path], rows: list[np.ndarray], tree: concepts.Tree, number: int) -> np.ndarray:
    return concepts.leaves(cells.read_vectors(files[number], rows[number]), tree)


class Vectors:
    """A tower's annotation files against the sorted uids of a run: rows[i] of files[i] have a vector, of the images ids[i]."""

    def __init__(self, how: How, files: list[Path], images: pa.Table):
        self.how, self.files = how, files
        uids = images["uid"].cast(pa.large_string()).combine_chunks()
        self.draw = cells.draws(uids.to_pylist())
        self.known = np.zeros(len(uids), bool)
        self.rows, self.ids = [], []
        for file in files:
            table = pq.read_table(file, columns=["uid", "error"])
            place = pc.index_in(table["uid"].cast(pa.large_string()), uids).fill_null(-1).to_numpy()
            rows = np.flatnonzero(table["error"].is_null().to_numpy() & (place >= 0))
            rows = rows[images["error"].is_null().to_numpy()[place[rows]]]
            self.rows.append(rows)
            self.ids.append(place[rows].astype(np.int64))
            self.known[self.ids[-1]] = True

    def sample(self, count: int, among: np.ndarray) -> np.ndarray:
        """float16 (count, dim) vectors of the images with the smallest draws, in that order, of those that are `among` (N,)."""
        allowed = np.flatnonzero(among & self.known)
        chosen = allowed[cells.sample_rows(self.draw[allowed], count)]
        place = np.full(len(self.draw), -1)
        place[chosen] = np.arange(len(chosen))
        taken = [rows[place[ids] >= 0] for rows, ids in zip(self.rows, self.ids, strict=True)]
        out = None
        for number, vectors in self.how.tasks(partial(_sample, self.files, taken), range(len(self.files)), "sample"):
            out = np.empty((len(chosen), vectors.shape[1]), vectors.dtype) if out is None else out
            at = place[self.ids[number]]
            out[at[at >= 0]] = vectors
        return out


def _sample(files: list[Path], rows: list[np.ndarray], number: int) -> np.ndarray:
    return cells.read_vectors(files[number], rows[number])


def watch(steps: tuple) -> Iterable:
    """Progress on stderr, when the search takes longer than 5 seconds."""
    return tqdm(steps, desc="dedup", unit="step", file=sys.stderr, delay=5)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(dedup, argv, "k2 dedup")


if __name__ == "__main__":
    sys.exit(main())
