"""Files on any filesystem: is it there, is it still the one that was listed, and its bytes."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec

from curation.names import escaped


class SourceChangedError(ValueError):
    """A file is not the one that was listed; the text names it with its old and new size and version."""


def stamp(info: dict[str, Any]) -> str:
    """Size and version of a file from its fsspec entry: generation (gs://), ETag (s3://), blob (hf://), else the time it was changed."""
    fields = ("generation", "ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
    field = next((field for field in fields if info.get(field) not in (None, "")), None)
    if info["type"] != "file":
        return "missing" if info["type"] == "missing" else "not a regular file"
    if field is None:
        return f"{info.get('size')} bytes"
    value = info[field].timestamp() if hasattr(info[field], "timestamp") else info[field]  # a listing and a single entry may differ in type
    return f"{info.get('size')} bytes, {field} " + (f"{value:.6f}" if isinstance(value, float) else str(value).strip('"'))


def local_info(path: str) -> dict[str, Any]:
    """The same entry of a local file, links followed; a file that is not there is of type missing."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return {"type": "missing"}
    kind = "file" if stat.S_ISREG(facts.st_mode) else "directory" if stat.S_ISDIR(facts.st_mode) else "other"
    return {"size": facts.st_size, "mtime": facts.st_mtime, "type": kind}


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Is it the disk of this machine?"""
    return "file" in ((filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol)


def infos(filesystem: fsspec.AbstractFileSystem, paths: list[str]) -> list[dict[str, Any]]:
    """The entry of each path as it is now; type missing where there is none."""
    if is_local(filesystem):
        return [local_info(path) for path in paths]

    def info(path: str) -> dict[str, Any]:
        try:
            return filesystem.info(path, refresh=True)
        except FileNotFoundError:
            return {"type": "missing"}

    return _each(info, paths)


def _each(function: Callable, items: list) -> list:
    """The results for all items of a remote store, 16 at a time: each one is mostly waiting."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, items))


def check(path: str, before: str, now: str) -> None:
    """Compare a file's stamp in the listing with its stamp now.

    Raises:
        SourceChangedError: they differ.
    """
    if before and before != now:
        raise SourceChangedError(
            f"{escaped(path)} changed since it was listed: {before} -> {now}. Put the file back as it was, or annotate into a new --out."
        )


def contents(
    filesystem: fsspec.AbstractFileSystem, paths: list[str], found: list[dict[str, Any]], limit: int
) -> list[tuple[bytes | None, str | None]]:
    """(bytes, error) of each file, given its entry: one of them is None. What is no regular file, too large or not there is an error.

    Raises:
        OSError: the store cannot be reached now.
    """

    def content(item: tuple[str, dict]) -> tuple[bytes | None, str | None]:
        path, info = item
        if info["type"] != "file":
            return None, f"cannot read the file: it is {'missing' if info['type'] == 'missing' else 'not a regular file'}"
        if (info["size"] or 0) > limit:
            return None, f"file of {info['size']} bytes is over the limit of {limit}"
        try:
            return filesystem.cat_file(path), None
        except OSError as problem:
            if is_local(filesystem) or isinstance(problem, FileNotFoundError | PermissionError):
                return None, f"{type(problem).__name__}: cannot read the file"
            raise

    items = list(zip(paths, found, strict=True))
    return [content(item) for item in items] if is_local(filesystem) else _each(content, items)
