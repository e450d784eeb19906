"""The samples of one shard: a tar, a Parquet or Arrow file, or a slice of a folder -> rows of schema.SAMPLES.

Rows in are rows out. An image that cannot be read is a row with `error`. Where a file is cut or damaged, the samples before the
damage are rows, and one last row with the key `~lost` says in `error` where it ends and why: the same file always gives the
same rows, so a torn file does not fail its shard for ever. A lost connection is no damage: it raises, and the shard is tried again.
"""

import json
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from curation import columns, tar
from curation.decode import LIMITS
from curation.files import SourceChangedError, check, contents, infos, is_local, place_of, stamp
from curation.names import LOST, escaped, name_in_words, safe_key, webdataset_key
from curation.schema import SAMPLES

IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "heic", "heif", "jxl"])
TEXT_SUFFIXES = ("txt", "json")
MAX_TEXT = 16 << 20  # bytes of a caption file
MAX_SAMPLE = 1 << 30  # bytes of one tar sample, all its images together
MAX_BATCH = 256 << 20  # bytes of images in one RecordBatch, beyond its first row
_REMOTE = {"block_size": 8 << 20, "cache_type": "readahead"}  # ranges as they are needed, never the whole file
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes inside a tar


@dataclass(frozen=True)
class Shard:
    """A tar, a Parquet or Arrow file (or a span of a Parquet file's row groups), or a slice of a folder's listing."""

    name: str  # safe as a file name
    kind: str  # tar, parquet, arrow or folder
    path: str  # local path or fsspec URL
    members: tuple[str, ...] = ()  # of a folder: image files, relative to `path`
    root: str = ""  # paths inside a Parquet file may not lead out of here
    size: int = 0  # bytes of the file, or of a folder's members
    stamp: str = ""  # size and version of the file when it was listed; empty: not checked
    row_groups: tuple[int, int] | None = None  # first and one past the last; None: all
    stamps: tuple[str, ...] = ()  # one per member
    texts: tuple[tuple[str, ...], ...] = ()  # suffixes of the text files beside each member
    captions: tuple[tuple[str, ...], ...] = ()  # of each member, from a folder's metadata.csv, .jsonl or .parquet


class Sample(NamedTuple):
    """What a reader finds, before it becomes a row."""

    key: str
    image: bytes | None
    captions: Sequence[str]  # the first is the caption
    caption_source: str
    error: str | None


def read_samples(shard: Shard, batch_size: int = 64) -> Iterator[pa.RecordBatch]:
    """The samples of a shard in their order, as RecordBatches of schema.SAMPLES with at most `batch_size` rows and about MAX_BATCH
    bytes. Decoding is not tried here.

    Raises:
        SourceChangedError: the file is not the one that was listed.
        ValueError: a Parquet file has no image column.
        OSError: the file cannot be reached now (a failed shard, tried again).
    """
    rows: list[dict] = []
    size = 0
    for row in read_rows(shard):
        rows.append(row)
        size += len(row["image"] or b"")
        if len(rows) == batch_size or size >= MAX_BATCH:
            yield _batch(rows)
            rows, size = [], 0
    if rows:
        yield _batch(rows)


def _batch(rows: list[dict]) -> pa.RecordBatch:
    arrays = [pa.array([row[field.name] for row in rows], field.type) for field in SAMPLES]
    return pa.RecordBatch.from_arrays(arrays, schema=SAMPLES)


def fetch(shards: list[Shard], uids: Collection[str]) -> Iterator[dict]:
    """The rows of schema.SAMPLES with these uids, in the order of the source; only shards that hold one are opened, and only the
    wanted images are read from them. An image of a folder that is not the one that was listed is a row with `error`.

    Raises:
        As `read_samples`.
    """
    keys: dict[str, set[str]] = {}
    for uid in uids:
        name, _, key = uid.partition("/")
        keys.setdefault(name, set()).add(key)
    for shard in shards:
        if wanted := keys.get(shard.name):
            yield from read_rows(shard, wanted)


def read_rows(shard: Shard, wanted: set[str] | None = None) -> Iterator[dict]:
    """The same samples one by one, as dicts of the columns of schema.SAMPLES, which copies no image; only `wanted` keys where given.

    Raises:
        As `read_samples`.
    """
    taken: dict[str, int] = {}
    for sample in _READERS[shard.kind](shard, wanted):
        key = name = safe_key(sample.key)
        while key in taken:  # a key that comes twice is two samples, not one lost
            taken[name] += 1
            key = f"{name}~{taken[name]}"
        taken[key] = 1
        if wanted is not None and key not in wanted:
            continue
        captions, source = sample.captions, sample.caption_source
        if not captions:
            captions, source = [name_in_words(f"{shard.name}/{key}")], "name"
        yield {
            "uid": f"{shard.name}/{key}",
            "shard": shard.name,
            "key": key,
            "image": sample.image,
            "caption": captions[0],
            "caption_source": source,
            "other_captions": list(captions[1:]),
            "error": sample.error,
        }


@contextmanager
def opened(shard: Shard) -> Iterator[tar.Source]:
    """The file of a shard, compared with the listing."""
    filesystem, place = place_of(shard.path)
    check(shard.path, shard.stamp, stamp(infos(filesystem, [place])[0]))
    with filesystem.open(place, "rb", **({} if is_local(filesystem) else _REMOTE)) as file:
        yield tar.Source(file)


# --- captions ---


def captions_of(texts: dict[str, bytes]) -> tuple[list[str], str]:
    """Captions of a sample, the main one first, and where that one comes from, out of its text files by suffix.

    The main one is that of `txt`, or the longest of `long.txt`, `short.txt` and the like, or that of `json`. Beside a text file, `json`
    gives what it names as further captions. A text stays as it is, byte order mark aside.
    """
    written = {suffix: data.decode("utf-8-sig", "replace") for suffix, data in texts.items() if suffix != "json"}
    written = {suffix: text for suffix, text in written.items() if text and not text.isspace()}
    main = [written.get("txt") or max(written.values(), key=len)] if written else []
    try:
        fields = json.loads(texts.get("json", b"null"))
    except (ValueError, RecursionError):
        fields = None
    found = columns.other_captions(fields) if main else columns.captions_in(fields)
    captions = list(dict.fromkeys([*main, *written.values(), *found]))[: columns.MAX_CAPTIONS]
    return captions, "txt" if main else "json" if found else "name"


# --- tars ---


def _tar_samples(shard: Shard, wanted: set[str] | None) -> Iterator[Sample]:
    """Samples of a WebDataset tar: consecutive files that share a name up to the first dot of the base name.

    A link, a device, a sparse file and a name without a dot belong to no sample: each is a row with an error.
    """
    bases = None if wanted is None else {base for key in wanted for base in _bases(key)}
    with opened(shard) as source:
        key: str | None = None
        files: dict[str, tuple[bytes | None, str | None]] = {}
        size, lost = 0, None
        try:
            for member in tar.members(source):
                if member.kind == "directory" or _META.match(member.name):
                    continue
                name, suffix = webdataset_key(member.name)
                if member.kind != "file" or name is None:
                    what = f"a {member.kind}: not followed, not read" if member.kind != "file" else "a file without a suffix"
                    yield Sample(member.name, None, (), "name", f"{escaped(member.name)[:200]} is {what}")
                    continue
                if name != key or suffix in files:
                    yield from _tar_sample(key, files)
                    key, files, size = name, {}, 0
                files[suffix] = (None, "the tar is cut inside this file")  # until it is read
                files[suffix] = _content(member, suffix, size) if bases is None or safe_key(name) in bases else (None, None)
                size += len(files[suffix][0] or b"")
        except tar.Damage as problem:
            lost = str(problem)
        yield from _tar_sample(key, files)
        if lost:
            yield Sample(LOST, None, (), "name", f"samples after this one are lost: {lost}")


def _bases(key: str) -> Iterator[str]:
    """The WebDataset keys that a row's key may have come from: itself, without its count, without the suffix of a further image."""
    for name in {key, re.sub(r"~\d+$", "", key)}:
        yield name
        yield webdataset_key(name)[0] or name


def _content(member: tar.Member, suffix: str, size: int) -> tuple[bytes | None, str | None]:
    """(bytes, error) of one file of a sample of which `size` bytes are read; what is neither image nor text is not read."""
    ending = suffix.rpartition(".")[2]
    if ending not in IMAGE_SUFFIXES and ending not in TEXT_SUFFIXES:
        return None, None
    limit = LIMITS.max_bytes if ending in IMAGE_SUFFIXES else MAX_TEXT
    if member.size > limit:
        return None, f"file of {member.size} bytes is over the limit of {limit}"
    if size + member.size > MAX_SAMPLE:
        return None, f"the images of this sample are over the limit of {MAX_SAMPLE} bytes together"
    return member.read(), None


def _tar_sample(key: str | None, files: dict[str, tuple[bytes | None, str | None]]) -> Iterator[Sample]:
    """One row per image of a sample; a sample without one is a row with an error."""
    if key is None:
        return
    images = [suffix for suffix in files if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    texts: dict[str, bytes] = {}
    trouble = None
    for suffix, (data, error) in files.items():
        ending = suffix.rpartition(".")[2]
        if ending == "txt" or suffix == "json" or (ending == "json" and "json" not in texts):
            texts["json" if ending == "json" else suffix] = data or b""
            trouble = f"{escaped(suffix)}: {error}" if error else trouble
    captions, source = captions_of(texts)
    for i, suffix in enumerate(images):
        data, error = files[suffix]
        yield Sample(key if i == 0 else f"{key}.{suffix}", data, captions, source, error or trouble)
    if not images:
        yield Sample(key, None, captions, source, f"sample has no image, only {escaped(', '.join(sorted(files))[:200])}")


# --- folders ---


def member_paths(place: str, member: str, texts: tuple[str, ...]) -> list[str]:
    """The paths of an image and of the text files beside it."""
    path = f"{place}/{member}"
    return [path, *(f"{posixpath.splitext(path)[0]}.{suffix}" for suffix in texts)]


def _folder_samples(shard: Shard, wanted: set[str] | None) -> Iterator[Sample]:
    filesystem, place = place_of(shard.path)
    place = place.rstrip("/")
    chosen = [i for i, member in enumerate(shard.members) if wanted is None or safe_key(member) in wanted]
    for start in range(0, len(chosen), 16):
        some = chosen[start : start + 16]
        texts = [shard.texts[i] if shard.texts else () for i in some]
        paths = [member_paths(place, shard.members[i], suffixes) for i, suffixes in zip(some, texts, strict=True)]
        everything = [path for group in paths for path in group]
        found = dict(zip(everything, infos(filesystem, everything), strict=True))
        changed: dict[int, str] = {}
        for i, group in zip(some, paths, strict=True):
            try:
                check(group[0], shard.stamps[i] if shard.stamps else "", member_stamp([found[path] for path in group]))
            except SourceChangedError as problem:
                if wanted is None:
                    raise
                changed[i] = str(problem)  # of a few images that are wanted back, one that changed must not take the others along
        first, beside = [group[0] for group in paths], [path for group in paths for path in group[1:]]
        images = contents(filesystem, first, [found[path] for path in first], LIMITS.max_bytes)
        sides = iter(contents(filesystem, beside, [found[path] for path in beside], MAX_TEXT))
        for i, group, suffixes, (image, error) in zip(some, paths, texts, images, strict=True):
            given = {suffix: next(sides) for suffix in suffixes}
            for suffix, path in zip(suffixes, group[1:], strict=True):
                if is_local(filesystem) and _leads_out(path, place):
                    given[suffix] = (None, "a link that leads out of the source's folder: not read")
            trouble = next((f"{suffix}: {problem}" for suffix, (_, problem) in given.items() if problem), None)
            captions, source = captions_of({suffix: data for suffix, (data, _) in given.items() if data})
            if not captions and shard.captions and shard.captions[i]:
                captions, source = shard.captions[i], "metadata"
            if i in changed:
                image, error = None, changed[i]
            yield Sample(shard.members[i], image, captions, source, error or trouble)


def member_stamp(found: list[dict[str, Any]]) -> str:
    """The stamp of an image of a folder and of the text files beside it."""
    return "; ".join(stamp(info) for info in found)


def _leads_out(path: str, place: str) -> bool:
    """Is a text file a link to somewhere else? Its text would end up in the data set, whatever it is: a key, a password."""
    return os.path.islink(path) and not os.path.realpath(path).startswith(os.path.realpath(place) + "/")


# --- Parquet and Arrow ---


def _table_samples(shard: Shard, wanted: set[str] | None) -> Iterator[Sample]:
    read = columns.parquet_samples if shard.kind == "parquet" else columns.arrow_samples
    positions = None if wanted is None else {int(digits[0]) for key in wanted if (digits := re.match("[0-9]{1,18}", key))}
    with opened(shard) as source:
        try:
            for values in read(source, shard.path, shard.row_groups, positions, lambda paths: _inside(shard, paths)):
                yield Sample(*values)
        except tar.Damage as problem:
            yield Sample(LOST, None, (), "name", f"rows after this one are lost: {problem}")


def _inside(shard: Shard, paths: list[str]) -> list[tuple[bytes | None, str | None]]:
    """(bytes, error) of the files that a table names, relative to it; none outside of the source's root is opened."""
    filesystem, place = place_of(shard.path)
    root = place_of(shard.root or posixpath.dirname(shard.path))[1].rstrip("/")
    errors: list[str | None] = []
    places: list[str] = []
    for path in paths:
        target, error = columns.resolved(path, posixpath.dirname(place), root, filesystem)
        if error is None and is_local(filesystem) and not os.path.realpath(target).startswith(os.path.realpath(root) + "/"):
            error = f"{escaped(path)[:200]!r} is a link that leads out of the source's folder {root}: not opened"
        errors.append(error)
        places.append(target)
    good = [target for target, error in zip(places, errors, strict=True) if error is None]
    found = iter(contents(filesystem, good, infos(filesystem, good), LIMITS.max_bytes))
    results = []
    for path, error in zip(paths, errors, strict=True):
        data, problem = next(found) if error is None else (None, None)
        results.append((data, f"{escaped(path)[:200]!r}: {problem}" if problem else error))
    return results


_READERS = {"tar": _tar_samples, "folder": _folder_samples, "parquet": _table_samples, "arrow": _table_samples}
