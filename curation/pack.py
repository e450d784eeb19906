"""A selection as training shards: crop, resize, bucket, shuffle. A row group of a packed shard is a training batch of one bucket.

    plan          selection + seed -> which uid stands in which row group of which file; needs no pixels
    make_piece    one source shard -> its chosen images, cropped, resized and encoded (.pieces/<shard>.parquet)
    assemble      pieces -> packed shards in the order of the plan, then dataset.json, the commit point

K2 crops and resizes ahead of time, because doing it while training made CPU and I/O load uneven, and shuffles and packs so
that one worker reads a batch of one aspect ratio (report, "Data loading").
"""

import hashlib
import io
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from curation.decode import DecodeError, decode
from curation.schema import PACKED, UID, column
from curation.shards import is_done, write_json, write_row_groups, write_table
from curation.sources import Shard, fetch

JPEG_QUALITY = 95
PIECE = pa.schema(
    [
        UID,
        *[PACKED.field(name).with_nullable(True) for name in PACKED.names if name != "uid"],
        column("error", pa.string(), "why not packed"),
    ]
)


@dataclass(frozen=True)
class Packing:
    """What decides the bytes of a packed set."""

    policy: str
    selection: str  # hash of the selection's file
    resolution: int
    batch_size: int
    seed: int
    batches_per_file: int = 64
    jpeg_quality: int = JPEG_QUALITY

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batches_per_file < 1:
            raise ValueError(f"batch_size and batches_per_file must be 1 or more; got {self.batch_size} and {self.batches_per_file}")


def plan(selection: pa.Table, packing: Packing) -> list[list[list[str]]]:
    """Files of batches of uids: a function of the chosen uids, their buckets and the seed, not of the order of the rows.

    Every bucket's images are shuffled and cut into batches (the last of a bucket may be short), then the batches are shuffled, so that
    a file mixes buckets and a reader sees all aspect ratios all the time.
    """
    rows = selection.select(["uid", "bucket_height", "bucket_width"]).to_pylist()
    order = sorted(rows, key=lambda row: (row["bucket_height"], row["bucket_width"], _draw(packing.seed, row["uid"])))
    batches = []
    for _, group in groupby(order, key=lambda row: (row["bucket_height"], row["bucket_width"])):
        uids = [row["uid"] for row in group]
        batches += [uids[i : i + packing.batch_size] for i in range(0, len(uids), packing.batch_size)]
    batches.sort(key=lambda uids: _draw(packing.seed, "batch " + uids[0]))
    return [batches[i : i + packing.batches_per_file] for i in range(0, len(batches), packing.batches_per_file)]


def _draw(seed: int, text: str) -> bytes:
    """A random place in an order, the same on every machine."""
    return hashlib.blake2b(f"{seed} {text}".encode(), digest_size=16).digest()


def make_piece(shard: Shard, rows: list[dict], path: str, made_by: str) -> int:
    """Write the chosen images of one source shard, whole or not at all; returns how many were written now.

    `rows` are those of the selection that come from this shard. An image that no longer decodes is a row with `error`.
    """
    if is_done(path, made_by):
        return 0
    wanted = {row["uid"]: row for row in rows}
    pieces = {sample["uid"]: _piece(sample, wanted[sample["uid"]]) for sample in fetch([shard], wanted)}
    for uid in wanted.keys() - pieces.keys():
        pieces[uid] = {"uid": uid, "error": "the source no longer has this sample"}
    write_table(pa.Table.from_pylist([pieces[uid] for uid in sorted(pieces)], PIECE), path, made_by)
    return len(pieces)


def _piece(sample: dict, chosen: dict) -> dict:
    facts = {name: sample[name] for name in ("uid", "shard", "key", "caption", "caption_source")}
    try:
        pixels, header = decode(sample["image"])
    except DecodeError as problem:
        return facts | {"error": str(problem)}
    size = {"source_height": header.height, "source_width": header.width}
    if chosen["crop_top"] + chosen["crop_height"] > header.height or chosen["crop_left"] + chosen["crop_width"] > header.width:
        return facts | {"error": f"the image is {header.width}x{header.height} now, smaller than when it was annotated"}
    return facts | size | {name: chosen[name] for name in chosen if name in PACKED.names} | {"image": crop_and_resize(pixels, chosen)}


def crop_and_resize(pixels: np.ndarray, chosen: dict) -> bytes:
    """Crop uint8 (H, W, 3), resize to the bucket with Lanczos, and encode as JPEG without chroma subsampling."""
    top, left = chosen["crop_top"], chosen["crop_left"]
    box = (left, top, left + chosen["crop_width"], top + chosen["crop_height"])
    image = Image.fromarray(pixels)
    assert box[2] <= image.width and box[3] <= image.height, (box, image.size, chosen["uid"])
    # Crop first: `resize(box=...)` lets the filter look at pixels outside of the box.
    resized = image.crop(box).resize((chosen["bucket_width"], chosen["bucket_height"]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def assemble(files: list[list[list[str]]], pieces: list[str], out_dir: Path, packing: Packing, made_by: str) -> dict:
    """Write the packed shards that are missing, then dataset.json; returns its content.

    Each packed shard scans all pieces once: fine while the pieces lie on a local disk. An image that could not be packed is
    listed under "errors" and leaves its row group shorter.
    """
    found = ds.dataset(pieces, format="parquet") if pieces else None
    errors = found.to_table(columns=["uid", "error"], filter=ds.field("error").is_valid()).to_pylist() if found else []
    broken = {row["uid"] for row in errors}
    batches = []
    for number, file in enumerate(files):
        name, whole = f"{number:05d}.parquet", [kept for uids in file if (kept := [uid for uid in uids if uid not in broken])]
        if not is_done(out_dir / name, made_by):
            table = found.to_table(columns=PACKED.names, filter=ds.field("uid").isin([uid for uids in whole for uid in uids]))
            place = {uid: i for i, uid in enumerate(table["uid"].to_pylist())}
            groups = (table.take([place[uid] for uid in uids]) for uids in whole)
            write_row_groups(groups, out_dir / name, PACKED, made_by)
        sizes = pq.read_table(out_dir / name, columns=["uid", "bucket_height", "bucket_width"]).to_pylist()
        bucket = {row["uid"]: {"bucket_height": row["bucket_height"], "bucket_width": row["bucket_width"]} for row in sizes}
        batches += [{"file": name, "row_group": i, **bucket[uids[0]], "num_rows": len(uids)} for i, uids in enumerate(whole)]
    content = {
        "fingerprint": made_by,
        "policy": packing.policy,
        "resolution": packing.resolution,
        "batch_size": packing.batch_size,
        "seed": packing.seed,
        "num_rows": sum(batch["num_rows"] for batch in batches),
        "num_batches": len(batches),
        "batches": batches,
        "errors": sorted(errors, key=lambda row: row["uid"]),
    }
    write_json(content, out_dir / "dataset.json")
    return content
