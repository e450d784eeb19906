"""Tars of small JPEGs for the benchmarks: crops of photographs that scikit-image and scikit-learn ship."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images


def make_tars(folder: Path, num_images: int, per_shard: int, sides: tuple[int, int] = (64, 128), seed: int = 0) -> None:
    """`num_images` crops in tars of `per_shard`; both sides of a crop are drawn from `sides`, pixels, and scaled up where a photograph is
    smaller. The same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    photographs = [data.astronaut(), data.coffee(), data.rocket(), data.chelsea(), data.hubble_deep_field(), *load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, num_images, per_shard)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(first, min(first + per_shard, num_images)):
                photograph = photographs[i % len(photographs)]
                height, width = (int(rng.integers(sides[0], sides[1] + 1)) for _ in range(2))
                scale = min(1.0, photograph.shape[0] / height, photograph.shape[1] / width)
                rows, columns = int(height * scale), int(width * scale)
                top, left = (int(rng.integers(0, have - want + 1)) for have, want in zip(photograph.shape, (rows, columns), strict=False))
                crop = Image.fromarray(np.ascontiguousarray(photograph[top : top + rows, left : left + columns]))
                buffer = io.BytesIO()
                (crop if scale == 1.0 else crop.resize((width, height))).save(buffer, "JPEG", quality=int(rng.integers(70, 96)))
                entry = tarfile.TarInfo(f"{i:07d}.jpg")
                entry.size = buffer.tell()
                tar.addfile(entry, io.BytesIO(buffer.getvalue()))
