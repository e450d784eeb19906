"""Decoding: upright RGB of every mode, and a reason for everything that is broken."""

import functools
import io
import struct
import zlib

import cv2
import hostile
import numpy as np
import pytest
import simplejpeg
import tifffile
from conftest import encode, photographs
from PIL import Image, ImageCms, ImageOps
from skimage import data

from curation.decode import VIEW_SIDE, DecodeError, Limits, decode, decode_for, view_factor

PICTURE = photographs(1, 64)[0]
LARGE = np.asarray(Image.fromarray(data.coffee()).resize((1601, 1100), Image.Resampling.LANCZOS))

hostile_images = functools.cache(hostile.images)


def saved(image: Image.Image, container: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, container, **options)
    return buffer.getvalue()


def error_of(encoded: bytes, reads: str, limits: Limits = Limits()) -> str | None:  # noqa: B008
    try:
        decode_for(encoded, reads, limits)
    except DecodeError as error:
        return str(error)
    return None


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


LOSSLESS = {
    "PNG": lambda p: encode(p, "PNG"),
    "PNG by OpenCV": lambda p: cv2.imencode(".png", p[..., ::-1])[1].tobytes(),
    "interlaced palette GIF": lambda p: saved(Image.fromarray(p).quantize(32), "GIF"),
    "lossless WEBP": lambda p: encode(p, "WEBP", lossless=True),
    "lossless JXL": lambda p: encode(p, "JXL", lossless=True),
    "BMP": lambda p: encode(p, "BMP"),
    "TIFF": lambda p: encode(p, "TIFF"),
    "LZW TIFF": lambda p: encode(p, "TIFF", compression="tiff_lzw"),
    "tiled TIFF by tifffile": lambda p: tiff(p, tile=(32, 32), photometric="rgb"),
    "big TIFF by tifffile": lambda p: tiff(p, bigtiff=True, photometric="rgb"),
}


def tiff(pixels: np.ndarray, bigtiff: bool = False, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, bigtiff=bigtiff, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("pixels", [PICTURE, LARGE[:1025, :1030]], ids=["small", "large"])
def test_what_a_lossless_encoder_wrote_comes_back_exactly(name, pixels):
    encoded = LOSSLESS[name](pixels)
    decoded = decode_for(encoded, "pixels")
    expected = pixels if "palette" not in name else np.asarray(Image.fromarray(pixels).quantize(32).convert("RGB"))
    assert np.array_equal(decoded.pixels, expected)
    assert np.array_equal(decoded.view, decode_for(encoded, "view").view)


@pytest.mark.parametrize(("container", "options"), [("AVIF", {"quality": 90}), ("HEIF", {"quality": 90}), ("JXL", {"quality": 90})])
def test_lossy_formats_come_back_near_the_original(container, options):
    decoded = decode_for(encode(LARGE[:600, :500], container, **options), "pixels")
    assert decoded.header.format == container and decoded.header.width == 500
    assert np.abs(decoded.pixels.astype(int) - LARGE[:600, :500]).mean() < 4


JPEGS = {
    "baseline": {"quality": 90},
    "progressive": {"quality": 80, "progressive": True},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "4:2:2": {"quality": 70, "subsampling": 1},
    "restart markers": {"quality": 85, "restart_marker_blocks": 3},
    "sRGB stored as RGB": {"quality": 90, "keep_rgb": True},
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("pixels", [PICTURE, LARGE, LARGE[..., 0]], ids=["small", "large", "grey"])
def test_jpegs_equal_pillows_full_decode_and_the_view_is_near_its_area_means(name, pixels):
    encoded = encode(pixels, **JPEGS[name])
    decoded, reference = decode_for(encoded, "pixels"), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(decoded.pixels, reference)
    factor = view_factor(pixels.shape[1], pixels.shape[0])
    height, width = -(-pixels.shape[0] // factor), -(-pixels.shape[1] // factor)
    means = cv2.resize(reference, (width, height), interpolation=cv2.INTER_AREA)
    assert decoded.view.shape == means.shape and np.abs(decoded.view.astype(int) - means).mean() < 2


@pytest.mark.parametrize(
    ("width", "height", "short"), [(300, 9000, 300), (512, 700, 512), (1023, 1500, 1023), (1024, 1024, 512), (5000, 4099, 513)]
)
def test_a_view_has_a_short_side_of_512_to_1023_or_is_the_whole_smaller_image(width, height, short):
    flat = np.full((height, width, 3), 90, np.uint8)
    for container in ("JPEG", "PNG"):
        decoded = decode_for(encode(flat, container), "view")
        assert min(decoded.view.shape[:2]) == short and decoded.pixels is None
        assert VIEW_SIDE <= short < 2 * VIEW_SIDE or short == min(width, height)


def test_a_jpeg_beyond_eight_times_the_view_is_still_reduced_to_it():
    decoded = decode_for(encode(np.full((8200, 8300, 3), 90, np.uint8)), "view")
    assert decoded.view.shape == (513, 519, 3) and (decoded.view == 90).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_every_exif_orientation_is_upright_in_view_and_pixels(container, orientation):
    upright = np.ascontiguousarray(LARGE[:1026:2, 100:1440:2]) if container != "JPEG" else np.ascontiguousarray(LARGE[:1026, 100:1440])
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]  # Image.Transpose that the camera would have made
    image = Image.fromarray(upright)
    for step in undo:
        image = image.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if container == "WEBP" else {} if container in ("PNG", "TIFF") else {"quality": 95}
    encoded = saved(image, container, exif=exif.tobytes() if container == "HEIF" else exif, **options)  # bytes: HEIF then turns too
    for reads in ("view", "pixels"):
        decoded = decode_for(encoded, reads)
        assert (decoded.header.width, decoded.header.height) == (upright.shape[1], upright.shape[0])
        small = cv2.resize(upright, decoded.view.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(decoded.view.astype(int) - small).mean() < 3
    assert np.abs(decoded.pixels.astype(int) - upright).mean() < 3


def test_a_jpeg_xl_is_turned_by_its_codestream_and_not_by_its_exif():
    """ISO/IEC 18181-2: the orientation of the codestream counts, that of an Exif box is ignored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(PICTURE[:, :32], "JXL", lossless=True, exif=exif.tobytes(), use_container=True)
    assert np.array_equal(decode(encoded)[0], PICTURE[:, :32])


def test_the_reference_for_orientation_is_pillows_own():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded = saved(Image.fromarray(LARGE), "JPEG", exif=exif)
        assert np.array_equal(decode(encoded)[0], np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))))


@pytest.mark.parametrize("name", ["PNG", "TIFF by tifffile"])
def test_sixteen_bit_colour_keeps_its_high_byte(name):
    deep = PICTURE.astype(np.uint16) * 257
    encoded = {
        "PNG": lambda: cv2.imencode(".png", deep[..., ::-1])[1].tobytes(),
        "TIFF by tifffile": lambda: tiff(deep, photometric="rgb"),
    }[name]()
    pixels = decode(encoded)[0].astype(int)
    assert np.abs(pixels - PICTURE).max() <= 1


def test_ycck_and_cmyk_are_inverted_as_adobe_wrote_them():
    cmyk = np.asarray(Image.fromarray(PICTURE).convert("CMYK"))
    plain = saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95)
    assert decode(plain)[1].mode == "CMYK" and np.abs(decode(plain)[0].astype(int) - PICTURE).mean() < 6
    # The same planes called YCCK: the third channel and the first are then colour differences.
    marker = plain.index(b"Adobe") + 11
    ycck = plain[:marker] + b"\x02" + plain[marker + 1 :]
    reference = Image.open(io.BytesIO(ycck)).convert("RGB")
    assert np.array_equal(decode(ycck)[0], np.asarray(reference)) and not np.array_equal(decode(ycck)[0], decode(plain)[0])


def test_alpha_is_marked_only_where_a_pixel_is_not_opaque():
    opaque = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 255, np.uint8)])
    glass = opaque.copy()
    glass[0, 0, 3] = 200
    for container in ("PNG", "WEBP", "TIFF", "AVIF", "JXL"):
        assert not decode(encode(opaque, container))[1].has_alpha and not decode(encode(PICTURE, container))[1].has_alpha
        assert decode(encode(glass, container))[1].has_alpha


def wide_gamut() -> bytes:
    """A profile whose red and green are swapped: a conversion to sRGB can be seen at once."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {profile[at : at + 4].decode(): at for at in range(132, 132 + 12 * struct.unpack_from(">I", profile, 128)[0], 12)}
    red, green = places["rXYZ"], places["gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_a_profile_is_converted_left_alone_or_ignored_and_marked(container):
    red = np.full((1100, 1030, 3), (250, 5, 5), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, mark, shown in ((None, "none", 0), (srgb, "srgb", 0), (wide_gamut(), "converted", 1), (b"garbage" * 99, "broken", 0)):
        options = {} if profile is None else {"icc_profile": profile}
        if container in ("AVIF", "HEIF") and mark == "broken":
            continue  # nor these a broken one
        encoded = saved(Image.fromarray(red), container, **options)
        decoded = decode_for(encoded, "pixels")
        assert decoded.header.icc == mark
        for pixels in (decoded.view, decoded.pixels, decode_for(encoded, "view").view):
            assert pixels[5, 5].argmax() == shown


def test_a_profile_of_another_colour_space_is_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, header = decode(saved(Image.fromarray(PICTURE).convert("L"), "JPEG", icc_profile=srgb))
    assert header.icc == "broken" and np.abs(pixels[..., 0].astype(int) - np.asarray(Image.fromarray(PICTURE).convert("L"))).mean() < 4


@pytest.mark.parametrize("container", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_frames_are_counted_and_the_first_is_shown(container):
    frames = [Image.fromarray(p) for p in photographs(5, 64)]
    assert container != "TIFF" or decode(tiff(np.stack(photographs(5, 64)), bigtiff=True, photometric="rgb"))[1].num_frames == 5
    pixels, header = decode(saved(frames[0], container, save_all=True, append_images=frames[1:], duration=100))
    assert header.num_frames == 5 and np.abs(pixels.astype(int) - photographs(1, 64)[0]).mean() < 20


def test_frames_are_counted_no_further_than_a_thousand_and_a_loop_of_pages_ends():
    files = {file.name: file.content for file in hostile_images() if "frames" in file.name or "loop" in file.name}
    assert decode(files["bomb_gif_300000_frames.gif"])[1].num_frames == 1000
    assert decode(files["bomb_gif_600_frames.gif"])[1].num_frames == 600
    assert decode(files["lie_tiff_directory_loop.tif"])[1].num_frames == 1


@pytest.mark.parametrize("cut", [1, 2, 3, 40, 2000])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_without_its_last_bytes_is_an_error_whatever_is_read(cut, options):
    whole = encode(LARGE, quality=90, **options)
    assert error_of(whole, "view") is None
    assert error_of(whole[:-cut], "view") == error_of(whole[:-cut], "pixels") == "truncated: the JPEG has no end-of-image marker"
    closed = whole[: -cut - 200] + b"\xff\xd9"  # cut, and closed again by some tool
    assert error_of(closed, "view") == error_of(closed, "pixels") and "damaged" in error_of(closed, "view")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_a_png_with_too_few_rows_is_an_error_and_a_black_bottom_is_not(mode):
    picture = PICTURE.copy()
    picture[-9:] = 0
    whole = saved(Image.fromarray(picture).convert(mode), "PNG")
    assert error_of(whole, "view") is None
    rows = whole.index(b"IHDR") + 8
    taller = whole[:rows] + struct.pack(">I", 70) + whole[rows + 4 :]
    assert "fewer pixels than the 64x70" in error_of(taller[:29] + struct.pack(">I", zlib.crc32(taller[12:29])) + taller[33:], "view")


def test_an_interlaced_png_without_its_last_pass_is_an_error():
    assert np.array_equal(decode(adam7(PICTURE, 7))[0], PICTURE)
    assert "fewer pixels" in error_of(adam7(PICTURE, 6), "view")


def adam7(pixels: np.ndarray, num_passes: int) -> bytes:
    """An interlaced PNG, which Pillow reads and does not write."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [b"\0" + row.tobytes() for x, y, dx, dy in passes[:num_passes] for row in np.ascontiguousarray(pixels[y::dy, x::dx])]
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(hostile.chunk(kind, body) for kind, body in chunks)


def test_junk_inside_a_jpeg_that_changes_no_pixel_is_a_warning_and_behind_it_nothing():
    whole = encode(PICTURE)
    junk = whole.replace(b"\xff\xdb", b"junk\xff\xdb", 1)
    pixels, header = decode(junk)
    assert "extraneous bytes" in header.warning and np.array_equal(pixels, decode(whole)[0])
    assert decode(whole + b"junk" * 99)[1].warning is None


def test_scans_metadata_and_tags_have_limits():
    progressive = encode(LARGE, quality=90, progressive=True)
    assert "more than 3 scans" in error_of(progressive, "view", Limits(max_scans=3))
    assert "pixels in all scans" in error_of(progressive, "view", Limits(max_scan_pixels=10_000_000))
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    assert "bytes of metadata" in error_of(progressive[:2] + comment * 9 + progressive[2:], "view", Limits(max_metadata=500_000))
    strips = bytearray(tiff(PICTURE, photometric="rgb"))
    entry = strips.index(struct.pack("<HH", 273, 4))  # StripOffsets
    struct.pack_into("<I", strips, entry + 4, 2_000_000)
    assert "values in the tags" in error_of(bytes(strips), "view")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"\n<!DOCTYPE HTML><html></html>", "HTML"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"PK\x03\x04....", "ZIP"),
        (b"plain words", "text"),
        (bytes(900), "zero bytes"),
        (b"P6 2 2 255\n" + bytes(12), "unknown"),
        (b"\xff\xd8\xff\xd9", "JPEG"),
    ],
)
def test_what_is_no_image_is_named(content, name):
    assert name in error_of(content, "view") and error_of(content, "view") == error_of(content, "pixels")


def test_no_plugin_of_pillow_outside_the_list_is_reached(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was called"))
    assert "PostScript" in error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "pixels")


def test_every_hostile_file_gets_its_verdict_and_the_same_from_view_and_pixels():
    whole = {name: decode(hostile.clean(name))[0] for name in hostile.CONTAINERS}
    for file in hostile_images():
        found = {reads: error_of(file.content, reads) for reads in ("view", "pixels")}
        assert found["view"] == found["pixels"], file.name
        assert file.becomes != "error" or found["view"], file.name
        if file.becomes == "same" and found["view"] is None:
            assert any(np.array_equal(decode(file.content)[0], pixels) for pixels in whole.values()), file.name


def test_simplejpeg_would_not_notice_a_lying_size():
    """Why `_turbo` compares shapes: a second frame header is the size that libjpeg and Pillow may disagree on."""
    whole = encode(PICTURE)
    start = whole.index(b"\xff\xc0")
    frame = bytearray(whole[start : start + 19])
    frame[5:9] = struct.pack(">HH", 32, 32)
    two = whole[:start] + whole[start : start + 19] + bytes(frame) + whole[start + 19 :]
    assert error_of(two, "view") == error_of(two, "pixels")
    assert simplejpeg.is_jpeg(two)
