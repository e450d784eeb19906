"""Whole-or-nothing files, fingerprints, and what is done or missing.

A file exists whole or not at all: it is written under a temporary name and renamed (on object stores a put is
already atomic). "Done" means that the file is there and was made by the same description.
"""

import dataclasses
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

FINGERPRINT_KEY = b"k2.fingerprint"


def describe(value: Any) -> Any:
    """A description (frozen dataclasses, tuples, dicts, paths) as plain JSON values; dataclasses name their class.

    A dataclass may hide fields that do not change values (device, number of workers) by leaving them out of
    its own `describe()` method, or add facts (a hash of its weights).
    """
    if hasattr(value, "describe") and not isinstance(value, type):
        return value.describe()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def fingerprint(value: Any) -> str:
    """A short hash (12 hex digits) of a description."""
    return hashlib.sha256(json.dumps(describe(value), sort_keys=True).encode()).hexdigest()[:12]


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, 12 hex digits: how descriptions name weights."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _filesystem(path: str | Path) -> tuple[fsspec.AbstractFileSystem, str, bool]:
    """(filesystem, path on it, is it the local disk)."""
    filesystem, place = fsspec.core.url_to_fs(str(path))
    return filesystem, place, "file" in _protocols(filesystem)


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The protocols of a filesystem as a tuple (fsspec has a string or a tuple)."""
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write to, which is there whole after the block, or not at all when the block raises.

    On the local disk what is written streams through; on an object store it is held in memory, because there a put is atomic.
    """
    filesystem, place, local = _filesystem(path)
    if not local:
        buffer = io.BytesIO()
        yield buffer
        with filesystem.open(place, "wb") as file:
            file.write(buffer.getbuffer())
        return
    target = Path(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique, so that two writers of one shard (a retry beside a slow worker) do not tear each other's file.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(data: bytes, path: str | Path) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


def write_json(value: Any, path: str | Path) -> None:
    """Write JSON whole or not at all."""
    write_bytes((json.dumps(describe(value), indent=1, sort_keys=True) + "\n").encode(), path)


def write_table(table: pa.Table, path: str | Path, made_by: str, row_group_size: int | None = None) -> None:
    """Write a Parquet file whole or not at all, with the fingerprint `made_by` in its footer.

    The bytes are a function of the table and the fingerprint alone: no time, no host name.
    """
    write_row_groups([table], path, table.schema, made_by, row_group_size)


def write_row_groups(
    tables: Iterable[pa.Table],
    path: str | Path,
    schema: pa.Schema,
    made_by: str,
    row_group_size: int | None = None,
    plain: bool = False,
) -> None:
    """Write each table as row groups of one Parquet file, whole or not at all; one table is in memory at a time.

    With `plain` values are not compressed, and those of a column and row group lie in one page (k2model.data reads them from there).
    """
    # Statistics of nullable columns are left out: DuckDB 2.0.0 reads "all values equal" as "no value is null", and then
    # `WHERE error IS NULL` returns the broken rows too (docs/log.md).
    sound = [field.name for field in schema if not field.nullable]
    schema = schema.with_metadata({**(schema.metadata or {}), FINGERPRINT_KEY: made_by.encode()})
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": sound}
    options |= {"compression": "none", "data_page_size": 1 << 30} if plain else {}
    with whole_file(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=row_group_size or max(len(table), 1))


def read_fingerprint(path: str | Path) -> str | None:
    """The fingerprint in a Parquet file's footer; None when the file is not there."""
    filesystem, place, _ = _filesystem(path)
    if not filesystem.exists(place):
        return None
    with filesystem.open(place, "rb") as file:
        return ((pq.read_schema(file).metadata or {}).get(FINGERPRINT_KEY) or b"").decode()


def is_done(path: str | Path, made_by: str) -> bool:
    """True when `path` is there and was made by this description; False when it is missing.

    Raises:
        ValueError: another description made the file.
    """
    found = read_fingerprint(path)
    if found is None:
        return False
    if found != made_by:
        raise ValueError(
            f"{path} was made by another description (fingerprint {found}, now {made_by}). "
            "Choose a new --out, or delete the old files to make them again."
        )
    return True
