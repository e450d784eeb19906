"""Semantic groups and concepts, on made vectors whose neighbours are known."""

import numpy as np
import pyarrow as pa
import pytest

from curation import semantic
from curation.cells import Cells, draws, fit_cells, nearest, num_cells, places, sample_rows, units
from curation.concepts import Concepts, check_levels, fit_tree, leaves, paths, weights
from curation.ordered import COLUMNS, ORDERED
from curation.semantic import Semantic, description_for, merged, near_vectors

COSINE = 0.9


def crowd(seed: int, size: int = 3000, dim: int = 32, num_concepts: int = 12) -> np.ndarray:
    """float16 vectors around concepts, all positive as EfficientNet's are; the last tenth are near copies of the first."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_concepts, dim))[rng.integers(num_concepts, size=size)] + 2 * rng.standard_normal((size, dim))
    copies = size // 10
    vectors[-copies:] = vectors[:copies] + 0.6 * rng.standard_normal((copies, dim))
    return (vectors + 8).astype(np.float16)


def pairs_by_comparing_all(vectors: np.ndarray, mean: np.ndarray, cosine: float) -> set[tuple[int, int]]:
    unit = units(vectors, mean)
    left, right = np.nonzero(np.triu(unit @ unit.T >= cosine, 1))
    return set(zip(left.tolist(), right.tolist(), strict=True))


def found_in(vectors: np.ndarray, cells: Cells, description: Semantic) -> semantic.Found:
    return merged(list(near_vectors(np.arange(len(vectors)), vectors, cells, description)))


def test_pairs_near_a_border_are_found_in_cells_as_when_all_are_compared():
    vectors = crowd(0)
    cells = fit_cells(vectors, 24)
    expected = pairs_by_comparing_all(vectors, cells.mean, COSINE)
    home = nearest(units(vectors, cells.mean), cells.centroids)[1][:, 0]
    across = sum(home[i] != home[j] for i, j in expected)
    assert len(expected) > 250 and across > 10, "the planted copies, some of them in two cells"
    found = found_in(vectors, cells, Semantic("made", COSINE, probes=24))
    assert set(zip(found.left.tolist(), found.right.tolist(), strict=True)) == expected, "with every cell looked at, none is lost"
    four = found_in(vectors, cells, Semantic("made", COSINE))
    assert len(four.left) >= 0.98 * len(expected)
    assert len(found_in(vectors, cells, Semantic("made", COSINE, probes=1)).left) == len(expected) - across


def test_an_image_visits_only_cells_whose_border_is_near():
    vectors = crowd(1)
    cells = fit_cells(vectors, 24)
    strict, loose = (places(units(vectors, cells.mean), cells, 4, Semantic("made", cosine).reach)[1] for cosine in (0.99, 0.5))
    assert (strict >= 0).mean() < 0.5 * (loose >= 0).mean()


def test_a_cell_that_is_too_large_is_cut_again_and_finds_the_same(monkeypatch):
    vectors = crowd(2)
    cells = fit_cells(vectors, 1)
    whole = found_in(vectors, cells, Semantic("made", COSINE, probes=12))
    monkeypatch.setattr(semantic, "LARGE", 1000)
    monkeypatch.setattr(semantic, "num_cells", lambda size: max(2, size // 250))
    cut = found_in(vectors, cells, Semantic("made", COSINE, probes=12))
    assert (cut.left.tolist(), cut.right.tolist()) == (whole.left.tolist(), whole.right.tolist())
    monkeypatch.setattr(semantic, "LARGE", 10)
    equal = np.ones((64, 8), np.float16) * np.arange(1, 9, dtype=np.float16)
    assert len(found_in(equal, Cells(np.zeros(8, np.float32), np.ones((1, 8), np.float32)), Semantic("made", COSINE)).left) == 64 * 63 / 2


def test_cells_do_not_depend_on_the_number_of_threads():
    import faiss

    vectors, before = crowd(3), faiss.omp_get_max_threads()
    first = fit_cells(vectors, 16)
    faiss.omp_set_num_threads(4)
    try:
        second = fit_cells(vectors, 16)
    finally:
        faiss.omp_set_num_threads(before)
    assert first.centroids.tobytes() == second.centroids.tobytes()


def test_a_tower_without_a_measured_threshold_needs_one():
    with pytest.raises(ValueError, match="those of another do not hold"):
        description_for("siglip")
    assert description_for("siglip", 0.95) == Semantic("siglip", 0.95)
    with pytest.raises(ValueError, match="between 0 and 1"):
        description_for("effnet", 1.5)


def test_a_group_keeps_its_best_counts_its_duplicates_and_takes_no_pair_that_the_phashes_refuse():
    rng = np.random.default_rng(0)
    hashes = [rng.permutation(np.arange(144) % 2) for _ in range(3)]
    packed = [np.packbits(hashes[i]).tobytes() for i in (0, 0, 0, 1)]
    rows = [
        {"uid": uid, "bytes": 1, "md5": uid, "width": width, "height": 300, "format": "JPEG", "jpeg_quality": 90, "phash": packed[i]}
        | {"phash_mirror": np.packbits(hashes[2]).tobytes(), "colorhash": bytes(6)}
        for i, (uid, width) in enumerate(zip("abcd", (300, 200, 400, 500), strict=True))
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema([ORDERED.field(name) for name in COLUMNS]))
    found = semantic.Found(np.array([0, 0]), np.array([2, 3]), np.array([0.95, 0.95], np.float32), np.zeros(0, int), np.zeros(0))
    kept = np.array([0, 0, 2, 3])  # b is a duplicate of a
    found, groups = semantic.groups(table, np.ones(4, bool), kept, found, Semantic("made", COSINE, 48))
    assert found.right.tolist() == [2], "a and d have nothing in common but the vector"
    assert groups["representative"].to_pylist() == [False, False, True, True]
    assert groups["group"].to_pylist() == [0, 0, 0, None] and groups["group_size"].to_pylist() == [3, 3, 3, 1]
    assert [value is None for value in groups["cosine"].to_pylist()] == [False, True, True, True]
    unknown = semantic.groups(table, np.array([False, True, True, True]), np.arange(4), found, Semantic("made", COSINE))[1]
    assert unknown["group"].to_pylist() == [None] * 4, "an image without a vector is in no group"


def test_merged_parts_have_each_pair_once_and_of_each_image_the_nearest():
    parts = [
        semantic.Found(np.array([5, 1]), np.array([2, 2]), np.array([0.9, 0.8]), np.array([1, 2, 5]), np.array([0.8, 0.9, 0.9])),
        semantic.Found(np.array([2]), np.array([5]), np.array([0.95]), np.array([2, 5, 7]), np.array([0.95, 0.95, -1])),
    ]
    found = merged(parts)
    assert found.left.tolist() == [1, 2] and found.right.tolist() == [2, 5] and found.cosine.tolist() == [0.8, 0.95]
    assert found.ids.tolist() == [1, 2, 5, 7] and found.nearest.tolist() == pytest.approx([0.8, 0.95, 0.95, -1])
    assert len(merged([]).left) == len(merged([]).ids) == 0


# --- concepts ---


def test_every_branch_of_the_tree_has_the_same_share_and_weights_have_mean_one():
    path = np.array([[0, 0]] * 6 + [[0, 1]] * 2 + [[1, 2]] * 4)
    counted = np.array([True] * 5 + [False] + [True] * 6)
    weight, sizes = weights(path, counted)
    share = weight / counted.sum()
    assert share[counted].sum() == pytest.approx(1)
    assert share[:5].sum() == pytest.approx(1 / 4) and share[6:8].sum() == pytest.approx(1 / 4) and share[8:].sum() == pytest.approx(1 / 2)
    assert weight[5] == weight[0] and sizes[5].tolist() == [7, 5]


def test_a_rare_concept_weighs_more_and_resampling_gives_it_more_clusters():
    rng = np.random.default_rng(0)
    centres = 4 * rng.standard_normal((20, 16))
    concept = np.repeat(np.arange(20), [4000] + [60] * 19)
    vectors = (centres[concept] + rng.standard_normal((len(concept), 16))).astype(np.float16)
    common = {}
    for steps in (0, 5):
        tree = fit_tree(vectors, Concepts("made", (64, 8, 2), steps))
        leaf = leaves(vectors, tree)
        common[steps] = len(set(leaf[concept == 0]))
        weight, _ = weights(paths(leaf, tree), np.ones(len(leaf), bool))
        assert weight.mean() == pytest.approx(1) and weight[concept == 0].mean() < 1 < weight[concept > 0].mean()
    assert common[5] < common[0], "k-means alone spends its clusters on the concept of which there is most"


def test_a_balanced_subset_is_drawn_by_uid_alone():
    uids = [f"s/{i}" for i in range(4000)]
    draw = draws(uids)
    assert (draws(uids[::-1]) == draw[::-1]).all() and 0 <= draw.min() < 0.01 and 0.99 < draw.max() < 1
    weight = np.where(np.arange(4000) < 3000, 0.5, 2.5)
    kept = draw < 0.2 * weight
    assert kept[:3000].mean() == pytest.approx(0.1, abs=0.02) and kept[3000:].mean() == pytest.approx(0.5, abs=0.05)


def test_the_sample_is_the_smallest_draws_of_those_that_may_be_drawn_smallest_first():
    draw, among = np.array([0.5, 0.1, 0.3, 0.1, 0.2, 0.9]), np.array([1, 1, 0, 1, 1, 1], bool)
    assert [sample_rows(draw, among, count).tolist() for count in (0, 1, 3, 9)] == [[], [1], [1, 3, 4], [1, 3, 4, 0, 5]]


def test_levels_must_fall_and_fit():
    for levels, size in (((8, 16), 100), ((), 100), ((0,), 100), ((101, 10), 100)):
        with pytest.raises(ValueError, match="--levels"):
            check_levels(levels, size)


def test_the_number_of_cells_grows_with_the_images_and_then_with_their_root():
    assert [num_cells(size) for size in (1, 10_000, 1_000_000, 10**9)] == [1, 9, 976, 126_491]
