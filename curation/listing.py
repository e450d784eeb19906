"""RUN/shards.parquet: a source as it was listed, and what may change in it: files may be added, never altered or taken away."""

from dataclasses import fields, replace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.files import SourceChangedError
from curation.names import escaped, safe_shard_name, unescaped
from curation.readers import Shard
from curation.schema import SHARDS
from curation.shards import write_table

LISTING = "shards.parquet"


def save_listing(shards: list[Shard], run_dir: str) -> None:
    """Remember a source's shards in RUN/shards.parquet."""
    rows = [{field.name: getattr(shard, field.name) for field in fields(Shard)} for shard in shards]
    for row in rows:
        row |= {name: escaped(row[name]) for name in ("path", "root")} | {"members": [escaped(member) for member in row["members"]]}
    write_table(pa.Table.from_pylist(rows, SHARDS), f"{run_dir}/{LISTING}", "listing")


def load_listing(run_dir: str) -> list[Shard]:
    """The shards of a run.

    Raises:
        FileNotFoundError: the run was never annotated.
    """
    filesystem, place = fsspec.core.url_to_fs(f"{run_dir}/{LISTING}")
    if not filesystem.exists(place):
        raise FileNotFoundError(f"{run_dir}/{LISTING} is missing; run `k2 annotate --source ... --out {run_dir}` first")
    with filesystem.open(place, "rb") as file:
        rows = pq.read_table(file).to_pylist()
    shards = []
    for row in rows:
        row |= {name: unescaped(row[name]) for name in ("path", "root")} | {"members": [unescaped(member) for member in row["members"]]}
        row |= {name: tuple(row[name]) for name in ("members", "stamps")}
        row |= {name: tuple(map(tuple, row[name])) for name in ("texts", "captions")}
        shards.append(Shard(**row | {"row_groups": tuple(row["row_groups"]) if row["row_groups"] else None}))
    return shards


def grown(known: list[Shard], found: list[Shard], shard_size: int = 256) -> list[Shard]:
    """The known shards, and new ones for files that were added to the source since.

    Raises:
        SourceChangedError: a known file changed or is gone; the first few are named with their old and new size and version.
    """
    before, now = _stamps(known), _stamps(found)
    wrong = [f"{escaped(path)}: {old} -> {now.get(path, 'gone')}" for path, old in before.items() if now.get(path) != old]
    if wrong:
        raise SourceChangedError(
            f"{len(wrong)} files of the source changed since they were listed:\n  "
            + "\n  ".join(wrong[:5])
            + "\nPut them back as they were, or annotate into a new --out."
        )
    shards, names = list(known), {shard.name for shard in known}
    for shard in found:
        if shard.kind != "folder" and shard.path not in before:
            name = shard.name if shard.name not in names else safe_shard_name(f"{shard.name}-{len(names):05d}")
            shards.append(replace(shard, name=name))
            names.add(name)
    for path in sorted({shard.path for shard in found if shard.kind == "folder"}):
        slices = [shard for shard in found if shard.path == path]
        new = [(shard, i) for shard in slices for i, member in enumerate(shard.members) if f"{path}/{member}" not in before]
        stem = slices[0].name.rpartition("-")[0]
        number = 1 + max((int(name.rpartition("-")[2]) for name in names if name.rpartition("-")[0] == stem), default=-1)
        for start in range(0, len(new), shard_size):
            some = new[start : start + shard_size]
            shards.append(_slice_of(f"{stem}-{number + start // shard_size:05d}", path, some))
    return shards


def _slice_of(name: str, path: str, members: list[tuple[Shard, int]]) -> Shard:
    """A slice of a folder from (slice of the new listing, place in it)."""
    return Shard(
        name,
        "folder",
        path,
        tuple(shard.members[i] for shard, i in members),
        size=sum(int(shard.stamps[i].split()[0]) for shard, i in members if shard.stamps[i][0].isdigit()),
        stamps=tuple(shard.stamps[i] for shard, i in members),
        texts=tuple(shard.texts[i] if shard.texts else () for shard, i in members) if any(s.texts for s, _ in members) else (),
        captions=tuple(shard.captions[i] if shard.captions else () for shard, i in members) if any(s.captions for s, _ in members) else (),
    )


def _stamps(shards: list[Shard]) -> dict[str, str]:
    """File -> size and version, of every file of a listing."""
    found: dict[str, str] = {}
    for shard in shards:
        if shard.kind == "folder":
            found |= {f"{shard.path}/{member}": mark for member, mark in zip(shard.members, shard.stamps, strict=True)}
        else:
            found[shard.path] = shard.stamp
    return found
