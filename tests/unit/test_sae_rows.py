"""Training rows as a stream: every row once in an epoch, the same rows from any cursor, little in memory."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from curation.fitted import parse_tower
from curation.sae_rows import Cursor, InMemory, RowGroup, row_groups, shuffled, survey
from curation.schema import embedding_schema
from curation.shards import describe, write_json, write_table
from curation.stages.embedding import Embedding
from curation.tags import PARTS, part


def pieces(*sizes: int) -> list[InMemory]:
    """Pieces whose rows count on from one to the next."""
    starts = np.cumsum([0, *sizes])
    return [InMemory({"fit": np.arange(a, b)[:, None]}) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 60])
@pytest.mark.parametrize("sizes", [(10,), (3, 5, 2), (4, 0, 0, 6), (1,) * 10])
def test_every_row_comes_once_in_an_epoch_whatever_the_batch_and_the_pieces(batch_size, sizes):
    batches = shuffled(pieces(*sizes), batch_size, 0, together=2)
    seen = np.concatenate([next(batches)[0] for _ in range(-(-40 // batch_size))])[:40, 0]
    epochs = seen.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_from_any_cursor_the_same_batches_follow():
    source = pieces(3, 5, 2, 7, 1)
    whole = list(itertools.islice(shuffled(source, 4, 1, together=2), 20))
    for done in range(19):
        cursor = Cursor(*whole[done][1])
        for (batch, after), (again, same) in zip(whole[done + 1 :], shuffled(source, 4, 1, cursor, together=2), strict=False):
            assert (batch == again).all() and after == same


def test_rows_of_a_bundle_are_mixed_and_another_seed_mixes_otherwise():
    def first(seed):
        return [batch[:, 0].tolist() for batch, _ in itertools.islice(shuffled(pieces(50, 50), 20, seed, together=2), 5)]

    assert first(0) == first(0) != first(1)
    assert all(min(batch) < 50 <= max(batch) for batch in first(0))


def write_run(folder, groups: int = 3, size: int = 40) -> np.ndarray:
    """A run with two shards of `groups` row groups; returns all vectors. The first row of every shard is broken."""
    tower, rng, everything = parse_tower("compact"), np.random.default_rng(0), []
    for shard in "ab":
        vectors = rng.normal(size=(groups * size, tower.dim)).astype(np.float16)
        everything.append(vectors[1:])
        columns = {"uid": [f"{shard}/{i}" for i in range(len(vectors))], "vector": [None, *(v.tobytes() for v in vectors[1:])]}
        table = pa.table(columns | {"error": ["broken"] + [None] * (len(vectors) - 1)}, embedding_schema(tower.dim))
        write_table(table, folder / "annotations" / "compact" / f"{shard}.parquet", "x", row_group_size=size)
    stages = {"compact": {"description": describe(Embedding(tower))}}
    write_json({"description": {"stages": stages}}, folder / "run.json")
    return np.concatenate(everything)


def test_a_runs_vectors_stream_by_row_group_and_a_part_is_that_of_the_uid(tmp_path):
    everything = write_run(tmp_path)
    groups = row_groups(str(tmp_path), parse_tower("compact"))
    assert len(groups) == 6 and all(isinstance(group, RowGroup) for group in groups)
    counts, kept = survey(groups, dict.fromkeys(PARTS, 10**6), seed=0)
    assert sum(counts.values()) == len(everything) == 2 * 119
    assert sorted(row.tobytes() for rows in kept.values() for row in rows) == sorted(row.tobytes() for row in everything)
    of_a = [part(f"a/{i}".encode()) for i in range(1, 40)]
    assert (groups[0].rows("estimate") == everything[:39][np.array(of_a) == "estimate"]).all()
    batch, _ = next(shuffled(groups, 16, 0))
    assert batch.dtype == np.float16 and batch.shape == (16, everything.shape[1])


def test_a_survey_keeps_no_more_rows_than_asked_for_and_counts_all(tmp_path):
    write_run(tmp_path)
    counts, kept = survey(row_groups(str(tmp_path), parse_tower("compact")), {"fit": 25, "estimate": 5, "report": 5}, seed=0)
    assert {name: len(rows) for name, rows in kept.items()} == {"fit": 25, "estimate": 5, "report": 5}
    assert sum(counts.values()) == 238
