"""Metadata blocks -> named fields: EXIF tags, XMP properties, IPTC datasets, each bounded plain text or a number. Nothing raises."""

import re
import struct
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

TEXT = 200  # characters kept of a field
LONG = 1 << 20  # characters looked at where a generator hides its parameters
_CONTROL = re.compile(
    r"[\x00-\x20\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+"
)  # spaces, controls, bidi overrides, halves

# (name, IFD, tag): Exif 3.0, tables 3 to 9
_IFD0 = {"description": 0x010E, "make": 0x010F, "model": 0x0110, "software": 0x0131, "artist": 0x013B}
_PHOTO = {"exposure": 0x829A, "f_number": 0x829D, "iso": 0x8827, "taken": 0x9003, "focal": 0x920A, "maker_note": 0x927C}
_PHOTO |= {"comment": 0x9286, "lens": 0xA434}
_XMP_TAG, _IPTC_TAG, _EXIF_IFD = 0x02BC, 0x83BB, 0x8769
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 13: 4, 129: 1}
_FORMS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii"}

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_IPTC_EXT = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
_XMP_FIELDS = {
    _IPTC_EXT + "DigitalSourceType": "source_type",
    _IPTC_EXT + "AISystemUsed": "ai_system",  # IPTC Photo Metadata Standard 2025.1
    "{http://ns.adobe.com/xap/1.0/}CreatorTool": "creator_tool",
    "{http://ns.adobe.com/photoshop/1.0/}Credit": "credit",
    "{http://purl.org/dc/terms/}provenance": "remote",  # C2PA 2.2, 11.4: URL of a manifest that is not in the file
    "{http://purl.org/dc/elements/1.1/}description": "description",
    "{http://ns.adobe.com/exif/1.0/}UserComment": "comment",
    "{http://www.tc260.org.cn/ns/AIGC/1.0/}AIGC": "aigc",  # TC260-PG-20258A, China's label of generated content
}
_IPTC_FIELDS = {(2, 65): "program", (2, 110): "credit"}  # IPTC-IIM 4.2
_SOURCE_TYPE = re.compile(rb"DigitalSourceType[^<]{0,40}?[/:]digitalsourcetype/(\w{1,60})", re.IGNORECASE)


def plain(text: str | None, limit: int = TEXT) -> str | None:
    """One line of printable text of at most `limit` characters; None when nothing is left."""
    return (_CONTROL.sub(" ", text[: 4 * limit]).strip()[:limit].strip() or None) if text else None


def exif_fields(tiff: bytes) -> dict[str, Any]:
    """The fields that provenance needs of a TIFF structure. Two directories are read, so that links in circles do no harm.

    Text is as found (up to LONG characters); exposure in seconds, focal length in millimetres; maker_note is True where one is.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return {}
    first = _directory(tiff, int.from_bytes(tiff[4:8], "little" if order == "<" else "big"), order)
    link = _numbers(first.get(_EXIF_IFD), order)
    photo = _directory(tiff, int(link[0]), order) if link else {}
    fields: dict[str, Any] = {name: _string(first.get(tag)) for name, tag in _IFD0.items()}
    fields |= {name: _string(photo.get(tag)) for name, tag in _PHOTO.items() if name in ("taken", "lens")}
    fields |= {name: _number(photo.get(_PHOTO[name]), order) for name in ("exposure", "f_number", "iso", "focal")}
    fields["maker_note"] = True if _PHOTO["maker_note"] in photo else None
    fields["comment"] = _comment(photo.get(_PHOTO["comment"]) or first.get(_PHOTO["comment"]), order)
    fields["xmp"] = first[_XMP_TAG][1] if _XMP_TAG in first else None
    fields["iptc"] = first[_IPTC_TAG][1] if _IPTC_TAG in first else None
    return {name: value for name, value in fields.items() if value not in (None, "", b"")}


def _directory(tiff: bytes, start: int, order: str) -> dict[int, tuple[int, bytes]]:
    """{tag: (type, value bytes)} of one directory: the wanted tags only, each at most LONG bytes."""
    wanted = {*_IFD0.values(), *_PHOTO.values(), _XMP_TAG, _IPTC_TAG, _EXIF_IFD}
    found = {}
    count = struct.unpack_from(order + "H", tiff, start)[0] if start + 2 <= len(tiff) else 0
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", tiff, entry)
        if tag in wanted and kind in _SIZES and tag not in found:
            size = min(number * _SIZES[kind], LONG)
            place = entry + 8 if number * _SIZES[kind] <= 4 else struct.unpack_from(order + "I", tiff, entry + 8)[0]
            found[tag] = (kind, tiff[place : place + size])
    return found


def _string(entry: tuple[int, bytes] | None) -> str | None:
    if entry is None or entry[0] not in (1, 2, 7, 129):
        return None
    raw = entry[1].partition(b"\0")[0].strip()
    try:
        return raw.decode() or None
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _numbers(entry: tuple[int, bytes] | None, order: str) -> tuple[int, ...]:
    form = _FORMS.get(entry[0]) if entry else None
    return struct.unpack_from(order + form, entry[1]) if form and len(entry[1]) >= struct.calcsize(order + form) else ()


def _number(entry: tuple[int, bytes] | None, order: str) -> float | None:
    """The first number of an entry; None for 0/0 and other nonsense."""
    found = _numbers(entry, order)
    if len(found) == 2:
        return found[0] / found[1] if found[1] else None
    return float(found[0]) if found else None


def _comment(entry: tuple[int, bytes] | None, order: str) -> str | None:
    """UserComment: eight bytes name the encoding. UNICODE is UTF-16 in either byte order: writers do not agree on which."""
    if entry is None:
        return None
    code, raw = entry[1][:8], entry[1][8:]
    if code.rstrip(b"\0") == b"UNICODE":
        zeros = raw[0:400:2].count(0), raw[1:400:2].count(0)  # most text is Latin: its high bytes are zero
        return raw.decode("utf-16-be" if zeros[0] > zeros[1] or (zeros[0] == zeros[1] and order == ">") else "utf-16-le", "replace")
    known = code.rstrip(b"\0 ") in (b"ASCII", b"JIS", b"")
    return (raw if known else entry[1]).strip(b"\0 ").decode("utf-8", "replace")


def xmp_fields(packet: bytes) -> dict[str, str]:
    """The properties that provenance needs of one XMP packet. Entities and document types are refused, not expanded.

    Only the picture's own properties are read, not those that an editor kept of its ingredients (xmpMM:Pantry).
    """
    fields: dict[str, str] = {}
    try:
        tree = fromstring(packet.strip(b"\0 \r\n\t"), forbid_dtd=True)
        own = [node for rdf in ([tree] if tree.tag == _RDF + "RDF" else tree.findall(_RDF + "RDF")) for node in rdf]
    except (ParseError, DefusedXmlException, ValueError, LookupError, RecursionError):
        own = []
        if found := _SOURCE_TYPE.search(packet):  # a packet that is not XML can still say it
            fields["source_type"] = found.group(1).decode("latin-1")
    for node in own:
        for name, value in node.attrib.items():
            if name in _XMP_FIELDS:
                fields.setdefault(_XMP_FIELDS[name], value[:LONG])
        for child in node:
            if child.tag in _XMP_FIELDS:
                item = child.find(f"*/{_RDF}li")  # a list, or a text in several languages: the first counts
                value = child.get(_RDF + "resource") or (child.text or "").strip() or (item.text if item is not None else None)
                if value:
                    fields.setdefault(_XMP_FIELDS[child.tag], value[:LONG])
    if "source_type" in fields:
        fields["source_type"] = fields["source_type"].strip().rstrip("/").rpartition("/")[2]
    return fields


def iptc_fields(iim: bytes) -> dict[str, str]:
    """Credit and originating program of IIM datasets: 0x1C, record, dataset, length (2 bytes), value."""
    fields, position = {}, 0
    while iim[position : position + 1] == b"\x1c" and position + 5 <= len(iim):
        record, dataset, size = struct.unpack_from(">BBH", iim, position + 1)
        if size & 0x8000:  # extended length: no text that we want is that long
            break
        if (name := _IPTC_FIELDS.get((record, dataset))) and size:
            fields[name] = iim[position + 5 : position + 5 + size].decode("utf-8", "replace")
        position += 5 + size
    return fields
