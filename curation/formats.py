"""What an image file is, and what it would cost, read from its bytes before any decoder runs.

Every function here looks at bytes only, allocates nothing of the image's size, and does work bounded by the file's length.
"""

import re
import struct
import zlib

# What is decoded, as Pillow names it. Nothing else is tried: Pillow's other plugins are never reached, some of which start programs
# (EPS calls Ghostscript) or are seldom tested on hostile bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "JXL", "GIF", "TIFF", "BMP")
MAX_FRAMES = 1000  # frames are counted up to here
MAX_TAG_VALUES = 1_000_000  # values in the tags of one TIFF page: Pillow makes a Python object of each strip
TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # classic and big, by byte order
_GIF_BYTES = 16 << 20  # a GIF's frames are counted in its first 16 MiB

_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    *((start, "TIFF") for start in TIFF_STARTS),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"7z\xbc\xaf", "7z archive"),
    (b"Rar!", "RAR archive"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"PAR1", "Parquet"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)


def looks_like(encoded: bytes) -> str:
    """What bytes that are no image seem to be, for an error's text: "HTML", "SVG", "PDF", "text", or their first bytes."""
    for start, name in _STARTS:
        if encoded.startswith(start):
            return name
    if encoded[4:8] == b"ftyp":
        return f"an ISO media file of brand {encoded[8:12]!r}"
    if encoded.startswith(b"RIFF"):
        return f"a RIFF file of kind {encoded[8:12]!r}"
    head = bytes(encoded[:1024]).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, name in ((b"<svg", "SVG"), (b"<!doctype html", "HTML"), (b"<html", "HTML"), (b"<?xml", "XML")):
        if mark in head and head.startswith(b"<"):
            return name
    if head[:1] in (b"{", b"["):
        return "JSON"
    if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "text"
    if not encoded.strip(b"\x00"):
        return "nothing but zero bytes"
    return f"unknown, first bytes {bytes(encoded[:8])!r}"


# A marker is 0xFF and a code; stuffed bytes (0xFF00), fill bytes (0xFFFF) and restart markers (0xFFD0-D7) are part of a scan.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def jpeg_scans(encoded: bytes, most: int) -> tuple[int, int, bool]:
    """(scans, bytes before the first scan, is there an end-of-image marker) of a JPEG, from its markers (ITU-T T.81, annex B).

    Stops counting beyond `most` scans. What follows the end of the image (further images of an MPO, junk) is not looked at.
    """
    place, scans, first = 2, 0, len(encoded)
    while found := _MARKER.search(encoded, place):
        code, place = encoded[found.start() + 1], found.end()
        if code == 0xD9:
            return scans, first, True
        if code in (0x01, 0xD8):  # markers without a length
            continue
        if code == 0xDA:
            scans, first = scans + 1, min(first, place)
            if scans > most:
                break
        if place + 2 > len(encoded):
            break
        place += max(2, int.from_bytes(encoded[place : place + 2], "big"))
    return scans, first, False


def png_is_short(encoded: bytes) -> bool:
    """Does a PNG hold fewer bytes of pixels than its header promises? Pillow leaves the rest black without a word.

    The stream is unpacked a mebibyte at a time, no further than the promise.
    """
    if encoded[12:16] != b"IHDR" or len(encoded) < 33:
        return False
    width, height, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", encoded, 16)
    pixel = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
    # Adam7 (W3C PNG, 8.1): first column and row, step of columns and rows, of each pass.
    steps = (
        [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)] if interlaced else [(0, 0, 1, 1)]
    )
    sizes = [(max(0, -(-(width - x) // dx)), max(0, -(-(height - y) // dy))) for x, y, dx, dy in steps]
    missing = sum(rows * (1 + (columns * pixel + 7) // 8) for columns, rows in sizes if columns and rows)
    stream, place = zlib.decompressobj(), 8
    try:
        while missing > 0 and place + 8 <= len(encoded):
            size, kind = int.from_bytes(encoded[place : place + 4], "big"), encoded[place + 4 : place + 8]
            if kind == b"IDAT":
                data = encoded[place + 8 : place + 8 + size]
                while missing > 0 and (piece := stream.decompress(data, 1 << 20)):
                    missing -= len(piece)
                    data = stream.unconsumed_tail
            elif kind == b"IEND":
                break
            place += 12 + size
    except zlib.error:
        return True
    return missing > 0


def gif_frames(encoded: bytes) -> int:
    """Frames of a GIF, counted from its blocks up to MAX_FRAMES; at least 1."""
    end, frames = min(len(encoded), _GIF_BYTES), 0
    place = 13 + _colour_table(encoded[10]) if end > 13 else end
    while place + 10 < end and frames < MAX_FRAMES:
        if encoded[place] == 0x2C:  # image descriptor, colour table, code size, data
            frames += 1
            place += 11 + _colour_table(encoded[place + 9])
        elif encoded[place] == 0x21:  # extension
            place += 2
        else:
            break
        while place < end and encoded[place]:
            place += encoded[place] + 1
        place += 1
    return max(frames, 1)


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def tiff_pages(encoded: bytes) -> tuple[int, int]:
    """(pages up to MAX_FRAMES, values in all tags of the first page) of a classic or big TIFF; (1, 0) where it is torn."""
    order = "<" if encoded[:2] == b"II" else ">"
    big = encoded[2:4] in (b"+\x00", b"\x00+")
    where, count, entry, offset = (order + "Q", order + "Q", 20, 8) if big else (order + "I", order + "H", 12, 4)
    pages, values, seen = 0, 0, set()
    try:
        (place,) = struct.unpack_from(where, encoded, offset)
        while place and place not in seen and pages < MAX_FRAMES:
            seen.add(place)
            (tags,) = struct.unpack_from(count, encoded, place)
            first = place + struct.calcsize(count)
            if pages == 0:
                # Bytes (ASCII, UNDEFINED and the like: ICC, XMP, Photoshop) are read in one piece, so they are not counted.
                for i in range(min(tags, 4096)):
                    kind, number = struct.unpack_from(order + ("HQ" if big else "HI"), encoded, first + i * entry + 2)
                    values += number if kind not in (1, 2, 6, 7) else 0
            pages += 1
            (place,) = struct.unpack_from(where, encoded, first + tags * entry)
    except (struct.error, OverflowError):
        pass
    return max(pages, 1), values


def early_size(encoded: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP or JPEG XL, whose decoders take memory for the canvas as soon as they are opened; else None."""
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP" and len(encoded) >= 30:
        kind = encoded[12:16]
        if kind == b"VP8X":  # RFC 9649, section 2.7
            return 1 + int.from_bytes(encoded[24:27], "little"), 1 + int.from_bytes(encoded[27:30], "little")
        if kind == b"VP8L":
            bits = int.from_bytes(encoded[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", encoded, 26)
            return width & 0x3FFF, height & 0x3FFF
    if encoded.startswith(b"\xff\x0a"):
        return _jxl_size(encoded[2:32])
    if encoded.startswith(b"\x00\x00\x00\x0cJXL \r\n\x87\n"):
        place = 12
        while place + 8 <= len(encoded):
            size, kind, header = int.from_bytes(encoded[place : place + 4], "big"), encoded[place + 4 : place + 8], 8
            if size == 1:
                size, header = int.from_bytes(encoded[place + 8 : place + 16], "big"), 16
            if kind in (b"jxlc", b"jxlp"):
                start = place + header + (4 if kind == b"jxlp" else 0)
                return _jxl_size(encoded[start + 2 : start + 32])
            if size < header:
                break
            place += size
    return None


def _jxl_size(codestream: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG XL SizeHeader (ISO/IEC 18181-1), bits from the least significant one."""
    bits = int.from_bytes(codestream, "little")

    def take(number: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << number) - 1), bits >> number
        return value

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    ratio = take(3)
    up, down = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return (height * up // down if ratio else side()), height
