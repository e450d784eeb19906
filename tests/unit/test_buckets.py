"""Aspect buckets and crops."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.buckets import STEP, buckets, crop_box, nearest_bucket, place, place_sql

resolutions = st.integers(16, 96).map(lambda n: n * STEP)
sides = st.integers(1, 20_000)


def test_the_buckets_of_256_are_these():
    assert buckets(256) == (
        (256, 256),
        (224, 288),
        (288, 224),
        (208, 304),
        (304, 208),
        (192, 336),
        (336, 192),
        (176, 352),
        (352, 176),
    )


@given(resolutions)
def test_buckets_are_whole_tokens_near_the_square_and_come_in_both_orientations(resolution):
    shapes = buckets(resolution)
    assert len(shapes) == 9 and shapes[0] == (resolution, resolution)
    for height, width in shapes:
        assert height % STEP == width % STEP == 0
        assert 0.88 * resolution**2 <= height * width <= resolution**2
        assert (width, height) in shapes


@given(sides, sides, resolutions)
def test_a_crop_lies_inside_the_image_is_centred_and_has_the_aspect_of_its_bucket(height, width, resolution):
    high, wide = nearest_bucket(height, width, resolution)
    top, left, crop_height, crop_width = crop_box(height, width, high, wide)
    assert top >= 0 and left >= 0 and crop_height >= 1 and crop_width >= 1
    assert top + crop_height <= height and left + crop_width <= width
    assert crop_height == height or crop_width == width
    assert abs((height - crop_height - top) - top) <= 1 and abs((width - crop_width - left) - left) <= 1
    # The cut side is within half a pixel of the exact one, unless that is thinner than a pixel.
    exact = width * high / wide if crop_height < height else height * wide / high
    cut = crop_height if crop_height < height else crop_width
    assert abs(cut - exact) <= 0.5 or cut == 1 or (crop_height, crop_width) == (height, width)


@given(sides, sides, resolutions)
def test_no_bucket_is_nearer_in_log_aspect(height, width, resolution):
    high, wide = nearest_bucket(height, width, resolution)
    off = [abs(np.log(height / width) - np.log(h / w)) for h, w in buckets(resolution)]
    assert abs(np.log(height / width) - np.log(high / wide)) <= min(off) + 1e-12


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), resolutions)
def test_many_images_are_placed_as_one_by_one(images, resolution):
    placed = place(*np.array(images).T, resolution)
    for i, (height, width) in enumerate(images):
        bucket = nearest_bucket(height, width, resolution)
        assert tuple(int(column[i]) for column in placed) == (*bucket, *crop_box(height, width, *bucket))


@settings(deadline=None, max_examples=50)  # DuckDB starts anew each time
@given(st.lists(st.tuples(st.integers(1, 2**28), st.integers(1, 2**28)) | st.tuples(sides, sides), min_size=1, max_size=40), resolutions)
def test_the_sql_places_images_as_the_arrays_do(images, resolution):
    heights, widths = np.array(images).T
    table = pa.table({"uid": range(len(images)), "height": heights.astype(np.int32), "width": widths.astype(np.int32)})
    con = duckdb.connect()
    con.register("images", table)
    rows = con.sql(f"SELECT * FROM ({place_sql(resolution, 'images')}) ORDER BY uid").fetchnumpy()
    placed = place(heights, widths, resolution)
    for name, values in (placed._asdict() | {"scale": placed.scale}).items():
        np.testing.assert_array_equal(rows[name], values, name)


def test_the_scale_says_where_an_image_would_be_enlarged():
    assert place([256, 255, 512], [256, 400, 512], 256).scale.tolist() == [1.0, pytest.approx(255 / 208), 2.0]
    assert place([200], [288], 256).scale[0] < 1


@pytest.mark.parametrize("resolution", [0, -16, 100, 250])
def test_a_resolution_that_is_not_whole_tokens_is_refused(resolution):
    with pytest.raises(ValueError, match=f"resolution {resolution} must be"):
        buckets(resolution)
