"""`k2 dedup` in partitions: the same bytes as in one process, on Ray too, after a kill, and whatever the order of shards."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import partitions
from curation.dedup import near_here
from curation.hamming import plan_for
from curation.partitions import HashSearch, write_hashes
from curation.schema import BASICS, embedding_schema
from curation.shards import write_table
from pipelines import dedup as verb
from pipelines.dedup import dedup

OUTPUTS = ("duplicates", "semantic", "concepts")
SIZE, DIM = 1500, 24


def annotated(run: Path, shards: int = 3, seed: int = 0) -> Path:
    """A run of made-up images with near hashes and near vectors among them, and a broken one."""
    rng = np.random.default_rng(seed)
    bits = rng.permuted(np.tile(np.arange(144, dtype=np.uint8) % 2, (SIZE, 1)), axis=1)
    vectors = rng.standard_normal((20, DIM))[rng.integers(20, size=SIZE)] + rng.standard_normal((SIZE, DIM))
    for row in range(0, 300, 2):  # every second one: near the next by its hash, or by its vector
        if row % 4:
            ones, zeros = rng.choice(np.flatnonzero(bits[row]), 3, False), rng.choice(np.flatnonzero(bits[row] == 0), 3, False)
            bits[row + 1] = bits[row]
            bits[row + 1, ones], bits[row + 1, zeros] = 0, 1
        else:
            vectors[row + 1] = vectors[row] + 0.1 * rng.standard_normal(DIM)
    packed = [row.tobytes() for row in np.packbits(bits, axis=1)]
    mirror = [row.tobytes() for row in np.packbits(rng.permuted(bits, axis=1), axis=1)]
    rows = [
        {"uid": f"{i * 7919 % SIZE:06d}", "shard": "s", "key": f"{i}", "md5": f"{i // 2 if i > 1400 else -i}", "bytes": 1000 + i}
        | {"width": 300 + i % 5, "height": 300, "format": "JPEG", "jpeg_quality": 90, "phash": packed[i], "phash_mirror": mirror[i]}
        | {"colorhash": bytes(6)}
        for i in range(SIZE)
    ]
    rows[5] = {name: rows[5][name] for name in ("uid", "shard", "key", "md5", "bytes")} | {"error": "broken"}
    halves = vectors.astype("<f2")
    for shard in range(shards):
        mine = range(shard, SIZE, shards)
        write_table(pa.Table.from_pylist([rows[i] for i in mine], schema=BASICS), run / f"annotations/basics/{shard}.parquet", "made")
        cells = [{"uid": rows[i]["uid"], "vector": None if i == 5 else halves[i].tobytes(), "error": rows[i].get("error")} for i in mine]
        write_table(pa.Table.from_pylist(cells, schema=embedding_schema(DIM)), run / f"annotations/made/{shard}.parquet", "made")
    return run


def outputs(run: Path) -> list[bytes]:
    return [(run / f"annotations/{name}/all.parquet").read_bytes() for name in OUTPUTS]


@pytest.fixture(autouse=True)
def several_cells(monkeypatch):
    monkeypatch.setattr("curation.cells.PER_CELL", 100)
    monkeypatch.setattr("curation.concepts.SAMPLE", 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[bytes]]:
    """The run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curation.cells.PER_CELL", 100)
        patch.setattr("curation.concepts.SAMPLE", 32)
        run = annotated(tmp_path_factory.mktemp("whole"))
        assert dedup(str(run), "made", 0.9, (32, 8, 2)) == 0
    return run, outputs(run)


def test_groups_weights_and_draws_are_there_for_every_image(whole):
    duplicates, groups, concepts = (pq.read_table(whole[0] / f"annotations/{name}/all.parquet") for name in OUTPUTS)
    assert duplicates["uid"].equals(groups["uid"]) and groups["uid"].equals(concepts["uid"]) and len(groups) == SIZE
    assert duplicates["kind"].to_pylist().count("perceptual") >= 74 and duplicates["kind"].to_pylist().count("exact") >= 98
    extra = sum(value is False for value in groups["representative"].to_pylist())
    assert extra >= sum(value is False for value in duplicates["representative"].to_pylist()) + 70
    assert {row["error"] for row in groups.to_pylist() if row["representative"] is None} == {"broken"}
    kept = [row for row, group in zip(concepts.to_pylist(), groups.to_pylist(), strict=True) if group["representative"]]
    assert np.mean([row["weight"] for row in kept]) == pytest.approx(1, abs=1e-4)
    assert all(row["path"][-1] == row["leaf"] and len(row["path"]) == len(row["sizes"]) == 3 for row in kept)


def test_partitions_give_the_same_bytes_as_one_process_and_leave_nothing_behind(whole, tmp_path, capsys):
    run = annotated(tmp_path)
    assert dedup(str(run), "made", 0.9, (32, 8, 2), memory_gb=1e-4) == 0
    assert outputs(run) == whole[1] and not (run / "dedup").exists()
    capsys.readouterr()
    assert dedup(str(run), "made", 0.9, (32, 8, 2)) == 0
    assert [json.loads(line).get("done") for line in capsys.readouterr().out.splitlines()] == ["before"] * 3


@pytest.mark.ray
def test_ray_gives_the_same_bytes(whole, tmp_path, ray_cluster):
    run = annotated(tmp_path)
    # A worker is another process, where PER_CELL is what it was: cells are chosen by the driver alone.
    assert dedup(str(run), "made", 0.9, (32, 8, 2), ray="auto", workers=2, memory_gb=1e-4) == 0
    assert outputs(run) == whole[1]


def test_the_order_of_the_shards_changes_no_group(whole, tmp_path):
    run = annotated(tmp_path, shards=5)
    assert dedup(str(run), "made", 0.9, (32, 8, 2), memory_gb=1e-4) == 0
    for name in OUTPUTS[:2]:
        mine, theirs = (pq.read_table(each / f"annotations/{name}/all.parquet") for each in (run, whole[0]))
        for column in {"group", "group_size", "representative"}:
            assert mine[column].equals(theirs[column]), (name, column)


def test_a_killed_job_goes_on_with_what_is_missing(whole, tmp_path, monkeypatch):
    run = annotated(tmp_path)
    code = (
        "import os, signal, curation.cells, curation.concepts, curation.partitions as p, pipelines.dedup as d\n"
        "curation.cells.PER_CELL, curation.concepts.SAMPLE, count = 100, 32, [0]\n"
        "real = p.write_table\n"
        "def write(*args):\n"
        "    count[0] += 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if count[0] == 12 else real(*args)\n"
        "p.write_table = write\n"
        f"d.dedup({str(run)!r}, 'made', 0.9, (32, 8, 2), memory_gb=1e-4)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    before = len(list(run.rglob("pairs/*.parquet")))
    assert before >= 5 and not (run / "annotations/duplicates/all.parquet").exists()
    written = []
    monkeypatch.setattr(partitions, "write_table", lambda table, path, made: (written.append(path), write_table(table, path, made)))
    assert dedup(str(run), "made", 0.9, (32, 8, 2), memory_gb=1e-4) == 0
    assert outputs(run) == whole[1]
    plan = plan_for(2 * SIZE, 12)
    pairs = [path for path in written if "duplicates-" in str(path) and path.parent.name == "pairs"]
    assert pairs and len(set(pairs)) == len(pairs) and len(pairs) % len(plan.steps) == -before % len(plan.steps)


def test_a_task_that_fails_twice_leaves_the_rest_done_and_exit_code_1(tmp_path, monkeypatch, capsys):
    run, search = annotated(tmp_path), HashSearch._search
    monkeypatch.setattr(HashSearch, "_search", lambda job, item: 1 / 0 if (item.step, item.number) == (0, 1) else search(job, item))
    assert dedup(str(run), memory_gb=1e-4) == 1
    assert "1 of" in capsys.readouterr().err and list(run.rglob("pairs/*.parquet"))
    monkeypatch.undo()
    assert dedup(str(run), memory_gb=1e-4) == 0


def test_partitions_find_the_pairs_of_one_search_for_any_chunk_and_number(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (4000, 18), dtype=np.uint8)
    hashes[2000:] = hashes[:2000]
    hashes[2000:, 3] ^= 7
    rows = np.sort(rng.choice(9000, 2000, replace=False))
    order = rng.permutation(4000)
    images, mirrors = hashes[order[:2000]], hashes[order[2000:]]
    expected = pairs_of(near_here(iter([(rows, images, mirrors)]), 12))
    assert len(expected) > 1000
    for chunk, count in ((1000, 3), (4096, 4), (333, 1)):
        monkeypatch.setattr(partitions, "CHUNK", chunk)
        folder = tmp_path / f"{chunk}"
        pieces = [(rows[i : i + 300], images[i : i + 300], mirrors[i : i + 300]) for i in range(0, 2000, 300)]
        job = HashSearch(folder, plan_for(4000, 12), write_hashes(iter(pieces), folder, "made"), count, 9000, "made")
        for items in job.items():
            for item in items:
                job.run(item)
        assert pairs_of(job.result()) == expected


def pairs_of(found: tuple[np.ndarray, np.ndarray]) -> set[tuple[int, int]]:
    return {(int(min(pair)), int(max(pair))) for pair in zip(*found, strict=True)}


def test_a_run_without_embeddings_says_so_and_too_little_memory_is_refused(tmp_path, capsys):
    run = annotated(tmp_path)
    assert dedup(str(run)) == 0
    assert "no embeddings" in json.loads(capsys.readouterr().out.splitlines()[-1])["why"]
    with pytest.raises(ValueError, match="--memory-gb 0"):
        dedup(str(run), memory_gb=0)
    (run / "annotations/duplicates/all.parquet").unlink()
    with pytest.raises(ValueError, match="GB per worker"):
        dedup(str(run), memory_gb=1e-9)
    assert verb.main(["--run", str(run), "--tower", "made"]) == 2, "no threshold for this tower"
