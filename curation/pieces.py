"""Pieces: the chosen images of one source shard as training sees them, kept until they are packed.

A piece is an Arrow file in the order of the draws, with CHUNK rows in a record batch, so that any row is read by its number, without
a search and without the rows around it. It does not depend on the plan: when the selection changes, the rows that are still
wanted are taken over, and only the others are decoded.
"""

import io
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.decode import VIEW_SIDE, DecodeError, Header, decode_for
from curation.schema import PACKED, UID, column
from curation.shards import FINGERPRINT_KEY, fingerprint, whole_file
from curation.shuffle import draws
from curation.sources import Shard, fetch

CHUNK = 256  # rows in a record batch; also what is held in memory while a piece is written
JPEG_QUALITY = 95
SPARE = 2  # source pixels per trained pixel that a scaled-down view must still have
ROW_FORMAT = (  # what a row is made of; rows of another format are made again
    f"crop, Lanczos (of a view with {SPARE} times the pixels where there is one), JPEG {JPEG_QUALITY} 4:4:4; or the source's own JPEG; "
    "all captions"
)
_ROW_FORMAT_KEY = b"k2.row_format"
_WHERE = ["crop_top", "crop_left", "crop_height", "crop_width", "bucket_height", "bucket_width"]
PIECE = pa.schema(
    [
        UID,
        *[PACKED.field(name).with_nullable(True) for name in PACKED.names if name not in ("uid", "padding")],
        column("error", pa.string(), "why not packed"),
    ]
)


class Made(NamedTuple):
    """What became of one piece."""

    num_rows: int
    num_decoded: int  # now
    num_reused: int  # now, of an earlier piece
    errors: list[dict[str, Any]]  # uid, error, and `row` of the piece


class Piece:
    """Rows of a piece on a local or mounted disk, read where they lie (memory-mapped)."""

    def __init__(self, path: str | Path):
        self._source = pa.memory_map(str(path))
        self._reader = pa.ipc.open_file(self._source)
        self._chunks: dict[int, pa.RecordBatch] = {}
        metadata = self._reader.schema.metadata or {}
        self.made_by, self.row_format = metadata[FINGERPRINT_KEY].decode(), metadata.get(_ROW_FORMAT_KEY, b"").decode()

    def row(self, number: int) -> pa.RecordBatch:
        """One row, not copied."""
        chunk = number // CHUNK
        if chunk not in self._chunks:
            self._chunks[chunk] = self._reader.get_batch(chunk)
        return self._chunks[chunk].slice(number % CHUNK, 1)

    def columns(self, names: list[str]) -> pa.Table:
        fields = [self._reader.schema.get_field_index(name) for name in names]
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=sorted(fields))).read_all()


def make_piece(shard: Shard, selection: str | Path, path: Path, seed: int) -> Made:
    """Write the chosen images of one source shard, whole or not at all.

    Nothing is done where the piece is there already; rows of an earlier piece with the same crop and bucket are taken over. An image
    that no longer decodes is a row with `error`, and is tried again when the piece is made again.
    """
    wanted = wanted_rows(selection, shard, seed)
    made_by = fingerprint({"row_format": ROW_FORMAT, "rows": wanted.select(["uid", *_WHERE]).to_pydict()})
    before = Piece(path) if path.exists() else None
    reused: dict[str, int] = {}
    num_decoded = 0
    if before is None or before.made_by != made_by:
        reused = _reusable(before, wanted) if before is not None and before.row_format == ROW_FORMAT else {}
        missing = {row["uid"]: row for row in wanted.to_pylist() if row["uid"] not in reused}
        num_decoded = len(missing)
        fresh = path.with_name(f".{path.name}.fresh")  # in the order of the source: images come as they are read
        _write(fresh, made_by, map(_batch, _chunks(_cut(shard, missing))))
        decoded = Piece(fresh)
        place = {uid: (before, row) for uid, row in reused.items()}
        place |= {uid: (decoded, row) for row, uid in enumerate(decoded.columns(["uid"])["uid"].to_pylist())}
        rows = (piece.row(row) for piece, row in map(place.__getitem__, wanted["uid"].to_pylist()))
        _write(path, made_by, map(pa.concat_batches, _chunks(rows)))
        fresh.unlink()
    found = Piece(path).columns(["uid", "error"])
    errors = [{"uid": u, "error": e, "row": i} for i, (u, e) in enumerate(zip(*found.to_pydict().values(), strict=True)) if e is not None]
    return Made(len(found), num_decoded, len(reused), errors)


def wanted_rows(selection: str | Path, shard: Shard, seed: int) -> pa.Table:
    """The rows of a selection that come from this shard, in the order of their draws."""
    rows = pq.read_table(selection, filters=[("shard", "=", shard.name)]).combine_chunks()
    high, low = draws(rows["uid"].combine_chunks(), seed) if len(rows) else ([], [])
    return rows.take(pa.array(np.lexsort((low, high)), pa.int64()))


def _reusable(before: Piece, wanted: pa.Table) -> dict[str, int]:
    """uid -> row of the earlier piece, of the images that are still cut out in the same way."""
    had = before.columns(["uid", *_WHERE, "error"])
    known = {(row["uid"], *(row[name] for name in _WHERE)): i for i, row in enumerate(had.to_pylist()) if row["error"] is None}
    rows = ((row["uid"], *(row[name] for name in _WHERE)) for row in wanted.to_pylist())
    return {row[0]: known[row] for row in rows if row in known}


def _write(path: Path, made_by: str, batches: Iterable[pa.RecordBatch]) -> None:
    schema = PIECE.with_metadata({FINGERPRINT_KEY: made_by.encode(), _ROW_FORMAT_KEY: ROW_FORMAT.encode()})
    with whole_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.cast(schema))


def _batch(rows: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, PIECE)


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while some := list(islice(rows, CHUNK)):
        yield some


def _cut(shard: Shard, wanted: dict[str, dict]) -> Iterator[dict]:
    """The wanted images as rows of PIECE, in the order of the source."""
    left = dict(wanted)
    for sample in fetch([shard], wanted) if wanted else ():
        yield _row(sample, left.pop(sample["uid"]))
    yield from ({"uid": uid, "error": "the source no longer has this sample"} for uid in sorted(left))


def _row(sample: dict, chosen: dict) -> dict:
    facts = {name: sample[name] for name in ("uid", "shard", "key", "caption", "caption_source", "other_captions")}
    try:
        image, header = cut(sample["image"], chosen)
    except DecodeError as problem:
        return facts | {"error": sample["error"] or str(problem)}
    return facts | {name: chosen[name] for name in _WHERE} | {"source_height": header.height, "source_width": header.width, "image": image}


def cut(encoded: bytes | None, chosen: dict) -> tuple[bytes, Header]:
    """An image as training sees it, a JPEG of exactly the bucket's size, and the facts of its source.

    Where a scaled-down view has SPARE times the bucket's pixels along both sides, it is used: JPEG decodes to it directly. A plain
    JPEG that has the bucket's size already keeps its own bytes: decoding it and encoding it again could only lose.

    Raises:
        DecodeError: the image does not decode, or is smaller than its crop.
    """
    size = np.array([chosen["bucket_height"], chosen["bucket_width"]])
    crop = np.array([chosen["crop_height"], chosen["crop_width"]])
    decoded = decode_for(encoded, "view" if SPARE * size.min() <= VIEW_SIDE else "pixels")
    header = decoded.header
    source = np.array([header.height, header.width])
    if (np.array([chosen["crop_top"], chosen["crop_left"]]) + crop > source).any():
        raise DecodeError(f"the image is {header.width}x{header.height} now, smaller than when it was annotated")
    pixels = decoded.view if decoded.pixels is None else decoded.pixels
    factor = _factor(header, pixels)
    if factor > 1 and (crop < SPARE * factor * size).any():
        pixels = decode_for(encoded, "pixels").pixels
    if (source == size).all() and (crop == size).all() and is_plain(encoded):
        return encoded, header
    return crop_and_resize(pixels, header, chosen), header


def is_plain(encoded: bytes) -> bool:
    """True for a JPEG that any decoder shows as it is: three channels, upright, no colour profile, one picture."""
    with Image.open(io.BytesIO(encoded)) as image:
        upright = image.getexif().get(0x0112, 1) == 1
        return (image.format, image.mode) == ("JPEG", "RGB") and upright and "icc_profile" not in image.info


def crop_and_resize(pixels: np.ndarray, header: Header, chosen: dict) -> bytes:
    """Crop uint8 (H, W, 3), resize to the bucket with Lanczos, and encode as JPEG without chroma subsampling.

    The crop is in pixels of the source, of which `pixels` may be a smaller view.
    """
    factor = _factor(header, pixels)
    top, left = chosen["crop_top"] / factor, chosen["crop_left"] / factor
    bottom, right = (chosen["crop_top"] + chosen["crop_height"]) / factor, (chosen["crop_left"] + chosen["crop_width"]) / factor
    # Crop first: `resize(box=...)` lets the filter look at pixels outside of the box. In a view the box may end inside of a pixel.
    outer = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    assert 0 <= outer[0] < outer[2] <= pixels.shape[1] and 0 <= outer[1] < outer[3] <= pixels.shape[0], (outer, pixels.shape, chosen)
    box = (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
    size = (chosen["bucket_width"], chosen["bucket_height"])
    return _jpeg(Image.fromarray(pixels[outer[1] : outer[3], outer[0] : outer[2]]).resize(size, Image.Resampling.LANCZOS, box=box))


def _factor(header: Header, pixels: np.ndarray) -> int:
    """Source pixels per pixel of a view, whose sides are rounded up; 1 for all pixels."""
    return round(header.height / pixels.shape[0])


def _jpeg(image: Image.Image) -> bytes:
    # Pillow's JPEG: as fast as simplejpeg and OpenCV at this setting, and 0.5 dB better than simplejpeg (docs/log.md).
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
