"""What the columns of `defects` and `text_density` find of planted faults, and what they take of real images and of styles.

    python benchmarks/bench_defects.py --images DIR [--num 60]

DIR is a folder with a MANIFEST.tsv of path, label (real or synthetic) and kind (photo, illustration, ...). Every fault is planted
at several strengths on photographs from it. The rules are the ones of the policies; their thresholds were set by looking. `free`
shows for each column the threshold that one half of the photographs allows, with at most 0.5 % of its clean and styled images
above it, and what that threshold does on the other half. Appends one JSON line to benchmarks/results/defects.jsonl and draws
docs/images/defects.svg.
"""

import csv
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from curation import faults, plots
from curation.decode import DecodeError, ImageBatch, decode
from curation.faults import FAULTS, encode, pixels_of
from curation.stages import defects
from curation.stages.text_density import TextDensity
from pipelines.run_folder import commit, versions

SIDE = 640  # planted photographs are cut to this many pixels a side; nothing is scaled
TEXT_EVERY = 3  # of the real images, one in so many is searched for text, which costs 20 times as much as all else
SMALL_TEXT = 12  # pixels of box height at the training resolution under which letters are lost
RULES: dict[str, Callable[[dict], bool]] = {  # true: the image goes; the policies hold the same lines in SQL
    "not_enlarged": lambda f: f["resampling"] > 0.14,
    "not_blocky": lambda f: f["blockiness"] > 1.6,
    "not_posterised": lambda f: f["banding"] > 0.004 or f["level_gaps"] > 0.8,
    "not_interlaced": lambda f: f["combing"] > 0.009,
    "no_inset": lambda f: max(f["inset_y"], f["inset_x"]) > 0.08,
    "not_oversaturated": lambda f: f["clipped_both"] > 0.01,
    "not_dark": lambda f: f["luma_high"] < 40,
    "not_overexposed": lambda f: f["clipped_high"] > 0.45 and f["clipped_partly"] > 0.05,
    "readable_256": lambda f: f["small_256"] > 0.1,
}
COLUMN = {  # fault -> the column that should answer, and its sign
    "enlarged": ("resampling", 1),
    "recompressed": ("blockiness", 1),
    "resaved": ("blockiness", 1),
    "banded": ("banding", 1),
    "interlaced": ("combing", 1),
    "oversaturated": ("clipped_both", 1),
    "underexposed": ("luma_high", -1),
    "overexposed": ("clipped_partly", 1),
    "lettered": ("small_256", 1),
}
STRENGTHS: dict[str, dict[str, dict]] = {
    "enlarged": {
        f"x{factor:g} {how.name.lower()}": {"factor": factor, "how": how} for factor in (1.5, 2, 3, 4) for how in faults.RESAMPLERS
    },
    "recompressed": {f"q{quality}": {"quality": quality} for quality in (5, 8, 12, 20, 30, 50)},
    "resaved": {f"q{q} {c}": {"quality": q, "container": c} for c in ("JPEG", "PNG") for q in (5, 8, 12, 20, 30, 50)},
    "banded": {f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 5)},
    "interlaced": {f"{shift} px": {"shift": shift} for shift in (1, 2, 6, 16)},
    "letterboxed": {f"{share:.0%}": {"share": share} for share in (0.15, 0.25, 0.4)},
    "oversaturated": {f"x{gain}": {"gain": gain} for gain in (2, 3, 5)},
    "overexposed": {f"x{gain}": {"gain": gain} for gain in (2, 3, 4)},
    "underexposed": {f"x{gain}": {"gain": gain} for gain in (0.2, 0.1, 0.05)},
    "lettered": {
        f"{height:.1%} high on {share:.0%}": {"text_height": height, "share": share}
        for share in (0.3, 0.7)
        for height in (0.015, 0.02, 0.03, 0.05)
    },
}


def measure(pixels: np.ndarray, encoded: bytes, text: Callable | None) -> dict:
    """Columns of both stages, and the share of the image in letters too small for each resolution (0 unless asked for)."""
    boxes = text(ImageBatch([], [], [pixels], []))["boxes"][0] if text else []
    small = {f"small_{size}": sum(box["area"] for box in boxes if box["text_height"] * size < SMALL_TEXT) for size in (256, 512, 1024)}
    return defects.facts(pixels, len(encoded)) | small


def readable(folder: str, chosen: list[dict]) -> list[tuple[dict, bytes, np.ndarray]]:
    """(row of the manifest, file, pixels) of what decodes and has 200 pixels a side, the least that a policy keeps."""
    found = []
    for row in chosen:
        encoded = Path(folder, row["path"]).read_bytes()
        try:
            pixels, _ = decode(encoded)
        except DecodeError:
            continue
        if min(pixels.shape[:2]) >= 200:
            found.append((row, encoded, pixels))
    return found


def cost(photos: list[np.ndarray], text: Callable) -> dict[str, float]:
    """CPU milliseconds per 0.25 megapixels, by group; text_density per image of 736 x 736 pixels."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable, *args) -> None:
        start = time.process_time()
        function(*args)
        spent[name] += (time.process_time() - start) * 1000

    pictures = [np.asarray(Image.fromarray(photo).resize((500, 500))) for photo in photos]
    for picture in pictures:
        parts = defects.parts(picture)
        grey = np.asarray(Image.fromarray(picture).convert("L"))
        timed("levels", defects.levels, defects.thinned(picture))
        timed("compression", defects.compression, picture, parts, 1)
        timed("grid", defects.grid, grey[None])
        timed("scaling", defects.scaling, grey, grey[None])
        timed("lines", defects.lines, grey[None])
        timed("frames", defects.frames, grey)
        timed("all", defects.facts, picture, 1)
    for picture in pictures[:8]:
        timed("text_density", text, ImageBatch([], [], [np.asarray(Image.fromarray(picture).resize((736, 736)))], []))
    return {name: round(total / (8 if name == "text_density" else len(pictures)), 2) for name, total in spent.items()}


def draw(recall: dict[str, dict[str, float]], styles: dict[str, float], path: Path) -> None:
    """One bar per fault and strength: what the rules find of it; under them what they take of the styles."""
    labels = [f"{fault}  {strength}" for fault, entries in recall.items() for strength in entries]
    values = [value for entries in recall.values() for value in entries.values()]
    figure, axis = plots.axes(8, 0.21 * (len(labels) + len(styles)) + 1)
    rows = np.arange(len(labels) + len(styles))
    axis.barh(rows, [*values, *styles.values()], color=[plots.BLUE] * len(labels) + [plots.ORANGE] * len(styles), height=0.75)
    axis.set_yticks(rows, [*labels, *(f"style: {name.replace('_', ' ')}" for name in styles)], fontsize=7)
    axis.set(xlim=(0, 1), xlabel="share of images that a rule removes (blue: faults, orange: clean images and styles)")
    axis.invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


def main(images: str, num: int = 60) -> None:
    """Measure and record.

    Args:
        images: A folder with a MANIFEST.tsv.
        num: Photographs that faults are planted on.
    """
    with open(Path(images, "MANIFEST.tsv")) as file:
        manifest = list(csv.DictReader(file, delimiter="\t"))
    text = TextDensity().load("cpu")
    rng = np.random.default_rng(0)
    photos = [row for row in manifest if (row["label"], row["kind"]) == ("real", "photo")]
    photos = readable(images, [photos[i] for i in rng.permutation(len(photos))[: num * 2]])[:num]
    rows: dict[tuple[str, str], list[dict]] = defaultdict(list)
    styles = {"clean": lambda encoded, _: encoded} | {name: fault.plant for name, fault in FAULTS.items() if fault.expect == "kept"}
    for i, (_, encoded, pixels) in enumerate(photos):
        if max(pixels.shape[:2]) > SIDE:
            encoded = encode(pixels[:SIDE, :SIDE], 95)
        for name, plant in styles.items():
            changed = plant(encoded, np.random.default_rng(i))
            searched = text if name == "clean" else None
            rows["style", name].append(measure(pixels_of(changed), changed, searched) | {"half": i % 2})
        for fault, strengths in STRENGTHS.items():
            for strength, options in strengths.items():
                changed = FAULTS[fault].plant(encoded, np.random.default_rng(i), **options)
                searched = text if fault == "lettered" else None
                rows[fault, strength].append(measure(pixels_of(changed), changed, searched) | {"half": i % 2})
    halves = {
        name: {key: [f for f in found if f["half"] == half] for key, found in rows.items()}
        for half, name in enumerate(("half_a", "half_b"))
    }
    recall = {half: _removed(found) for half, found in halves.items()}
    kinds: dict[str, list[dict]] = defaultdict(list)
    for i, (row, encoded, pixels) in enumerate(readable(images, [row for row in manifest if row["label"] == "real"])):
        kinds[row["kind"]].append(measure(pixels, encoded, None if i % TEXT_EVERY else text))
    line = {
        "photos": len(photos),
        "recall": {half: {fault: recall[half][fault] for fault in STRENGTHS} for half in recall},
        "style_removed": {half: recall[half]["style"] for half in recall},
        "free": {fault: _free(halves, fault, *COLUMN[fault]) for fault in COLUMN},
        "real_removed": {
            kind: {name: int(sum(map(rule, found))) for name, rule in RULES.items()} | {"of": len(found)} for kind, found in kinds.items()
        },
        "cpu_ms": cost([pixels for _, _, pixels in photos], text),
        "machine": platform.processor() or platform.machine(),
        "commit": commit(),
        "versions": versions(),
    }
    draw(
        {fault: recall["half_b"][fault] for fault in STRENGTHS},
        recall["half_b"]["style"],
        Path(__file__).parents[1] / "docs/images/defects.svg",
    )
    with open(Path(__file__).parent / "results" / "defects.jsonl", "a") as results:
        results.write(json.dumps(line) + "\n")
    print(json.dumps(line))


def _removed(found: dict[tuple[str, str], list[dict]]) -> dict[str, dict[str, float]]:
    """Share that any rule removes, by fault and strength."""
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for (fault, strength), facts in found.items():
        shares[fault][strength] = round(float(np.mean([any(rule(f) for rule in RULES.values()) for f in facts])), 3)
    return dict(shares)


def _free(halves: dict, fault: str, column: str, sign: int) -> dict:
    """The threshold that half_a's clean and styled images allow at 0.5 %, and what it does on half_b."""
    innocent = {
        half: [sign * f[column] for (kind, _), facts in found.items() if kind == "style" for f in facts] for half, found in halves.items()
    }
    threshold = float(np.quantile(innocent["half_a"], 0.995, method="higher"))
    return {
        "column": column,
        "threshold": round(sign * threshold, 4),
        "false": round(float(np.mean(np.array(innocent["half_b"]) > threshold)), 4),
        "recall": {
            strength: round(float(np.mean([sign * f[column] > threshold for f in facts])), 3)
            for (kind, strength), facts in halves["half_b"].items()
            if kind == fault
        },
    }


if __name__ == "__main__":
    tyro.cli(main)
