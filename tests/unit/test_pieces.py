"""How one image becomes what training sees: the crop, the resize, the bytes."""

import io

import numpy as np
import pytest
from conftest import encode, photographs
from PIL import Image
from skimage import data

from curation import pieces
from curation.buckets import place
from curation.decode import DecodeError
from curation.pieces import cut


def chosen(height: int, width: int, resolution: int) -> dict:
    return {name: int(value[0]) for name, value in place([height], [width], resolution)._asdict().items()}


def shown(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded))).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a - b) ** 2))


def test_the_crop_is_what_is_resized():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = (200, 40, 90)
    box = {"crop_top": 16, "crop_left": 16, "crop_height": 32, "crop_width": 32, "bucket_height": 16, "bucket_width": 16}
    assert np.abs(shown(cut(encode(picture, "PNG"), box)[0]) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize("shape", [(1500, 2000), (2000, 1100), (1403, 1777), (700, 1900)])
def test_a_picture_from_a_scaled_view_is_the_picture_from_all_pixels(shape):
    """Against Pillow's Lanczos on the cropped full decode, without the last JPEG's loss on both sides."""
    photograph = np.asarray(Image.fromarray(data.astronaut()).resize(shape[::-1], Image.Resampling.BICUBIC))
    encoded, box = encode(photograph, quality=92), chosen(*shape, 256)
    top, left, high, wide = (box[name] for name in ("crop_top", "crop_left", "crop_height", "crop_width"))
    size = (box["bucket_width"], box["bucket_height"])
    full = Image.open(io.BytesIO(encoded)).crop((left, top, left + wide, top + high)).resize(size, Image.Resampling.LANCZOS)
    image, header = cut(encoded, box)
    assert (header.height, header.width) == shape and shown(image).shape[1::-1] == size
    assert psnr(shown(image), np.asarray(full, float)) > 38


@pytest.mark.parametrize("shape", [(300, 400), (256, 256), (500, 384), (511, 1300)])
def test_a_small_picture_is_never_made_from_fewer_pixels_than_it_has_to_give(shape):
    photograph = np.asarray(Image.fromarray(data.astronaut()).resize(shape[::-1], Image.Resampling.BICUBIC))
    box = chosen(*shape, 256)
    top, left, high, wide = (box[name] for name in ("crop_top", "crop_left", "crop_height", "crop_width"))
    size = (box["bucket_width"], box["bucket_height"])
    full = Image.fromarray(photograph).crop((left, top, left + wide, top + high)).resize(size, Image.Resampling.LANCZOS)
    assert (shown(cut(encode(photograph, "PNG"), box)[0]) == shown(encode(np.asarray(full), quality=95, subsampling=0))).all()


def test_an_image_smaller_than_its_crop_is_an_error_that_says_so():
    with pytest.raises(DecodeError, match="the image is 40x30 now, smaller than when it was annotated"):
        cut(encode(np.zeros((30, 40, 3), np.uint8), "PNG"), chosen(64, 64, 32))


def test_a_plain_jpeg_of_the_buckets_size_is_not_encoded_again_but_a_broken_one_is_not_packed():
    plain = encode(photographs(1, 64)[0], quality=70)
    assert cut(plain, chosen(64, 64, 64))[0] == plain
    assert cut(plain, chosen(64, 64, 32))[0] != plain
    with pytest.raises(DecodeError):
        cut(plain[: len(plain) // 2], chosen(64, 64, 64))


def test_a_row_of_a_piece_is_read_by_its_number(tmp_path):
    rows = [{"uid": str(i), "image": bytes([i % 256]) * (i % 7), "error": None} for i in range(600)]
    pieces._write(tmp_path / "p.arrow", "made", map(pieces._batch, pieces._chunks(rows)))
    piece = pieces.Piece(tmp_path / "p.arrow")
    for i in (0, 255, 256, 511, 599):
        row = piece.row(i).to_pylist()[0]
        assert (row["uid"], row["image"]) == (str(i), rows[i]["image"])
    assert piece.made_by == "made" and piece.columns(["error", "uid"])["uid"].to_pylist() == [row["uid"] for row in rows]
