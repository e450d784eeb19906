"""The heap of `bench_study.py`: squares of real photographs and art, styled, damaged and copied images, generated ones; what is held
out; the policies of the arms.

No image of a held-out file, nor a part of it, is in the heap.
"""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.decode import DecodeError, decode_for
from curation.faults import FAULTS, encode
from curation.rules import rules
from curation.shards import write_bytes, write_json, write_table
from curation.sources import list_shards

SIDE = 256  # the heap's images have at most this side: what styles and damage are planted at, and the top resolution of the study
LEAST = 128  # and at least this one
SHARES = {"clean": 0.55, "styled": 0.20, "generated": 0.10, "damaged": 0.10, "duplicate": 0.05}
DAMAGE = (  # faults that leave a square a square, and a file that opens
    *("bordered", "noisy", "recompressed", "resaved", "banded", "oversaturated", "overexposed", "underexposed", "interlaced"),
    *("lettered", "watermarked"),
)
STYLES = tuple(name for name, fault in FAULTS.items() if fault.expect == "kept")
COPIES = tuple(name for name, fault in FAULTS.items() if fault.expect == "duplicate")
HELD_STYLES = ("motion_blurred", "shallow_focused", "soft_focused", "grainy")
NUM_HELD_PHOTOS, NUM_HELD_ART = 100, 40
PAINTINGS, SKY_ART = "paintings/drawings (style inputs, <=2017)", "Stellarium sky-culture art"
CAPTIONS = {  # by source; what a captioner would see of the content, and nothing of how an image was made
    "Houses-dataset (real-estate web)": "a house or a room",
    "Endless Sky landscapes (photo/edit)": "a landscape",
    "Stellarium nebula photographs": "stars and a nebula",
    "Endless Sky 3D renders": "a space ship",
    **dict.fromkeys(("Open Clip Art", "Tux Paint stamps", PAINTINGS, SKY_ART), "a drawing"),
}
PLAIN = "a picture"
PROMPTS = (PLAIN, *dict.fromkeys(CAPTIONS.values()))
ARMS = ("uncurated", "quality", "curated", "curated+quality", "removed")
BEST = 0.5  # the quality filter keeps this share of the heap


class Picture(NamedTuple):
    pixels: np.ndarray  # uint8 (H, H, 3)
    caption: str
    source: str
    file: str  # of the image collection


class Held(NamedTuple):
    """A family of held-out images."""

    pictures: list[Picture]

    def at(self, side: int) -> np.ndarray:
        """uint8 (N, side, side, 3)."""
        squares = (Image.fromarray(picture.pixels).resize((side, side), Image.Resampling.LANCZOS) for picture in self.pictures)
        return np.stack([np.asarray(square) for square in squares])


def square(pixels: np.ndarray) -> np.ndarray:
    """The centre square of uint8 (H, W, 3), reduced to SIDE where it is larger."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = pixels[top : top + side, left : left + side]
    return cut if side <= SIDE else np.asarray(Image.fromarray(cut).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def tiles(pixels: np.ndarray) -> list[np.ndarray]:
    """Squares of half the short side (or 160 pixels, if that is more) side by side over uint8 (H, W, 3), from the middle of it."""
    height, width = pixels.shape[:2]
    side = max(160, min(height, width) // 2)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    corners = [(top + i * side, left + j * side) for i in range(rows) for j in range(columns)]
    return [square(pixels[y : y + side, x : x + side]) for y, x in corners]


def collection(images: str) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """(row of the manifest, uint8 (H, W, 3)) of every image that can be read, in the manifest's order."""
    with open(f"{images}/MANIFEST.tsv") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                yield row, decode_for(Path(images, row["path"]).read_bytes(), "pixels").pixels
            except DecodeError as error:
                print(f"left out {row['path']}: {error}", file=sys.stderr)


def pools(images: str) -> tuple[list[Picture], list[Picture], dict[str, Held]]:
    """Real and generated pictures of the heap, each in a random order, and the held-out families."""
    rng = np.random.default_rng(2026)
    found = [(row, pixels) for row, pixels in collection(images) if min(pixels.shape[:2]) >= LEAST]
    real = [(row, pixels) for row, pixels in found if row["label"] == "real"]
    photos = [i for i, (row, _) in enumerate(real) if row["kind"] == "photo" and row["generator_or_source"] not in CAPTIONS]
    art = [i for i, (row, _) in enumerate(real) if row["generator_or_source"] == PAINTINGS]
    art += rng.permutation([i for i, (row, _) in enumerate(real) if row["generator_or_source"] == SKY_ART]).tolist()
    held_photos, held_art = rng.permutation(photos)[:NUM_HELD_PHOTOS].tolist(), art[:NUM_HELD_ART]
    pool = []
    for i, (row, pixels) in enumerate(real):
        if i in held_photos or i in held_art:
            continue
        parts = tiles(pixels) if row["kind"] == "photo" and min(pixels.shape[:2]) >= 256 else []
        chosen = rng.permutation(len(parts))[:3]
        pool += [picture(row, cut) for cut in (square(pixels), *(parts[j] for j in chosen))]
    generated = [picture(row, square(pixels)) for row, pixels in found if row["label"] == "synthetic"]
    clean = [picture(real[i][0], square(real[i][1])) for i in held_photos]
    held = {
        "photographs": Held(clean),
        "styled": Held([styled(one, HELD_STYLES[i % len(HELD_STYLES)], rng) for i, one in enumerate(clean)]),
        "art": Held([picture(real[i][0], square(real[i][1])) for i in held_art]),
    }
    return [pool[i] for i in rng.permutation(len(pool))], [generated[i] for i in rng.permutation(len(generated))], held


def picture(row: dict[str, str], pixels: np.ndarray) -> Picture:
    return Picture(pixels, CAPTIONS.get(row["generator_or_source"], PLAIN), row["generator_or_source"], row["path"])


def styled(one: Picture, style: str, rng: np.random.Generator) -> Picture:
    """A picture with a style control planted, as held-out pixels."""
    pixels = decode_for(FAULTS[style].plant(encode(one.pixels, 95), rng), "pixels").pixels
    return one._replace(pixels=pixels)


def counts(number: int) -> dict[str, int]:
    """How many images of each kind a heap of `number` has; what rounding leaves over is clean."""
    found = {kind: int(number * share) for kind, share in SHARES.items()}
    found["clean"] += number - sum(found.values())
    return found


def planted(plant: Callable[[bytes, np.random.Generator], bytes], encoded: bytes, rng: np.random.Generator) -> bytes:
    """A fault whose outcome is square, so that every pack has one bucket and every arm the same batches."""
    for _ in range(100):
        out = plant(encoded, rng)
        with Image.open(io.BytesIO(out)) as image:
            if image.size[0] == image.size[1]:
                return out
    raise ValueError("a fault never left a square; take it out of DAMAGE")


def write_heap(run: Path, real: Sequence[Picture], generated: Sequence[Picture], number: int) -> None:
    """Write RUN/source, then RUN/truth.json: uid -> kind, detail, source.

    Raises:
        ValueError: there are too few pictures for so large a heap.
    """
    rng, wanted = np.random.default_rng(7), counts(number)
    need = wanted["clean"] + wanted["styled"] + wanted["damaged"]
    if len(real) < need or len(generated) < wanted["generated"]:
        raise ValueError(f"a heap of {number} needs {need} real and {wanted['generated']} generated; got {len(real)}, {len(generated)}")
    kinds = np.repeat(["clean", "styled", "damaged"], [wanted[kind] for kind in ("clean", "styled", "damaged")]).tolist()
    queue = [(one, kind) for one, kind in zip(real, kinds, strict=False)]
    queue += [(one, "generated") for one in generated[: wanted["generated"]]]
    heap = []
    for i, (one, kind) in enumerate(queue):
        encoded = encode(one.pixels, int(rng.integers(85, 96)))
        names = {"styled": STYLES, "damaged": DAMAGE}.get(kind)
        detail = names[i % len(names)] if names else one.source
        heap.append((planted(FAULTS[detail].plant, encoded, rng) if names else encoded, one, kind, detail))
    originals = rng.permutation(len(heap))[: wanted["duplicate"]]
    for i, place in enumerate(originals):
        copy = COPIES[i % len(COPIES)]
        heap.append((FAULTS[copy].plant(heap[place][0], rng), heap[place][1], "duplicate", copy))
    truth = {}
    for number, place in enumerate(rng.permutation(len(heap))):
        encoded, one, kind, detail = heap[place]
        suffix = "jpg" if encoded[:2] == b"\xff\xd8" else "png"
        write_bytes(encoded, run / "source" / f"{number:04d}.{suffix}")
        write_bytes(one.caption.encode(), run / "source" / f"{number:04d}.txt")
        truth[f"{number:04d}.{suffix}"] = {"kind": kind, "detail": detail, "source": one.source}
    uids = {member: f"{shard.name}/{member}" for shard in list_shards(str(run / "source"), 256) for member in shard.members}
    write_json({uids[file]: entry for file, entry in truth.items()}, run / "truth.json")


def write_quality(run: Path, uids: Sequence[str], values: Sequence[float]) -> None:
    """RUN/annotations/quality: an annotation of the study's own, BRISQUE of every image (smaller is better)."""
    table = pa.table({"uid": pa.array(uids, pa.string()), "brisque": pa.array(values, pa.float64())})
    write_table(table.sort_by("uid"), run / "annotations" / "quality" / "all.parquet", "brisque 0.2.0")


def arm_policy(arm: str, resolution: int, seed: int, number: int, pretrain: str, least: int = 0) -> str:
    """The policy of an arm and a seed: its rules, and of what they keep the first `number` in an order that the seed makes.

    `pretrain` is the text of the policy pretrain_256, whose rules the curated arms take over, with the resolution changed where they
    name it. The arm `removed` has what those rules take out: a control that shows what a pack of nothing else does.
    With `least` only images of at least so many pixels a side, so that packs of several resolutions can have the same images.
    """
    plain = (
        "SELECT basics.uid, basics.error IS NULL AS decoded, buckets.scale >= 1 AS large_enough\nFROM basics LEFT JOIN buckets USING (uid)"
    )
    # Letters shrink with the picture; the other thresholds stay those of 256 pixels.
    inner = plain if arm in ("uncurated", "quality") else pretrain.replace("text_height * 256", f"text_height * {resolution}")
    names = [rule.name for rule in rules(inner)]
    shown = {name: name for name in names}
    if arm == "removed":
        shown = {"decoded": "decoded", "is_removed": f"NOT coalesce({' AND '.join(names)}, false)"}
    if arm.endswith("quality"):
        shown["good_quality"] = f"brisque <= (SELECT quantile_cont(brisque, {BEST}) FROM quality)"
    if least:
        shown["side_enough"] = f"uid IN (SELECT uid FROM basics WHERE least(width, height) >= {least})"
    columns = ", ".join(name if rule == name else f"{rule} AS {name}" for name, rule in shown.items())
    return (
        f"-- resolution: {resolution}\n-- Arm {arm} of the study, seed {seed}: {number} images of those that the rules keep.\n"
        f"WITH judged AS (\n{re.sub('(?m)^-- *resolution.*$', '--', inner).rstrip()}\n),\n"
        f"ranked AS (\n  SELECT uid, row_number() OVER (ORDER BY md5(uid || '/{seed}')) AS place\n"
        f"  FROM judged JOIN quality USING (uid) WHERE {' AND '.join(shown.values())}\n)\n"
        f"SELECT judged.uid, {columns}, coalesce(place <= {number}, false) AS drawn -- packs of one size\n"
        "FROM judged JOIN quality USING (uid) LEFT JOIN ranked USING (uid)\n"
    )
