"""Broken and hostile image files, made anew each time: what a crawl of the web, or somebody with bad intentions, puts into a source.

`images()` gives files by name, each with what has to become of it:

    "error"   a row with an error
    "same"    decoded to the very pixels of `clean(container)`, or a row with an error: never other pixels without a word
    "any"     decoded to something or a row with an error; it only has to stay within the limits

Every file is one sample; what is wrong is in its name.
"""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  registers the plugin
from conftest import encode, photographs
from PIL import Image, PngImagePlugin

pillow_heif.register_heif_opener()


class Hostile(NamedTuple):
    """One file: its name, its bytes, and what has to become of it."""

    name: str
    content: bytes
    becomes: str  # error, same or any


@cache
def clean(container: str) -> bytes:
    """A whole file of this kind, made from one photograph."""
    photo = photographs(1, 96)[0][:80]
    grey16 = (photo[..., 0].astype(np.uint16) << 8) | photo[..., 1]
    made = {
        "jpeg": lambda: encode(photo, quality=90),
        "progressive_jpeg": lambda: encode(photo, quality=90, progressive=True),
        "grey_jpeg": lambda: encode(photo[..., 0], quality=90),
        "cmyk_jpeg": lambda: _saved(Image.fromarray(photo).convert("CMYK"), "JPEG"),
        "png": lambda: encode(photo, "PNG"),
        "palette_png": lambda: _saved(Image.fromarray(photo).quantize(64), "PNG"),
        "grey16_png": lambda: encode(grey16, "PNG"),
        "webp": lambda: encode(photo, "WEBP", quality=80),
        "lossless_webp": lambda: encode(photo, "WEBP", lossless=True),
        "gif": lambda: _saved(Image.fromarray(photo).quantize(64), "GIF"),
        "bmp": lambda: encode(photo, "BMP"),
        "tiff": lambda: encode(photo, "TIFF"),
        "lzw_tiff": lambda: encode(photo, "TIFF", compression="tiff_lzw"),
        "avif": lambda: encode(photo, "AVIF", quality=80),
        "heic": lambda: encode(photo, "HEIF", quality=80),
        "jxl": lambda: encode(photo, "JXL"),
    }
    return made[container]()


CONTAINERS = [
    "jpeg",
    "progressive_jpeg",
    "grey_jpeg",
    "cmyk_jpeg",
    "png",
    "palette_png",
    "grey16_png",
    "webp",
    "lossless_webp",
    "gif",
    "bmp",
    "tiff",
    "lzw_tiff",
    "avif",
    "heic",
    "jxl",
]
SUFFIX = {"webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif", "avif": "avif", "heic": "heic", "jxl": "jxl", "png": "png"}


def _saved(image: Image.Image, container: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, container, **options)
    return buffer.getvalue()


@cache
def images() -> list[Hostile]:
    """All of them, with unique names."""
    made = [*_truncated(), *_flipped(), *_not_images(), *_bombs(), *_lies(), *_metadata(), *_wrong_suffix()]
    assert len({file.name for file in made}) == len(made)
    return made


def _named(container: str, what: str) -> str:
    kind = container.rpartition("_")[2]
    return f"{what}_{container}.{SUFFIX.get(kind, 'jpg')}"


def _truncated() -> Iterator[Hostile]:
    """Cut at the places that matter: inside the signature, the header, the pixels, and just before the end."""
    for container in CONTAINERS:
        whole = clean(container)
        places = {"1": 1, "4": 4, "11": 11, "25": 25, "60": 60}
        places |= {f"{share}%": len(whole) * share // 100 for share in (20, 50, 80, 95)} | {f"last{n}": len(whole) - n for n in (9, 2, 1)}
        for place, length in places.items():
            yield Hostile(_named(container, f"cut_{place}"), whole[:length], "error" if length < 0.7 * len(whole) else "same")


def _flipped() -> Iterator[Hostile]:
    """Bytes changed at random, a few of them, in the header half of the time."""
    for container in CONTAINERS:
        for seed in range(5):
            dice = random.Random(f"{container} {seed}")
            content = bytearray(clean(container))
            for _ in range(dice.choice((1, 3, 20))):
                content[dice.randrange(min(100, len(content)) if seed % 2 else len(content))] = dice.randrange(256)
            yield Hostile(_named(container, f"flipped_{seed}"), bytes(content), "any")


def _not_images() -> Iterator[Hostile]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    texts = {
        "empty": b"",
        "one_space": b" ",
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "noise": random.Random(0).randbytes(4096),
        "html": b"<!DOCTYPE html><html><body onload=alert(1)>404 Not Found</body></html>",
        "svg": svg,
        "svg_xml": b'<?xml version="1.0"?>' + svg,
        "billion_laughs": b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]><svg>&b;</svg>',
        "json": b'{"error": "rate limited"}',
        "deep_json": b"[" * 100_000,
        "pdf": b"%PDF-1.7\n1 0 obj<</OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n(/etc/passwd) (r) file\n%%EOF\n",
        "eps_binary": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, 60, 0, 0, 0, 0) + b"\xff\xff%!PS-Adobe-3.0 EPSF-3.0\nquit\n",
        "shell": b"#!/bin/sh\ntouch /tmp/k2-was-here\n",
        "python_pickle": b"cos\nsystem\n(S'touch /tmp/k2-was-here'\ntR.",
        "elf": b"\x7fELF\x02\x01\x01" + bytes(100),
        "zip": b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(60),
        "tar": b"a.jpg".ljust(257, b"\0") + b"ustar\x0000" + bytes(300),
        "gzip": zlib.compress(bytes(100), wbits=31),
        "mp4": struct.pack(">I", 24) + b"ftypisom\x00\x00\x02\x00isomiso2" + bytes(200),
        "psd": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(300),
        "ico": struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 9, 9, 0, 0, 1, 32, 40, 22) + bytes(60),
        "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "mpo_of_nothing": b"\xff\xd8\xff\xe2\x00\x10MPF\x00II*\x00" + bytes(60),
        "pcx": bytes([10, 5, 1, 8]) + bytes(124) + bytes(200),
        "xbm": b"#define a_width 9\n#define a_height 9\nstatic char a_bits[] = {\n0x00};\n",
        "xpm": b'/* XPM */\nstatic char * a[] = {\n"9 9 1 1",\n" c red",\n',
        "fits": b"SIMPLE  =                    T".ljust(2880),
        "im": b"Image type: L image\r\nName: x\r\nImage size (x*y): 9*9\r\n".ljust(512, b"\0"),
        "utf16": "<html>".encode("utf-16") * 10,
        "base64": b"data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD",
        "git_lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }
    return (Hostile(f"not_{name}.jpg", content, "error") for name, content in texts.items())


def png(width: int, height: int, bits: int = 8, color: int = 2, pixels: bytes = b"", extra: bytes = b"", crc: bool = True) -> bytes:
    """A PNG with any header; `pixels` are the filtered rows before compression."""
    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, bits, color, 0, 0, 0)
    chunks = [chunk(b"IHDR", head, crc), extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(kind: bytes, data: bytes, crc: bool = True) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc else 0)


def _resized_header(content: bytes, marker: bytes, offset: int, form: str, *values: int) -> bytes:
    """The bytes with numbers written `offset` behind the first `marker`."""
    place = content.index(marker) + offset
    size = struct.calcsize(form)
    return content[:place] + struct.pack(form, *values) + content[place + size :]


def _bombs() -> Iterator[Hostile]:
    """Small files that ask for much memory or time."""
    yield Hostile("bomb_png_900_megapixels.png", png(30_000, 30_000, 1, 0, bytes(3_751 * 30_000)), "error")
    yield Hostile("bomb_png_2_gigapixels_of_nothing.png", png(2**31 - 1, 2, 8, 2, b""), "error")
    yield Hostile("bomb_png_wide.png", png(2**31 - 1, 2**31 - 1, 16, 6, b"\0"), "error")
    yield Hostile("bomb_png_too_much_data.png", png(9, 9, 8, 2, bytes(200 << 20)), "any")
    jpeg = clean("jpeg")
    yield Hostile("bomb_jpeg_65500.jpg", _resized_header(jpeg, b"\xff\xc0", 5, ">HH", 65_500, 65_500), "error")
    yield Hostile("bomb_gif_65535.gif", _resized_header(clean("gif"), b"GIF8", 6, "<HH", 65_535, 65_535), "error")
    yield Hostile("bomb_bmp.bmp", _resized_header(clean("bmp"), b"BM", 18, "<ii", 60_000, 60_000), "error")
    yield Hostile("bomb_tiff.tif", _tiff_with(clean("tiff"), {256: 100_000, 257: 100_000}), "error")
    yield Hostile("bomb_ppm.jpg", b"P6 60000 60000 255\n" + bytes(100), "error")
    progressive = clean("progressive_jpeg")
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield Hostile("bomb_jpeg_5000_scans.jpg", progressive[:-2] + scan * 5_000 + b"\xff\xd9", "any")
    big = _resized_header(progressive, b"\xff\xc2", 5, ">HH", 12_000, 12_000)
    yield Hostile("bomb_jpeg_many_large_scans.jpg", big[:-2] + scan * 500 + b"\xff\xd9", "error")
    frames = [Image.fromarray(np.full((40, 40), i % 251, np.uint8)) for i in range(600)]
    yield Hostile("bomb_gif_600_frames.gif", _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "any")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\x00"
    gif = clean("gif")
    yield Hostile("bomb_gif_300000_frames.gif", gif[:-1] + frame * 300_000 + b"\x3b", "any")
    yield Hostile("bomb_apng_lies_about_frames.png", _png_plus(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))), "any")
    yield Hostile("bomb_png_text.png", _png_plus(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))), "any")
    yield Hostile("bomb_png_itxt.png", _png_plus(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(100 << 20)))), "any")
    yield Hostile("bomb_png_icc.png", _png_plus(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20)))), "any")
    yield Hostile("bomb_png_100000_chunks.png", _png_plus(chunk(b"tEXt", b"a\0b") * 100_000), "any")
    yield Hostile("bomb_jpeg_5000_segments.jpg", jpeg[:2] + (b"\xff\xfe\x10\x00" + bytes(4094)) * 2_000 + jpeg[2:], "any")
    for container in ("webp", "lossless_webp"):
        whole = clean(container)
        at = 26 if container == "webp" else 21
        yield Hostile(f"bomb_{container}_16383.webp", whole[:at] + b"\xff\x3f\xff\x3f" + whole[at + 4 :], "error")
    for container in ("avif", "heic"):
        yield Hostile(f"bomb_{container}_ispe.{container}", _resized_header(clean(container), b"ispe", 8, ">II", 60_000, 60_000), "error")


def _tiff_with(content: bytes, tags: dict[int, int]) -> bytes:
    """A little-endian TIFF with other values for some tags of its first directory."""
    content = bytearray(content)
    (place,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, place)
    for i in range(count):
        entry = place + 2 + 12 * i
        tag, kind = struct.unpack_from("<HH", content, entry)
        if tag in tags:
            struct.pack_into("<HHII", content, entry, tag, 4 if kind in (3, 4) else kind, 1, tags[tag])
    return bytes(content)


def _png_plus(extra: bytes) -> bytes:
    """The clean PNG with chunks behind its header."""
    whole = clean("png")
    return whole[:33] + extra + whole[33:]


def _lies() -> Iterator[Hostile]:
    """Headers that say something else than the pixels."""
    rows = bytes(80 * (1 + 3 * 96))
    for name, width, height in (
        ("wider", 500, 80),
        ("higher", 96, 5_000),
        ("zero_width", 0, 80),
        ("zero_height", 96, 0),
        ("negative", -1, -1),
    ):
        yield Hostile(f"lie_png_{name}.png", png(width, height, 8, 2, rows), "error")
    yield Hostile("lie_png_narrower.png", png(9, 9, 8, 2, rows), "any")
    yield Hostile("lie_png_bad_crc.png", png(96, 80, 8, 2, rows, crc=False), "any")
    for bits, color in ((3, 2), (8, 1), (8, 5), (0, 0), (255, 255), (16, 3)):
        yield Hostile(f"lie_png_bits_{bits}_color_{color}.png", png(96, 80, bits, color, rows), "error")
    yield Hostile("lie_png_palette_missing.png", png(96, 80, 8, 3, bytes(80 * 97)), "any")
    yield Hostile("lie_png_no_pixels.png", clean("png")[:33] + chunk(b"IEND", b""), "error")
    yield Hostile("lie_png_bad_filter.png", png(9, 9, 8, 2, b"\xee" * 9 * 28), "any")
    jpeg = clean("jpeg")
    for name, height, width in (("wider", 80, 2_000), ("higher", 2_000, 96), ("zero_width", 80, 0), ("zero_height", 0, 96)):
        becomes = "any" if name == "zero_height" else "error"  # a height of 0 may be legal: it can follow in a DNL marker
        yield Hostile(f"lie_jpeg_{name}.jpg", _resized_header(jpeg, b"\xff\xc0", 5, ">HH", height, width), becomes)
    yield Hostile("lie_jpeg_12_bits.jpg", _resized_header(jpeg, b"\xff\xc0", 4, ">B", 12), "error")
    yield Hostile("lie_jpeg_9_components.jpg", _resized_header(jpeg, b"\xff\xc0", 9, ">B", 9), "error")
    yield Hostile("lie_jpeg_sampling_0.jpg", _resized_header(jpeg, b"\xff\xc0", 11, ">B", 0), "error")
    yield Hostile("lie_jpeg_no_huffman_table.jpg", jpeg.replace(b"\xff\xc4", b"\xff\xfe"), "any")
    yield Hostile("lie_jpeg_no_quantisation_table.jpg", jpeg.replace(b"\xff\xdb", b"\xff\xfe"), "error")
    yield Hostile("lie_jpeg_segment_length_0.jpg", jpeg[:2] + b"\xff\xe1\x00\x00" + jpeg[2:], "any")
    yield Hostile("lie_jpeg_segment_past_the_end.jpg", jpeg[:2] + b"\xff\xe1\xff\xff" + jpeg[2:], "any")
    yield Hostile("lie_jpeg_only_end.jpg", b"\xff\xd8\xff\xd9", "error")
    yield Hostile("lie_jpeg_thumbnail_only.jpg", jpeg[: jpeg.index(b"\xff\xda")], "error")
    yield Hostile("lie_two_jpegs_in_one.jpg", jpeg + clean("grey_jpeg"), "same")
    yield Hostile("lie_jpeg_with_a_zip_behind.jpg", jpeg + b"PK\x03\x04" + bytes(500), "same")
    gif = clean("gif")
    yield Hostile("lie_gif_frame_outside.gif", _resized_header(gif, b"\x2c\0\0\0\0", 5, "<HH", 3_000, 3_000), "any")
    yield Hostile("lie_gif_code_size.gif", gif[: gif.index(b"\x2c\0\0\0\0") + 10] + b"\xff" + gif[gif.index(b"\x2c\0\0\0\0") + 11 :], "any")
    bmp = clean("bmp")
    for name, offset, form, value in (
        ("pixels_past_the_end", 10, "<I", 2**31 - 1),
        ("header_size_0", 14, "<I", 0),
        ("header_size_huge", 14, "<I", 2**31 - 1),
        ("bits_7", 28, "<H", 7),
        ("compression_99", 30, "<I", 99),
        ("palette_huge", 46, "<I", 2**31 - 1),
        ("width_negative", 18, "<i", -96),
    ):
        yield Hostile(f"lie_bmp_{name}.bmp", _resized_header(bmp, b"BM", offset, form, value), "any" if name == "palette_huge" else "error")
    tiff = clean("tiff")
    (directory,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, directory)
    loop = directory + 2 + 12 * count
    yield Hostile("lie_tiff_directory_loop.tif", tiff[:loop] + struct.pack("<I", directory) + tiff[loop + 4 :], "same")
    yield Hostile("lie_tiff_directory_past_the_end.tif", tiff[:4] + struct.pack("<I", 2**31) + tiff[8:], "error")
    for name, tags in {
        "strips_past_the_end": {273: 2**31},
        "strip_bytes_huge": {279: 2**31 - 1},
        "rows_per_strip_0": {278: 0},
        "bits_77": {258: 77},
        "compression_unknown": {259: 4711},
        "photometric_unknown": {262: 99},
        "samples_99": {277: 99},
        "width_0": {256: 0},
    }.items():
        yield Hostile(f"lie_tiff_{name}.tif", _tiff_with(tiff, tags), "any")
    webp = clean("webp")
    yield Hostile("lie_webp_riff_size_0.webp", webp[:4] + bytes(4) + webp[8:], "any")
    yield Hostile("lie_webp_riff_size_huge.webp", webp[:4] + b"\xff" * 4 + webp[8:], "any")
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16_000_000).to_bytes(3, "little") * 2
    yield Hostile("lie_webp_canvas.webp", webp[:12] + canvas + webp[12:], "any")
    for container in ("avif", "heic"):
        whole = clean(container)
        yield Hostile(f"lie_{container}_no_item.{container}", whole.replace(b"iloc", b"free"), "error")
        yield Hostile(f"lie_{container}_brand.{container}", whole.replace(b"ftyp", b"free", 1), "error")
        yield Hostile(f"lie_{container}_box_size_0.{container}", whole.replace(b"meta", b"mdat", 1), "error")
    yield Hostile("lie_jxl_size.jxl", clean("jxl")[:2] + b"\xff\xff\xff\xff" + clean("jxl")[6:], "any")


def _metadata() -> Iterator[Hostile]:
    """Sound pixels behind odd metadata: the picture is what counts."""
    photo = Image.fromarray(photographs(1, 96)[0][:80])
    for orientation in (0, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Hostile(f"meta_orientation_{orientation}.jpg", _saved(photo, "JPEG", quality=90, exif=exif), "same")
    jpeg = clean("jpeg")

    def with_segment(marker: int, data: bytes) -> bytes:
        return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]

    head = b"Exif\0\0II*\0" + struct.pack("<I", 8)
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    yield Hostile("meta_exif_loop.jpg", with_segment(0xE1, head + struct.pack("<H", 1) + entry + struct.pack("<I", 8)), "same")
    yield Hostile("meta_exif_count_huge.jpg", with_segment(0xE1, head + b"\xff\xff" + bytes(40)), "same")
    huge = struct.pack("<HHII", 0x010F, 2, 2**32 - 1, 8)
    yield Hostile("meta_exif_string_huge.jpg", with_segment(0xE1, head + struct.pack("<H", 1) + huge + bytes(4)), "same")
    yield Hostile("meta_exif_garbage.jpg", with_segment(0xE1, b"Exif\0\0" + random.Random(1).randbytes(500)), "same")
    yield Hostile("meta_exif_empty.jpg", with_segment(0xE1, b"Exif\0\0"), "same")
    script = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><script>alert('\"; DROP TABLE basics; --')</script></x:xmpmeta>"
    yield Hostile("meta_xmp_script.jpg", with_segment(0xE1, script), "same")
    laughs = b'http://ns.adobe.com/xap/1.0/\0<!DOCTYPE x [<!ENTITY a "aaaaaaaaaaaaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><x>&b;</x>'
    yield Hostile("meta_xmp_entities.jpg", with_segment(0xE1, laughs), "same")
    external = b'http://ns.adobe.com/xap/1.0/\0<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>'
    yield Hostile("meta_xmp_external.jpg", with_segment(0xE1, external), "same")
    yield Hostile("meta_icc_garbage.jpg", with_segment(0xE2, b"ICC_PROFILE\0\1\1" + random.Random(2).randbytes(3_000)), "same")
    yield Hostile("meta_icc_part_9_of_1.jpg", with_segment(0xE2, b"ICC_PROFILE\0\x09\x01" + bytes(128)), "same")
    yield Hostile("meta_icc_empty.jpg", with_segment(0xE2, b"ICC_PROFILE\0\1\1"), "same")
    yield Hostile("meta_adobe_short.jpg", with_segment(0xEE, b"Adobe"), "any")
    yield Hostile("meta_adobe_transform_9.jpg", with_segment(0xEE, b"Adobe\0d\0\0\0\0\x09"), "any")
    yield Hostile("meta_c2pa_garbage.jpg", with_segment(0xEB, b"JP\0\1\0\0\0\1" + struct.pack(">I", 2**31) + b"jumb" + bytes(60)), "same")
    yield Hostile("meta_iptc_garbage.jpg", with_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\xff\xff\xff\xff" + bytes(30)), "same")
    yield Hostile("meta_comment_script.jpg", with_segment(0xFE, b"<script>alert(1)</script>"), "same")
    yield Hostile("meta_mpf_past_the_end.jpg", with_segment(0xE2, b"MPF\0II*\0" + struct.pack("<I", 2**31)), "same")
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "cat\nSteps: 20, Sampler: Euler, \x00\x1b[2J" + "x" * 60_000)
    yield Hostile("meta_png_text.png", _saved(photo, "PNG", pnginfo=text), "any")
    for name, data in {
        "gAMA_0": chunk(b"gAMA", bytes(4)),
        "pHYs_0": chunk(b"pHYs", bytes(9)),
        "tRNS_long": chunk(b"tRNS", bytes(600)),
        "eXIf_garbage": chunk(b"eXIf", random.Random(3).randbytes(200)),
        "unknown_critical": chunk(b"ABCD", b"x"),
        "two_headers": clean("png")[8:33],
        "tEXt_no_key": chunk(b"tEXt", b"\0" * 9),
        "zTXt_bad": chunk(b"zTXt", b"a\0\0not zlib"),
        "iTXt_bad": chunk(b"iTXt", b"a\0\1\0"),
        "iCCP_bad": chunk(b"iCCP", b"a\0\0not zlib"),
        "cHRM_short": chunk(b"cHRM", b"x"),
        "sRGB_long": chunk(b"sRGB", bytes(99)),
    }.items():
        yield Hostile(f"meta_png_{name}.png", _png_plus(data), "any")


def _wrong_suffix() -> Iterator[Hostile]:
    """Sound images under another name."""
    for container in CONTAINERS:
        kind = SUFFIX.get(container.rpartition("_")[2], "jpg")
        yield Hostile(f"named_otherwise_{container}.{'png' if kind == 'jpg' else 'jpg'}", clean(container), "same")
