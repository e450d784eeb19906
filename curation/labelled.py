"""Labelled images: a manifest or labelled folders -> what is known of each, its container's facts, and its vectors in every view."""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from curation import canonical
from curation.decode import DecodeError, Header, decode_for
from curation.detector import BRANCHES, VIEWS, branch_of
from curation.probe import Labels
from curation.shards import fingerprint, whole_file
from curation.stages.basics import jpeg_quality
from curation.towers import Tower, loaded

COLUMNS = ("path", "label", "generator_or_source", "kind")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".jxl")
JUDGED = (*VIEWS, *canonical.DEGRADATIONS)
FACTS = ("format", "bytes per pixel", "width", "height", "aspect", "jpeg quality")


class Entry(NamedTuple):
    """One labelled image."""

    path: str  # relative to the folder
    synthetic: bool
    group: str
    kind: str


class Images(NamedTuple):
    """N labelled images that could be read."""

    paths: list[str]
    labels: Labels
    area: np.ndarray  # (N,) pixels of the file's image
    container: np.ndarray  # (N, len(FACTS)) float, NaN where it does not apply
    vectors: dict[str, np.ndarray]  # branch -> (N, V, d), NaN where an image has no such view
    num_bad: int


def branches_of(towers: Sequence[Tower]) -> dict[str, Tower]:
    """branch -> tower.

    Raises:
        ValueError: none, or two of the same branch.
    """
    found = {branch_of(tower): tower for tower in towers}
    if not towers or len(found) != len(towers):
        raise ValueError(f"give one tower for pixels (compact), one for semantics (effnet or siglip), or both; got {len(towers)} towers")
    return {name: found[name] for name in BRANCHES if name in found}


def entries(images: str, manifest: str | None) -> list[Entry]:
    """The labelled images of a manifest (TSV: path, label, generator_or_source, kind; labels other than real and synthetic are left
    out), or without one of the folders `images`/real/<source>/... and `images`/synthetic/<generator>/... (kind "unknown").

    Raises:
        ValueError: columns or labels are missing, or there is no such folder or image.
    """
    if manifest is not None:
        return [Entry(r["path"], r["label"] == "synthetic", r["generator_or_source"], r["kind"]) for r in read_manifest(manifest)]
    found = []
    for label in ("real", "synthetic"):
        for path in sorted(Path(images, label).glob("*/**/*")):
            if path.suffix.lower() in SUFFIXES:
                relative = path.relative_to(images)
                found.append(Entry(relative.as_posix(), label == "synthetic", relative.parts[1], "unknown"))
    if not found:
        raise ValueError(f"{images} holds no images as real/<source>/... and synthetic/<generator>/...; give --manifest TSV instead")
    return found


def read_manifest(manifest: str) -> Iterator[dict[str, str]]:
    """The rows labelled real or synthetic.

    Raises:
        ValueError: a column is missing, or no row has such a label.
    """
    with open(manifest, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{manifest} lacks the columns {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}")
        rows = [row for row in reader if row["label"] in ("real", "synthetic")]
    if not rows:
        raise ValueError(f"{manifest} has no row with the label real or synthetic")
    yield from rows


def known_by(found: Sequence[Entry]) -> str:
    """A short hash of a labelled set: the same images with the same labels, wherever they lie."""
    return fingerprint({"entries": [list(entry) for entry in found]})


def read(images: str, found: Sequence[Entry], towers: dict[str, Tower], device: str, seed: int = 0, kept: str | None = None) -> Images:
    """Decode every image once, and embed it in every view of JUDGED.

    With a folder `kept` the vectors stay there, by tower and labelled set: the next call with it reads them.

    The first view is the image as `k2 annotate` gives it to the tower; the others are native-scale crops (`curation.canonical`), which
    images with a side under 256 pixels do not have. An image that cannot be read is named on stderr and counted.

    Raises:
        ValueError: none could be read.
    """
    if kept is not None:
        parts = [_kept(Path(kept), images, found, name, tower, device, seed) for name, tower in towers.items()]
        return parts[0]._replace(vectors={name: part.vectors[name] for name, part in zip(towers, parts, strict=True)})
    encoders = {name: loaded(tower, device) for name, tower in towers.items()}
    paths, rows, area, container = [], [], [], []
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in towers}
    for entry in tqdm(found, desc="images", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()):
        try:
            encoded = Path(images, entry.path).read_bytes()
            header, view, pixels = decode_for(encoded, "pixels")
        except (DecodeError, FileNotFoundError) as error:
            print(f"left out {entry.path}: {error}", file=sys.stderr)
            continue
        rng = np.random.default_rng([seed, *entry.path.encode()])
        squares = _crops(pixels, rng)
        for name, encoder in encoders.items():
            seen = [view if towers[name].reads == "view" else pixels, *squares]
            found_here = np.full((len(JUDGED), towers[name].dim), np.nan, np.float32)
            found_here[: len(seen)] = np.concatenate([encoder.pooled(towers[name].prepare([image])) for image in seen])
            vectors[name].append(found_here)
        paths.append(entry.path)
        rows.append(entry[1:])
        area.append(header.width * header.height)
        container.append(_container(header, len(encoded)))
    if not rows:
        raise ValueError(f"none of the {len(found)} images could be read under {images}; is --images the right folder?")
    labels = Labels(*(np.array(column) for column in zip(*rows, strict=True)))
    stacked = {name: np.stack(vectors[name]) for name in vectors}
    return Images(paths, labels, np.array(area, float), np.array(container, float), stacked, len(found) - len(rows))


def _kept(folder: Path, images: str, found: Sequence[Entry], name: str, tower: Tower, device: str, seed: int) -> Images:
    path = folder / f"{name}-{fingerprint([tower.identity, known_by(found), JUDGED, seed])}.npz"
    if not path.is_file():
        data = read(images, found, {name: tower}, device, seed)
        labels = {f"label_{field}": value for field, value in data.labels._asdict().items()}
        with whole_file(path) as file:
            vectors = data.vectors[name]
            np.savez(file, paths=data.paths, area=data.area, container=data.container, vectors=vectors, num_bad=data.num_bad, **labels)
    file = np.load(path)
    labels = Labels(*(file[f"label_{field}"] for field in Labels._fields))
    return Images(file["paths"].tolist(), labels, file["area"], file["container"], {name: file["vectors"]}, int(file["num_bad"]))


def _crops(pixels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """One crop per view of JUDGED but the first; none of an image that is too small."""
    if not canonical.fits(*pixels.shape[:2]):
        return []
    square = canonical.crop(pixels)
    return [canonical.random_crop(pixels, rng) if view.startswith("random") else canonical.canonical(square, view) for view in JUDGED[1:]]


def _container(header: Header, size: int) -> tuple[float, ...]:
    """FACTS: what a classifier can know without a look at the picture."""
    names = ("JPEG", "PNG", "WEBP")
    kind = names.index(header.format) if header.format in names else len(names)
    quality = jpeg_quality(header.luma_table) if header.luma_table else None
    area = header.width * header.height
    return (kind, size / area, header.width, header.height, header.width / header.height, np.nan if quality is None else quality)
