"""Packed shards to training batches. Position is data: every batch comes with the cursor of the next one.

A row group of a packed shard is a batch of one bucket. The order of the batches of an epoch is a permutation made from
(seed, epoch), so batch i is a pure function of files, seed and cursor, and resuming is seeking.
"""

import io
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from curation.schema import LATENTS, PACKED

OPEN_FILES = 128  # of one packed set; a footer read again costs far less than a row group decoded


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

    Several threads may read from one of these.

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
        self._files: OrderedDict[str, tuple[Lock, pq.ParquetFile]] = OrderedDict()  # the last used is last
        self._files_lock = Lock()

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
        num_rows = group["num_rows"] + (group.get("num_padding", 0) if padding else 0)
        table = self.table(group, ["uid", "image", "caption"]).slice(0, num_rows)  # padding comes last
        pixels = np.empty((num_rows, group["bucket_height"], group["bucket_width"], 3), np.uint8)
        self.decode(group, table, range(num_rows), pixels)
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), table["caption"].to_pylist(), table["uid"].to_pylist())

    def table(self, group: dict, columns: Sequence[str]) -> pa.Table:
        """Columns of one row group as they are packed (schema.PACKED), padding too."""
        return self._read(group["file"], group["row_group"], columns, PACKED)

    def decode(self, group: dict, table: pa.Table, rows: Sequence[int], pixels: np.ndarray) -> None:
        """Decode `rows` of the row group's `table` into `pixels`, uint8 (len(rows), H, W, 3).

        Raises:
            ValueError: an image cannot be decoded, or is not of its bucket's size; the text names file, row group, row and uid.
        """
        images = table["image"].combine_chunks()
        for row, out in zip(rows, pixels, strict=True):
            try:
                found = decode_into(memoryview(images[row].as_buffer()).cast("B"), out)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{self.place(group)} row {row} ({table['uid'][row]}): {error}. Pack again.") from error
            if found != out.shape[:2]:
                raise ValueError(
                    f"{self.place(group)} row {row} ({table['uid'][row]}) is an image of {found}, "
                    f"but dataset.json says {out.shape[:2]}. Pack again."
                )

    def latents(self, group: dict) -> Tensor:
        """The latents of one row group, float16 (B, 16, H/8, W/8), without padding.

        Raises:
            ValueError: they were not made, or not of this packed set.
        """
        return self.latent_rows(group)[0][: group["num_rows"]]

    def latent_rows(self, group: dict) -> tuple[Tensor, list[str]]:
        """The latents of one row group, float16 (B, 16, H/8, W/8), and their uids; padding too.

        Raises:
            ValueError: they were not made, or are of another size.
        """
        try:
            table = self._read(f"latents/{group['file']}", group["row_group"], ["uid", "latent"], LATENTS)
        except FileNotFoundError:
            raise ValueError(f"{self.directory}/latents/{group['file']} is missing. Run k2 pack --latents") from None
        shape = (len(table), 16, group["bucket_height"] // 8, group["bucket_width"] // 8)
        values = _contiguous(table["latent"].combine_chunks())
        if values.nbytes != 2 * np.prod(shape):
            raise ValueError(
                f"{self.directory}/latents/{group['file']} row group {group['row_group']} has {values.nbytes} bytes, "
                f"and float16 {shape} has {2 * np.prod(shape)}. Delete the latents, and run k2 pack --latents again"
            )
        return torch.from_numpy(values.view("<f2").reshape(shape)), table["uid"].to_pylist()

    def place(self, group: dict) -> str:
        """Where a row group lies, for texts."""
        return f"{self.directory}/{group['file']} row group {group['row_group']}"

    def batches(self, seed: int, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Batches from `cursor` on, for ever, each with the cursor of the batch after it."""
        assert 0 <= cursor.index < len(self), (cursor, len(self))
        while True:
            order = self.order(seed, cursor.epoch)
            for index in range(cursor.index, len(order)):
                following = Cursor(cursor.epoch, index + 1) if index + 1 < len(order) else Cursor(cursor.epoch + 1, 0)
                yield self.read(self.groups[order[index]]), following
            cursor = Cursor(cursor.epoch + 1, 0)

    def _read(self, name: str, row_group: int, columns: Sequence[str], schema: pa.Schema) -> pa.Table:
        lock, file = self._file(name, schema)
        with lock:  # Arrow does not promise that one reader serves two threads
            return file.read_row_group(row_group, columns=list(columns), use_threads=False)

    def _file(self, name: str, schema: pa.Schema) -> tuple[Lock, pq.ParquetFile]:
        """An open Parquet file, kept for the next row group, and what to hold while reading from it."""
        with self._files_lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        path = f"{self.directory}/{name}"
        filesystem, inside = fsspec.core.url_to_fs(path)
        local = isinstance(filesystem, fsspec.implementations.local.LocalFileSystem)
        # On the local disk Arrow reads by itself, without Python's lock; not memory-mapped, for there an I/O error kills the process.
        file = pq.ParquetFile(inside) if local else pq.ParquetFile(filesystem.open(inside, "rb"), pre_buffer=True)
        if not file.schema_arrow.equals(schema, check_metadata=False):
            wanted = "a packed shard (schema.PACKED)" if schema is PACKED else "latents (schema.LATENTS)"
            raise ValueError(f"{path} does not have the columns of {wanted}. Pack again.")
        with self._files_lock:
            found = self._files.setdefault(name, (Lock(), file))
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return found


def decode_into(data: Any, pixels: np.ndarray) -> tuple[int, int]:
    """Decode an encoded image (a buffer) into RGB `pixels`, uint8 (H, W, 3); returns its height and width, and nothing is written
    when they are others.

    A JPEG goes through libjpeg-turbo without Pillow in between: the same values (accurate DCT and upsampling, as Pillow's) in
    0.6 of the time. What is no JPEG, or a CMYK one, or one that libjpeg-turbo complains of, goes through Pillow.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be decoded.
    """
    if bytes(data[:2]) == b"\xff\xd8":
        with suppress(ValueError):
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if (height, width) == pixels.shape[:2] and space in ("YCbCr", "RGB", "Gray"):
                simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
                return height, width
    image = Image.open(io.BytesIO(data))
    if (image.height, image.width) == pixels.shape[:2]:
        pixels[:] = np.asarray(image.convert("RGB"))
    return image.height, image.width


def _contiguous(values: pa.BinaryArray) -> np.ndarray:
    """The bytes of all values of a column without nulls, where they lie."""
    ends = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(values.buffers()[2], np.uint8)[ends[0] : ends[-1]]
    # Arrow calls a buffer read-only although nobody else has it, and PyTorch warns of every array that is.
    return data if data.flags.writeable else data.copy()


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [-1, 1], as the codecs take them."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
