"""`k2 dedup`: duplicate groups, semantic groups and concepts of a run, as annotations."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from curation import cells, concepts, semantic
from curation.dedup import Dedup, Hashes, annotation_files, find_duplicates, made_by, near_here
from curation.groups import integers
from curation.hamming import plan_for
from curation.ordered import COLUMNS, LEAST_MEMORY, Ordered, put_in_order, spread, text
from curation.partitions import COPIES, ROW_BYTES, HashSearch, VectorSearch, write_hashes
from curation.schema import CONCEPTS, DUPLICATES, SEMANTIC
from curation.shards import read_fingerprint, write_row_groups
from pipelines import cluster
from pipelines.cli import call

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
        memory_gb: Memory of one worker. A search that needs more is cut into partitions, on disk under RUN/dedup until it ends. This
            process itself needs 1 GB or a quarter of that, and memory for the images that equal another (docs/operating.md).
    """
    how = How(run, ray, workers, memory_gb)
    try:
        _duplicates(how)
        tower = tower or next((name for name in TOWERS if Path(run, "annotations", name).is_dir()), None)
        if tower is None:
            print(json.dumps({"semantic": None, "concepts": None, "why": "the run has no embeddings; annotate with a tower"}))
        else:
            _semantic(how, semantic.description_for(tower, cosine))
            _concepts(how, tower, levels)
        how.clean()
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
        self.folder = Path(run, "dedup")

    @cached_property
    def images(self) -> Ordered:
        """The images of the run in the order of their uids."""
        files, memory = annotation_files(self.run), max(self.memory / 4, LEAST_MEMORY)
        made = made_by(files, COLUMNS)
        path = self.folder / f"images-{made}.parquet"
        return Ordered(path, memory) if read_fingerprint(path) == made else put_in_order(files, path, made, memory)

    def clean(self) -> None:
        """Remove what only this command reads."""
        for path in self.folder.glob("images-*.parquet"):
            path.unlink()
        with contextlib.suppress(OSError):  # it is not there, or another search is under way in it
            self.folder.rmdir()

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
        return found


def _same(function: Any) -> Any:
    return function


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _duplicates(how: How) -> None:
    description, files = Dedup(), annotation_files(how.run)
    path, fingerprint, start = how.out("duplicates"), made_by(files, description), time.perf_counter()
    if read_fingerprint(path) == fingerprint:
        print(json.dumps({"duplicates": path, "done": "before"}))
        return

    def search(hashes: Hashes, max_bits: int) -> tuple[np.ndarray, np.ndarray]:
        num_rows = 2 * len(how.images)
        count = how.partitions(num_rows * ROW_BYTES)
        if not count or not num_rows:
            return near_here(hashes, max_bits, watch)
        plan = plan_for(num_rows, max_bits)
        most = plan.most_partitions
        if num_rows * ROW_BYTES / most > 2 * how.memory:
            raise ValueError(f"--memory-gb: {num_rows} hashes need {num_rows * ROW_BYTES / most / 1e9:.1f} GB per worker")
        folder, made = how.folder / f"duplicates-{fingerprint}", f"{fingerprint}-{min(count, most)}"
        chunks = write_hashes(hashes, folder, made)
        return how.search(HashSearch(folder, plan, chunks, min(count, most), len(how.images), made), "near hashes")

    write_row_groups(find_duplicates(how.images, description, search), path, DUPLICATES, fingerprint)
    sql = f"""SELECT count(*) AS images, count(error) AS broken, coalesce(max("group") + 1, 0) AS groups,
        count(*) FILTER (kind = 'exact' AND NOT representative) AS exact,
        count(*) FILTER (kind = 'perceptual' AND NOT representative) AS perceptual FROM read_parquet({text(path)})"""
    (summary,) = next(how.images.query(sql)).to_pylist()
    print(json.dumps({"duplicates": path, **summary, "seconds": _since(start)}))


def _semantic(how: How, description: semantic.Semantic) -> None:
    files, basics = annotation_files(how.run, description.tower), annotation_files(how.run)
    path, fingerprint = how.out("semantic"), made_by([*basics, *files], {"semantic": description, "duplicates": Dedup()})
    start = time.perf_counter()
    if read_fingerprint(path) == fingerprint:
        print(json.dumps({"semantic": path, "done": "before"}))
        return
    images, vectors = how.images, Vectors(how, files)
    compare = vectors.known & _kept(how.out("duplicates"))
    for first, piece in images.pieces(("width", "height", "phash", "error")):
        good = np.flatnonzero(piece["error"].is_null().to_numpy())
        compare[first + good] &= semantic.comparable(piece.take(good), description)
    total = int(compare.sum())
    found = _near_vectors(how, vectors, compare, description, fingerprint) if total else semantic.merged([])

    grouped, stands = _stand_ins(how.out("duplicates"))
    rows = np.unique(np.concatenate([grouped, found.left, found.right]))
    kept = np.arange(len(rows))
    kept[np.searchsorted(rows, grouped)] = np.searchsorted(rows, stands)
    found, table = semantic.groups(images.take(rows, COLUMNS), vectors.known[rows], kept, found.at(rows), description)
    nearest = np.full(len(images), -1, np.float32)
    nearest[found.ids] = found.nearest

    def pieces() -> Iterator[pa.Table]:
        for first, piece in spread(images, rows, table, semantic.ALONE, vectors.known):
            mine = nearest[first : first + len(piece)]
            more = {"tower": pa.array([description.tower] * len(piece)), "nearest": pa.array(mine, mask=mine <= -1)}
            yield pa.table([more[name] if name in more else piece[name] for name in SEMANTIC.names], SEMANTIC.names)

    write_row_groups(pieces(), path, SEMANTIC, fingerprint)
    sql = f"""SELECT coalesce(max("group") + 1, 0) AS groups, count(*) FILTER (NOT representative) AS extra
        FROM read_parquet({text(path)})"""
    (counts,) = next(images.query(sql)).to_pylist()
    summary = {"semantic": path, "tower": description.tower, "cosine": description.cosine, "compared": total, "pairs": len(found.left)}
    print(json.dumps(summary | counts | {"seconds": _since(start)}))


def _kept(path: str) -> np.ndarray:
    """Whether (N,) each image of an annotation of groups is the one to keep of its group."""
    with pq.ParquetFile(path) as file:
        groups = (file.read_row_group(i, columns=["representative"])["representative"] for i in range(file.num_row_groups))
        return np.concatenate([np.zeros(0, bool), *(column.fill_null(False).to_numpy() for column in groups)])


def _stand_ins(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are in a group, and the row of the representative of each."""
    rows, numbers, kept, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, bool)], 0
    with pq.ParquetFile(path) as file:
        for i in range(file.num_row_groups):
            table = file.read_row_group(i, columns=["group", "representative"])
            at = np.flatnonzero(table["group"].is_valid().to_numpy())
            rows.append(start + at)
            numbers.append(integers(table["group"].take(at)))
            kept.append(table["representative"].take(at).to_numpy())
            start += len(table)
    row, number, first = (np.concatenate(part) for part in (rows, numbers, kept))
    stands = np.zeros(number.max(initial=-1) + 1, np.int64)
    stands[number[first]] = row[first]
    return row, stands[number]


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
    images, vectors = how.images, Vectors(how, files)
    counted = _kept(str(kept[0])) & _kept(str(kept[1])) & vectors.known
    total = int(counted.sum())
    if not total:
        print(json.dumps({"concepts": None, "why": f"no image has a vector of {tower}"}))
        return
    description = concepts.Concepts(tower, levels or concepts.levels_for(total))
    concepts.check_levels(description.levels, total)
    tree = concepts.fit_tree(vectors.sample(min(total, description.levels[0] * concepts.SAMPLE), counted), description)
    leaf = np.full(len(images), -1, np.int32)
    task = partial(_leaves, files, vectors.rows, tree)
    for number, found in how.tasks(task, range(len(files)), "concepts"):
        leaf[vectors.ids[number]] = found
    table = concepts.leaf_table(tree, np.bincount(leaf[counted], minlength=description.levels[0]))

    def pieces() -> Iterator[pa.Table]:
        for first, piece in images.pieces(("uid", "error")):
            mine = slice(first, first + len(piece))
            found = table.take(pa.array(leaf[mine], mask=leaf[mine] < 0))
            more = {"uid": piece["uid"], "tower": pa.array([tower] * len(piece)), "draw": vectors.draw[mine], "error": piece["error"]}
            yield pa.table([more[name] if name in more else found[name] for name in CONCEPTS.names], CONCEPTS.names)

    write_row_groups(pieces(), path, CONCEPTS, fingerprint)
    sql = f"SELECT quantile_disc(weight, [0, 0.5, 1]) AS weights FROM read_parquet({text(path)})"
    (weights,) = next(images.query(sql))["weights"].to_pylist()
    summary = {"concepts": path, "tower": tower, "levels": description.levels, "counted": total}
    print(json.dumps(summary | {"weights": [round(float(value), 3) for value in weights], "seconds": _since(start)}))


def _leaves(files: list[Path], rows: list[np.ndarray], tree: concepts.Tree, number: int) -> np.ndarray:
    return concepts.leaves(cells.read_vectors(files[number], rows[number]), tree)


class Vectors:
    """A tower's annotation files against the images of a run: rows[i] of files[i] have a vector, of the images ids[i]."""

    def __init__(self, how: How, files: list[Path]):
        self.how, self.files = how, files
        images = how.images
        self.draw, self.known = np.empty(len(images)), np.zeros(len(images), bool)
        for start, piece in images.pieces(("uid",)):
            self.draw[start : start + len(piece)] = cells.draws(piece["uid"].to_pylist())
        rows: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in files]
        ids: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in files]
        names = pa.table({"filename": [str(file) for file in files], "number": np.arange(len(files))})
        paths = ", ".join(map(text, files))
        sql = f"""SELECT names.number, vectors.file_row_number AS place, images."row"
            FROM read_parquet([{paths}], filename = true, file_row_number = true) AS vectors JOIN names USING (filename)
            JOIN images USING (uid) WHERE vectors.error IS NULL AND images.error IS NULL ORDER BY ALL"""
        for table in images.query(sql, names=names):
            number, place, row = (integers(column) for column in table.columns)
            starts = np.flatnonzero(np.diff(number, prepend=-1))
            for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(number)], strict=True):
                rows[number[start]].append(place[start:stop].astype(np.int32))
                ids[number[start]].append(row[start:stop])
            self.known[row] = True
        self.rows, self.ids = [np.concatenate(each) for each in rows], [np.concatenate(each) for each in ids]

    def sample(self, count: int, among: np.ndarray) -> np.ndarray:
        """float16 (count, dim) vectors of the images with the smallest draws, in that order, of those that are `among` (N,)."""
        chosen = cells.sample_rows(self.draw, among & self.known, count)
        order = np.argsort(chosen)
        rise = chosen[order]
        taken, places = [], []
        for rows, ids in zip(self.rows, self.ids, strict=True):
            at = np.minimum(np.searchsorted(rise, ids), len(rise) - 1)
            mine = rise[at] == ids
            taken.append(rows[mine])
            places.append(order[at[mine]])
        out = None
        for number, vectors in self.how.tasks(partial(_sample, self.files, taken), range(len(self.files)), "sample"):
            out = np.empty((len(chosen), vectors.shape[1]), vectors.dtype) if out is None else out
            out[places[number]] = vectors
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
