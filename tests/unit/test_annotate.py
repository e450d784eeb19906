"""annotate_shard: one row out per row in, whatever is in the shard."""

import pickle
from dataclasses import dataclass
from typing import ClassVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import annotate, compact
from curation.annotate import annotate_shard, annotation_path, infer
from curation.decode import decode_for
from curation.schema import ERROR, UID, column
from curation.sources import list_shards, read_samples
from curation.stages.basics import Basics
from curation.stages.embedding import Embedding
from curation.stages.synthetic import Synthetic
from curation.towers import Compact, EffNet


@dataclass(frozen=True)
class Brightness:
    """A stage of the tests: mean of all pixels, plus `offset`; NaN when told so."""

    offset: float = 0.0
    name: ClassVar[str] = "brightness"
    schema: ClassVar[pa.Schema] = pa.schema([UID, column("mean", pa.float32(), "mean of all pixels"), ERROR])

    def load(self, device):
        return lambda batch: {"mean": [float(image.mean()) + self.offset for image in batch.images]}


def run(shards, stages, out):
    functions = {stage: stage.load("cpu") for stage in stages}
    return [annotate_shard(shard, stages, functions, str(out)) for shard in shards]


def test_rows_in_are_rows_out_and_broken_images_say_why(tiny_folder, tmp_path):
    shards = list_shards(str(tiny_folder), 10)
    reports = run(shards, (Basics(), Brightness()), tmp_path)
    assert [(r.rows, r.bad) for r in reports] == [(10, 3), (10, 0), (3, 0)]
    for stage in ("basics", "brightness"):
        rows = {r["uid"]: r for shard in shards for r in pq.read_table(annotation_path(str(tmp_path), stage, shard.name)).to_pylist()}
        assert sorted(rows) == sorted(r["uid"] for s in shards for b in read_samples(s) for r in b.to_pylist())
        errors = {uid.rpartition("/")[2]: row["error"] for uid, row in rows.items() if row["error"]}
        assert set(errors) == {"broken_empty.jpg", "broken_cut.jpg", "broken_html.jpg"}
        assert "empty file" in errors["broken_empty.jpg"] and "truncated" in errors["broken_cut.jpg"]


def test_bytes_and_md5_are_known_of_broken_images_too(tiny_folder, tmp_path):
    run(list_shards(str(tiny_folder)), (Basics(),), tmp_path)
    query = f"SELECT bytes, md5, width FROM '{tmp_path}/annotations/basics/*.parquet' WHERE key = 'broken_html.jpg'"
    assert duckdb.sql(query).fetchall() == [(16, "4b13ef7673c929baa5eaf80b3850045b", None)]


def test_a_second_run_does_nothing_and_a_new_stage_does_only_itself(tiny_tars, tmp_path):
    shards = list_shards(str(tiny_tars))
    run(shards, (Basics(),), tmp_path)
    assert [r.stages for r in run(shards, (Basics(),), tmp_path)] == [[], [], []]
    assert [r.stages for r in run(shards, (Basics(), Brightness()), tmp_path)] == [["brightness"]] * 3


def test_another_description_of_a_stage_is_refused(tiny_tars, tmp_path):
    shards = list_shards(str(tiny_tars))
    run(shards, (Brightness(),), tmp_path)
    with pytest.raises(ValueError, match="made by another description"):
        run(shards, (Brightness(offset=1.0),), tmp_path)


def test_batch_limits_change_memory_but_not_values(tiny_folder, tmp_path, monkeypatch):
    shards = list_shards(str(tiny_folder))
    run(shards, (Basics(),), tmp_path / "one")
    monkeypatch.setattr(annotate, "BATCH_PIXELS", 10_000)
    run(shards, (Basics(),), tmp_path / "two")
    one, two = (pq.read_table(annotation_path(str(tmp_path / name), "basics", shards[0].name)) for name in ("one", "two"))
    assert one.to_pylist() == two.to_pylist()


def test_a_score_that_is_not_finite_is_our_bug_and_fails_the_shard(tiny_tars, tmp_path):
    with pytest.raises(AssertionError, match="mean is not finite"):
        run(list_shards(str(tiny_tars)), (Brightness(offset=float("nan")),), tmp_path)
    assert not (tmp_path / "annotations").exists()


@dataclass(frozen=True)
class Looks:
    """A stage of the tests that says how far its images were decoded when it saw them."""

    reads: str
    schema: ClassVar[pa.Schema] = pa.schema([UID, column("md5", pa.string(), ""), column("saw", pa.string(), "lengths"), ERROR])

    @property
    def name(self):
        return f"looks_{self.reads}"

    def load(self, device):
        return lambda batch: {
            "saw": [f"{len(batch.encoded)} {len(batch.views)} {len(batch.images)} {len(batch.headers)}"] * len(batch.uids)
        }


def looks_of(run_dir, shard, reads):
    return pq.read_table(annotation_path(str(run_dir), f"looks_{reads}", shard.name)).to_pylist()


def test_a_stage_that_reads_bytes_also_sees_images_that_do_not_decode(tiny_folder, tmp_path):
    shards = list_shards(str(tiny_folder))
    run(shards, (Looks("bytes"), Looks("pixels")), tmp_path)
    (shard,) = shards
    by_bytes, by_pixels = looks_of(tmp_path, shard, "bytes"), looks_of(tmp_path, shard, "pixels")
    assert [row["error"] for row in by_bytes] == [None] * 23 and {row["saw"] for row in by_bytes} == {"23 0 0 0"}
    assert sum(row["error"] is not None for row in by_pixels) == 3 and {row["saw"] for row in by_pixels} == {"20 20 20 20", None}
    assert [row["md5"] for row in by_bytes] == [row["md5"] for row in by_pixels]


def test_images_are_decoded_once_and_no_further_than_the_greediest_missing_stage_asks(tiny_folder, tmp_path):
    asked = []

    def decode(encoded, reads, limits):
        asked.append(reads)
        return decode_for(encoded, reads, limits)

    def go(*stages):
        functions = {stage: stage.load("cpu") for stage in stages}
        annotate_shard(list_shards(str(tiny_folder))[0], stages, functions, str(tmp_path), decode=decode)

    go(Looks("bytes"))
    assert asked == []
    go(Looks("bytes"), Looks("view"))
    assert asked == ["view"] * 23
    go(Looks("view"), Looks("pixels"), Brightness())
    assert asked == ["view"] * 23 + ["pixels"] * 23


def test_towers_in_another_process_write_the_same_bytes_from_small_arrays_alone(tiny_folder, tmp_path):
    """`ask` as a cluster does it: what goes over is pickled, and the other side has never seen the images."""
    shards, stages = list_shards(str(tiny_folder)), (Basics(), Embedding(EffNet()), Synthetic(), Embedding(Compact()))
    run(shards, stages, tmp_path / "one")
    far = {stage: stage.load("cpu") for stage in stages[1:]}
    sizes = []

    def ask(inputs):
        message = pickle.dumps(inputs, protocol=5)
        sizes.append((len(inputs.uids), len(message)))
        return lambda: infer(far, pickle.loads(message))

    for shard in shards:
        annotate_shard(shard, stages, {Basics(): Basics().load("cpu")}, str(tmp_path / "two"), ask=ask)
    assert sizes == [(20, pytest.approx(20 * 3 * (260**2 + compact.NUM_CROPS * compact.SIDE**2), rel=0.01))]
    one, two = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*.parquet")} for d in (tmp_path / "one", tmp_path / "two"))
    assert len(one) == 4 and one == two
