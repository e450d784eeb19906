"""The scores of a run, as the notebook shows them."""

import numpy as np
import pyarrow as pa
import pytest

from curation import score_plots, scores
from curation.evidence import boxes
from curation.schema import SYNTHETIC
from curation.shards import write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three shards of 60 images; shard c scores high. One image declares AI and looks real, one is a camera's and looks generated."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    for shard in "abc":
        rows = []
        for i in range(60):
            p = float(rng.beta(2, 6)) if shard != "c" else float(rng.beta(6, 2))
            row = {"uid": f"{shard}/{i:02}", "p_synthetic": p, "p_pixels": p, "kind": ["photo", "art"][i % 2], "real_share": 1 - p}
            rows.append(row)
        if shard == "a":
            rows[0] |= {"declared": "plain", "p_synthetic": 0.6}  # 0.6 with 5.1 of evidence added: the picture says 0.9 %
            rows[1] |= {"declared": "camera", "p_synthetic": 0.9}
            rows[2] = {"uid": "a/02", "error": "broken"}
        write_table(pa.Table.from_pylist(rows, SYNTHETIC), folder / f"annotations/synthetic/{shard}.parquet", "made")
    return str(folder)


def test_a_summary_counts_every_image_that_has_a_score(run):
    rows = {row["kind"]: row for row in scores.summary(run)}
    assert rows["art"]["images"] + rows["photo"]["images"] == 179
    found = scores.scores(run)
    assert sum(row["removed"] for row in rows.values()) == (found["real_share"] <= 0.05).sum()
    assert sum(row["in doubt"] for row in rows.values()) == ((found["real_share"] > 0.05) & (found["real_share"] <= 0.15)).sum()
    assert {kind: len(values) for kind, values in scores.by_kind(run).items()} == {kind: row["images"] for kind, row in rows.items()}


def test_mistakes_are_found_by_what_files_declare_without_what_that_added(run):
    missed, wrong = scores.mistakes(run, True), scores.mistakes(run, False)
    assert [item["uid"] for item in missed] == ["a/00"] and missed[0]["label"].endswith("plain")
    assert [item["uid"] for item in wrong] == ["a/01"]


def test_mistakes_are_found_by_labels_and_the_worst_comes_first(run):
    labels = {uid: uid.startswith("a/") for uid in scores.scores(run)["uid"]}
    found = scores.mistakes(run, False, 5, labels)
    values = [item["value"] for item in found]
    assert len(found) == 5 and values == sorted(values, reverse=True) and not any(item["uid"].startswith("a/") for item in found)


def test_the_shard_that_differs_is_beyond_its_mark_and_comes_first(run):
    rows = scores.drift(run)
    assert rows[0]["shard"] == "c" and rows[0]["distance"] > rows[0]["limit"] and rows[0]["median shift"] > 1
    score_plots.drift([row["shard"] for row in rows], [row["distance"] for row in rows], [row["limit"] for row in rows])


def test_like_shards_are_rarely_beyond_the_mark(tmp_path):
    rng = np.random.default_rng(1)
    for shard in range(40):
        rows = [{"uid": f"s{shard:02}/{i}", "p_synthetic": float(p), "real_share": 0.5} for i, p in enumerate(rng.beta(2, 4, 50))]
        write_table(pa.Table.from_pylist(rows, SYNTHETIC), tmp_path / f"annotations/synthetic/s{shard:02}.parquet", "made")
    beyond = [row["distance"] > row["limit"] for row in scores.drift(str(tmp_path))]
    assert len(beyond) == 40 and sum(beyond) <= 3


def test_extremes_are_the_highest_and_the_lowest(run):
    values = [item["value"] for item in scores.extremes(run, True, 3) + scores.extremes(run, False, 3)]
    everything = np.sort(scores.scores(run)["p_synthetic"])
    assert values == [*everything[::-1][:3], *everything[:3]]


def test_a_run_without_scores_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `k2 annotate` first"):
        scores.scores(str(tmp_path))


@pytest.mark.parametrize("height, width", [(1, 1), (256, 256), (257, 300), (4000, 100), (3000, 9000)])
def test_the_squares_of_a_heat_map_cover_the_image_and_stay_in_it(height, width):
    found, covered = boxes(height, width), np.zeros((height, width), bool)
    assert 1 <= len(found) <= 36
    for top, left, high, wide in found:
        assert top >= 0 and left >= 0 and top + high <= height and left + wide <= width
        covered[top : top + high, left : left + wide] = True
    assert covered.all()


def test_figures_of_nothing_and_of_much_can_be_drawn(tmp_path):
    figures = [
        score_plots.distributions({}, "p"),
        score_plots.distributions({f"k{i}": np.random.default_rng(i).random(50) for i in range(7)}, "p", 0.5),
        score_plots.generator_bars([]),
        score_plots.recall_curves({"loss": [0.002, 0.05, 0.5], "detector": [0.1, 0.5, 0.9], "format only": []}),
        score_plots.drift([], [], []),
        score_plots.heat_map(np.zeros((60, 200, 3), np.uint8), boxes(60, 200), np.array([-3.0]), "t"),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
