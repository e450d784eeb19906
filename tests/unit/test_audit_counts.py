"""The audit: known sizes, a bound that covers the truth, and tables that a person cannot fill in wrongly without being told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from curation import audit
from curation.audit import Counts


@pytest.mark.parametrize("claim, found, images", [(0.001, 0, 2995), (0.001, 1, 4742), (0.005, 0, 598), (0.01, 2, 628)])
def test_the_images_to_check_are_those_of_the_tables(claim, found, images):
    assert audit.needed(claim, found) == images
    assert audit.upper(found, images) <= claim < audit.upper(found, images - 1)


@pytest.mark.parametrize("claim", [0.0, 1.0, -0.1])
def test_a_claim_that_is_no_share_is_refused(claim):
    with pytest.raises(ValueError, match="between 0 and 1"):
        audit.needed(claim)


@pytest.mark.parametrize("num", [100, 600, 2995])
def test_the_bound_covers_every_truth_exactly(num):
    """No simulation: the probability of all findings whose bound covers the truth, for a grid of truths."""
    highs = np.array([audit.left(Counts(num, found)).high for found in range(num + 1)])
    lows = np.array([audit.left(Counts(num, found)).low for found in range(num + 1)])
    for truth in np.r_[np.geomspace(1e-5, 0.5, 60), 0.9, 0.999]:
        chance = binom.pmf(np.arange(num + 1), num, truth)
        assert chance[highs >= truth].sum() >= 0.95 - 1e-9 and chance[lows <= truth].sum() >= 0.95 - 1e-9


@pytest.mark.parametrize("sensitivity, known", [(1.0, 0), (0.9, 100), (0.6, 60)])
def test_the_bound_covers_the_truth_in_95_of_100_simulated_audits(sensitivity, known):
    rng, num = np.random.default_rng(known), 600
    covered = []
    for truth in rng.choice([0.0005, 0.002, 0.01, 0.03, 0.2, 0.7], 1000):
        counts = Counts(num, rng.binomial(num, truth * sensitivity), known, rng.binomial(known, sensitivity))
        left = audit.left(counts)
        assert left.low <= left.share <= left.high
        covered.append((left.low <= truth, truth <= left.high))
    assert (np.mean(covered, 0) >= 0.95).all()


@pytest.mark.parametrize("truth", [0.01, 0.1, 0.5])
def test_the_bound_covers_the_truth_when_a_classifier_is_wrong_about_real_images_too(truth):
    rng, num, sensitivity, false = np.random.default_rng(7), 5000, 0.8, 0.05
    highs, lows = [], []
    for _ in range(1000):
        flagged = rng.binomial(num, truth * sensitivity + (1 - truth) * false)
        left = audit.left(Counts(num, int(flagged), 300, int(rng.binomial(300, sensitivity)), 500, int(rng.binomial(500, false))))
        highs.append(left.high >= truth)
        lows.append(left.low <= truth)
    assert np.mean(highs) >= 0.95 and np.mean(lows) >= 0.95


def test_the_adjusted_count_is_rogan_and_gladens():
    left = audit.left(Counts(1000, 100, 400, 320, 400, 20))
    assert left.share == pytest.approx((0.1 - 0.05) / (0.8 - 0.05))
    assert audit.left(Counts(1000, 10)).share == 0.01


def test_an_auditor_who_finds_nothing_that_is_known_bounds_nothing():
    left = audit.left(Counts(3000, 0, 50, 0))
    assert left.high == 1.0 and left.low == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.data())
def test_more_findings_or_a_worse_auditor_never_lower_the_bound(num, data):
    found = data.draw(st.integers(0, num - 1))
    known = data.draw(st.integers(1, 100))
    seen = data.draw(st.integers(1, known))
    bound = audit.left(Counts(num, found, known, seen)).high
    assert audit.left(Counts(num, found + 1, known, seen)).high >= bound
    assert audit.left(Counts(num, found, known, seen - 1)).high >= bound


@pytest.mark.parametrize("counts", [Counts(0, 0), Counts(5, 6), Counts(5, 1, 3, 4)])
def test_counts_that_contradict_each_other_are_refused(counts):
    with pytest.raises(ValueError, match="finds no more than there are"):
        audit.left(counts)


def test_a_sample_is_drawn_without_repeats_and_the_same_way_every_time():
    uids, known = [f"s/{i}" for i in range(100)], ["x", "y"]
    drawn = audit.draw(uids, known, 30, 5)
    assert drawn == audit.draw(uids, known, 30, 5) != audit.draw(uids, known, 30, 6)
    assert len(set(drawn)) == 32 and set(known) < set(drawn) and set(drawn) - set(known) < set(uids)
    with pytest.raises(ValueError, match="a sample of 101 from 100 images"):
        audit.draw(uids, [], 101, 0)


def filled(answers: list[str]) -> str:
    lines = audit.sheet([f"n{i}" for i in range(len(answers))]).splitlines()
    return "\n".join([lines[0], *(line + answer for line, answer in zip(lines[1:], answers, strict=True))]) + "\n"


def test_a_table_is_counted_and_doubt_never_lowers_the_bound():
    names = ["n0", "n1", "n2", "n3", "n4"]
    counts = audit.read_checked(filled(["real", "AI", "unsure", "ai", "unsure"]), names, {"n3", "n4"})
    assert counts == Counts(num=3, found=2, num_known=2, found_known=1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace(",real", ","), "have no answer, the first is number 1"),
        (lambda text: text.replace(",real", ",maybe"), "'maybe' is no answer"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "leave the rows as they were"),
        (lambda text: text.replace("image", "picture"), "must have the columns number, image, ai"),
    ],
)
def test_a_table_that_cannot_be_counted_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        audit.read_checked(change(filled(["real", "ai", "ai"])), ["n0", "n1", "n2"], {"n2"})
