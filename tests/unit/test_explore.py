"""Queries and pictures of a run folder: what they say is what is in the files."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import duckdb
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from small_run import PLANTED, small_run

from curation import explore, plots
from curation.judged import short

POLICY = "pretrain_256"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return str(small_run(tmp_path_factory.mktemp("explore")))


def names(items: Iterable[dict]) -> list[str]:
    return [item["uid"].rpartition("/")[2] for item in items]


def words(figure: Figure) -> str:
    axis = figure.axes[0]
    texts = [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels(), axis.xaxis.label, axis.yaxis.label]
    return "\n".join(text.get_text() for text in texts)


def test_annotations_count_rows_errors_and_files(run):
    found = {row["stage"]: row for row in explore.annotations(run)}
    assert list(found) == ["artifacts", "basics", "duplicates", "provenance", "synthetic"]
    assert found["basics"]["rows"] == 17 and found["basics"]["errors"] == 1 and found["basics"]["files"] == 2
    assert found["duplicates"]["rows"] == 17 and found["synthetic"]["fingerprint"] == "made up"


def test_policies_come_by_resolution_and_a_missing_one_names_the_command(run):
    assert explore.policies(run) == [POLICY, "pretrain_512"]
    with pytest.raises(FileNotFoundError, match="k2 filter"):
        explore.funnel(run, "pretrain_1024")


def test_removed_by_lists_exactly_the_failures_worst_first(run):
    funnel = {rule["name"]: rule for rule in explore.funnel(run, POLICY)["rules"]}
    for name, rule in funnel.items():
        assert len(explore.removed_by(run, POLICY, name, 99)) == rule["failed"], name
    assert names(explore.removed_by(run, POLICY, "not_synthetic")) == ["astronaut.jpg"]
    assert explore.removed_by(run, POLICY, "not_synthetic")[0]["label"] == "real_share 0.01"
    small = [item["value"] for item in explore.removed_by(run, "pretrain_512", "large_enough", 99)]
    assert len(small) > 3 and small == sorted(small)


def test_nearest_kept_are_kept_and_come_nearest_first(run):
    kept = {uid for (uid,) in duckdb.sql(f"SELECT uid FROM '{run}/selection/{POLICY}.parquet'").fetchall()}
    found = explore.nearest_kept(run, POLICY, "not_too_complex", 99)
    values = [item["value"] for item in found]
    assert {item["uid"] for item in found} == kept and values == sorted(values, reverse=True)
    assert explore.nearest_kept(run, POLICY, "not_duplicate") == []  # true or false, so nothing is near


def test_an_unknown_rule_is_refused_with_the_names(run):
    with pytest.raises(ValueError, match="not_synthetic"):
        explore.removed_by(run, POLICY, "not_synthetik")


def test_a_changed_annotation_is_seen_again(run, tmp_path):
    copy = str(tmp_path / "copy")
    shutil.copytree(run, copy)
    before = explore.removed_by(copy, POLICY, "not_synthetic")
    path = Path(copy, "selection", f"{POLICY}.funnel.json")
    funnel = json.loads(path.read_text())
    funnel["sql"] = re.sub(r"real_share > [\d.]+", "real_share > 0.95", funnel["sql"])
    path.write_text(json.dumps(funnel))
    assert len(before) == 1 and len(explore.removed_by(copy, POLICY, "not_synthetic", 99)) == 16


@pytest.mark.parametrize(
    ("column", "label"),
    [
        ("buckets.scale", "scale"),
        ("COALESCE(jpeg_quality, 100)", "jpeg_quality"),
        ("width / height", "width / height"),
        ("GREATEST(LEAST(border_top, border_bottom), border_left)", ""),
    ],
)
def test_a_label_names_its_column_where_there_is_room(column, label):
    assert short(column) == label


def test_a_table_escapes_what_is_not_ours():
    text = explore.table([{"name": "a|b <script>x</script>\n*bold*", "count": 1234, "none": None}], ["count", "name", "none"])
    assert text.splitlines()[2] == r"| 1,234 | a\|b &lt;script&gt;x&lt;/script&gt; \*bold\* |  |"
    assert explore.table([]) == "|  |\n|  |"


def test_duplicate_groups_start_with_their_representative(run):
    groups = explore.duplicate_groups(run)
    assert sorted(sorted(names(group)) for group in groups) == [
        ["coffee.jpg", "planted_exact_copy.jpg"],
        ["planted_mirrored_copy.jpg", "rocket.jpg"],
    ]
    assert all(group[0]["representative"] and not group[1]["representative"] for group in groups)
    assert explore.num_duplicates(run) == {"groups": 2, "images": 4, "extra": 2}


def test_planted_faults_are_counted_against_the_truth(run):
    found = explore.planted(run, POLICY)
    faults = {row["fault"]: row for row in found["faults"]}
    assert {name.replace("_", " ") for name in PLANTED} | {"clean"} == set(faults)
    assert faults["truncated"]["by"] == "error of decoding 1" and faults["mirrored copy"]["by"] == "duplicates of k2 dedup 1"
    assert faults["bordered"]["right"] == 1 and "no_border 1" in faults["bordered"]["by"]
    # Nothing was planted in ten images; coffee and rocket are originals of copies, and the policy removes the astronaut.
    assert faults["clean"]["planted"] == 8 and faults["clean"]["right"] == 7 and "not_synthetic 1" in faults["clean"]["by"]
    removed = {row["fault"] for row in found["faults"] if row["expect"] == "rule" and not row["right"]}
    assert {item["label"] for item in found["missed"]} == removed and found["wrong"] == []


def test_exemplars_and_firing_rates_read_the_codes(run):
    assert names(explore.exemplars(run, 3)) == ["retina.jpg", "coffee.jpg", "rocket.jpg"]
    assert [item["label"] for item in explore.exemplars(run, 3, 2)] == ["3", "2"]
    often, rare = explore.firing_rates(run)
    assert (often["feature"], often["images"], often["share"]) == (7, 16, 1.0)
    assert (rare["feature"], rare["images"], rare["mean"], rare["largest"]) == (3, 3, 2.0, 3.0)


def test_packed_buckets_and_samples_agree_with_the_selection(run):
    buckets, kept = explore.packed_buckets(run, POLICY), explore.funnel(run, POLICY)["num_kept"]
    assert sum(bucket["images"] for bucket in buckets) == kept
    samples = explore.packed_samples(run, POLICY, 4)
    assert len(samples) == 4 and len({sample["uid"] for sample in samples}) == 4
    assert all(sample["label"] == f"{sample['image'].width} × {sample['image'].height}" for sample in samples)


def test_thumbnails_leave_out_the_broken_and_keep_the_shape(run):
    uids = [row["uid"] for group in explore.duplicate_groups(run) for row in group] + [explore.broken(run)[0]["uid"]]
    found = explore.thumbnails(run, uids, 64)
    assert len(found) == 4 and {picture.size for picture in found.values()} == {(64, 64)}


def test_a_contact_sheet_shows_every_picture_in_its_place():
    pictures = [Image.new("RGB", size, colour) for size, colour in (((300, 100), "red"), ((100, 300), "lime"), ((50, 50), "blue"))]
    sheet = explore.contact_sheet(pictures, ["a", "a label that is far too long for its picture", "日本"], columns=2, size=80)
    assert sheet.size == (2 * 88 + 8, 2 * 106 + 8)
    # Pictures stand on the line of their label, in the middle of their column.
    assert sheet.getpixel((48, 80)) == (255, 0, 0) and sheet.getpixel((136, 20)) == (0, 255, 0) and sheet.getpixel((48, 190)) == (0, 0, 255)
    assert explore.contact_sheet([], []).size[0] > 0


def test_the_funnel_plot_says_what_the_funnel_says(run):
    text = words(explore.plot_funnel(run, POLICY))
    for rule in explore.funnel(run, POLICY)["rules"]:
        assert rule["name"] in text and str(rule["kept_so_far"]) in text
        assert not rule["failed"] or f"removes {rule['failed']}, alone {rule['failed_alone']}" in text


def test_overlaps_count_images_that_two_rules_remove(run):
    failing = [rule for rule in explore.funnel(run, POLICY)["rules"] if rule["failed"]]
    written = {text.get_position(): int(text.get_text()) for text in explore.plot_overlaps(run, POLICY).axes[0].texts}
    assert [written[i, i] for i in range(len(failing))] == [rule["failed"] for rule in failing]
    judged, order = explore.judge(run, POLICY), [rule["name"] for rule in failing]
    noise, complexity = order.index("not_noise"), order.index("not_too_complex")
    both = sum(a == 0 and b == 0 for a, b in zip(judged.verdicts["not_noise"], judged.verdicts["not_too_complex"], strict=True))
    assert written.get((noise, complexity), 0) == both >= 1


def test_histograms_show_each_threshold_with_what_it_removes(run):
    figures = explore.score_histograms(run, explore.policies(run))
    assert "removes 1  (256, 512)" in words(figures["synthetic.real_share"])
    large = {
        policy: {rule["name"]: rule for rule in explore.funnel(run, policy)["rules"]}["large_enough"] for policy in explore.policies(run)
    }
    assert f"removes {large[POLICY]['failed']} / {large['pretrain_512']['failed']}" in words(figures["buckets.scale"])


@pytest.mark.parametrize("values", [[], [np.nan], [0.0] * 500 + [1.0], [5.0] * 3, np.geomspace(1e-3, 1e6, 50), [-1.0, 0.0, 2.0]])
def test_a_histogram_of_any_values_can_be_drawn(values, tmp_path):
    plots.histogram(np.array(values), "x" * 90, [("256", "<", 0.5, 3), ("512", ">", 7.0, 0)]).savefig(tmp_path / "x.svg")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (6.0, "6"), (0.01234, "0.0123"), (-2.5, "-2.5"), (12345.6, "12,346"), (float("nan"), "none")],
)
def test_numbers_read_well(value, text):
    assert plots.number(value) == text
