"""The stage `text_density`: letters are found where they stand, with their height; pictures without letters have none."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from curation.decode import ImageBatch
from curation.faults import encode, lettered, pixels_of
from curation.stages.text_density import TextDensity, density, reduced


@pytest.fixture(scope="module")
def detect():
    function = TextDensity().load("cpu")
    return lambda *images: function(ImageBatch([], [], list(images), []))


def written(text: str, size: int, at: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(data.coffee())
    ImageDraw.Draw(picture).text(at, text, fill=(255, 255, 255), font=ImageFont.load_default(size=size))
    return np.asarray(picture)


def test_a_line_is_found_where_it_stands_with_its_height(detect):
    found = detect(written("HARBOUR MUSEUM", 32, (60, 50)))
    (box,) = [box for box in found["boxes"][0] if box["y"] < 0.3]
    assert 600 * box["x"] == pytest.approx(60, abs=12) and 400 * box["y"] == pytest.approx(54, abs=14)
    assert 24 < 400 * box["text_height"] < 48 and 180 < 600 * box["width"] < 340


def test_photographs_without_letters_have_no_text(detect):
    found = detect(data.chelsea(), data.coffee())
    assert max(found["text_area"]) < 0.02 and min(found["text_height_min"]) > 0


def test_a_page_of_small_print_is_full_of_text_that_is_small(detect):
    page = pixels_of(lettered(encode(data.astronaut()), np.random.default_rng(0), 0.03, 0.8))
    found = detect(page)
    assert found["text_area"][0] > 0.3 and found["num_boxes"][0] > 10 and found["text_height_median"][0] < 0.06


def test_no_text_is_an_area_of_zero_and_heights_of_one():
    assert density(np.zeros((0, 4, 2)), [], 40, 50) == {
        "num_boxes": 0, "text_area": 0, "largest_box": 0, "text_height_min": 1, "text_height_median": 1, "boxes": []
    }  # fmt: skip


def test_overlapping_boxes_are_counted_once():
    box = np.array([[10, 10], [49, 10], [49, 29], [10, 29]])
    found = density(np.stack([box, box]), [0.9, 0.8], 100, 100)
    assert found["text_area"] == pytest.approx(0.08) and found["largest_box"] == pytest.approx(0.08)
    assert found["text_height_median"] == pytest.approx(0.2) and found["num_boxes"] == 2


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 3), (5, 4000, 3), (900, 3, 3)])
def test_any_shape_gives_values(shape, detect):
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = detect(noise, np.zeros(shape, np.uint8))
    assert all(0 <= area <= 1 for area in found["text_area"])
    assert max(reduced(noise, 736).shape) <= 4 * 736


def test_two_sessions_find_the_same(detect):
    image = written("OPEN FROM NINE", 24, (40, 200))
    assert detect(image) == TextDensity().load("cpu")(ImageBatch([], [], [image], []))
