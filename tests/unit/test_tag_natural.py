"""Natural pairs: which copies are compared, and what the tags say of them."""

import pyarrow as pa
import pytest
from test_policy import annotated_by

from curation.schema import ARTIFACTS, BASICS, DUPLICATES
from curation.shards import write_table
from curation.tag_natural import confirm, find_pairs
from curation.tags import Tag

COPIES = {  # uid -> (group, representative (which is an exact copy of itself), kind, bytes, value of feature 7)
    **{f"best{i}": (i, True, "exact", 1000, 0.0) for i in range(8)},
    **{f"mid{i}": (i, False, "perceptual", 600, 0.0) for i in range(8)},
    **{f"worst{i}": (i, False, "perceptual", 300, 2.0 if i else 0.0) for i in range(8)},
    "same_best": (20, True, "exact", 1000, 0.0),
    "same": (20, False, "exact", 100, 9.0),
    "near_best": (21, True, "exact", 1000, 0.0),
    "near": (21, False, "perceptual", 900, 9.0),
    "alone": (None, True, "unique", 1000, 9.0),
}
TAG = Tag("sae-x", 7, "jpeg", "artifact", 1.0, "", "effnet/1", "abc")


@pytest.fixture
def run(tmp_path):
    usual = dict.fromkeys(BASICS.names) | {"shard": "s", "width": 10, "height": 10}
    rows = [usual | {"uid": uid, "key": uid, "bytes": size} for uid, (_, _, _, size, _) in COPIES.items()]
    write_table(pa.Table.from_pylist(rows, BASICS), tmp_path / "annotations/basics/s.parquet", "x")
    groups = [
        {"uid": uid, "group": g, "group_size": 3, "kind": k, "representative": r, "distance": 1, "mirrored": False, "error": None}
        for uid, (g, r, k, _, _) in COPIES.items()
    ]
    write_table(pa.Table.from_pylist(groups, DUPLICATES), tmp_path / "annotations/duplicates/all.parquet", "x")
    codes = [{"uid": uid, "codes": [{"feature": 7, "value": v}] * (v > 0), "error": None} for uid, (*_, v) in COPIES.items()]
    write_table(pa.Table.from_pylist(codes, ARTIFACTS), tmp_path / "annotations/artifacts/s.parquet", "x")
    annotated_by(tmp_path, "effnet/1", "abc")
    return tmp_path


def test_the_best_copy_is_compared_with_the_smallest_and_copies_of_one_quality_are_left_out(run):
    pairs = find_pairs(run)
    assert pairs.best == [f"best{i}" for i in range(8)]
    assert pairs.worst == [f"worst{i}" for i in range(8)]


def test_natural_pairs_confirm_a_tag(run):
    found = confirm(run, [TAG])
    assert (found["num_pairs"], found["any_tag_on_worst"], found["any_tag_on_best"]) == (8, 0.875, 0)
    assert found["tags"]["7"] == {"only_worst": 7, "only_best": 0, "p": pytest.approx(2**-7, rel=0.01)}
    high = confirm(run, [Tag("sae-x", 7, "jpeg", "artifact", 3.0, "", "effnet/1", "abc")])
    assert high["tags"]["7"] == {"only_worst": 0, "only_best": 0, "p": 1.0}
    assert confirm(run, []) == {"num_pairs": 8, "tags": {}}


def test_a_run_of_another_sae_confirms_nothing(run):
    annotated_by(run, "effnet/1", "other")
    with pytest.raises(ValueError, match="encoder effnet/1 and SAE other"):
        confirm(run, [TAG])


def test_a_run_without_duplicates_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotation basics; run `k2 annotate`"):
        find_pairs(tmp_path)
