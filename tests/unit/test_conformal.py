"""`real_share`: what a threshold promises, whatever the scores, and that no source decides for the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import conformal


def real(scores, kind="photo", source="one"):
    scores = np.asarray(scores, float)
    return conformal.calibrate(scores, np.full(len(scores), kind), np.full(len(scores), source))


def test_the_share_counts_the_real_images_with_such_a_score_or_more():
    reals = real(np.arange(99))
    shares = conformal.real_share(reals, np.array([98.5, 98.0, 0.0, -1.0]), np.full(4, "photo"))
    assert shares == pytest.approx([0.01, 0.02, 1.0, 1.0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(40, 400), st.sampled_from([0.01, 0.05, 0.2]))
def test_a_new_real_image_is_removed_no_more_often_than_promised(seed, num, allowed):
    """Exact on average over calibration sets: with ties, heavy tails and few images too."""
    rng = np.random.default_rng(seed)
    lost = []
    for _ in range(60):
        scores = np.round(rng.standard_t(2, num + 50), 1)
        lost.append((conformal.real_share(real(scores[:num]), scores[num:], np.full(50, "photo")) <= allowed).mean())
    assert np.mean(lost) <= allowed + 3 * np.sqrt(allowed / num / 60 + allowed / 3000)


def test_the_larger_source_does_not_set_the_threshold_of_the_smaller():
    scores = np.r_[np.zeros(900), np.ones(100)]
    source = np.r_[np.full(900, "large"), np.full(100, "small")]
    reals = conformal.calibrate(scores, np.full(1000, "photo"), source)
    assert conformal.real_share(reals, np.array([1.0]), np.array(["photo"]))[0] == pytest.approx(0.5, abs=0.01)


def test_a_kind_has_its_own_threshold_and_one_of_few_images_that_of_all():
    scores = np.r_[np.linspace(0, 1, 100), np.linspace(5, 6, 100), np.linspace(9, 10, 10)]
    kind = np.r_[np.full(100, "photo"), np.full(100, "art"), np.full(10, "render")]
    reals = conformal.calibrate(scores, kind, kind)
    assert conformal.kinds_of(reals) == ["art", "photo"]
    shares = conformal.real_share(reals, np.array([3.0, 3.0, 3.0, 3.0]), np.array(["photo", "art", "render", ""]))
    assert shares[0] < 0.02 and shares[1] == 1.0
    assert shares[2] == shares[3] == pytest.approx((1 + 210 * 2 / 3) / 211, abs=1e-4)


def test_a_higher_score_never_has_a_larger_share():
    rng = np.random.default_rng(0)
    reals = conformal.calibrate(rng.normal(size=200), rng.choice(["a", "b"], 200), rng.choice(["s", "t", "u"], 200))
    shares = conformal.real_share(reals, np.linspace(-4, 4, 300), np.full(300, "a"))
    assert (np.diff(shares) <= 0).all() and shares[0] == 1.0 and shares[-1] == pytest.approx(1 / ((reals.kind == "a").sum() + 1))


@pytest.mark.parametrize("share", conformal.SHARES)
def test_the_thresholds_that_are_written_down_are_where_the_share_falls_to_them(share):
    rng = np.random.default_rng(1)
    reals = conformal.calibrate(rng.normal(size=700), np.full(700, "photo"), rng.choice(["s", "t"], 700))
    cut = conformal.thresholds(reals)["photo"][f"{share:g}"]["log_odds"]
    below, above = conformal.real_share(reals, np.array([cut - 1e-3, cut + 1e-3]), np.full(2, "photo"))
    assert above <= share < below + 0.01 and below >= share


def test_the_interval_of_the_loss_narrows_with_the_images_and_few_images_give_no_threshold():
    widths = []
    for num in (100, 10_000):
        entry = conformal.thresholds(real(np.random.default_rng(2).normal(size=num)))["photo"]
        low, high = entry["0.05"]["loss"]
        assert low < 0.05 < high and entry["effective"] == pytest.approx(num)
        widths.append(high - low)
    assert widths[1] < widths[0] / 5
    assert conformal.thresholds(real(np.arange(50)))["all"]["0.01"] is None
