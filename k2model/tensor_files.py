"""Safetensors files as streams: headers that are checked, and tensors read and written a piece at a time.

A file of 26 GB is copied, renamed or cast in less memory than its largest tensor: no tensor is ever held whole, only
pieces of PIECE values. The library's `save_file` wants all tensors in memory at once.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 1 << 21  # values that are in memory at once


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # first byte in the file

    def pieces(self) -> Iterator[Tensor]:
        """Its values in order, as flat tensors of at most PIECE values, each a view of one buffer that is used again."""
        buffer = bytearray(min(PIECE, math.prod(self.shape)) * self.dtype.itemsize)
        left = math.prod(self.shape)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                count = min(PIECE, left)
                view = memoryview(buffer)[: count * self.dtype.itemsize]
                done = 0
                while done < len(view):
                    read = file.readinto(view[done:])
                    if not read:
                        raise ValueError(f"{self.path} ended inside {self.name}: it changed while it was read. Start again.")
                    done += read
                yield torch.frombuffer(view, dtype=self.dtype)
                left -= count

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        flat = torch.empty(math.prod(self.shape), dtype=self.dtype)
        done = 0
        for piece in self.pieces():
            flat[done : done + len(piece)] = piece
            done += len(piece)
        return flat.view(self.shape)


class New(NamedTuple):
    """A tensor to be written: its place in the header, and where its values come from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]  # flat tensors of this dtype, in order

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Reads the header only.

    Raises:
        ValueError: not a safetensors file, or cut off; it names the first tensor that is not all there.
    """
    size = path.stat().st_size
    foreign = f"{path} is not a safetensors file"
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= 100_000_000:
            raise ValueError(f"{foreign} (its first bytes are {start!r}). Give the .safetensors of a K2 model.")
        if 8 + length > size:
            raise ValueError(f"{path} is cut off inside its header: {size} bytes of at least {8 + length}. Copy or download it again.")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            spans = sorted((*info["data_offsets"], name) for name, info in header.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{foreign}: its header cannot be read ({error!r}). Copy or download it again.") from error
    for _, end, name in spans:
        if 8 + length + end > size:
            raise ValueError(
                f"{path} is cut off: {name} should end at byte {8 + length + end}, the file has {size}. Copy or download it again."
            )
    try:
        with safe_open(path, "pt"):  # the library's own checks: offsets, overlaps, sizes
            pass
    except SafetensorError as error:
        raise ValueError(f"{foreign}: {error}. Copy or download it again.") from error
    unknown = next((name for _, _, name in spans if header[name]["dtype"] not in DTYPES), None)
    if unknown:
        raise ValueError(f"{path}: {unknown} is of dtype {header[unknown]['dtype']}; known are {', '.join(DTYPES)}")
    tensors = {}
    for name, info in header.items():
        tensors[name] = Stored(path, name, DTYPES[info["dtype"]], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
    return tensors, metadata


def write_file(tensors: Iterable[New], path: Path, metadata: dict[str, str]) -> int:
    """Write a safetensors file, header first, then every tensor piece by piece; returns its size in bytes.

    The widest dtypes come first, so that every tensor is aligned, as the safetensors library does it.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header, offset = {"__metadata__": metadata}, 0
    for tensor in ordered:
        span = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            written = 0
            for piece in tensor.pieces():
                assert piece.dtype == tensor.dtype, (tensor.name, piece.dtype)
                written += file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))
            assert written == tensor.num_bytes, (tensor.name, written, tensor.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset


def write_folder(tensors: list[New], folder: Path, stem: str, shard_bytes: int, metadata: dict[str, str]) -> None:
    """Write `<stem>.safetensors`, or shards of at most `shard_bytes` (a larger tensor is a shard of its own) and their index.

    Names are those that transformers and diffusers read: `<stem>-00001-of-00003.safetensors`, `<stem>.safetensors.index.json`.
    """
    shards: list[list[New]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    if len(shards) == 1:
        write_file(tensors, folder / f"{stem}.safetensors", metadata)
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, folder / name, metadata)
        places |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
