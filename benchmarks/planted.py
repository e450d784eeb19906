"""Copies planted in real images, for bench_dedup.py: which file is a copy of which is known."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

COUNTS = {"copy": 100, "small": 100, "crop": 50, "mirror": 50}  # each of another original
MIN_SIDE = 256  # K2's smallest bucket; below it, sprites and icons


def plant(images: list[Path], out: Path, seed: int = 0) -> dict[str, str]:
    """Write the images and the copies of 300 of them to a folder; returns {copy: original}, both as "<kind>/<name>".

    copy: the same bytes. small: 60 % of both sides, JPEG quality 60. crop: 5 % off each of the four edges, quality 90. mirror: quality 90.

    Raises:
        ValueError: fewer than 300 images with a short side of at least MIN_SIDE pixels.
    """
    shutil.rmtree(out, ignore_errors=True)
    large = []
    for path in images:
        name = f"original/{path.parent.name}_{path.name}"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / name)
        with Image.open(path) as picture:
            if min(picture.size) >= MIN_SIDE:
                large.append(name)
    if len(large) < sum(COUNTS.values()):
        raise ValueError(f"{len(large)} images have a short side of {MIN_SIDE} px or more; {sum(COUNTS.values())} are needed")
    chosen = iter(np.random.default_rng(seed).permutation(sorted(large)).tolist())
    truth = {}
    for kind, count in COUNTS.items():
        (out / kind).mkdir()
        for _ in range(count):
            name = next(chosen)
            copy = f"{kind}/{Path(name).name if kind == 'copy' else Path(name).stem + '.jpg'}"
            if kind == "copy":
                shutil.copy(out / name, out / copy)
            else:
                (out / copy).write_bytes(_copied(out / name, kind))
            truth[copy] = name
    return truth


def _copied(path: Path, kind: str) -> bytes:
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode in ("RGBA", "LA", "P"):  # on white, as curation.decode does
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    width, height = picture.size
    if kind == "small":
        picture = picture.resize((round(0.6 * width), round(0.6 * height)), Image.Resampling.LANCZOS)
    elif kind == "crop":
        left, top = round(0.05 * width), round(0.05 * height)
        picture = picture.crop((left, top, width - left, height - top))
    else:
        picture = ImageOps.mirror(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60 if kind == "small" else 90)
    return buffer.getvalue()
