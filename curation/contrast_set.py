"""The vectors of a contrast set: every picture of a source as it is, damaged, restyled and merely handled, through one tower.

Who gets what bounds the cost. A picture of `fit` gets a seeded two thirds of the kinds of damage, each in one drawn severity: damage is
discovered there, from one independent pair per picture and kind. A picture of `estimate` or `report` gets every kind in one drawn
severity, every style and every control: thresholds and their claims need styles. That makes 22 pictures of one; 500 pictures cost about
10 CPU minutes with EfficientNet. Real art, illustrations and renders are style families of their own: clean, and not to be removed.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from tqdm import tqdm

from curation.contrast import CONTROLS, DAMAGE, STYLES, window
from curation.contrast_damage import SEVERITIES
from curation.decode import DecodeError, decode
from curation.labelled import read_manifest
from curation.shards import fingerprint, whole_file
from curation.sources import list_shards, read_samples
from curation.tags import PARTS, part
from curation.towers import Tower, loaded

VERSION = 1  # of the transforms and of who gets what: kept vectors of another version are not used
REAL_STYLES = ("art", "illustration", "render")  # kinds of a manifest that nobody may remove for what they are
SHARE_IN_FIT = 2 / 3  # of the kinds of damage that a picture of `fit` gets


class Family(NamedTuple):
    """One way to change a picture."""

    name: str  # "clean", a name of DAMAGE, STYLES or CONTROLS, or a kind of REAL_STYLES
    role: str  # clean, damage, style or control
    severity: int  # 1 to 5 for damage, else 0


CLEAN = Family("clean", "clean", 0)
FAMILIES = [
    CLEAN,
    *(Family(name, "damage", severity) for name in DAMAGE for severity in SEVERITIES),
    *(Family(name, "style", 0) for name in STYLES),
    *(Family(name, "control", 0) for name in CONTROLS),
    *(Family(kind, "style", 0) for kind in REAL_STYLES),
]


class ContrastSet(NamedTuple):
    """N pictures in F families through a tower of d dimensions."""

    families: list[Family]
    uids: list[str]
    part: np.ndarray  # (N,) str: fit, estimate or report
    vectors: np.ndarray  # (N, F, d) float32; NaN where a picture lacks a family
    tower: str  # its identity
    groups: np.ndarray  # (N,) str: where a picture comes from, "" when nobody said
    seed: int  # of the changes, with which `changed` makes them again


class Picture(NamedTuple):
    """One image of a source."""

    key: str
    uid: str
    encoded: bytes


def pictures(source: str, only: Mapping[str, Any] | set[str] | None = None) -> Iterator[Picture]:
    """The samples of a source that have bytes; `only` are keys (of a folder: relative paths) to keep."""
    for shard in list_shards(source):
        for batch in read_samples(shard, 16):
            for row in batch.to_pylist():
                if row["image"] is not None and (only is None or row["key"] in only):
                    yield Picture(row["key"], row["uid"], row["image"])


def changed(image: np.ndarray, family: Family, rng: np.random.Generator) -> np.ndarray:
    """A picture (uint8 (H, W, 3)) as a member of a family; of a large one the middle window, whatever the family."""
    image = window(image)
    if family.role == "damage":
        return DAMAGE[family.name](image, rng, family.severity)
    return (STYLES | CONTROLS)[family.name](image, rng) if family.name in STYLES | CONTROLS else image


def generator(uid: str, family: Family, seed: int) -> np.random.Generator:
    """What draws the details of one picture's change: the same picture comes out of it again at any time."""
    return np.random.default_rng([seed, crc32(uid.encode()), crc32(family.name.encode()), family.severity])


def planned(uid: str, where: str, seed: int) -> list[Family]:
    """The families that a picture of a part gets, all of which are encoded (real styles are clean pictures, so they are not)."""
    rng = np.random.default_rng([seed, crc32(uid.encode())])
    severities = rng.integers(1, len(SEVERITIES) + 1, len(DAMAGE))
    taken = rng.permutation(len(DAMAGE))[: round(len(DAMAGE) * SHARE_IN_FIT)] if where == "fit" else range(len(DAMAGE))
    damage = {Family(name, "damage", int(s)) for i, (name, s) in enumerate(zip(DAMAGE, severities, strict=True)) if i in set(taken)}
    more = where != "fit"
    return [f for f in FAMILIES if f == CLEAN or f in damage or (more and f.name in STYLES | CONTROLS)]


def read(
    images: str,
    tower: Tower,
    only: Mapping[str, tuple[str, str]] | set[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    kept: str | None = None,
) -> ContrastSet:
    """Decode every picture once, change it, embed it.

    Args:
        images: Folder, tars or Parquet.
        tower: The encoder.
        only: Keys to take; as a mapping it says the source and the kind of each (`sources_of`).
        device: Of the tower.
        seed: Of who gets what, and of the changes.
        kept: Folder in which the vectors stay, by tower, pictures and seed: the next call reads what is there and makes the rest.

    Raises:
        ValueError: a part has no picture.
    """
    total = len(only) if only is not None else None
    taken = tqdm(pictures(images, only), total=total, desc="contrast set", unit="image", file=sys.stderr)
    found = [(p, made) for p in taken if (made := _vectors(p, tower, device, seed, kept)) is not None]
    where = np.array([part(p.encoded) for p, _ in found], str)
    counts = {name: int((where == name).sum()) for name in PARTS}
    if min(counts.values()) == 0:
        raise ValueError(f"pictures per part are {counts}; every part needs some: give more images")
    vectors = np.full((len(found), len(FAMILIES), tower.dim), np.nan, np.float32)
    for index, (_, (families, rows)) in enumerate(found):
        vectors[index, families] = rows
    facts = only if isinstance(only, Mapping) else {}
    groups, kinds = (np.array([facts.get(p.key, ("", ""))[i] for p, _ in found], str) for i in (0, 1))
    for index, family in enumerate(FAMILIES):
        if family.name in REAL_STYLES:
            vectors[kinds == family.name, index] = vectors[kinds == family.name, 0]
    return ContrastSet(FAMILIES, [p.uid for p, _ in found], where, vectors, tower.identity, groups, seed)


def sources_of(manifest: str) -> dict[str, tuple[str, str]]:
    """key -> (source, kind) of the real images of a manifest. Raises as `labelled.read_manifest` does."""
    return {row["path"]: (row["generator_or_source"], row["kind"]) for row in read_manifest(manifest) if row["label"] == "real"}


def _vectors(picture: Picture, tower: Tower, device: str, seed: int, kept: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(families (R,), vectors (R, d)) of one picture, read where they are kept; None when it cannot be decoded."""
    name = fingerprint([tower.identity, VERSION, seed, picture.uid, crc32(picture.encoded), len(picture.encoded)])
    path = Path(kept, tower.name, f"{name}.npz") if kept else None
    if path is not None and path.is_file():
        file = np.load(path)
        return file["families"], file["vectors"]
    try:
        image = decode(picture.encoded)[0]
    except DecodeError as error:
        print(f"left out {picture.uid}: {error}", file=sys.stderr)
        return None
    plan, encode = planned(picture.uid, part(picture.encoded), seed), loaded(tower, device)
    members = [changed(image, family, generator(picture.uid, family, seed)) for family in plan]
    families, vectors = np.array([FAMILIES.index(family) for family in plan]), encode.pooled(tower.prepare(members))
    if path is not None:
        with whole_file(path) as file:
            np.savez(file, families=families, vectors=vectors)
    return families, vectors
