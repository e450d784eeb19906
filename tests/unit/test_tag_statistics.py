"""Exact tests, intervals, thresholds that keep a budget."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, spearmanr
from sklearn.metrics import roc_auc_score

from curation import tag_statistics as statistics

RNG = np.random.default_rng


def test_discovery_is_the_exact_one_sided_mcnemar_test():
    rng = RNG(0)
    before, after = rng.random((60, 5)) - 0.7, rng.random((60, 5)) - [0.2, 0.7, 0.7, 0.95, 2]
    gained, lost, p = statistics.mcnemar(before, after)
    for j in range(5):
        up, down = int(((after > 0) & (before <= 0))[:, j].sum()), int(((before > 0) & (after <= 0))[:, j].sum())
        assert (gained[j], lost[j]) == (up, down)
        assert p[j] == pytest.approx(binomtest(up, up + down, 0.5, "greater").pvalue)
    assert statistics.mcnemar(before * 0, before * 0)[2].tolist() == [1] * 5


def test_areas_equal_those_of_scikit_learn_and_their_intervals_cover():
    rng = RNG(1)
    positive, negative = rng.normal(1, 1, (40, 2)).round(1), rng.normal(0, 1, (50, 2)).round(1)
    labels = np.repeat([1, 0], [40, 50])
    for j in range(2):
        expected = roc_auc_score(labels, np.concatenate([positive[:, j], negative[:, j]]))
        assert statistics.auroc(positive, negative)[j] == pytest.approx(expected)
        assert statistics.auroc_interval(positive[:, j], negative[:, j])[0] == pytest.approx(expected)
    truth, covered = 0.76025, 0  # P(N(1, 1) > N(0, 1))
    for _ in range(300):
        _, low, high = statistics.auroc_interval(rng.normal(1, 1, 60), rng.normal(0, 1, 60))
        covered += low <= truth <= high
    assert 0.91 <= covered / 300 <= 0.985
    area, low, high = statistics.auroc_interval(np.ones(30), np.zeros(30))
    assert (area, high) == (1, 1) and 0.85 < low < 0.95, "thirty pictures do not prove perfection"


def test_odds_and_shares_have_exact_intervals():
    odds, low, high = statistics.matched_odds_ratio(20, 5)
    share = binomtest(20, 25).proportion_ci(0.95, "exact")
    assert (odds, low, high) == pytest.approx((4, share.low / (1 - share.low), share.high / (1 - share.high)))
    assert statistics.matched_odds_ratio(6, 0)[2] == float("inf")
    assert statistics.upper_bound(0, 598) < 0.005 < statistics.upper_bound(0, 597)
    assert (statistics.upper_bound(3, 3), statistics.upper_bound(0, 0)) == (1, 1)


def test_dose_is_the_rank_correlation_with_severity():
    rng = RNG(2)
    severity = rng.integers(0, 6, 80)
    values = np.stack([severity + rng.normal(0, 1, 80), rng.normal(0, 1, 80), np.zeros(80)], 1)
    found = statistics.dose(values, severity)
    assert found[:2] == pytest.approx([spearmanr(values[:, j], severity)[0] for j in range(2)])
    assert found[0] > 0.8 and found[2] == 0


@pytest.mark.parametrize("num, budget, expected", [(58, 0.05, None), (59, 0.05, 0), (149, 0.02, 0), (148, 0.02, None), (600, 0.02, 6)])
def test_the_number_allowed_above_a_threshold_proves_the_budget_and_no_larger_one_does(num, budget, expected):
    above = statistics.allowed(num, budget)
    assert above == expected
    if above is not None:
        assert binom.cdf(above, num, budget) <= 0.05 < binom.cdf(above + 1, num, budget)
    assert statistics.provable(num, budget) == pytest.approx(budget if expected is not None else 1 - 0.05 ** (1 / num))


def test_thresholds_keep_every_harmless_family_of_new_pictures_within_the_budget():
    rng, budget, broken = RNG(0), 0.05, 0
    for _ in range(200):
        cut = statistics.thresholds({"clean": rng.random((100, 1)), "mist": rng.random((100, 1)) / 2}, budget)
        broken += 1 - cut[0] > budget  # the true share of uniform values above the cut
    assert broken / 200 <= 0.08  # 5 % promised


def test_a_tag_of_one_source_reaches_one_source():
    groups = np.repeat(["a", "b", "c", "d"], 10)
    everywhere, here = np.tile([True, False], 20), groups == "a"
    assert statistics.reach(everywhere, groups) == {"num_groups": 4, "reached": 1, "worst_recall": 0.5, "largest_share": 0.25}
    assert statistics.reach(here, groups) == {"num_groups": 4, "reached": 0.25, "worst_recall": 0, "largest_share": 1}


def test_a_feature_is_matched_by_the_feature_of_another_sae_that_moves_with_it():
    values = np.maximum(RNG(3).normal(size=(200, 3)), 0)
    others = np.stack([np.maximum(RNG(4).normal(size=200), 0), 3 * values[:, 1] + 1], 1)
    found = statistics.matched(values, others)
    assert found[1] == pytest.approx(1) and found[0] < 0.3 and found[2] < 0.3
