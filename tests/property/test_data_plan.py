"""The order of training batches: every batch once an epoch, and resuming is seeking."""

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_world import landscapes, make_packed

from k2model.data import Cursor, Packed, to_images, to_pixels

SIZES = [(32, 32), (32, 48), (48, 32)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    return Packed(make_packed(tmp_path_factory.mktemp("packed") / "p", landscapes(23, SIZES), 32, 3))


@given(seed=st.integers(0, 2**32), skip=st.integers(0, 25), take=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_resuming_at_any_cursor_equals_the_stream_that_was_never_stopped(packed, seed, skip, take):
    whole = list(islice(packed.batches(seed, Cursor()), skip + take))
    cursor = whole[skip - 1][1] if skip else Cursor()
    for (batch, after), (expected, expected_after) in zip(islice(packed.batches(seed, cursor), take), whole[skip:], strict=True):
        assert batch.uids == expected.uids and after == expected_after and torch.equal(batch.images, expected.images)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(packed, seed, epoch):
    assert sorted(packed.order(seed, epoch)) == list(range(len(packed)))
    assert (packed.order(seed, epoch) == packed.order(seed, epoch)).all()


def test_an_epoch_shows_every_image_once_and_the_next_one_in_another_order(packed):
    batches = list(islice(packed.batches(0, Cursor()), 2 * len(packed)))
    epochs = [[uid for batch, _ in part for uid in batch.uids] for part in (batches[: len(packed)], batches[len(packed) :])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"s{i % 2}/{i:03d}" for i in range(23)) and epochs[0] != epochs[1]
    assert batches[len(packed) - 1][1] == Cursor(1, 0)


def test_a_batch_has_the_bucket_the_pixels_and_the_captions_of_its_row_group(packed):
    for batch, _ in islice(packed.batches(5, Cursor()), len(packed)):
        assert batch.images.dtype == torch.uint8 and tuple(batch.images.shape[2:]) in SIZES
        assert len(batch.captions) == len(batch.uids) == len(batch.images) and all("sky over" in caption for caption in batch.captions)


def test_pixels_come_back_from_the_range_of_the_codec(packed):
    images = next(packed.batches(0, Cursor()))[0].images
    assert to_pixels(images).min() >= -1 and (torch.from_numpy(to_images(to_pixels(images))).permute(0, 3, 1, 2) == images).all()


def test_a_missing_or_foreign_packed_set_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="k2 pack --policy nothing"):
        Packed(tmp_path / "nothing")
    place = make_packed(tmp_path / "p", landscapes(2, SIZES[:1]), 32, 2)
    pq.write_table(pa.table({"x": [1]}), place / "00000.parquet")
    with pytest.raises(ValueError, match="columns of a packed shard"):
        next(Packed(Path(place)).batches(0, Cursor()))
