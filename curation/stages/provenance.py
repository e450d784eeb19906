"""The stage `provenance`: what a file says about where its picture comes from, read from the original bytes.

    bytes -> blocks (metadata) -> fields -> marks of generators (generators) -+
         \\-> C2PA manifest (manifest) ---------------------------------------+-> declared_ai, declared_by, and the fields as columns

`declared_ai` serves reason 5 of K2 (no AI-generated images). It is true for pictures that a model made, and for those that a model
edited or that hold a part of one (compositeWithTrainedAlgorithmicMedia, compositeSynthetic): what the label leaves open, from a
removed cable to a new background, costs more in the mix than the few photographs that go with it. A policy that thinks otherwise
reads `declared_source_type`. A manifest whose check fails counts too: an AI picture that was edited afterwards is still one.

False means that nothing is declared, which says nothing: most platforms strip metadata. Nothing here is proof against a liar.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation import metadata
from curation.decode import ImageBatch
from curation.fields import TEXT, exif_fields, iptc_fields, plain, xmp_fields
from curation.generators import label_of, marks_of, parameters_of
from curation.manifest import AI_TYPES, Manifest, Reader
from curation.schema import PROVENANCE

_MAKER = 64  # characters of a make or model


@dataclass(frozen=True)
class Provenance:
    """What the file declares. `version` changes whenever a rule does."""

    version: int = 1
    reads: ClassVar[str] = "bytes"
    name: ClassVar[str] = "provenance"
    schema: ClassVar[pa.Schema] = PROVENANCE

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """Bytes are read on the CPU whatever the device."""
        read_manifest = Reader()
        names = [name for name in PROVENANCE.names if name not in ("uid", "error")]

        def compute(batch: ImageBatch) -> dict[str, Any]:
            rows = [facts(encoded, read_manifest) for encoded in batch.encoded]
            return {name: [row.get(name) for row in rows] for name in names}

        return compute


def facts(encoded: bytes, read_manifest: Callable[[bytes], Manifest | None]) -> dict[str, Any]:
    """The columns of one file; a column without a value may be left out. Never raises: a broken block is an absent one."""
    blocks = metadata.read(encoded)
    exif = exif_fields(blocks.exif)
    for packet in (exif.pop("xmp", None), *blocks.xmp):
        if packet and packet not in blocks.xmp:
            blocks.xmp.append(packet)
    xmp: dict[str, str] = {}
    for packet in blocks.xmp:
        xmp = xmp_fields(packet) | xmp  # the main packet before its extension
    iptc = iptc_fields(blocks.iptc or exif.pop("iptc", b""))
    manifest = read_manifest(encoded) if blocks.c2pa else None
    row = _fields(exif, xmp, iptc) | _manifest(manifest, xmp.get("remote"))
    row["text_keys"] = plain(",".join(dict.fromkeys(keyword for keyword, _ in blocks.text)))
    for text in (xmp.get("aigc"), *(text for _, text in blocks.text), exif.get("comment")):
        if text and (label := label_of(text))[0]:
            row |= {"aigc_label": label[0], "aigc_producer": plain(label[1])}
            break

    marks = marks_of(blocks, exif, xmp, iptc)
    types = [*(manifest.source_types if manifest else ()), *([xmp["source_type"]] if xmp.get("source_type") else [])]
    ranked = [kind for kind in AI_TYPES if kind in types] or types
    by = ["c2pa"] if manifest and set(AI_TYPES) & set(manifest.source_types) else []
    by += ["source_type"] if xmp.get("source_type") in AI_TYPES else []
    by += ["ai_system"] if row["xmp_ai_system"] else []
    by += [mark.kind for mark in marks]
    tools = [mark.generator for mark in marks] + [*(manifest.ai_tools if manifest else ()), row["xmp_ai_system"]]
    return row | {
        "declared_ai": bool(by),
        "declared_by": ",".join(dict.fromkeys(by)) or None,
        "declared_source_type": plain(ranked[0]) if ranked else None,
        "generator": plain(next(filter(None, tools), None)) if by else None,
        "evidence": plain(",".join(dict.fromkeys(mark.place for mark in marks))),
    }


def _fields(exif: dict[str, Any], xmp: dict[str, str], iptc: dict[str, str]) -> dict[str, Any]:
    """The plain columns. Numbers outside of what a camera can do are nobody's, and infinity is no number."""
    row: dict[str, Any] = {f"exif_{name}": plain(exif.get(name)) for name in ("software", "lens", "taken")}
    for name in ("make", "model"):  # ComfyUI's WebP has its workflow there
        text = exif.get(name)
        row[f"exif_{name}"] = None if text and parameters_of(text) else plain(text, _MAKER)
    for name, highest in (("exposure", 1e5), ("f_number", 1e3), ("iso", 1e7), ("focal", 1e5)):
        value = exif.get(name)
        row[f"exif_{name}"] = value if value is not None and 0 < value <= highest else None
    return row | {
        "exif_maker_note": exif.get("maker_note"),
        "xmp_source_type": plain(xmp.get("source_type")),
        "xmp_creator_tool": plain(xmp.get("creator_tool")),
        "xmp_ai_system": plain(xmp.get("ai_system")),
        "credit": plain(xmp.get("credit") or iptc.get("credit")),
        "iptc_program": plain(iptc.get("program")),
    }


def _manifest(manifest: Manifest | None, remote: str | None) -> dict[str, Any]:
    if manifest is None:
        return {"c2pa": "remote" if remote else None, "c2pa_remote": plain(remote, 5 * TEXT)}
    return {
        "c2pa": manifest.state,
        "c2pa_problems": plain(",".join(manifest.problems)),
        "c2pa_claim_generator": plain(manifest.claim_generator),
        "c2pa_issuer": plain(manifest.issuer),
        "c2pa_source_types": plain(",".join(manifest.source_types)),
        "c2pa_ai_tools": plain(",".join(manifest.ai_tools)),
        "c2pa_remote": plain(remote, 5 * TEXT),
    }
