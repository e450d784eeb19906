"""Planted faults: each one does to the pixels what its name says, and nothing happens by chance."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image
from skimage import data

from curation.decode import DecodeError, decode
from curation.faults import FAULTS, encode, pixels_of

RINGING = 8  # pixels beside the picture where JPEG blocks hold both frame and picture


@pytest.fixture(scope="module")
def photo():
    return encode(data.coffee())


def plant(name, encoded, seed=0):
    return FAULTS[name].plant(encoded, np.random.default_rng(seed))


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_generator_plants_the_same_bytes(name, photo):
    assert plant(name, photo, 7) == plant(name, photo, 7)


@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"truncated"}))
def test_a_planted_image_still_decodes(name, photo):
    image, _ = decode(plant(name, photo))
    assert image.ndim == 3 and image.dtype == np.uint8


@pytest.mark.parametrize("seed", range(8))
def test_a_truncated_file_does_not_decode(seed, photo):
    with pytest.raises(DecodeError):
        decode(plant("truncated", photo, seed))


def test_recompressed_says_so_in_its_table_and_resaved_hides_it(photo):
    tables = [Image.open(io.BytesIO(plant(name, photo))).quantization[0] for name in ("recompressed", "resaved")]
    assert min(tables[0][:8]) > 50 and max(tables[1]) < 30
    blocks = [jumps_at_block_edges(pixels_of(data)) for data in (photo, plant("recompressed", photo), plant("resaved", photo))]
    assert blocks[0] < 1.3 < 3 < min(blocks[1:])


def jumps_at_block_edges(pixels):
    """Mean step across the edges of 8x8 blocks over the mean step elsewhere."""
    steps = np.abs(np.diff(pixels.astype(float).mean(axis=2), axis=1)).mean(axis=0)
    edge = np.arange(len(steps)) % 8 == 7
    return steps[edge].mean() / steps[~edge].mean()


@pytest.mark.parametrize("seed", range(4))
def test_banded_leaves_at_most_eight_levels(seed, photo):
    assert len(np.unique(pixels_of(plant("banded", photo, seed)))) <= 8


@pytest.mark.parametrize("seed", range(6))
def test_bordered_adds_a_flat_frame_and_keeps_the_picture(seed, photo):
    before, after = pixels_of(photo), pixels_of(plant("bordered", photo, seed))
    top, left = ((np.array(after.shape) - before.shape) // 2)[:2]
    assert max(top, left) >= 0.12 * min(before.shape[:2]) - 1
    frame = np.ones(after.shape[:2], bool)
    spared_y, spared_x = max(top - RINGING, 0), max(left - RINGING, 0)
    frame[spared_y : after.shape[0] - spared_y, spared_x : after.shape[1] - spared_x] = False
    assert frame.mean() > 0.1 and np.ptp(after[frame].astype(int)) <= 2
    middle = after[top : top + before.shape[0], left : left + before.shape[1]]
    assert np.abs(middle.astype(int) - before).mean() < 3


def test_watermarked_brightens_text_all_over_and_spares_the_rest(photo):
    change = pixels_of(plant("watermarked", photo)).astype(int) - pixels_of(photo)
    touched = change.max(axis=2) > 30
    assert 0.03 < touched.mean() < 0.4
    quarters = [touched[y : y + 200, x : x + 300].mean() for y in (0, 200) for x in (0, 300)]
    assert min(quarters) > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_far_stronger_than_grain(seed, photo):
    before = pixels_of(photo).astype(int)
    strength = {name: np.abs(pixels_of(plant(name, photo, seed)) - before).mean() for name in ("noisy", "grainy")}
    assert strength["noisy"] > 15 > 14 > strength["grainy"] > 3


@pytest.mark.parametrize(("name", "limit"), [("exact_copy", 0), ("near_copy", 6), ("motion_blurred", 20), ("soft_focused", 12)])
def test_a_copy_has_the_hash_of_its_original(name, limit, photo):
    hashes = [imagehash.phash(Image.fromarray(pixels_of(encoded)), hash_size=12) for encoded in (photo, plant(name, photo))]
    assert hashes[0] - hashes[1] <= limit


def test_a_mirrored_copy_mirrored_again_is_the_original(photo):
    twice = pixels_of(plant("mirrored_copy", plant("mirrored_copy", photo)))
    assert np.abs(twice.astype(int) - pixels_of(photo)).mean() < 2
