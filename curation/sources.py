"""Where images come from: tars, folders, Parquet and Arrow files, local or on a store that fsspec knows -> shards.

A shard is the unit of work, retry and resume. A source is listed once; RUN/shards.parquet remembers what was found, with the size
and version of every file, so that a source that changed is noticed. `curation.readers` reads the samples of a shard.
"""

import heapq
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.columns import image_columns
from curation.files import SourceChangedError, is_local, local_info, stamp
from curation.imagefolder import captions_of
from curation.listing import LISTING, grown, load_listing, save_listing
from curation.names import escaped, name_in_words, safe_shard_name
from curation.patterns import expand, filesystem_of, fixed_part, resolve
from curation.readers import IMAGE_SUFFIXES, TEXT_SUFFIXES, Shard, fetch, member_paths, member_stamp, read_rows, read_samples

__all__ = [
    "IMAGE_SUFFIXES", "Shard", "SourceChangedError", "fetch", "grown", "list_shards", "load_listing", "name_in_words", "read_rows",
    "read_samples", "save_listing", "source_shards",
]  # fmt: skip

SLICE_BYTES = 1 << 30  # a Parquet file beyond this is several shards, each of about half of it
_KINDS = {
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tbz2", ".tar.xz"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}
_ENDINGS = re.compile(r"\.(tar\.(gz|zst|bz2|xz)|tgz|tbz2|tar|parquet|pq|arrow)$")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def source_shards(source: str | Sequence[str], run_dir: str, shard_size: int = 256, relist: bool = False) -> list[Shard]:
    """The shards of a run: as remembered in RUN/shards.parquet, or listed now when nothing is remembered yet.

    With `relist` the source is listed again: files that were added make new shards after the known ones, which keep their names.

    Raises:
        SourceChangedError: `relist` finds that a known file changed or is gone.
        ValueError: as `list_shards`.
    """
    filesystem, place = fsspec.core.url_to_fs(f"{run_dir}/{LISTING}")
    if not filesystem.exists(place):
        return list_shards(source, shard_size)
    known = load_listing(run_dir)
    return grown(known, list_shards(source, shard_size), shard_size) if relist else known


def list_shards(source: str | Sequence[str], shard_size: int = 256) -> list[Shard]:
    """The shards of a source, sorted by name; `shard_size` is the number of images in a shard of a folder.

    `source` is one or several of: a folder, a tar, Parquet or Arrow file, a pattern with * or {a,b} or {000..123}, an @file with one
    of those a line; local or an fsspec URL. A folder that holds tars, Parquet or Arrow files is read as those.

    Raises:
        ValueError: nothing matches, a path is missing, a folder holds no image or both images and archives, two shards share a name,
            a filesystem's package is missing or refuses us.
    """
    groups: dict[str, tuple[fsspec.AbstractFileSystem, list[str]]] = {}
    for pattern in expand(source):
        filesystem, place = filesystem_of(pattern)
        groups.setdefault(pattern.partition("://")[0] if "://" in pattern else "", (filesystem, []))[1].append(place)
    shards: list[Shard] = []
    for scheme, (filesystem, places) in groups.items():
        try:
            shards += _list(source, filesystem, f"{scheme}://" if scheme not in ("", "file") else "", places, shard_size)
        except ValueError:
            raise
        except Exception as problem:
            raise ValueError(
                f"--source {source!r} cannot be listed: {type(problem).__name__}: {problem}. "
                "Credentials come from the environment or from fsspec's configuration."
            ) from problem
    if not shards:
        raise ValueError(
            f"--source {source!r} matches nothing; give a folder of images, tars or Parquet files, or a pattern such as 'data/*.tar'"
        )
    first: dict[str, Shard] = {}
    for shard in shards:
        if (other := first.setdefault(shard.name, shard)) is not shard:
            raise ValueError(
                f"two shards are called {shard.name!r}: {other.path} and {shard.path}; rename one, or give their common folder"
            )
    return sorted(shards, key=lambda shard: shard.name)


def _list(source: Any, filesystem: fsspec.AbstractFileSystem, prefix: str, places: list[str], shard_size: int) -> list[Shard]:
    """The shards of all patterns on one filesystem. Names are relative to what the patterns have in common, not to what they match
    today: a source that grows keeps its names."""
    found = resolve(filesystem, places)
    files = {place: entry for place, entry in found.items() if entry["type"] != "directory"}
    named = {place.rstrip("/") for place in places}
    # A pattern that matches files means the files, not the folders between them; a folder that is named is meant.
    folders = sorted(place for place, entry in found.items() if entry["type"] == "directory" and (not files or place in named))
    if strangers := [place for place in files if not _archive_kind(place)]:
        raise ValueError(
            f"--source {source!r} matches {strangers[0]!r}, which is neither .tar (.gz, .zst, .bz2, .xz), .parquet nor .arrow; "
            "give its folder instead"
        )
    single = len(folders) == 1 and not files
    root = folders[0] if single else _common([fixed_part(place) for place in places])
    shards = _archives(filesystem, prefix, root, _without_side_tables(files))
    for folder in folders:
        shards += _folder(filesystem, prefix, root, folder.rstrip("/"), shard_size)
    return shards


def _common(folders: list[str]) -> str:
    absolute = [folder or "/" for folder in folders]
    return os.path.commonpath(absolute) if len({folder.startswith("/") for folder in absolute}) == 1 else ""


def _archive_kind(path: str) -> str | None:
    return next((kind for kind, endings in _KINDS.items() if path.endswith(endings)), None)


def _without_side_tables(files: dict[str, Any]) -> dict[str, Any]:
    """Leave out the tables that img2dataset writes beside its tars or folders (00000.parquet beside 00000.tar or 00000/), also where
    no download of a shard succeeded and only the table and 00000_stats.json are there: the images lie elsewhere."""
    folders = {str(parent) for file in files for parent in PurePosixPath(file).parents}
    others = any(_archive_kind(file) == "tar" or _suffix(file) in IMAGE_SUFFIXES for file in files)

    def is_side_table(path: str) -> bool:
        stem = path.removesuffix(".parquet")
        return stem != path and (f"{stem}.tar" in files or stem in folders or (others and f"{stem}_stats.json" in files))

    return {path: entry for path, entry in files.items() if not is_side_table(path)}


def _archives(filesystem: fsspec.AbstractFileSystem, prefix: str, root: str, files: dict[str, dict]) -> list[Shard]:
    shards = []
    for path, entry in sorted(files.items()):
        name = safe_shard_name(_ENDINGS.sub("", posixpath.relpath(path, root or ".")))
        entry = local_info(path) if is_local(filesystem) else entry
        if entry["type"] != "file":
            raise ValueError(f"{escaped(path)} is {stamp(entry)}: it cannot be read; take it away or mend it")
        shard = Shard(name, _archive_kind(path), prefix + path, root=prefix + root, size=entry.get("size") or 0, stamp=stamp(entry))
        shards += _slices(filesystem, path, shard) if shard.kind == "parquet" and shard.size > SLICE_BYTES else [shard]
    for shard in shards:
        if shard.kind == "parquet":
            _check_columns(filesystem, shard)
            break
    return shards


def _check_columns(filesystem: fsspec.AbstractFileSystem, shard: Shard) -> None:
    """Raise ValueError now when the first Parquet file has no image column; a damaged one is a matter of reading."""
    try:
        with filesystem.open(filesystem._strip_protocol(shard.path), "rb") as file:
            schema = pq.read_schema(file)
        assert schema.names is not None  # a name that is no UTF-8 shows here
    except (OSError, ValueError, pa.ArrowException):
        return
    image_columns(schema, shard.path)


def _slices(filesystem: fsspec.AbstractFileSystem, path: str, shard: Shard) -> list[Shard]:
    """A large Parquet file as spans of row groups of about SLICE_BYTES / 2, named after their first row group: a function of the file."""
    try:
        with filesystem.open(path, "rb") as file:
            footer = pq.read_metadata(file)
    except (OSError, ValueError, pa.ArrowException):
        return [shard]
    shards, start, size = [], 0, 0
    for group in range(footer.num_row_groups):
        size += footer.row_group(group).total_byte_size
        if size >= SLICE_BYTES // 2 or group + 1 == footer.num_row_groups:
            name = safe_shard_name(f"{shard.name}-rg{start:05d}")
            shards.append(replace(shard, name=name, row_groups=(start, group + 1), size=size))
            start, size = group + 1, 0
    return shards or [shard]


def _folder(filesystem: fsspec.AbstractFileSystem, prefix: str, root: str, place: str, shard_size: int) -> list[Shard]:
    files = _walk(place) if is_local(filesystem) else _find(filesystem, place)
    archives = {
        file: entry
        for file, entry in _without_side_tables(files).items()
        if _archive_kind(file) and posixpath.basename(file) not in _METADATA and not posixpath.basename(file).startswith("cache-")
    }
    images = sorted(file for file in files if _suffix(file) in IMAGE_SUFFIXES)
    if archives and images:
        raise ValueError(
            f"the folder {place!r} holds {len(archives)} archives ({min(archives)}) and {len(images)} loose images ({images[0]}); "
            f"say which you mean: a pattern such as '{place}/**/*{posixpath.splitext(min(archives))[1]}', or a subfolder"
        )
    if archives:
        return _archives(filesystem, prefix, root, {f"{place}/{file}": entry for file, entry in archives.items()})
    if not images:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"the folder {place!r} holds no image, tar, Parquet or Arrow file ({len(files)} other files); looked for {endings}"
        )
    captions = captions_of(filesystem, place, [file for file in files if posixpath.basename(file) in _METADATA])
    name = (posixpath.basename(place) if place == root else posixpath.relpath(place, root)) or "images"
    return _cut(safe_shard_name(name), prefix + place, place, images, files, captions, shard_size)


def _cut(
    name: str,
    path: str,
    place: str,
    images: list[str],
    files: dict[str, dict],
    captions: dict[str, tuple[str, ...]],
    shard_size: int,
    start: int = 0,
) -> list[Shard]:
    """Slices of a folder's sorted images, numbered from `start`."""
    shards = []
    for i in range(0, len(images), shard_size):
        members = images[i : i + shard_size]
        beside = [tuple(suffix for suffix in TEXT_SUFFIXES if f"{posixpath.splitext(member)[0]}.{suffix}" in files) for member in members]
        stamps = [
            member_stamp([files[path[len(place) + 1 :]] for path in member_paths(place, member, texts)])
            for member, texts in zip(members, beside, strict=True)
        ]
        shards.append(
            Shard(
                f"{name}-{start + i // shard_size:05d}",
                "folder",
                path,
                tuple(members),
                size=sum(files[member].get("size") or 0 for member in members),
                stamps=tuple(stamps),
                texts=tuple(beside) if any(beside) else (),
                captions=tuple(captions.get(member, ()) for member in members) if captions else (),
            )
        )
    return shards


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower().lstrip(".")


def _walk(place: str) -> dict[str, dict]:
    """Relative path -> entry of every file below a local folder, hidden ones left out.

    Links to folders are followed, each real folder once and the real ones first: loops end, and the result does not depend on the
    order of the disk.
    """
    found: dict[str, dict] = {}
    seen: set[tuple[int, int]] = set()
    real, linked = [""], []
    while real or linked:
        folder = real.pop() if real else heapq.heappop(linked)
        facts = os.stat(posixpath.join(place, folder))
        if (facts.st_dev, facts.st_ino) in seen:
            continue
        seen.add((facts.st_dev, facts.st_ino))
        with os.scandir(posixpath.join(place, folder)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                path = posixpath.join(folder, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    real.append(path)
                elif local_info(entry.path)["type"] == "directory":
                    heapq.heappush(linked, path)
                else:
                    found[path] = local_info(entry.path)
    return found


def _find(filesystem: fsspec.AbstractFileSystem, place: str) -> dict[str, dict]:
    """The same of a store, in pages of many files a request."""
    entries = filesystem.find(place, detail=True)
    relative = {
        path[len(place) + 1 :]: entry for path, entry in entries.items() if entry["type"] == "file" and path.startswith(place + "/")
    }
    return {path: entry for path, entry in relative.items() if not re.search(r"(^|/)(\.|__MACOSX/)", path)}
