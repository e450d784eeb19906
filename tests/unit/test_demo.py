"""The demo's heap: real photographs, windows that differ, and faults whose truth is written down."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_run import small_run

from curation.decode import DecodeError, decode
from curation.faults import FAULTS
from curation.sources import list_shards
from pipelines import demo


@pytest.fixture
def small_heap(monkeypatch):
    """Three photographs and one of each fault, so that a heap is built in a second."""
    monkeypatch.setattr(demo, "PHOTOGRAPHS", {name: demo.PHOTOGRAPHS[name] for name in ("hopper", "galaxies", "motorcycle")})
    monkeypatch.setattr(demo, "PER_FAULT", 1)
    monkeypatch.setattr(demo, "AREAS", (60_000,))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_truth_names_every_planted_image_of_the_listing(small_heap, tmp_path):
    demo.write_heap(str(tmp_path))
    truth = json.loads((tmp_path / "faults.json").read_text())
    listed = {f"{shard.name}/{member}" for shard in list_shards(str(tmp_path / "source"), demo.SHARD_SIZE) for member in shard.members}
    assert Counter(entry["fault"] for entry in truth.values()) == dict.fromkeys(FAULTS.keys() - {"enlarged"}, 1)
    assert set(truth) == {uid for uid in listed if "/planted/" in uid}
    originals = {uid: entry["original"] for uid, entry in truth.items() if entry["original"]}
    assert set(originals.values()) <= listed - set(truth) and len(originals) == 3
    place = tmp_path / "source"
    for uid, entry in truth.items():
        encoded = (place / uid.partition("/")[2]).read_bytes()
        if entry["fault"] == "truncated":
            with pytest.raises(DecodeError):
                decode(encoded)
        if entry["fault"] == "exact_copy":
            assert encoded == (place / originals[uid].partition("/")[2]).read_bytes()


def test_the_heap_is_the_same_every_time(small_heap, tmp_path):
    truths = [demo.build_heap(tmp_path / name) for name in ("a", "b")]
    assert truths[0] == truths[1] and contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("size", [(300, 451), (512, 512), (1411, 1411)])
def test_windows_lie_inside_and_share_little(size):
    found = demo.windows(*size, np.random.default_rng(1))
    assert len(found) >= 4
    covered = [np.zeros(size, bool) for _ in found]
    for mask, (top, left, height, width) in zip(covered, found, strict=True):
        assert 0 <= top <= top + height <= size[0] and 0 <= left <= left + width <= size[1]
        mask[top : top + height, left : left + width] = True
    shared = [(a & b).sum() / min(a.sum(), b.sum()) for i, a in enumerate(covered) for b in covered[:i]]
    assert max(shared) < 0.5


def test_every_photograph_is_packaged():
    found = {name: pixels.shape for name, _, pixels in demo.photographs()}
    assert set(found) == set(demo.PHOTOGRAPHS) and min(min(shape[:2]) for shape in found.values()) >= 300


def test_the_closing_words_count_what_the_report_counts(tmp_path):
    words = demo.found(str(small_run(tmp_path)))
    assert "planted faults found" in words and "1 of 1 style controls kept" in words and "7 of 8 other images kept" in words
