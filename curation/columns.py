"""Images and captions in the columns of Parquet and Arrow files: bytes, Hugging Face's {bytes, path}, or paths to files."""

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.tar import Source

CAPTION_FIELDS = ("caption", "text", "prompt", "txt", "alt_text", "description", "TEXT")
_IMAGE_NAME = re.compile(r"(image|img|jpg|jpeg|png|webp|bytes|image_bytes|picture|photo)([_.]?\d+)?", re.IGNORECASE)
_PATH_NAME = re.compile(r"((image|img)_?)?(path|file|filepath|file_?name|url|uri|key)|image|img", re.IGNORECASE)
_BATCH = 64
_BUFFER = 8 << 20  # bytes: a column chunk is read in pieces, so that a row group of gigabytes fits

# Every function that yields samples yields (key, image, caption, caption source, error).
Values = tuple[str, bytes | None, str | None, str, str | None]
Open = Callable[[list[str]], list[tuple[bytes | None, str | None]]]  # paths that a table names -> (bytes, error) of each


def caption_of(fields: Any) -> str | None:
    """The caption among the fields of a JSON file or a row; None when there is none."""
    if not isinstance(fields, dict):
        return None
    found = (fields.get(name) for name in CAPTION_FIELDS)
    # A lone surrogate (JSON can spell one) is no text that a file can hold.
    return next((text.encode("utf-8", "replace").decode() for text in found if isinstance(text, str) and text.strip()), None)


def image_columns(schema: pa.Schema, path: str) -> list[str]:
    """The columns that hold images: Hugging Face's features say so, else the names and types do; columns of paths only where no column
    holds bytes.

    Raises:
        ValueError: there is none.
    """
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        images = [name for name in schema.names if features[name].get("_type") == "Image"]
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError):
        images = []
    images = images or [f.name for f in schema if _IMAGE_NAME.fullmatch(f.name) and _holds_bytes(f.type)]
    images = images or [f.name for f in schema if _PATH_NAME.fullmatch(f.name) and _is_text(f.type)][:1]
    if not images:
        found = ", ".join(schema.names)[:300]
        raise ValueError(f"{path} has no image column: looked for image, jpg, png, bytes, path, file_name and the like, found {found}")
    return images


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def parquet_samples(
    source: Source, path: str, row_groups: tuple[int, int] | None, positions: set[int] | None, open_paths: Open
) -> Iterator[Values]:
    """The rows of a Parquet file or of a span of its row groups; with `positions`, only row groups that hold one of these are read.

    Raises:
        Damage: the file is cut or damaged; the rows before that were yielded.
        ValueError: no image column.
    """
    with source.damage("not a Parquet file, or cut"):
        file = pq.ParquetFile(source, buffer_size=_BUFFER)
        schema = file.schema_arrow
    wanted = _wanted_columns(schema, path)
    position = 0
    first, last = row_groups or (0, file.num_row_groups)
    for group in range(last):
        size = file.metadata.row_group(group).num_rows
        inside = group >= first and (positions is None or any(position <= place < position + size for place in positions))
        batches = file.iter_batches(_BATCH, row_groups=[group], columns=wanted) if inside else iter(())
        start = position
        while True:
            with source.damage(f"row {start} and after cannot be read"):
                batch = next(batches, None)
            if batch is None:
                break
            yield from _batch_samples(batch, path, start, positions, open_paths)
            start += len(batch)
        position += size


def arrow_samples(
    source: Source, path: str, row_groups: tuple[int, int] | None, positions: set[int] | None, open_paths: Open
) -> Iterator[Values]:
    """The rows of an Arrow file (the stream that Hugging Face's `save_to_disk` writes, or the file format).

    Raises:
        Damage: the file is cut or damaged; the rows before that were yielded.
        ValueError: no image column.
    """
    assert row_groups is None
    with source.damage("not an Arrow file, or cut"):
        if source.read(6) == b"ARROW1":
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            file = pa.ipc.open_stream(source)
            batches = iter(file)
        schema = file.schema
    wanted = _wanted_columns(schema, path)
    position = 0
    while True:
        with source.damage(f"row {position} and after cannot be read"):
            batch = next(batches, None)
            if batch is None:
                return
            batch = batch.select(wanted)
            batch.validate(full=True)  # offsets in a file of someone else's may point anywhere
        for start in range(0, len(batch), _BATCH):
            yield from _batch_samples(batch.slice(start, _BATCH), path, position + start, positions, open_paths)
        position += len(batch)


def _wanted_columns(schema: pa.Schema, path: str) -> list[str]:
    images = image_columns(schema, path)
    captions = [name for name in CAPTION_FIELDS if name in schema.names and name not in images and _is_text(schema.field(name).type)][:1]
    # img2dataset keeps the rows that it could not download, and says why.
    reasons = [name for name in ("status", "error_message") if name in schema.names and _is_text(schema.field(name).type)]
    return [*images, *captions, *(name for name in reasons if name not in images)]


def _batch_samples(batch: pa.RecordBatch, path: str, start: int, positions: set[int] | None, open_paths: Open) -> Iterator[Values]:
    """One sample per row and image column; the key is the row's number, with the column for all but the first."""
    if positions is not None:
        chosen = [i for i in range(len(batch)) if start + i in positions]
        batch = batch.take(pa.array(chosen, pa.int64()))
    else:
        chosen = list(range(len(batch)))
    images = [name for name in image_columns(batch.schema, path) if name in batch.schema.names]
    values = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    cells = [(row, name, _bytes_and_path(values[name][row])) for row in range(len(chosen)) for name in images]
    opened = iter(open_paths([file for _, _, (data, file) in cells if data is None and file is not None]))
    for row, name, (data, file) in cells:
        error = None
        if data is None:
            data, error = next(opened) if file is not None else (None, f"column {name} is null or holds no bytes")
            if file is None and isinstance(values.get("status", [None] * len(chosen))[row], str):
                reason = values.get("error_message", [None] * len(chosen))[row]
                error = f"{values['status'][row]}: {reason}"[:500]
        key = f"{start + chosen[row]:08d}" + ("" if name == images[0] else f".{name}")
        yield key, data, caption_of({field: values[field][row] for field in values if field not in images}), "column", error


def _bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    """The image of one cell: bytes, or else the path of a file that has them."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
    else:
        data, path = (value, None) if isinstance(value, bytes | bytearray | memoryview) else (None, value)
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data), None
    return None, path if isinstance(path, str) and path else None


def resolved(path: str, folder: str, root: str, filesystem: fsspec.AbstractFileSystem) -> tuple[str, str | None]:
    """(place on `filesystem`, error) of a path that a table names, relative to the table's `folder`; outside of `root` it is an error."""
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    scheme, mark, _ = path.partition("://")
    shown = repr(path[:200])
    if mark and scheme.lower() in ("http", "https"):
        return "", f"{shown} is on the web: download the table with img2dataset first, and give its output"
    if mark and scheme not in protocols:
        return "", f"{shown} is on another store than its table: not opened"
    place = filesystem._strip_protocol(path) if mark else path
    target = posixpath.normpath(posixpath.join(folder, place))
    if "\0" in target or not target.startswith(root + "/"):
        return "", f"{shown} leads out of the source's folder {root}: not opened"
    return target, None
