"""Decoding: upright RGB of every mode, and a reason for everything that is broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encode, photographs
from PIL import Image

from curation.decode import DecodeError, Limits, decode

PICTURE = photographs(1, 64)[0]


def test_rgb_pixels_come_back_exactly():
    pixels, header = decode(encode(PICTURE, "PNG"))
    assert np.array_equal(pixels, PICTURE)
    assert (header.format, header.mode, header.width, header.height, header.num_frames) == ("PNG", "RGB", 64, 64, 1)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image 90 degrees clockwise
    pixels, header = decode(encode(PICTURE[:, :32], "PNG", exif=exif))
    assert np.array_equal(pixels, np.rot90(PICTURE[:, :32], -1))
    assert (header.width, header.height) == (64, 32)


def test_alpha_is_composited_on_white():
    transparent = np.dstack([PICTURE, np.zeros(PICTURE.shape[:2], np.uint8)])
    assert (decode(encode(transparent, "PNG"))[0] == 255).all()


def test_a_palette_with_transparency_is_composited_on_white():
    image = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    image.putpalette([200, 0, 0] + [0] * 765)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    assert (decode(buffer.getvalue())[0] == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    pixels, _ = decode(encode(ramp, "PNG"))
    assert np.abs(pixels[..., 0].astype(int) - ramp / 257).max() <= 1


def test_cmyk_becomes_rgb_near_the_original():
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert("CMYK").save(buffer, "JPEG", quality=95)
    pixels, header = decode(buffer.getvalue())
    assert header.mode == "CMYK" and np.abs(pixels.astype(int) - PICTURE).mean() < 6


def test_the_first_frame_of_an_animation_is_used_and_counted():
    buffer = io.BytesIO()
    frames = [Image.fromarray(p) for p in photographs(3, 32)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    pixels, header = decode(buffer.getvalue())
    assert header.num_frames == 3 and np.array_equal(pixels, photographs(1, 32)[0])


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"])
def test_every_container_cut_short_is_an_error_with_a_reason(container):
    whole = encode(PICTURE, container)
    decode(whole)
    with pytest.raises(DecodeError, match=r"\w"):
        decode(whole[: len(whole) // 2])


@pytest.mark.parametrize(("content", "reason"), [(None, "no image bytes"), (b"", "empty file"), (b"<html>404</html>", "not an image")])
def test_missing_empty_and_foreign_bytes_say_what_they_are(content, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(content)


def test_a_decompression_bomb_is_refused_from_its_header():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match="30000x30000 pixels is over the limit"):
        decode(bomb)
    with pytest.raises(DecodeError, match="over the limit of 10"):
        decode(encode(PICTURE), Limits(max_bytes=10))


def test_random_bytes_behind_a_valid_signature_never_escape_as_another_error():
    rng = np.random.default_rng(0)
    for container in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = bytearray(encode(PICTURE, container))
        for _ in range(40):
            torn = whole.copy()
            for place in rng.integers(8, len(torn), 12):
                torn[place] = rng.integers(256)
            try:
                pixels, _ = decode(bytes(torn), Limits(max_pixels=1_000_000))
            except DecodeError:
                continue
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
