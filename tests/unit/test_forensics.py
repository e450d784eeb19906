"""What each group of forensic statistics must notice, and what it must not."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from curation.forensics import CROP, NUM_CROPS, crops, names, statistics

PHOTOGRAPHS = {"astronaut": skimage.data.astronaut(), "chelsea": skimage.data.chelsea(), "coffee": skimage.data.coffee()}
each_photograph = pytest.mark.parametrize("image", PHOTOGRAPHS.values(), ids=PHOTOGRAPHS.keys())


def named(image):
    return dict(zip(names(), statistics(np.ascontiguousarray(image)).tolist(), strict=True))


def jpeg(image, quality, subsampling="4:2:0"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer))


def resized(image, scale):
    size = (int(image.shape[1] * scale), int(image.shape[0] * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


@each_photograph
def test_jpeg_compression_raises_blockiness_with_falling_quality(image):
    blockiness = [named(jpeg(image, quality))["grid.blockiness"] for quality in (90, 75, 30)]
    assert named(image)["grid.blockiness"] < 0.1 < blockiness[0] < blockiness[1] < blockiness[2]
    assert blockiness[2] > 1


@each_photograph
def test_a_crop_after_compression_moves_the_blocks_to_another_phase(image):
    cut = named(jpeg(image, 30)[3:, 5:])
    assert cut["grid.blockiness"] < 0.2 < 1 < cut["grid.elsewhere_across"]
    assert named(image)["grid.elsewhere_across"] < 0.3


@each_photograph
def test_scaling_up_lowers_the_roll_off_and_the_residual(image):
    before, after = named(image), named(resized(image, 2))
    assert after["spectrum.rolloff_90"] < 0.8 * before["spectrum.rolloff_90"]
    assert after["residual.laplace.log_std"] < before["residual.laplace.log_std"] - 0.5


@each_photograph
@pytest.mark.parametrize("times", [2, 4])
def test_repeated_pixels_leave_gaps_at_the_frequencies_of_the_repeat(image, times):
    """Repeating is a box filter, whose spectrum has its zeros at multiples of 1 / times."""
    before, after = named(image[:256, :256]), named(image[:256, :256].repeat(times, 0).repeat(times, 1))
    change = {k: after[f"peaks.line_{k}_16"] - before[f"peaks.line_{k}_16"] for k in range(2, 9)}
    gaps = [k for k in change if k % (16 // times) == 0]
    assert max(change[k] for k in gaps) < -0.3, change
    assert min(change[k] for k in change if k not in gaps) > -0.25, change


@each_photograph
def test_noise_raises_the_residual_most_where_the_image_is_calm(image):
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    before, after = named(image), named(noisy)
    assert after["residual.laplace.log_std"] > before["residual.laplace.log_std"] + 0.1
    assert after["residual.calm"] > before["residual.calm"] + 0.3
    assert after["levels.quiet_runs"] < 0.01


@each_photograph
def test_chroma_subsampling_lowers_the_chroma_residual(image):
    full, half = named(jpeg(image, 90, "4:4:4")), named(jpeg(image, 90, "4:2:0"))
    assert half["chroma.cb_to_luma"] < full["chroma.cb_to_luma"] - 0.05


@each_photograph
def test_posterising_leaves_gaps_in_the_levels_and_flat_runs(image):
    before, after = named(image), named(image // 16 * 16)
    assert after["levels.gaps"] > before["levels.gaps"] + 0.2
    assert after["levels.quiet_runs"] > before["levels.quiet_runs"] + 0.05


@pytest.mark.parametrize("k", [2, 4, 6])
@each_photograph
def test_a_pattern_that_repeats_raises_the_peak_of_its_frequency(image, k):
    image = image * 0.8 + 20  # room for the wave: clipping would add its harmonics
    wave = np.cos(2 * np.pi * k / 16 * np.arange(image.shape[1]))[None, :, None]
    before, after = named(image.astype(np.uint8)), named((image + 4 * wave).astype(np.uint8))
    rise = {j: after[f"peaks.axis_{j}_16"] - before[f"peaks.axis_{j}_16"] for j in range(1, 9)}
    assert rise[k] > 0.2 and rise[k] > 1.5 * max(abs(rise[j]) for j in rise if j != k), rise


def test_white_noise_has_the_values_that_theory_gives():
    noise = np.random.default_rng(0).normal(128, 20, (512, 512, 1)).repeat(3, 2).clip(0, 255).astype(np.uint8)
    value = named(noise)
    assert value["residual.second_to_first"] == pytest.approx(0.5 * np.log2(6 / 2), abs=0.02)  # variances of the differences
    assert value["residual.third_to_second"] == pytest.approx(0.5 * np.log2(20 / 6), abs=0.02)
    assert value["residual.autocorrelation_1"] == pytest.approx(-2 / 3, abs=0.02)
    assert value["residual.autocorrelation_2"] == pytest.approx(1 / 6, abs=0.02)
    assert value["spectrum.rolloff_90"] == pytest.approx(0.9**0.25, abs=0.02)
    assert value["residual.across.tails"] == pytest.approx(np.log2(3.1) / 3, abs=0.03)  # a Gaussian's kurtosis
    assert value["chroma.residual_rg"] == pytest.approx(1, abs=0.01)
    assert abs(value["grid.blockiness"]) < 0.1 and max(abs(value[f"peaks.line_{k}_16"]) for k in range(1, 9)) < 0.15


@each_photograph
def test_mirroring_and_small_crops_change_little_against_other_images(image):
    whole = statistics(image)
    others = [np.abs(statistics(other) - whole).mean() for other in PHOTOGRAPHS.values() if other is not image]
    mirrored = np.abs(statistics(np.ascontiguousarray(image[:, ::-1])) - whole).mean()
    cut = np.abs(statistics(np.ascontiguousarray(image[:-8, 8:])) - whole).mean()
    assert mirrored < 0.6 * min(others) and cut < 0.8 * min(others), (mirrored, cut, others)


def test_crops_lie_on_the_grid_and_span_the_calmest_and_the_busiest_place():
    rows, columns = np.indices((400, 603))
    image = np.stack([rows % 256, columns % 256, (rows // 256) * 2 + columns // 256], axis=2).astype(np.uint8)
    found = crops(image)
    assert found.shape == (NUM_CROPS, CROP, CROP, 3)
    starts = found[:, 0, 0, :].astype(int)
    assert (starts[:, :2] % 8 == 0).all() and len(np.unique(starts, axis=0)) == NUM_CROPS
    half = np.zeros((512, 512, 3), np.uint8)
    half[:, 256:] = np.random.default_rng(0).integers(0, 256, (512, 256, 3))
    energy = crops(half).astype(float).std((1, 2, 3))
    assert energy[0] == 0 and energy[-1] > 70


def test_a_blank_background_does_not_dilute_the_statistics():
    photograph = PHOTOGRAPHS["coffee"][:256, :256]
    page = np.full((768, 768, 3), 255, np.uint8)
    page[:256, :256] = photograph
    alone, on_page = named(photograph), named(page)
    assert on_page["levels.live_share"] < 0.7 and alone["levels.live_share"] == 1
    assert abs(on_page["residual.laplace.log_std"] - alone["residual.laplace.log_std"]) < 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (127, 129), (5, 3)])
@pytest.mark.parametrize("kind", ["zeros", "white", "noise"])
def test_any_image_gives_finite_numbers_of_the_order_of_one(shape, kind):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = {"zeros": noise * 0, "white": noise * 0 + 255, "noise": noise}[kind]
    vector = statistics(image)
    assert vector.shape == (len(names()),) and vector.dtype == np.float32
    assert np.isfinite(vector).all() and np.abs(vector).max() < 15
    assert np.array_equal(vector, statistics(image))


def test_names_are_unique_and_say_nothing_of_the_container():
    assert len(set(names())) == len(names()) and 128 <= len(names()) <= 256
    tiles = np.tile(PHOTOGRAPHS["chelsea"][:128, :128], (4, 4, 1))
    larger = np.tile(tiles, (2, 2, 1))  # every crop of both starts at a multiple of 8 in the same pattern
    assert np.abs(statistics(tiles) - statistics(larger)).mean() < 0.05
