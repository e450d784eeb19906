"""What `--source` may say: paths, fsspec URLs, shell patterns, braces, and @file lists of those."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from glob import has_magic
from itertools import pairwise
from typing import Any

import fsspec

MAX_PATTERNS = 1_000_000  # paths that braces may make
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([a-zA-Z])\.\.([a-zA-Z])(?:\.\.(-?\d+))?")


def filesystem_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(filesystem, place on it) of a path or URL. Credentials come from the environment or fsspec's own configuration, never from us.

    Raises:
        ValueError: the package of this filesystem is missing, or there is no such filesystem.
    """
    scheme = path.partition("://")[0] if "://" in path else "file"
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as problem:
        package = _PACKAGES.get(scheme, scheme)
        raise ValueError(f"--source {path!r} needs the package {package}: pip install {package}") from problem
    except ValueError as problem:
        raise ValueError(f"--source {path!r}: {problem}; use a local path, s3://, gs:// or hf://") from problem


def expand(source: str | Sequence[str]) -> list[str]:
    """Every path and pattern of a source, or of several, with @file lists read and braces expanded.

    An @file holds one path or pattern a line, relative to the list's own folder; empty lines and lines that start with # are left out.

    Raises:
        ValueError: a list cannot be read or names another list; braces make more than MAX_PATTERNS paths.
    """
    found = []
    for entry in [source] if isinstance(source, str) else source:
        for pattern in _list_of(entry[1:]) if entry.startswith("@") else [entry]:
            found += braces(pattern)
            if len(found) > MAX_PATTERNS:
                raise ValueError(f"--source {entry!r} makes over {MAX_PATTERNS} paths; use a pattern with * instead")
    return list(dict.fromkeys(found))


def _list_of(path: str) -> list[str]:
    filesystem, place = filesystem_of(path)
    try:
        text = filesystem.cat_file(place).decode()
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--source @{path}: cannot read the list ({type(problem).__name__}: {problem})") from problem
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if nested := next((line for line in lines if line.startswith("@")), None):
        raise ValueError(f"--source @{path} names another list, {nested!r}; put its lines into one list")
    folder = posixpath.dirname(path)
    return [line if "://" in line else posixpath.join(folder, line) for line in lines]


def braces(pattern: str) -> list[str]:
    """Expand {a,b}, {000..123}, {0..100..10} and {a..e}, also nested, as bash does; a brace without comma or range stays as it is.

    Raises:
        ValueError: over MAX_PATTERNS paths.
    """
    found = []
    for path in _braces(pattern):
        found.append(path)
        if len(found) > MAX_PATTERNS:
            raise ValueError(f"--source {pattern!r} makes over {MAX_PATTERNS} paths; use a pattern with * instead")
    return found


def _braces(pattern: str) -> Iterator[str]:
    start = pattern.find("{")
    while start >= 0:
        depth, commas = 0, [start]
        for end in range(start, len(pattern)):
            depth += (pattern[end] == "{") - (pattern[end] == "}")
            if pattern[end] == "," and depth == 1:
                commas.append(end)
            if depth == 0:
                break
        else:
            end = -1
        inside = pattern[start + 1 : end]
        span = _RANGE.fullmatch(inside) if end > 0 else None
        if end > 0 and (span or len(commas) > 1):
            cuts = [*commas, end]
            parts = _span(span) if span else (part for a, b in pairwise(cuts) for part in _braces(pattern[a + 1 : b]))
            for part in parts:
                for rest in _braces(pattern[end + 1 :]):
                    yield pattern[:start] + part + rest
            return
        start = pattern.find("{", start + 1)
    yield pattern


def _span(span: re.Match) -> Iterator[str]:
    """The numbers or letters of a range, padded as the wider end is where one end is padded."""
    first, last, step, letter, other, letter_step = span.groups()
    low, high = (ord(letter), ord(other)) if letter else (int(first), int(last))
    by = abs(int(step or letter_step or 1)) or 1
    width = max(len(first), len(last)) if not letter and any(re.match(r"-?0\d", end) for end in (first, last)) else 0
    for value in range(low, high + (1 if high >= low else -1), by if high >= low else -by):
        yield chr(value) if letter else str(value).zfill(width)


def fixed_part(place: str) -> str:
    """The folder that every match of a pattern lies in."""
    parts = place.split("/")
    fixed = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    return "/".join(parts[:fixed])


def resolve(filesystem: fsspec.AbstractFileSystem, places: list[str]) -> dict[str, dict[str, Any]]:
    """Place -> fsspec entry of everything that these paths and patterns match, in no more requests than there are folders and patterns.

    Raises:
        ValueError: a path (not a pattern) is not there.
    """
    found: dict[str, dict[str, Any]] = {}
    explicit: dict[str, list[str]] = {}
    for place in places:
        if has_magic(place) and _entry(filesystem, place) is None:  # a name may hold [1] and mean it
            found |= filesystem.glob(place, detail=True)
        else:
            explicit.setdefault(posixpath.dirname(place.rstrip("/")), []).append(place.rstrip("/") or place)
    missing = []
    for folder, paths in explicit.items():
        # One listing of the folder instead of a request for each of its files.
        listed = {entry["name"].rstrip("/"): entry for entry in _entries(filesystem, folder)} if len(paths) > 8 else None
        for path in paths:
            entry = listed.get(path) if listed is not None else _entry(filesystem, path)
            if entry is None:
                missing.append(path)
            else:
                found[path] = entry
    if missing and (found or len(missing) > 1):
        raise ValueError(
            f"--source: {len(missing)} of {len(missing) + len(found)} paths are not there, the first is {missing[0]!r}; "
            "use a pattern with * to take what there is"
        )
    return found


def _entries(filesystem: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    try:
        return filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return []


def _entry(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    try:
        return filesystem.info(path)
    except FileNotFoundError:
        return None
