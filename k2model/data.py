"""Packed shards to training batches. Position is data: every batch comes with the cursor of the next one.

A row group of a packed shard is a batch of one bucket. The order of the batches of an epoch is a permutation made from
(seed, epoch), so batch i is a pure function of files, seed and cursor, and resuming is seeking.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from curation.schema import PACKED


class Cursor(NamedTuple):
    """Where the next batch starts."""

    epoch: int = 0
    index: int = 0  # batches of this epoch that were read


class Batch(NamedTuple):
    images: Tensor  # uint8 (B, 3, H, W)
    captions: list[str]
    uids: list[str]


class Packed:
    """A packed set, RUN/packed/<policy>: `dataset.json` and its Parquet files, on any filesystem of fsspec.

    Raises:
        ValueError: there is no packed set at this place.
    """

    def __init__(self, directory: str | Path):
        self.directory = str(directory)
        try:
            with fsspec.open(f"{self.directory}/dataset.json", "r") as file:
                self.description = json.load(file)
        except FileNotFoundError:
            policy = self.directory.rstrip("/").rsplit("/", 1)[-1]
            raise ValueError(f"{self.directory} has no dataset.json: nothing is packed there. Run: k2 pack --policy {policy}") from None
        self.groups = self.description["batches"]
        self._files: dict[str, pq.ParquetFile] = {}

    @property
    def fingerprint(self) -> str:
        return self.description["fingerprint"]

    @property
    def resolution(self) -> int:
        return self.description["resolution"]

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.groups)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of the row groups in one epoch.

        It sorts raw Philox bits, whose stream NumPy promises to keep, and not the output of a NumPy method, which may change.
        """
        return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(len(self)), kind="stable")

    def group_at(self, cursor: Cursor, seed: int) -> dict:
        """The entry of `dataset.json` (file, row group, bucket) of the batch that starts at `cursor`."""
        return self.groups[self.order(seed, cursor.epoch)[cursor.index]]

    def read(self, group: dict, padding: bool = False) -> Batch:
        """Decode one row group. With `padding` every batch has the packed set's batch size: the last rows may be repeats."""
        table = self._file(group["file"]).read_row_group(group["row_group"], columns=["uid", "image", "caption"])
        num_rows = group["num_rows"] + (group.get("num_padding", 0) if padding else 0)
        table = table.slice(0, num_rows)  # padding comes last
        images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table["image"].to_pylist()]
        found, listed = [image.shape[:2] for image in images], [(group["bucket_height"], group["bucket_width"])] * num_rows
        if found != listed:
            place = f"{self.directory}/{group['file']} row group {group['row_group']}"
            raise ValueError(f"{place} has images of {found}, but dataset.json says {listed}. Pack again.")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return Batch(pixels, table["caption"].to_pylist(), table["uid"].to_pylist())

    def latents(self, group: dict) -> Tensor:
        """The latents of one row group, float16 (B, 16, H/8, W/8), without padding.

        Raises:
            ValueError: they were not made.
        """
        path = f"{self.directory}/latents/{group['file']}"
        try:
            with fsspec.open(path, "rb") as file:
                table = pq.ParquetFile(file).read_row_group(group["row_group"], columns=["latent"])
        except FileNotFoundError:
            raise ValueError(f"{path} is missing. Run k2 pack --latents") from None
        values = np.frombuffer(b"".join(table["latent"].to_pylist()), "<f2").copy()
        shape = (-1, 16, group["bucket_height"] // 8, group["bucket_width"] // 8)
        return torch.from_numpy(values.reshape(shape))[: group["num_rows"]]

    def batches(self, seed: int, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Batches from `cursor` on, for ever, each with the cursor of the batch after it."""
        assert 0 <= cursor.index < len(self), (cursor, len(self))
        while True:
            order = self.order(seed, cursor.epoch)
            for index in range(cursor.index, len(order)):
                following = Cursor(cursor.epoch, index + 1) if index + 1 < len(order) else Cursor(cursor.epoch + 1, 0)
                yield self.read(self.groups[order[index]]), following
            cursor = Cursor(cursor.epoch + 1, 0)

    def _file(self, name: str) -> pq.ParquetFile:
        """An open Parquet file; kept, because reading the footer again costs more than reading a batch."""
        if name not in self._files:
            file = pq.ParquetFile(fsspec.open(f"{self.directory}/{name}", "rb").open())
            if not file.schema_arrow.equals(PACKED, check_metadata=False):
                raise ValueError(f"{self.directory}/{name} does not have the columns of a packed shard (schema.PACKED). Pack again.")
            self._files[name] = file
        return self._files[name]


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [-1, 1], as the codecs take them."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
