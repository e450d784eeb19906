"""Reading a packed set: the pixels and captions of a row group, and errors that say what to do."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packed_world import landscapes, make_packed

from k2model.data import Packed, to_images, to_pixels

SIZES = [(32, 32), (32, 48), (48, 32)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    return Packed(make_packed(tmp_path_factory.mktemp("packed") / "p", landscapes(23, SIZES), 32, 3))


def test_a_row_group_has_its_bucket_s_size_and_the_pixels_and_captions_of_its_images(packed):
    pictures = {uid: (caption, pixels) for uid, caption, pixels in landscapes(23, SIZES)}
    seen = []
    for group in packed.groups:
        batch = packed.read(group)
        assert batch.images.dtype == torch.uint8 and tuple(batch.images.shape[2:]) == (group["bucket_height"], group["bucket_width"])
        for uid, caption, image in zip(batch.uids, batch.captions, batch.images, strict=True):
            assert caption == pictures[uid][0]
            assert (image.permute(1, 2, 0).float() - torch.from_numpy(pictures[uid][1]).float()).abs().mean() < 6  # JPEG
        seen += batch.uids
    assert sorted(seen) == sorted(pictures)


def test_pixels_come_back_from_the_range_of_the_codec(packed):
    images = packed.read(packed.groups[0]).images
    pixels = to_pixels(images)
    assert pixels.min() >= -1 and pixels.max() <= 1 and (torch.from_numpy(to_images(pixels)).permute(0, 3, 1, 2) == images).all()


def test_a_missing_or_foreign_packed_set_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="k2 pack --policy nothing"):
        Packed(tmp_path / "nothing")
    place = Packed(Path(make_packed(tmp_path / "p", landscapes(2, SIZES[:1]), 32, 2)))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "p" / "00000.parquet")
    with pytest.raises(ValueError, match="columns of a packed shard"):
        place.read(place.groups[0])
