"""A tiny packed set, written to the contract (schema.PACKED and dataset.json) and not by `k2 pack`."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.schema import PACKED
from curation.shards import fingerprint, write_json, write_row_groups

Picture = tuple[str, str | list[str], np.ndarray]  # uid, caption or captions, uint8 (H, W, 3) of its bucket's size


def make_packed(directory: Path, pictures: Sequence[Picture], resolution: int, batch_size: int, groups_per_file: int = 2) -> Path:
    """Write RUN/packed/<policy>: the pictures by size, `batch_size` to a row group (the last of a bucket may be short)."""
    by_size: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        by_size.setdefault(picture[2].shape[:2], []).append(picture)
    groups = [found[i : i + batch_size] for _, found in sorted(by_size.items()) for i in range(0, len(found), batch_size)]
    made_by = fingerprint([[uid for uid, _, _ in group] for group in groups])
    batches = []
    for first in range(0, len(groups), groups_per_file):
        name = f"{first // groups_per_file:05d}.parquet"
        tables = [pa.Table.from_pylist([row(*picture) for picture in group], PACKED) for group in groups[first : first + groups_per_file]]
        write_row_groups(tables, directory / name, PACKED, made_by)
        for i, table in enumerate(tables):
            height, width = table["bucket_height"][0].as_py(), table["bucket_width"][0].as_py()
            batches.append({"file": name, "row_group": i, "bucket_height": height, "bucket_width": width, "num_rows": len(table)})
    description = {
        "fingerprint": made_by,
        "policy": directory.name,
        "resolution": resolution,
        "batch_size": batch_size,
        "seed": 0,
        "num_rows": len(pictures),
        "num_batches": len(batches),
        "batches": batches,
    }
    write_json(description, directory / "dataset.json")
    return directory


def row(uid: str, caption: str | list[str], pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    height, width = pixels.shape[:2]
    shard, _, key = uid.partition("/")
    first, *others = [caption] if isinstance(caption, str) else caption
    return {
        "uid": uid,
        "image": buffer.getvalue(),
        "caption": first,
        "caption_source": "txt",
        "other_captions": others,
        "bucket_height": height,
        "bucket_width": width,
        "source_height": height,
        "source_width": width,
        "crop_top": 0,
        "crop_left": 0,
        "crop_height": height,
        "crop_width": width,
        "shard": shard,
        "key": key,
        "padding": False,
    }


def landscapes(count: int, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Picture]:
    """`count` made-up pictures, sizes in turn: a sky over ground of another colour, with grain; the caption names the colours."""
    colours = {"blue": (60, 110, 220), "red": (200, 50, 40), "green": (50, 150, 60), "grey": (128, 128, 128)}
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        sky, ground = rng.choice(list(colours), 2, replace=False)
        pixels = np.empty((height, width, 3))
        horizon = int(rng.integers(height // 4, 3 * height // 4))
        pixels[:horizon], pixels[horizon:] = colours[sky], colours[ground]
        pixels += rng.normal(0, 12, (height, width, 3)) + np.linspace(-20, 20, width)[:, None]
        pictures.append((f"s{i % 2}/{i:03d}", f"{sky} sky over {ground} ground", pixels.clip(0, 255).astype(np.uint8)))
    return pictures
