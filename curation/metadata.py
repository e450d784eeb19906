"""Encoded bytes -> the metadata blocks inside, untouched and bounded. No pixel is decoded, and nothing here raises.

    JPEG segments, PNG chunks, WebP and JPEG XL boxes, TIFF tags, HEIC and AVIF items -> Blocks

Own walks, because Pillow reads PNG text only up to the pixels, refuses a file that is broken elsewhere, and reads every TIFF
entry in full (a hostile file may point 65,535 entries at the same megabytes). Provenance has to be read from the original
bytes: re-encoding destroys it.
"""

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK_BYTES = 4 << 20  # what is kept of an EXIF block, and of all texts of a PNG; workflows of 1 MB are real
PACKET_BYTES = 1 << 20  # what is kept of one XMP packet; expat takes 0.3 s for 1 MB of nothing but tags
PACKETS = 4  # XMP packets of one file
PIECES = 65_536  # chunks, boxes or segments that are looked at

_EXIF = re.compile(rb"^(Exif\0[\0\xff])?(?=II\*\0|MM\0\*)")
_XMP, _MORE_XMP = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"


@dataclass
class Blocks:
    """The metadata of one file."""

    exif: bytes = b""  # a TIFF structure: "II*\\0" or "MM\\0*" first
    xmp: list[bytes] = field(default_factory=list)  # XML packets
    iptc: bytes = b""  # IIM datasets
    text: list[tuple[str, str]] = field(default_factory=list)  # (keyword, text) of a PNG, in file order
    c2pa: bool = False  # a JUMBF box lies where C2PA puts its manifest store

    def add_xmp(self, packet: bytes) -> None:
        """Keep the first PACKETS packets of a file."""
        if len(self.xmp) < PACKETS:
            self.xmp.append(packet[:PACKET_BYTES])

    def add_exif(self, block: bytes) -> None:
        """Keep the first EXIF block of a file, with or without the header that JPEG gives it."""
        found = _EXIF.match(block)
        if found and not self.exif:
            self.exif = block[found.end() : found.end() + BLOCK_BYTES]


def read(encoded: bytes) -> Blocks:
    """The metadata of an image file of any kind; empty blocks where there is none, and what could be read of a broken file."""
    blocks = Blocks()
    if encoded[:3] == b"\xff\xd8\xff":
        whole = _jpeg(encoded, blocks)
    elif encoded[:8] == b"\x89PNG\r\n\x1a\n":
        whole = _png(encoded, blocks)
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        whole = _webp(encoded, blocks)
    elif encoded[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        whole = _jxl(encoded, blocks)
    elif encoded[:4] in (b"II*\0", b"MM\0*"):
        blocks.exif, whole = encoded, False  # tags lie anywhere in the file
    else:
        whole = encoded[4:8] == b"ftyp" and _heif(encoded, blocks)
        blocks.c2pa = whole and b"jumb" in encoded
    if not whole:
        blocks.c2pa = blocks.c2pa or b"jumb" in encoded
        if not blocks.xmp:
            _scan(encoded, blocks)
    return blocks


def _scan(encoded: bytes, blocks: Blocks) -> None:
    """Packets wherever they lie: XMP is made to be found so (XMP specification, part 3, "packet scanning")."""
    end = 0
    for _ in range(PACKETS):
        start = encoded.find(b"<x:xmpmeta", end)
        end = encoded.find(b"</x:xmpmeta>", start, start + PACKET_BYTES) + 12
        if start < 0 or end < 12:
            return
        blocks.add_xmp(encoded[start:end])


def _jpeg(encoded: bytes, blocks: Blocks) -> bool:
    """Segments up to the first scan; False when the file ends or breaks before it."""
    position, photoshop, extended, left = 2, b"", {}, BLOCK_BYTES
    for _ in range(PIECES):
        if position + 4 > len(encoded) or encoded[position] != 0xFF:
            return False
        marker = encoded[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # filling, or a marker without a length
            position += 1 if marker == 0xFF else 2
            continue
        if marker in (0xDA, 0xD9):
            break
        size = int.from_bytes(encoded[position + 2 : position + 4], "big")
        content = encoded[position + 4 : position + 2 + size]
        if marker == 0xE1 and content[:5] == b"Exif\0":
            if blocks.exif and not _EXIF.match(content):  # EXIF over 64 kB goes on in the next segment
                blocks.exif = (blocks.exif + content[6:])[:BLOCK_BYTES]
            blocks.add_exif(content)
        elif marker == 0xE1 and content.startswith(_XMP):
            blocks.add_xmp(content[len(_XMP) :])
        elif marker == 0xE1 and content.startswith(_MORE_XMP):
            name = content[35:67]  # 32 hexadecimal digits; then the length of the whole and this part's offset, 4 bytes each
            if left > 0 and (name in extended or len(extended) < PACKETS):
                extended.setdefault(name, bytearray()).extend(content[75:])
                left -= len(content)
        elif marker == 0xED and content.startswith(b"Photoshop 3.0\0") and len(photoshop) < BLOCK_BYTES:
            photoshop += content[14:]
        elif marker == 0xEB and content[:2] == b"JP":
            blocks.c2pa = True
        position += 2 + max(size, 2)
    for packet in extended.values():
        blocks.add_xmp(bytes(packet))
    blocks.iptc = _photoshop(photoshop)
    return True


def _photoshop(resources: bytes) -> bytes:
    """The IPTC block (resource 0x0404) among Photoshop's image resources."""
    position = 0
    while resources[position : position + 4] == b"8BIM" and position + 12 <= len(resources):
        kind = resources[position + 4 : position + 6]
        name = resources[position + 6] // 2 * 2 + 2  # Pascal string, padded to even
        start = position + 6 + name + 4
        size = int.from_bytes(resources[start - 4 : start], "big")
        if kind == b"\x04\x04":
            return resources[start : start + size]
        position = start + size + size % 2
    return b""


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk's content; the end may lie behind the end of the file."""
    position = 8
    for _ in range(PIECES):
        if position + 8 > len(encoded):
            return
        size, kind = struct.unpack_from(">I4s", encoded, position)
        yield kind, position + 8, position + 8 + size
        position += size + 12  # length, type and checksum


def _png(encoded: bytes, blocks: Blocks) -> bool:
    """Chunks, those after the pixels too."""
    left = BLOCK_BYTES
    for kind, start, end in _png_chunks(encoded):
        if kind == b"IEND":
            return True
        if kind == b"caBX":
            blocks.c2pa = True
        elif kind == b"eXIf":
            blocks.add_exif(encoded[start : min(end, start + BLOCK_BYTES)])
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and left > 0:
            keyword, text = _text(kind, encoded[start : min(end, start + BLOCK_BYTES)], left)
            left -= len(text) + len(keyword)
            if keyword == "XML:com.adobe.xmp":
                blocks.add_xmp(text)
            elif keyword.startswith("Raw profile type "):
                _raw_profile(keyword[17:].lower(), text, blocks)
            else:
                blocks.text.append((keyword, text.decode("utf-8" if kind == b"iTXt" else "latin-1", "replace")))
    return False


def _text(kind: bytes, content: bytes, limit: int) -> tuple[str, bytes]:
    """(keyword, text) of a text chunk; compressed text is inflated up to `limit` bytes, whatever it would become."""
    keyword, _, text = content.partition(b"\0")
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        compressed = text[:1] == b"\1"
        _, _, text = text[2:].partition(b"\0")  # after flag and method: language, then translated keyword
        _, _, text = text.partition(b"\0")
    elif compressed:
        text = text[1:]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, limit)
        except zlib.error:
            text = b""
    return keyword[:79].decode("latin-1"), text[:limit]


def _raw_profile(kind: str, text: bytes, blocks: Blocks) -> None:
    """ImageMagick's profiles: a name, a length, and hexadecimal digits."""
    with contextlib.suppress(ValueError):
        content = bytes.fromhex(b"".join(text.split()[2:]).decode("latin-1"))
        if kind in ("exif", "app1"):
            blocks.add_exif(content)
        elif kind == "xmp":
            blocks.add_xmp(content)
        elif kind == "iptc":
            blocks.iptc = _photoshop(content) or content


def _webp(encoded: bytes, blocks: Blocks) -> bool:
    """RIFF chunks; False when the file ends before they do."""
    position = 12
    for _ in range(PIECES):
        if position + 8 > len(encoded):
            break
        kind, size = struct.unpack_from("<4sI", encoded, position)
        content = slice(position + 8, position + 8 + min(size, BLOCK_BYTES))
        if kind == b"EXIF":
            blocks.add_exif(encoded[content])
        elif kind == b"XMP ":
            blocks.add_xmp(encoded[content])
        elif kind == b"C2PA":
            blocks.c2pa = True
        position += 8 + size + size % 2
    return position >= len(encoded) > 12 and position <= len(encoded) + 1


def _jxl(encoded: bytes, blocks: Blocks) -> bool:
    """Boxes of a JPEG XL container; Brotli-compressed ones (brob) are left alone."""
    position = 0
    for _ in range(PIECES):
        if position + 8 > len(encoded):
            return position == len(encoded)
        size, kind = struct.unpack_from(">I4s", encoded, position)
        end = position + size if size else len(encoded)
        if kind == b"Exif":
            for skip in (12, 8):  # 4 bytes of offset come first, which some writers leave out
                blocks.add_exif(encoded[position + skip : min(end, position + BLOCK_BYTES)])
        elif kind == b"xml ":
            blocks.add_xmp(encoded[position + 8 : min(end, position + BLOCK_BYTES)])
        elif kind == b"jumb":
            blocks.c2pa = True
        position = max(end, position + 8)
    return False


def _heif(encoded: bytes, blocks: Blocks) -> bool:
    """Items of HEIC and AVIF, by libheif: they may lie in pieces anywhere in the file."""
    import pillow_heif  # takes 20 ms; few sources have such files

    try:
        info = pillow_heif.open_heif(io.BytesIO(encoded)).info
    except Exception:  # the library raises many kinds; the decoder tells the user, here the scan goes on
        return False
    blocks.add_exif((info.get("exif") or b"")[: BLOCK_BYTES + 6])
    if info.get("xmp"):
        blocks.add_xmp(info["xmp"])
    return True
