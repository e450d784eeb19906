"""Where images come from: WebDataset tars, a folder, Parquet with an image-bytes column -> shards -> RecordBatches of samples.

Local paths and fsspec URLs (s3://, gs://) take the same way. A shard is the unit of work, retry and resume.
"""

import json
import os
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from glob import has_magic
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.schema import SAMPLES
from curation.shards import write_json

IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "heic", "heif", "jxl"])
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "txt", "alt_text", "description", "TEXT")


@dataclass(frozen=True)
class Shard:
    """A tar, a Parquet file, or a slice of a folder's sorted listing (`members`: paths relative to `path`)."""

    name: str
    kind: str  # tar, parquet or folder
    path: str
    members: tuple[str, ...] = ()


def list_shards(source: str, shard_size: int = 256) -> list[Shard]:
    """The shards of a source, sorted by name; `shard_size` is the number of files in a shard of a folder.

    `source` is a folder, a tar or Parquet file, or a pattern with * or {a,b} or {000..123}; local or an fsspec URL.
    A folder that holds tars or Parquet files is read as those.

    Raises:
        ValueError: nothing matches, the kinds are mixed, or a folder holds no image.
    """
    filesystem, place = fsspec.core.url_to_fs(str(source))
    prefix = source[: source.index("://") + 3] if "://" in str(source) else ""
    if filesystem.isdir(place):
        files = sorted(filesystem.find(place))
        archives = [file for file in files if _archive_kind(file)]
        if archives:
            return _archives(archives, prefix)
        return _folder(place.rstrip("/"), prefix, files, shard_size)
    paths = sorted(
        {
            path
            for pattern in _braces(place)
            for path in (filesystem.glob(pattern) if has_magic(pattern) else [pattern])
            if filesystem.isfile(path)
        }
    )
    if not paths:
        raise ValueError(
            f"--source {source!r} matches nothing; give a folder of images, tars or Parquet files, or a pattern such as 'data/*.tar'"
        )
    strangers = [path for path in paths if not _archive_kind(path)]
    if strangers:
        raise ValueError(
            f"--source {source!r} matches {strangers[0]!r}, which is neither .tar, .tar.gz nor .parquet; give its folder instead"
        )
    return _archives(paths, prefix)


def _archive_kind(path: str) -> str | None:
    if path.endswith((".tar", ".tar.gz", ".tgz")):
        return "tar"
    return "parquet" if path.endswith((".parquet", ".pq")) else None


def _braces(pattern: str) -> list[str]:
    """Expand {a,b} and {000..123} as the shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    parts = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)] if span else match[1].split(",")
    return [rest for part in parts for rest in _braces(pattern[: match.start()] + part + pattern[match.end() :])]


def _archives(paths: list[str], prefix: str) -> list[Shard]:
    root = os.path.commonpath([str(PurePosixPath(path).parent) for path in paths])
    shards = []
    for path in paths:
        name = re.sub(r"\.(tar\.gz|tgz|tar|parquet|pq)$", "", os.path.relpath(path, root)).replace("/", "__")
        shards.append(Shard(name, _archive_kind(path), prefix + path))
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.name in seen:
            raise ValueError(f"two shards are called {shard.name!r}: {seen[shard.name]} and {shard.path}; rename one")
        seen[shard.name] = shard.path
    return shards


def _folder(place: str, prefix: str, files: list[str], shard_size: int) -> list[Shard]:
    images = [os.path.relpath(file, place) for file in files if _suffix(file) in IMAGE_SUFFIXES]
    if not images:
        endings = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"the folder {place!r} holds no image, tar or Parquet file ({len(files)} other files); looked for {endings}")
    name = PurePosixPath(place).name or "images"
    slices = [tuple(images[i : i + shard_size]) for i in range(0, len(images), shard_size)]
    return [Shard(f"{name}-{i:05d}", "folder", prefix + place, members) for i, members in enumerate(slices)]


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower().lstrip(".")


def save_listing(shards: list[Shard], run_dir: str) -> None:
    """Remember a source's shards in RUN/shards.json."""
    write_json([asdict(shard) for shard in shards], f"{run_dir}/shards.json")


def load_listing(run_dir: str) -> list[Shard]:
    """The shards of a run.

    Raises:
        FileNotFoundError: the run was never annotated.
    """
    path = f"{run_dir}/shards.json"
    filesystem, place = fsspec.core.url_to_fs(path)
    if not filesystem.exists(place):
        raise FileNotFoundError(f"{path} is missing; run `k2 annotate --source ... --out {run_dir}` first")
    with filesystem.open(place) as file:
        return [Shard(row["name"], row["kind"], row["path"], tuple(row["members"])) for row in json.load(file)]


def read_samples(shard: Shard, batch_size: int = 64) -> Iterator[pa.RecordBatch]:
    """The samples of a shard in their order, as RecordBatches of schema.SAMPLES with `batch_size` rows.

    A sample whose image cannot be read is a row with `error`. Decoding is not tried here.

    Raises:
        OSError, tarfile.TarError, pa.ArrowException: the shard itself is unreadable (a failed shard, tried again).
    """
    rows: list[dict] = []
    for row in _READERS[shard.kind](shard):
        rows.append(row)
        if len(rows) == batch_size:
            yield pa.RecordBatch.from_pylist(rows, schema=SAMPLES)
            rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=SAMPLES)


def fetch(shards: list[Shard], uids: Collection[str]) -> Iterator[dict]:
    """The rows of schema.SAMPLES with these uids, in the order of the source; only shards that hold one are opened."""
    wanted = set(uids)
    for shard in shards:
        keys = {uid[len(shard.name) + 1 :] for uid in wanted if uid.startswith(shard.name + "/")}
        if not keys:
            continue
        if shard.kind == "folder":
            yield from (_folder_row(shard, member) for member in shard.members if member in keys)
        else:
            yield from (row for row in _READERS[shard.kind](shard) if row["key"] in keys)


def _row(shard: Shard, key: str, image: bytes | None, caption: str | None, caption_source: str, error: str | None = None) -> dict:
    if not caption:
        caption, caption_source = name_in_words(f"{shard.name}/{key}"), "name"
    return {
        "uid": f"{shard.name}/{key}",
        "shard": shard.name,
        "key": key,
        "image": image,
        "caption": caption,
        "caption_source": caption_source,
        "error": error,
    }


def name_in_words(path: str) -> str:
    """A file's folder and name as words, the caption of last resort: 'snow_park/IMG-red fox.jpg' -> 'snow park IMG red fox'."""
    parts = PurePosixPath(path).with_suffix("").parts[-2:]
    return " ".join(re.sub(r"[\W_]+", " ", part).strip() for part in parts).strip()


def _caption(texts: dict[str, bytes]) -> tuple[str | None, str]:
    """Caption and its source from the side files of a sample, by suffix."""
    if "txt" in texts and (text := texts["txt"].decode("utf-8", "replace").strip()):
        return text, "txt"
    if "json" in texts:
        try:
            fields = json.loads(texts["json"])
        except ValueError:
            return None, "name"
        if isinstance(fields, dict):
            for name in _CAPTION_COLUMNS:
                if isinstance(fields.get(name), str) and fields[name].strip():
                    return fields[name].strip(), "json"
    return None, "name"


def _read_tar(shard: Shard) -> Iterator[dict]:
    """Samples of a WebDataset tar: consecutive files that share a name up to the first dot of the base name."""
    seen: set[str] = set()
    with fsspec.open(shard.path, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        key, files = None, {}
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            if name != key:
                yield from _tar_rows(shard, key, files, seen)
                key, files = name, {}
            files[suffix] = tar.extractfile(member).read()
        yield from _tar_rows(shard, key, files, seen)


def _tar_rows(shard: Shard, key: str | None, files: dict[str, bytes], seen: set[str]) -> Iterator[dict]:
    """One row per image of a sample; a sample without one is a row with an error."""
    if not files:
        return
    images = [suffix for suffix in files if suffix.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
    texts = {suffix.rpartition(".")[2].lower(): data for suffix, data in files.items() if suffix not in images}
    caption, caption_source = _caption(texts)
    for i, suffix in enumerate(images or [None]):
        name = key if i == 0 else f"{key}.{suffix}"
        while name in seen:  # a key that comes twice in a tar is two samples, not one lost
            name += "~"
        seen.add(name)
        error = None if suffix else f"sample has no image, only {', '.join(sorted(files))}"
        yield _row(shard, name, files[suffix] if suffix else None, caption, caption_source, error)


def _read_folder(shard: Shard) -> Iterator[dict]:
    return (_folder_row(shard, member) for member in shard.members)


def _folder_row(shard: Shard, member: str) -> dict:
    filesystem, place = fsspec.core.url_to_fs(shard.path)
    path = f"{place}/{member}"
    stem = path[: -len(PurePosixPath(path).suffix)]
    texts = {suffix: filesystem.cat_file(f"{stem}.{suffix}") for suffix in ("txt", "json") if filesystem.exists(f"{stem}.{suffix}")}
    caption, caption_source = _caption(texts)
    try:
        image, error = filesystem.cat_file(path), None
    except OSError as problem:
        image, error = None, f"{type(problem).__name__}: cannot read the file"
    return _row(shard, member, image, caption, caption_source, error)


def _read_parquet(shard: Shard) -> Iterator[dict]:
    """Rows of a Parquet file; the image column holds bytes or a struct with a `bytes` field (Hugging Face)."""
    with fsspec.open(shard.path, "rb") as stream:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        image_column = next((name for name in _IMAGE_COLUMNS if name in names), None)
        if image_column is None:
            raise ValueError(f"{shard.path} has no image column: looked for {', '.join(_IMAGE_COLUMNS)}, found {', '.join(names)}")
        caption_column = next((name for name in _CAPTION_COLUMNS if name in names and name != image_column), None)
        columns = [image_column] + ([caption_column] if caption_column else [])
        position = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                image = row[image_column]
                image = image.get("bytes") if isinstance(image, dict) else image
                image = bytes(image) if isinstance(image, bytes | bytearray | memoryview) else None
                caption = row.get(caption_column) if caption_column else None
                error = None if image is not None else f"column {image_column} is null or holds no bytes"
                yield _row(shard, f"{position:08d}", image, caption if isinstance(caption, str) else None, "column", error)
                position += 1


_READERS = {"tar": _read_tar, "folder": _read_folder, "parquet": _read_parquet}
