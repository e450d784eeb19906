"""Captions of a Hugging Face `imagefolder`: metadata.csv, metadata.jsonl or metadata.parquet with a column `file_name`."""

import csv
import io
import json
import posixpath
from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import captions_in, is_caption

MAX_METADATA = 4 << 30  # bytes of one metadata file
_LONGEST = 16 << 20  # characters of one field of a CSV


def captions_of(filesystem: fsspec.AbstractFileSystem, place: str, metadata: list[str]) -> dict[str, tuple[str, ...]]:
    """Image (relative to `place`) -> captions, from metadata files (relative to `place`). A deeper file wins over one above it.

    File names are only looked up, never opened.

    Raises:
        ValueError: a metadata file cannot be read; the text names it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(metadata, key=lambda file: (file.count("/"), file)):
        path = f"{place}/{file}"
        if filesystem.size(path) > MAX_METADATA:
            raise ValueError(f"{path} has over {MAX_METADATA} bytes; split the folder, or give the captions as .txt files")
        first: dict[str, tuple[str, ...]] = {}
        try:
            for row in _rows(filesystem.cat_file(path), file):
                name, captions = row.get("file_name"), captions_in(row)
                if isinstance(name, str) and captions:
                    first.setdefault(posixpath.normpath(posixpath.join(posixpath.dirname(file), name)), tuple(captions))
        except (ValueError, csv.Error, RecursionError, OSError, pa.ArrowException) as problem:
            raise ValueError(f"{path} cannot be read ({type(problem).__name__}: {problem}); mend it or take it away") from problem
        found |= first
    return found


def _rows(data: bytes, file: str) -> Iterator[dict]:
    if file.endswith(".parquet"):
        names = [name for name in pq.read_schema(io.BytesIO(data)).names if name == "file_name" or is_caption(name)]
        yield from pq.read_table(io.BytesIO(data), columns=names).to_pylist()
    elif file.endswith(".jsonl"):
        for line in io.BytesIO(data):
            if line.strip() and isinstance(row := json.loads(line), dict):
                yield row
    else:
        before = csv.field_size_limit(_LONGEST)
        try:
            yield from csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        finally:
            csv.field_size_limit(before)
