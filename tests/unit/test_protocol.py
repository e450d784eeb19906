"""The evaluation: crops that hide container and size, figures with known values, and controls that notice what they should."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from curation import canonical, controls, protocol
from curation.probe import Labels
from curation.protocol import Comparison


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_crop_is_the_native_centre_and_encoded_once():
    pixels = picture(400, 700)
    square = canonical.crop(pixels)
    np.testing.assert_array_equal(square, pixels[72:328, 222:478])
    stream = io.BytesIO()
    Image.fromarray(square).save(stream, "JPEG", quality=90, subsampling="4:2:0")
    np.testing.assert_array_equal(canonical.canonical(square), np.asarray(Image.open(stream)))


@pytest.mark.parametrize("height, width, has", [(256, 256, True), (255, 4000, False), (300, 256, True)])
def test_an_image_with_a_side_under_256_has_no_crop(height, width, has):
    assert canonical.fits(height, width) is has
    if not has:
        with pytest.raises(AssertionError, match="no square of 256 pixels"):
            canonical.crop(picture(height, width))


def test_degradations_lower_what_they_are_said_to():
    smooth = np.asarray(Image.fromarray(picture(64, 64)).resize((256, 256), Image.Resampling.BICUBIC))
    plain = canonical.canonical(smooth).astype(float)
    shapes = {view: canonical.canonical(smooth, view).shape for view in canonical.DEGRADATIONS}
    assert shapes == {view: (128, 128, 3) if view == "half size" else (256, 256, 3) for view in canonical.DEGRADATIONS}
    for view in ("jpeg 75", "webp 60", "blur"):
        assert np.abs(canonical.canonical(smooth, view) - smooth.astype(float)).mean() > np.abs(plain - smooth).mean()
    with pytest.raises(ValueError, match="no view 'sepia' of a crop; choose from crop, jpeg 75"):
        canonical.canonical(smooth, "sepia")


def test_training_crops_differ_in_place_and_quality_and_come_again_from_a_seed():
    pixels = picture(600, 600)
    crops = [canonical.random_crop(pixels, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert (crops[0] == crops[1]).all() and (crops[0] != crops[2]).any()


def test_auroc_is_that_of_sklearn_with_ties_too():
    rng = np.random.default_rng(0)
    fake, real = rng.integers(0, 9, 50) + 1.0, rng.integers(0, 9, 80) + 0.0
    assert protocol.auroc(fake, real) == pytest.approx(roc_auc_score(np.r_[np.ones(50), np.zeros(80)], np.r_[fake, real]))


def test_pairs_of_like_area_leave_nothing_to_the_area():
    rng = np.random.default_rng(0)
    areas = np.r_[rng.uniform(1e5, 1.9e5, 100), rng.uniform(1e6, 1.9e6, 100)]
    mostly = rng.random(200) < np.r_[np.full(100, 0.2), np.full(100, 0.8)]  # the large ones are mostly generated
    score = np.where(areas > 5e5, 1.0, 0.0)
    assert protocol.auroc(score[mostly], score[~mostly]) > 0.75
    assert protocol.like_area(score[mostly], score[~mostly], areas[mostly], areas[~mostly]) == 0.5
    assert np.isnan(protocol.like_area(score[:3], score[3:6], areas[:3], areas[3:6])), "too few pairs to say anything"


def test_figures_of_a_generator_have_known_values():
    fake, real = np.array([[9.0]] * 6 + [[0.5]] * 4), np.arange(100)[:, None] / 100
    one = Comparison("g", np.arange(10), np.arange(10, 110), fake, real)
    found = protocol.generators([one], np.full(110, 1e6), 0)
    (entry,) = found["generators"]
    assert entry["auroc"] == entry["like_area"] == pytest.approx((6 + 4 * 0.505) / 10)
    assert entry["recall at 5%"] == entry["recall at 1%"] == 0.6 and entry["recall at 5% interval"] == [0.2624, 0.8784]
    assert found["mean"]["auroc"] == entry["auroc"] and found["worst"] == entry


def test_generators_with_few_images_in_a_view_have_no_figures_there():
    fake, real = np.full((10, 2), 1.0), np.zeros((40, 2))
    fake[3:, 1] = np.nan
    one = Comparison("g", np.arange(10), np.arange(10, 50), fake, real)
    assert len(protocol.generators([one], np.full(50, 1e6), 0)["generators"]) == 1
    assert protocol.generators([one], np.full(50, 1e6), 1) == {"generators": []}


def test_losses_are_counted_per_kind_source_and_generator():
    labels = Labels(
        np.array([False, False, False, True, True]), np.array(["a", "a", "b", "g", "g"]), np.array(["photo", "photo", "art", "x", "x"])
    )
    found = protocol.losses(np.array([0.5, 0.05, np.nan, 0.01, 0.2]), labels)
    assert [(row["name"], row["num"], row["removed"]) for row in found["sources"]] == [("a", 2, 0.5)]
    assert [row["name"] for row in found["kinds"]] == ["photo"]
    assert found["real"]["removed"] == 0.5 and found["synthetic"]["removed"] == 0.5


def test_calibrated_probabilities_have_no_error_and_bold_ones_have():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(size=40_000) * 2
    truth = rng.random(40_000) < 1 / (1 + np.exp(-log_odds))
    assert protocol.reliability(log_odds, truth)["ece"] < 0.01
    assert protocol.reliability(4 * log_odds, truth)["ece"] > 0.1
    assert protocol.reliability(np.r_[log_odds, np.nan], np.r_[truth, True])["ece"] < 0.01


def test_controls_notice_a_format_a_size_and_sources_and_chance_is_chance():
    rng, num = np.random.default_rng(0), 240
    synthetic = np.arange(num) % 2 == 1
    group = np.array([f"{'g' if s else 's'}{i // 2 % 4}" for i, s in enumerate(synthetic)])
    labels = Labels(synthetic, group, np.full(num, "photo"))
    own = {name: rng.normal(size=8) * 4 for name in np.unique(group)}
    vectors = np.stack([own[name] + rng.normal(size=8) for name in group]).astype(np.float32)
    container, area = rng.uniform(size=(num, 3)), np.where(synthetic, 2e6, 1e6) * rng.uniform(0.9, 1.1, num)
    container[:, 1] = np.nan
    fair = controls.controls(container, area, vectors, labels, rng.normal(size=num), 0)
    assert abs(fair["format_only"] - 0.5) < 0.12 and fair["area_only"] == 1.0
    assert fair["real_against_real"] > 0.95 and fair["random_split"] > 0.95 and abs(fair["permuted_labels"] - 0.5) < 0.1
    assert fair["real_against_real_score"] < 0.65
    container[:, 0] = synthetic
    told = controls.controls(container, area, vectors, labels, np.where(group == "s0", 5.0, 0.0), 0)
    assert told["format_only"] > 0.99 and told["real_against_real_score"] > 0.7
