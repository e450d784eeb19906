"""The stage `basics`: near to imagehash, and each number says what its name says."""

import io

import imagehash
import numpy as np
import pytest
from conftest import encode, photographs
from PIL import Image, ImageOps
from scipy import ndimage
from skimage import data
from sklearn.datasets import load_sample_images

from curation.decode import decode, decode_for
from curation.stages.basics import Basics, border, facts, jpeg_quality

PICTURES = [*photographs(8, 90), data.coffee(), data.rocket()]


def bits(value: imagehash.ImageHash) -> bytes:
    return np.packbits(value.hash.reshape(-1)).tobytes()


def distance(a: bytes, b: bytes) -> int:
    """Bits that differ."""
    return int(np.unpackbits(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


def test_the_phash_of_small_pictures_is_the_one_of_the_imagehash_package():
    bits_off = [distance(facts(p)["phash"], bits(imagehash.phash(Image.fromarray(p), hash_size=12))) for p in PICTURES]
    assert np.mean(bits_off) <= 1 and max(bits_off) <= 4


@pytest.mark.parametrize("quality", [60, 90])
def test_hashes_of_views_are_within_a_bit_of_the_imagehash_package_on_full_pixels(quality):
    phash, color = [], []
    for picture in (data.coffee(), data.rocket(), data.astronaut(), data.chelsea(), *load_sample_images().images):
        large = Image.fromarray(picture).resize((2000, 1500), Image.Resampling.LANCZOS)
        content = encode(np.asarray(large), quality=quality)
        full, view = Image.open(io.BytesIO(content)), decode_for(content, "view").view
        assert view.shape == (750, 1000, 3)
        phash.append(distance(facts(view)["phash"], bits(imagehash.phash(full, hash_size=12))))
        color.append(distance(facts(view)["colorhash"], bits(imagehash.colorhash(full, binbits=3))))
    assert np.mean(phash) <= 1 and np.mean(color) <= 1.5


@pytest.mark.parametrize(
    "color", [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (90, 70, 60)]
)
def test_the_colorhash_of_one_colour_is_exactly_the_one_of_the_imagehash_package(color):
    flat = np.full((300, 200, 3), color, np.uint8)
    assert facts(flat)["colorhash"] == bits(imagehash.colorhash(Image.fromarray(flat), binbits=3))


def test_flat_pictures_have_one_phash_whatever_their_colour_and_size():
    found = {
        facts(np.full(shape, value, np.uint8))["phash"] for value in (3, 77, 251) for shape in ((50, 50, 3), (500, 700, 3), (1023, 600, 3))
    }
    assert len(found) == 1


def test_the_mirrored_hash_is_near_the_hash_of_the_mirrored_image():
    for pixels in PICTURES:
        mirrored = bits(imagehash.phash(ImageOps.mirror(Image.fromarray(pixels)), hash_size=12))
        assert distance(mirrored, facts(pixels)["phash_mirror"]) <= 4


def test_the_facts_of_a_photograph_stay_what_they_are():
    golden = {
        "rgb_entropy": 7.38621,
        "laplacian_var": 1531.9085,
        "white_ratio": 57 / 240000,
        "black_ratio": 3 / 240000,
        "complexity": 0.173529,
        "phash": bytes.fromhex("bb283c20937f4cf0fc36b37c72c9b2724330"),
        "colorhash": bytes.fromhex("210000a00000"),
    }
    found = facts(data.coffee())
    assert {k: v for k, v in found.items() if k in golden and isinstance(v, float)} == pytest.approx(
        {k: v for k, v in golden.items() if isinstance(v, float)}, rel=1e-3
    )
    assert {k: v for k, v in found.items() if k in golden and isinstance(v, bytes)} == {
        k: v for k, v in golden.items() if isinstance(v, bytes)
    }


@pytest.mark.parametrize("pixels", [data.coffee(), *photographs(4, 90)])
def test_facts_equal_their_plain_definitions(pixels):
    found, luma = facts(pixels), np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    histograms = [np.bincount(pixels[..., c].reshape(-1), minlength=256) / luma.size for c in range(3)]
    assert found["rgb_entropy"] == pytest.approx(np.mean([-(p[p > 0] * np.log2(p[p > 0])).sum() for p in histograms]))
    assert found["laplacian_var"] == pytest.approx(ndimage.laplace(luma, mode="reflect").var(), rel=1e-3)
    assert found["white_ratio"] == pytest.approx((pixels >= 250).all(-1).mean())
    assert found["black_ratio"] == pytest.approx((pixels <= 5).all(-1).mean())
    assert found["complexity"] == pytest.approx(len(encode(pixels, quality=75)) / luma.size, rel=0.05)


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
