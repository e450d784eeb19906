"""The linear head: folding, weights of groups, calibration, and folds that keep groups whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binomtest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from curation import probe
from curation.probe import Labels

DIM = 12


def labelled(num: int, num_groups: int = 4, seed: int = 0) -> tuple[np.ndarray, Labels]:
    """(num, 1, DIM) vectors of groups of equal size, and their labels."""
    rng = np.random.default_rng(seed)
    synthetic = np.arange(num) % 2 == 1
    group = np.array([f"{'generator' if label else 'source'} {i // 2 % num_groups}" for i, label in enumerate(synthetic)])
    vectors = rng.normal(size=(num, 1, DIM)) * 3 + 50 + synthetic[:, None, None] * np.linspace(0, 3, DIM)
    return vectors.astype(np.float32), Labels(synthetic, group, np.full(num, "photo"))


def test_without_shrinkage_the_head_is_a_linear_discriminant():
    vectors, labels = labelled(320)
    head = probe.fit_linear(vectors, labels, 0.0)
    expected = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.5, 0.5]).fit(vectors[:, 0], labels.synthetic)
    assert head.weight @ expected.coef_[0] / np.linalg.norm(head.weight) / np.linalg.norm(expected.coef_) > 0.9999
    scores = probe.linear_scores(vectors[:, 0], head)
    assert abs(scores[labels.synthetic].mean() + scores[~labels.synthetic].mean()) < 1e-3  # the middle of the two is 0


def test_scale_and_offset_of_the_vectors_do_not_matter():
    vectors, labels = labelled(160)
    stretch = np.linspace(0.1, 30, DIM, dtype=np.float32)
    plain, stretched = (probe.linear_scores(v[:, 0], probe.fit_linear(v, labels, 0.3)) for v in (vectors, vectors * stretch + 7))
    np.testing.assert_allclose(plain, stretched, atol=2e-3)


def test_leaving_images_out_by_subtraction_is_a_fit_without_them():
    vectors, labels = labelled(240)
    mask = labels.group == "source 1"
    head = next(iter(probe.heads_without([mask], vectors, labels, (0.3,))))[0]
    alone = probe.fit_linear(vectors[~mask], labels.at(~mask), 0.3)
    assert head.weight @ alone.weight / np.linalg.norm(head.weight) / np.linalg.norm(alone.weight) > 0.9999


def test_a_dimension_that_never_varies_does_no_harm():
    vectors, labels = labelled(80)
    vectors[..., 5] = 7.0
    head = probe.fit_linear(vectors, labels, 0.1)
    assert np.isfinite(head.weight).all() and np.isfinite(head.bias)


def test_an_image_with_many_views_counts_no_more_than_one_with_few():
    vectors, labels = labelled(160)
    copies = np.repeat(vectors, 3, 1)
    some = copies.copy()
    some[::3, 1:] = np.nan  # these have one view, and it is the same picture
    once, thrice, mixed = (probe.fit_linear(v, labels, 0.01).weight for v in (vectors, copies, some))
    for other in (thrice, mixed):
        assert once @ other / np.linalg.norm(once) / np.linalg.norm(other) > 0.999


def test_a_group_counts_by_the_root_of_its_size_and_a_class_by_half():
    synthetic = np.array([True] * 10 + [False] * 100)
    group = np.array(["a"] * 9 + ["b"] + ["c"] * 100)
    weights = probe.image_weights(Labels(synthetic, group, group))
    assert weights[synthetic].sum() == pytest.approx(weights[~synthetic].sum()) == pytest.approx(55)
    assert weights[group == "a"].sum() / weights[group == "b"].sum() == pytest.approx(3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), min_size=2, max_size=60), st.integers(0, 5))
def test_folds_cover_every_image_once_and_split_no_group(images, seed):
    synthetic = np.array([label for label, _ in images])
    group = np.array([f"{label}{number}" for label, number in images])
    folds = probe.group_folds(Labels(synthetic, group, group), seed)
    assert (np.sum(folds, 0) == 1).all()
    for name in np.unique(group):
        assert sum(fold[group == name].any() for fold in folds) == 1


def test_a_score_out_of_fold_is_by_a_head_that_never_saw_the_group():
    """Every group has its own mark, and nothing else: known groups are told apart perfectly, unseen ones not at all."""
    rng, num = np.random.default_rng(0), 320
    _, labels = labelled(num)
    own = {name: rng.normal(size=DIM) * 8 for name in np.unique(labels.group)}
    vectors = np.stack([rng.normal(size=DIM) + own[name] for name in labels.group])[:, None].astype(np.float32)
    seen = probe.fold_scores(vectors, labels, [np.arange(num) % 5 == i for i in range(5)], 1, 0.01)[:, 0]
    unseen = probe.leave_one_group_out(vectors, labels, 1, 0.01)[:, 0]
    right = [((scores > 0) == labels.synthetic).mean() for scores in (seen, unseen)]
    assert right[0] > 0.95 and right[1] < 0.75


def test_platt_scaling_recovers_the_probability_that_made_the_labels():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=20_000) * 2
    labels = rng.random(20_000) < expit(0.7 * scores)
    slope, intercept = probe.platt(scores, labels, np.ones(20_000))
    assert slope == pytest.approx(0.7, abs=0.04) and intercept == pytest.approx(0.0, abs=0.05)


def test_scores_that_fall_with_the_label_have_no_slope():
    labels = np.arange(100) % 2 == 1
    assert probe.platt(-labels.astype(float), labels, np.ones(100))[0] == 0.0


def test_tiny_scores_have_the_same_log_odds_as_large_ones():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=2000)
    labels = rng.random(2000) < expit(2 * scores)
    (large, bias), (tiny, tiny_bias) = (probe.platt(scale * scores, labels, np.ones(2000)) for scale in (1.0, 1e-6))
    assert large == pytest.approx(tiny * 1e-6, rel=1e-4) and bias == pytest.approx(tiny_bias, abs=1e-4) and large > 1.5


def test_fused_evidence_weighs_what_is_known_and_ignores_what_is_wrong():
    rng = np.random.default_rng(2)
    labels = rng.random(8000) < 0.5
    truth = np.where(labels, 1.0, -1.0)
    good, weak, wrong = (strength * truth + rng.normal(size=8000) for strength in (1.0, 0.3, -0.5))
    coefficients, _ = probe.combine(np.stack([good, weak, wrong], 1), labels, np.ones(8000))
    assert coefficients[0] > coefficients[1] > 0.2 and coefficients[2] == 0
    assert coefficients[0] == pytest.approx(2.0, abs=0.15)  # of normals with unit variance, log odds are 2 * mean * x


def test_perfect_separation_has_a_finite_answer():
    labels = np.arange(40) % 2 == 1
    (slope,), intercept = probe.combine(np.where(labels, 3.0, -3.0)[:, None], labels, np.ones(40))
    assert 0.5 < slope < 3 and abs(intercept) < 0.1


@pytest.mark.parametrize("hits, num", [(0, 20), (3, 57), (20, 20), (1, 1000)])
def test_intervals_of_a_share_are_exact(hits, num):
    expected = binomtest(hits, num).proportion_ci(0.95, "exact")
    assert probe.clopper_pearson(hits, num) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_prior_moves_the_log_odds_by_its_own(p, prior):
    assert logit(probe.to_prior(np.float64(p), prior)) == pytest.approx(logit(p) + logit(prior), abs=1e-6)
    assert probe.to_prior(np.float64(p), 0.5) == pytest.approx(p)
