"""A packed set: Parquet files whose row groups are training batches of one bucket. `k2model.order` says in which order they are read."""

import io
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from torch import Tensor

from curation.schema import LATENTS, PACKED

OPEN_FILES = 128  # of one packed set; a footer read again costs far less than a row group decoded


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
        self._files: OrderedDict[str, _Opened] = OrderedDict()  # the last used is last
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
        images = _one_chunk(table["image"])
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
            ValueError: they were not made, or not of these images.
        """
        name, shape = f"latents/{group['file']}", (16, group["bucket_height"] // 8, group["bucket_width"] // 8)
        try:
            opened = self._file(name, LATENTS)
        except FileNotFoundError:
            raise ValueError(f"{self.directory}/{name} is missing. Run k2 pack --latents") from None
        num_rows, size = group["num_rows"], 2 * int(np.prod(shape))
        rows = _plain_values(opened, group["row_group"], size)
        if rows is None:
            values = _one_chunk(self._read(name, group["row_group"], ["latent"], LATENTS)["latent"])
            if found := {len(value.as_buffer()) for value in values} - {size}:
                raise ValueError(
                    f"{self.directory}/{name} row group {group['row_group']} has latents of {sorted(found)} bytes, and float16 {shape} "
                    f"has {size}. Delete the latents, and run k2 pack --latents again"
                )
            rows = np.frombuffer(b"".join(value.as_buffer() for value in values), np.uint8).reshape(-1, size).copy()
        return torch.from_numpy(rows.view("<f2")[:num_rows]).unflatten(1, shape)

    def place(self, group: dict) -> str:
        """Where a row group lies, for texts."""
        return f"{self.directory}/{group['file']} row group {group['row_group']}"

    def _read(self, name: str, row_group: int, columns: Sequence[str], schema: pa.Schema) -> pa.Table:
        opened = self._file(name, schema)
        with opened.lock:  # Arrow does not promise that one reader serves two threads
            return opened.parquet.read_row_group(row_group, columns=list(columns), use_threads=False)

    def _file(self, name: str, schema: pa.Schema) -> "_Opened":
        """An open Parquet file, kept for the next row group.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it has other columns, or latents of other images than those that are packed.
        """
        with self._files_lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        path = f"{self.directory}/{name}"
        filesystem, inside = fsspec.core.url_to_fs(path)
        if isinstance(filesystem, LocalFileSystem):
            # Arrow reads by itself, without Python's lock; not memory-mapped, for there an I/O error kills the process.
            opened = _Opened(Lock(), pq.ParquetFile(inside), open(inside, "rb"))  # noqa: SIM115
        else:
            opened = _Opened(Lock(), pq.ParquetFile(filesystem.open(inside, "rb"), pre_buffer=True), None)
        if not opened.parquet.schema_arrow.equals(schema, check_metadata=False):
            wanted = "a packed shard (schema.PACKED)" if schema is PACKED else "latents (schema.LATENTS)"
            raise ValueError(f"{path} does not have the columns of {wanted}. Pack again.")
        if schema is LATENTS:
            uids = self._read(name.removeprefix("latents/"), 0, ["uid"], PACKED)["uid"]  # a file is written whole: one row group tells
            if not opened.parquet.read_row_group(0, columns=["uid"])["uid"].equals(uids):
                raise ValueError(f"{path} has latents of other images than are packed. Delete the latents, and run k2 pack --latents again")
        with self._files_lock:
            found = self._files.setdefault(name, opened)
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return found


class _Opened(NamedTuple):
    """An open file of a packed set."""

    lock: Lock
    parquet: pq.ParquetFile
    raw: BinaryIO | None  # the same file on the local disk


def _plain_values(opened: _Opened, row_group: int, size: int) -> np.ndarray | None:
    """The latents of a row group straight from the file, uint8 (B, size), each row a view; None where they do not lie one after the other.

    In Parquet's PLAIN encoding a value is its length, int32, and its bytes; without compression, in one page and without nulls they
    are the end of the column's chunk. Every length is looked at, so a file of another form is not misread. It saves Arrow's two copies.
    """
    group = opened.parquet.metadata.row_group(row_group)
    column = group.column(LATENTS.get_field_index("latent"))
    length, step = group.num_rows * (size + 4), size + 4
    if opened.raw is None or column.compression != "UNCOMPRESSED" or column.total_compressed_size < length:
        return None
    data = np.empty(length, np.uint8)
    end = column.data_page_offset + column.total_compressed_size
    if os.preadv(opened.raw.fileno(), [data], end - length) != length:
        return None
    rows = data.reshape(group.num_rows, step)
    return rows[:, 4:] if (rows[:, :4] == np.frombuffer(np.int32(size).tobytes(), np.uint8)).all() else None


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


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; `combine_chunks` copies even where there is one chunk already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in [-1, 1], as the codecs take them."""
    return images.float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
