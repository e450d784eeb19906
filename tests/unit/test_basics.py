"""The stage `basics`: equal to imagehash, and each number says what its name says."""

import imagehash
import numpy as np
import pytest
from conftest import encode, photographs
from PIL import Image, ImageOps
from skimage import data

from curation.decode import decode
from curation.stages.basics import Basics, border, facts, jpeg_quality

PICTURES = [*photographs(8, 90), data.coffee(), data.rocket()]


def bits(value: imagehash.ImageHash) -> bytes:
    return np.packbits(value.hash.reshape(-1)).tobytes()


@pytest.mark.parametrize("pixels", PICTURES)
def test_hashes_equal_the_imagehash_package(pixels):
    found, picture = facts(pixels), Image.fromarray(pixels)
    assert found["phash"] == bits(imagehash.phash(picture, hash_size=12))
    assert found["colorhash"] == bits(imagehash.colorhash(picture, binbits=3))


def test_the_mirrored_hash_is_near_the_hash_of_the_mirrored_image():
    for pixels in PICTURES:
        mirrored = bits(imagehash.phash(ImageOps.mirror(Image.fromarray(pixels)), hash_size=12))
        distance = np.unpackbits(np.frombuffer(mirrored, np.uint8) ^ np.frombuffer(facts(pixels)["phash_mirror"], np.uint8)).sum()
        assert distance <= 2


@pytest.mark.parametrize("quality", [5, 25, 49, 50, 75, 92, 100])
def test_jpeg_quality_is_read_from_the_table_that_pillow_wrote(quality):
    _, header = decode(encode(PICTURES[0], quality=quality))
    assert jpeg_quality(header.luma_table) == quality


def test_a_png_has_no_jpeg_quality():
    assert jpeg_quality(decode(encode(PICTURES[0], "PNG"))[1].luma_table) is None


def test_border_depth_is_the_share_of_flat_lines_on_each_side():
    framed = np.full((100, 200), 255, np.uint8)
    framed[20:90, 50:] = np.random.default_rng(0).integers(0, 255, (70, 150))
    assert border(framed) == pytest.approx((0.20, 0.10, 0.25, 0.0))
    assert border(np.full((10, 10), 7, np.uint8)) == (1.0, 1.0, 1.0, 1.0)


def test_photographs_have_no_border():
    assert max(max(border(np.asarray(Image.fromarray(p).convert("L")))) for p in (data.coffee(), data.astronaut())) == 0


def test_noise_raises_and_blur_lowers_the_laplacian_and_flat_colour_has_no_entropy():
    rocket = data.rocket()
    noise = np.clip(rocket + np.random.default_rng(0).normal(0, 40, rocket.shape), 0, 255).astype(np.uint8)
    assert facts(noise)["laplacian_var"] > 5 * facts(rocket)["laplacian_var"]
    flat = facts(np.full((400, 400, 3), 252, np.uint8))
    assert (flat["rgb_entropy"], flat["white_ratio"], flat["laplacian_var"]) == (0, 1, 0)
    assert facts(noise)["complexity"] > facts(rocket)["complexity"] > flat["complexity"]


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 300, 3), (700, 2, 3)])
def test_tiny_and_thin_images_have_finite_facts(shape):
    found = facts(np.random.default_rng(0).integers(0, 255, shape, np.uint8))
    assert all(np.isfinite(v) for v in found.values() if not isinstance(v, bytes))


def test_the_stage_names_its_table():
    assert Basics().name == "basics" and "phash_mirror" in Basics().schema.names
