"""From features to tags: exact tests, budgets that hold, and no tag for what also answers to style."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, false_discovery_control

from curation import tags
from curation.contrast import CONTROLS, DAMAGE, STYLES, view, window
from curation.schema import TAGS
from curation.tags import Rules, Tag

FAMILIES = ("clean", *DAMAGE, *STYLES, *CONTROLS)


def values(num: int, seed: int, num_features: int = 40) -> dict[str, np.ndarray]:
    """Features that fire at random in every family; 0 answers to jpeg alone, 1 to jpeg and film grain, 2 to the content."""
    rng = np.random.default_rng(seed)
    content = rng.random(num) < 0.4
    result = {}
    for name in FAMILIES:
        matrix = rng.gamma(1.0, 0.2, (num, num_features)) * (rng.random((num, num_features)) < 0.1)
        matrix[:, 0] = (name == "jpeg") * rng.uniform(0.5, 2, num) * (rng.random(num) < 0.8)
        matrix[:, 1] = (name in ("jpeg", "film_grain")) * rng.uniform(1, 3, num)
        matrix[:, 2] = content * rng.uniform(1, 3, num)
        result[name] = matrix.astype(np.float32)
    return result


def test_a_feature_that_answers_to_damage_alone_becomes_a_tag_and_one_that_answers_to_style_does_not():
    fit, estimate, report = values(200, 0), values(150, 1), values(150, 2)
    found = tags.discover(fit, "jpeg", 0.01)
    assert {0, 1} <= set(found.tolist()) and 2 not in found
    chosen, funnel = tags.select(fit, estimate, np.random.default_rng(0))
    assert [(tag.feature, tag.tag, tag.verdict) for tag in chosen] == [(0, "jpeg", "artifact")]
    measured = tags.report(report, chosen)
    assert measured["any_tag"]["jpeg"]["share"] > 0.6
    assert measured["worst_harmless"]["share"] == 0
    assert funnel["jpeg"]["discovered_in_exchanged_pairs"] == funnel["posterise"]["discovered"] == 0


def test_discovery_is_the_exact_one_sided_mcnemar_test_with_benjamini_hochberg():
    fit = values(60, 3)
    clean, damaged = fit["clean"] > 0, fit["jpeg"] > 0
    p = []
    for feature in range(clean.shape[1]):
        gained, lost = (damaged & ~clean)[:, feature].sum(), (clean & ~damaged)[:, feature].sum()
        p.append(binomtest(int(gained), int(gained + lost), 0.5, "greater").pvalue if gained + lost else 1.0)
    expected = np.flatnonzero(false_discovery_control(p) <= 0.2)
    np.testing.assert_array_equal(tags.discover(fit, "jpeg", 0.2), expected)


def test_pairs_exchanged_at_random_hold_the_same_values():
    fit = values(50, 4)
    swapped = tags.exchanged(fit, "jpeg", np.random.default_rng(0))
    np.testing.assert_allclose(swapped["clean"] + swapped["jpeg"], fit["clean"] + fit["jpeg"])
    moved = (swapped["clean"] != fit["clean"]).any(1).mean()
    assert 0.3 < moved < 0.7


@pytest.mark.parametrize("num, budget, expected", [(58, 0.05, None), (59, 0.05, 0), (149, 0.02, 0), (148, 0.02, None), (600, 0.02, 6)])
def test_the_number_allowed_above_a_threshold_proves_the_budget_and_no_larger_one_does(num, budget, expected):
    above = tags.allowed(num, budget)
    assert above == expected
    if above is not None:
        assert binom.cdf(above, num, budget) <= 0.05 < binom.cdf(above + 1, num, budget)


def test_thresholds_keep_every_harmless_family_of_new_pictures_within_the_budget():
    rng, budget, broken = np.random.default_rng(0), 0.05, 0
    for _ in range(200):
        cut = tags.thresholds({"clean": rng.random((100, 1)), "mist": rng.random((100, 1)) / 2}, budget)
        broken += 1 - cut[0] > budget  # the true share of uniform values above the cut
    assert broken / 200 <= 0.08  # 5 % promised


def test_too_few_pictures_are_refused_with_the_number_that_it_takes():
    with pytest.raises(ValueError, match=r"20 pictures.*2\.0%; it takes 149"):
        tags.select(values(50, 0), values(20, 1), np.random.default_rng(0), Rules(budget=0.02))


def test_no_feature_means_no_tag_and_a_table_with_a_header_only(tmp_path):
    quiet = {name: matrix[:, 3:] for name, matrix in values(150, 0).items()}
    other = {name: matrix[:, 3:] for name, matrix in values(150, 1).items()}
    chosen, _ = tags.select(quiet, other, np.random.default_rng(0))
    assert chosen == []
    tags.write_csv(chosen, "sae-x", tmp_path / "sae-x.tags.csv")
    assert (tmp_path / "sae-x.tags.csv").read_text() == ",".join(TAGS.names) + "\n"
    assert not tags.fires(quiet["jpeg"], chosen).any()


def test_only_the_verdict_artifact_removes():
    matrix = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    chosen = [Tag(0, "jpeg", "artifact", 1.0), Tag(1, "film grain", "style", 1.0)]
    assert tags.fires(matrix, chosen).tolist() == [True, False, False]


def test_a_tag_table_comes_back_and_unknown_verdicts_are_refused(tmp_path):
    path = tmp_path / "sae-x.tags.csv"
    chosen = [Tag(3, "jpeg+resave", "artifact", 0.5), Tag(9, "film grain", "style", 0.25)]
    tags.write_csv(chosen, "sae-x", path)
    assert tags.read_csv(path) == chosen
    path.write_text(path.read_text().replace("style", "ugly"))
    with pytest.raises(ValueError, match="verdict 'ugly' of feature 9"):
        tags.read_csv(path)


def test_a_picture_is_in_the_same_part_every_time_and_the_parts_have_their_shares():
    parts = [tags.part(str(index).encode()) for index in range(5000)]
    assert parts == [tags.part(str(index).encode()) for index in range(5000)]
    shares = [parts.count(name) / 5000 for name in ("fit", "estimate", "report")]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)


PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*(np.linspace(20, 230, n).reshape(s) for n, s in ((60, (60, 1)), (90, (1, 90)), (1, (1, 1))))), 2)


@pytest.mark.parametrize("name", [*DAMAGE, *STYLES, *CONTROLS])
def test_every_transform_is_a_pure_function_of_image_and_generator(name):
    change = (DAMAGE | STYLES | CONTROLS)[name]
    for image in (PICTURE, SMOOTH.astype(np.uint8), PICTURE[:1, :1], PICTURE[:3, :50], np.zeros((40, 40, 3), np.uint8)):
        before = image.copy()
        first, second = (change(image, np.random.default_rng(7)) for _ in range(2))
        assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3 and min(first.shape) >= 1
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(image, before)
    changed = change(SMOOTH.astype(np.uint8), np.random.default_rng(7))
    assert changed.shape != SMOOTH.shape or (changed != SMOOTH.astype(np.uint8)).any() or name in CONTROLS


def test_views_are_windows_of_bounded_size_and_a_window_is_cut_not_resized():
    big = np.random.default_rng(1).integers(0, 256, (900, 1000, 3)).astype(np.uint8)
    np.testing.assert_array_equal(window(big), big[66:834, 116:884])
    rng = np.random.default_rng(2)
    plain = [view(PICTURE, rng, damage=0, style=0) for _ in range(30)]
    assert len({cut.shape for cut in plain}) > 10
    assert all(0.2 < cut.shape[0] * cut.shape[1] / (60 * 90) <= 1 for cut in plain)


def test_views_are_damaged_and_restyled_as_often_as_asked(monkeypatch):
    monkeypatch.setattr("curation.contrast.DAMAGE", {"black": lambda image, rng: np.zeros_like(image)})
    monkeypatch.setattr("curation.contrast.STYLES", {"white": lambda image, rng: np.full_like(image, 255)})
    rng = np.random.default_rng(4)
    means = [view(PICTURE, rng, damage=0.3, style=0.2).mean() for _ in range(400)]
    assert means.count(0) / 400 == pytest.approx(0.3, abs=0.06)
    assert means.count(255) / 400 == pytest.approx(0.2, abs=0.06)
