"""The AI-generated probe: folding, calibration, thresholds, and figures that cannot be had by knowing the sources."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from curation import detector
from curation.detector import Rows

DIM = 24


def rows(shared: float, own: float, seed: int = 0, num_groups: int = 6, per_group: int = 40) -> Rows:
    """Gaussian vectors: `shared` separates real from synthetic everywhere, `own` moves every generator and source its own way."""
    rng = np.random.default_rng(seed)
    direction, vectors, synthetic, group = rng.normal(size=DIM) / np.sqrt(DIM), [], [], []
    for label in (False, True):
        for index in range(num_groups):
            centre = own * rng.normal(size=DIM) + shared * (1 if label else -1) * direction
            vectors.append(rng.normal(size=(per_group, DIM)) * 3 + 50 + centre)
            synthetic += [label] * per_group
            group += [f"{'generator' if label else 'source'} {index}"] * per_group
    num = len(group)
    kind = np.where(np.arange(num) % 2, "photo", "art")
    return Rows(np.concatenate(vectors).astype(np.float32), np.array(synthetic), np.array(group), kind, rng.uniform(0.01, 2, num))


def test_a_shared_signal_is_found_on_unseen_generators_and_sources():
    probe = detector.fit(rows(shared=6, own=0.5), "tower/1")
    figures = probe.info["evaluation"]
    assert figures["disjoint"]["mean"]["auroc"] > 0.9
    assert figures["leave_one_group_out"]["auroc"] > 0.9
    assert abs(figures["controls"]["auroc_permuted_labels"] - 0.5) < 0.1


def test_a_probe_that_only_knows_its_sources_looks_good_on_a_random_split_and_not_on_unseen_groups():
    known = rows(shared=0, own=4)
    figures = detector.controls(known, 0.01, 0)["auroc_random_split"], detector.disjoint(known, 0.01, 0)["mean"]["auroc"]
    assert figures[0] > 0.95
    assert figures[1] < 0.75


def test_standardisation_is_folded_into_the_weights():
    data = rows(shared=3, own=1)
    weight, bias = detector.fit_linear(data.vectors, data.synthetic, 0.1)
    standard = StandardScaler().fit_transform(data.vectors.astype(np.float64))
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=5000, tol=1e-6).fit(standard, data.synthetic)
    expected = model.decision_function(standard)
    np.testing.assert_allclose(detector.linear_scores(data.vectors, weight, bias), expected, atol=1e-4)


def test_a_dimension_that_never_varies_does_no_harm():
    data = rows(shared=3, own=1)
    data.vectors[:, 5] = 7.0
    weight, bias = detector.fit_linear(data.vectors, data.synthetic, 0.1)
    assert np.isfinite(weight).all() and np.isfinite(bias)


def test_platt_scaling_recovers_the_probability_that_made_the_labels():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=20_000) * 2
    labels = rng.random(20_000) < expit(0.7 * scores)
    slope, intercept = detector.platt(scores, labels)
    assert slope == pytest.approx(0.7, abs=0.04)
    assert intercept == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("num, rate, above", [(573, 0.05, 27), (573, 0.01, 4), (99, 0.05, 4), (20, 0.05, 0)])
def test_the_threshold_leaves_the_promised_number_of_real_images_above_it(num, rate, above):
    scores = np.random.default_rng(0).permutation(num) / num
    assert (scores > detector.threshold(scores, rate)).sum() == above
    assert above + 1 <= rate * (num + 1)  # so a new exchangeable image lies above it with probability at most `rate`


def test_too_few_real_images_for_a_rate_give_a_threshold_that_nothing_passes():
    assert detector.threshold(np.linspace(0, 0.9, 50), 0.01) == 1.0


def test_area_matched_auroc_compares_only_images_of_the_same_band():
    area = np.array([0.01, 0.01, 1.5, 1.5, 1.5])
    synthetic = np.array([True, False, True, False, False])
    data = Rows(np.zeros((5, 1)), synthetic, np.array(list("abcde")), np.array(["photo"] * 5), area)
    assert detector.area_matched_auroc(np.array([0.2, 0.3, 0.5, 0.1, 0.6]), data) == pytest.approx(1 / 3, abs=1e-4)
    assert detector.area_matched_auroc(area, data) == 0.5
    alone = Rows(np.zeros((2, 1)), np.array([True, False]), np.array(["a", "b"]), np.array(["photo"] * 2), np.array([0.01, 1.5]))
    assert detector.area_matched_auroc(np.array([1.0, 0.0]), alone) is None


def test_vectors_of_another_tower_are_refused_by_both_names():
    data = rows(shared=6, own=0.5)
    probe = detector.fit(data, "effnet/efficientnet_lite2/abc")
    with pytest.raises(ValueError, match=r"effnet/efficientnet_lite2/abc.*siglip/ViT-B-16-SigLIP2-256/webli.*synthetic fit --tower siglip"):
        detector.predict(probe, data.vectors, "siglip/ViT-B-16-SigLIP2-256/webli")


def test_a_saved_probe_gives_the_same_bits_and_a_row_does_not_depend_on_its_batch(tmp_path):
    data = rows(shared=6, own=0.5)
    probe = detector.fit(data, "tower/1")
    expected = detector.predict(probe, data.vectors, "tower/1")
    detector.save(probe, tmp_path / "probe")
    loaded = detector.load(str(tmp_path / "probe"))
    np.testing.assert_array_equal(detector.predict(loaded, data.vectors, "tower/1"), expected)
    np.testing.assert_array_equal(np.concatenate([detector.predict(loaded, row[None], "tower/1") for row in data.vectors]), expected)
    assert expected.dtype == np.float32 and expected.min() >= 0 and expected.max() <= 1


def test_the_same_rows_give_the_same_probe():
    first, second = (detector.fit(rows(shared=5, own=1), "tower/1", seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weight, second.weight)
    assert (first.bias, first.slope, first.info) == (second.bias, second.slope, second.info)


def test_the_report_counts_what_each_threshold_flags():
    data = rows(shared=6, own=0.5, per_group=10)
    probability = np.linspace(0, 1, len(data.group))
    result = detector.report(probability, data, {"fpr_5": 0.75, "fpr_1": 0.9})
    assert result["auroc"] == pytest.approx(roc_auc_score(data.synthetic, probability), abs=1e-4)
    assert result["real"] == {
        "num": 60,
        "flagged_at_fpr_5": 0.0,
        "interval_at_fpr_5": [0.0, 0.0596],
        "flagged_at_fpr_1": 0.0,
        "interval_at_fpr_1": [0.0, 0.0596],
    }
    flagged = {entry["name"]: entry["flagged_at_fpr_5"] for entry in result["generators"]}
    assert flagged == {f"generator {index}": share for index, share in enumerate([0, 0, 0, 1, 1, 1])}


def test_one_source_is_not_enough_to_judge_unseen_ones():
    data = rows(shared=6, own=0.5)
    few = Rows(*(column[(data.group == "source 0") | data.synthetic] for column in data))
    with pytest.raises(ValueError, match=r"1 sources \(real\).*at least 3"):
        detector.fit(few, "tower/1")


def test_vectors_that_cannot_tell_the_classes_apart_are_refused_or_stay_near_chance():
    data = rows(shared=0, own=0)
    try:
        probe = detector.fit(data, "tower/1")
    except ValueError as error:
        assert "cannot tell the two apart" in str(error)
    else:
        assert probe.info["evaluation"]["disjoint"]["mean"]["auroc"] < 0.65
