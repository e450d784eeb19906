"""Images and captions in the columns of Parquet and Arrow files: bytes, Hugging Face's {bytes, path}, or paths to files."""

import json
import posixpath
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.tar import Source

CAPTION_FIELDS = ("caption", "text", "prompt", "txt", "alt_text", "description", "TEXT")  # the first that is there is the caption
MAX_CAPTIONS = 64  # of one image
_LENGTHS = "long|medium|short|detailed|dense|brief"
_OTHER_CAPTIONS = re.compile(rf"captions|({_LENGTHS})_captions?|captions?_({_LENGTHS}|\d+)")  # further captions of the same image
_IMAGE_NAME = re.compile(r"(image|img|jpg|jpeg|png|webp|bytes|image_bytes|picture|photo)([_.]?\d+)?", re.IGNORECASE)
_PATH_NAME = re.compile(r"((image|img)_?)?(path|file|filepath|file_?name|url|uri|key)|image|img", re.IGNORECASE)
_BATCH = 64
_BUFFER = 8 << 20  # bytes: a column chunk is read in pieces, so that a row group of gigabytes fits

# Every function that yields samples yields (key, image, captions, caption source, error).
Values = tuple[str, bytes | None, list[str], str, str | None]
Open = Callable[[list[str]], list[tuple[bytes | None, str | None]]]  # paths that a table names -> (bytes, error) of each


def captions_in(fields: Any) -> list[str]:
    """The captions among the fields of a JSON file or a row, each once and at most MAX_CAPTIONS; none when there is none.

    The first one is the caption: of the first of CAPTION_FIELDS that has text, else the longest. The others are the rest of that field,
    where it is a list, and of the fields that `is_caption` knows beside CAPTION_FIELDS, in their order.
    """
    if not isinstance(fields, dict):
        return []
    main = next((found for name in CAPTION_FIELDS if (found := _texts(fields.get(name)))), [])
    others = other_captions(fields)
    if not main and others:
        main = [max(others, key=len)]
    return list(dict.fromkeys(main + others))[:MAX_CAPTIONS]


def other_captions(fields: Any) -> list[str]:
    """The captions of short_caption, caption_long, captions, caption_1 and the like, in their order."""
    if not isinstance(fields, dict):
        return []
    named = (value for name, value in fields.items() if isinstance(name, str) and _OTHER_CAPTIONS.fullmatch(name))
    return [text for value in named for text in _texts(value)]


def is_caption(name: str) -> bool:
    """Does `captions_in` look at a field of this name: caption, text, short_caption, caption_long, captions, caption_1 ...?"""
    return name in CAPTION_FIELDS or bool(_OTHER_CAPTIONS.fullmatch(name))


def _texts(value: Any) -> list[str]:
    """The texts of a field: one, or a list of them. A lone surrogate (JSON can spell one) is no text that a file can hold."""
    values = value if isinstance(value, list) else [value]
    return [text.encode("utf-8", "replace").decode() for text in values if isinstance(text, str) and text.strip()]


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


def _is_texts(kind: pa.DataType) -> bool:
    """Text, or lists of text."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return _is_text(kind.value_type if any(check(kind) for check in lists) else kind)


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
        assert schema.names is not None  # read here, where a name that is no UTF-8 is damage
    wanted_images = image_columns(schema, path)
    wanted = [*wanted_images, *_other_columns(schema, wanted_images)]
    order = None if positions is None else sorted(positions)
    position = 0
    first, last = row_groups or (0, file.num_row_groups)
    for group in range(last):
        size = file.metadata.row_group(group).num_rows
        inside = group >= first and (order is None or bisect_left(order, position) < bisect_left(order, position + size))
        batches = file.iter_batches(_BATCH, row_groups=[group], columns=wanted) if inside else iter(())
        start = position
        while True:
            with source.damage(f"row {start} and after cannot be read"):
                batch = next(batches, None)
                if batch is None:
                    break
                numbers, values = _values(batch, start, positions)
            yield from _batch_samples(numbers, values, wanted_images, open_paths)
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
        assert schema.names is not None
    wanted_images = image_columns(schema, path)
    wanted = [*wanted_images, *_other_columns(schema, wanted_images)]
    position = 0
    while True:
        with source.damage(f"row {position} and after cannot be read"):
            batch = next(batches, None)
            if batch is None:
                return
            batch = batch.select(wanted)
            batch.validate(full=True)  # offsets in a file of someone else's may point anywhere
        for start in range(0, len(batch), _BATCH):
            with source.damage(f"row {position + start} and after cannot be read"):
                numbers, values = _values(batch.slice(start, _BATCH), position + start, positions)
            yield from _batch_samples(numbers, values, wanted_images, open_paths)
        position += len(batch)


def _other_columns(schema: pa.Schema, images: list[str]) -> list[str]:
    texts = [name for name in schema.names if is_caption(name) and name not in images and _is_texts(schema.field(name).type)]
    main = [name for name in CAPTION_FIELDS if name in texts][:1]
    captions = [name for name in texts if name in main or name not in CAPTION_FIELDS]
    # img2dataset keeps the rows that it could not download, and says why.
    reasons = [name for name in ("status", "error_message") if name in schema.names and _is_text(schema.field(name).type)]
    return [*captions, *(name for name in reasons if name not in images)]


def _values(batch: pa.RecordBatch, start: int, positions: set[int] | None) -> tuple[list[int], dict[str, list]]:
    """(numbers of the wanted rows in the file, column -> their values). Raises ValueError for text that is no UTF-8."""
    numbers = list(range(start, start + len(batch)))
    if positions is not None:
        numbers = [number for number in numbers if number in positions]
        batch = batch.take(pa.array([number - start for number in numbers], pa.int64()))
    return numbers, {name: batch.column(name).to_pylist() for name in batch.schema.names}


def _batch_samples(numbers: list[int], values: dict[str, list], images: list[str], open_paths: Open) -> Iterator[Values]:
    """One sample per row and image column; the key is the row's number, with the column for all but the first."""
    nothing = [None] * len(numbers)
    cells = [(row, name, _bytes_and_path(values[name][row])) for row in range(len(numbers)) for name in images]
    opened = iter(open_paths([file for _, _, (data, file) in cells if data is None and file is not None]))
    for row, name, (data, file) in cells:
        error = None
        if data is None:
            data, error = next(opened) if file is not None else (None, f"column {name} is null or holds no bytes")
            if file is None and (status := values.get("status", nothing)[row]) is not None:
                error = f"{status}: {values.get('error_message', nothing)[row]}"[:500]
        key = f"{numbers[row]:08d}" + ("" if name == images[0] else f".{name}")
        yield key, data, captions_in({field: values[field][row] for field in values if field not in images}), "column", error


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
