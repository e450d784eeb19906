"""The stage `defects`: every column answers to its own fault, by a margin, and to no style."""

import io

import numpy as np
import pytest
from conftest import encode
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

from curation.decode import ImageBatch, decode
from curation.faults import FAULTS, banded, enlarged, interlaced, letterboxed, overexposed, oversaturated, pixels_of, resaved, underexposed
from curation.schema import DEFECTS
from curation.stages.defects import Defects, facts

PHOTOS = {"coffee": data.coffee(), "rocket": data.rocket(), "china": load_sample_image("china.jpg"), "cat": data.chelsea()}
STYLES = [name for name, fault in FAULTS.items() if fault.expect == "kept"]
LIMITS = {
    "blockiness": 1.5,
    "resampling": 0.14,
    "banding": 0.003,
    "combing": 0.009,
    "clipped_both": 0.008,
    "clipped_partly": 0.2,
    "inset_y": 0.08,
    "inset_x": 0.08,
}


def measured(encoded: bytes) -> dict:
    return facts(pixels_of(encoded), len(encoded))


def planted(plant, photo="coffee", **strength) -> dict:
    return measured(plant(encode(PHOTOS[photo], quality=95), np.random.default_rng(0), **strength))


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("style", STYLES)
def test_no_style_looks_like_a_fault(photo, style):
    found = planted(FAULTS[style].plant, photo)
    assert {name: found[name] for name, limit in LIMITS.items() if found[name] > limit} == {}
    assert found["colorfulness"] < 140 and found["luma_high"] > 60


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize(("container", "offset"), [("PNG", 0), ("JPEG", 0), ("PNG", 3)])
def test_blocks_are_found_after_a_second_save_and_a_crop(photo, container, offset):
    blocky = pixels_of(resaved(encode(PHOTOS[photo], quality=95), np.random.default_rng(0), 8, container))[offset:, offset:]
    found = facts(blocky, 1)
    assert found["blockiness"] > 1.3 > 3 * facts(PHOTOS[photo], 1)["blockiness"]
    assert (found["grid_x"], found["grid_y"]) == ((8 - offset) % 8,) * 2


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("how", [Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_enlargement_leaves_its_period_and_blur_does_not(photo, how):
    assert planted(enlarged, photo, factor=3, how=how)["resampling"] > 0.14
    for style in ("motion_blurred", "soft_focused", "defocused"):
        assert planted(FAULTS[style].plant, photo)["resampling"] < 0.1


@pytest.mark.parametrize("photo", PHOTOS)
def test_combs_are_found_where_the_fields_differ(photo):
    assert planted(interlaced, photo, shift=8)["combing"] > 0.012 > 0.009 > facts(PHOTOS[photo], 1)["combing"]


@pytest.mark.parametrize("photo", sorted(set(PHOTOS) - {"rocket"}))  # its edges are as dark and calm as the bars
def test_the_depth_of_blurred_bars_is_measured(photo):
    found = planted(letterboxed, photo, share=0.3)
    assert max(found["inset_y"], found["inset_x"]) == pytest.approx(0.3, abs=0.06)


def test_four_bits_have_gaps_or_false_contours_and_eight_have_neither():
    clean = facts(PHOTOS["rocket"], 1)
    few = [planted(banded, "rocket", bits=bits) for bits in (2, 3, 4)]
    assert clean["banding"] < 0.002 and min(entry["banding"] for entry in few[1:]) > 0.003
    assert few[0]["level_gaps"] > 0.8 > 0.05 > clean["level_gaps"]


def test_exposure_and_colour_mean_what_they_say():
    clean = facts(PHOTOS["coffee"], 1)
    light = planted(overexposed, gain=4)
    assert light["clipped_high"] > 0.4 > 10 * clean["clipped_high"] and light["clipped_partly"] > 0.2 > 10 * clean["clipped_partly"]
    assert planted(underexposed, gain=0.1)["luma_high"] < 30 < 150 < clean["luma_high"]
    loud = planted(oversaturated, gain=4)
    assert loud["colorfulness"] > 1.5 * clean["colorfulness"] and loud["clipped_both"] > 0.02 > 20 * clean["clipped_both"]
    red = facts(np.full((100, 200, 3), (255, 0, 0), np.uint8), 1)
    assert (red["saturation"], red["clipped_both"], red["clipped_partly"], red["luma_low"], red["luma_high"]) == (1, 1, 0, 76, 76)
    grey = facts(np.full((100, 200, 3), 90, np.uint8), 1)
    assert (grey["saturation"], grey["colorfulness"], grey["luma_mean"]) == (0, 0, 90)


def test_bytes_are_held_against_pixels_and_against_content():
    sizes = {quality: measured(encode(PHOTOS["china"], quality=quality)) for quality in (8, 75, 95)}
    assert sizes[75]["relative_bytes"] == pytest.approx(1, abs=0.1)
    assert sizes[8]["relative_bytes"] < 0.7 < 1.5 < sizes[95]["relative_bytes"]
    assert facts(np.zeros((100, 200, 3), np.uint8), 5000)["bits_per_pixel"] == 2


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 5000), (5000, 2), (63, 64), (64, 64), (70, 3000), (1500, 1300)])
@pytest.mark.parametrize("kind", ["flat", "noise"])
def test_any_shape_gives_finite_values(shape, kind):
    image = np.full((*shape, 3), 7, np.uint8) if kind == "flat" else np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = facts(image, 100)
    assert set(found) == set(DEFECTS.names) - {"uid", "error"}
    assert all(np.isfinite(value) for name, value in found.items() if name not in ("grid_x", "grid_y"))
    assert (found["grid_x"] is None) == (min(shape) < 64)
    if kind == "flat":
        assert [found[name] for name in LIMITS] == [0] * len(LIMITS)


def test_a_big_photograph_is_judged_by_its_parts_as_a_small_one_by_the_whole():
    big = np.tile(PHOTOS["china"], (3, 3, 1))
    blocky = pixels_of(resaved(encode(big), np.random.default_rng(0), 8, "PNG"))
    assert facts(blocky, 1)["blockiness"] > 1.5 > facts(big, 1)["blockiness"]


def test_two_runs_give_the_same_values():
    encoded = [encode(photo, quality=90) for photo in PHOTOS.values()]
    images, headers = zip(*(decode(data) for data in encoded), strict=True)
    batch = ImageBatch([str(i) for i in range(len(encoded))], encoded, list(images), list(headers))
    stage = Defects()
    assert stage.load("cpu")(batch) == stage.load("cpu")(batch)


def test_grey_files_are_measured_as_their_grey_pictures():
    grey = Image.fromarray(PHOTOS["coffee"]).convert("L")
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    image, _ = decode(buffer.getvalue())
    assert facts(image, 1)["saturation"] == 0 and facts(image, 1)["resampling"] < 0.1
