"""The stage `basics`: cheap facts of K2's CPU filters (report, "Pretraining Data"): hashes, entropy, noise, borders, complexity.

The report names the filters but neither thresholds nor the size at which statistics are computed; sizes here are ours.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image
from scipy import ndimage

from curation.decode import ImageBatch
from curation.schema import BASICS, PHASH_BYTES

VIEW_SIDE = 512  # short side of the view that texture statistics look at, so that a threshold means the same at every size
FLAT_RANGE = 6  # a line is flat when its 1st to 99th percentile spans at most this many grey levels (JPEG ringing allowed)

# IJG's luma table at quality 50 (ITU-T T.81, table K.1), natural order: the yardstick of the quality estimate.
_LUMA_50 = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
).reshape(-1)


@dataclass(frozen=True)
class Basics:
    """Facts that need no model. `version` changes whenever a formula does."""

    version: int = 1
    name: ClassVar[str] = "basics"
    schema: ClassVar[pa.Schema] = BASICS

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """Basics run on the CPU whatever the device."""
        return compute


def compute(batch: ImageBatch) -> dict[str, Any]:
    """One value per image for every column of BASICS that needs pixels or header."""
    rows = [
        facts(image) | {"format": h.format, "mode": h.mode, "num_frames": h.num_frames, "jpeg_quality": jpeg_quality(h.luma_table)}
        for image, h in zip(batch.images, batch.headers, strict=True)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def facts(image: np.ndarray) -> dict[str, Any]:
    """Facts of the pixels of one uint8 (H, W, 3) image."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    # phash of the library starts with exactly this resize; doing it once lets the mirror share it, bit for bit.
    small = picture.convert("L").resize((48, 48), Image.Resampling.LANCZOS)
    scale = VIEW_SIDE / min(height, width)
    view = picture if scale >= 1 else picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    pixels = np.asarray(view)
    luma = np.asarray(view.convert("L"), np.float32)
    top, bottom, left, right = border(np.asarray(picture.convert("L")))
    return {
        "width": width,
        "height": height,
        "phash": hash_bytes(imagehash.phash(small, hash_size=12)),
        "phash_mirror": hash_bytes(imagehash.phash(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), hash_size=12)),
        "colorhash": hash_bytes(imagehash.colorhash(picture, binbits=3)),
        "rgb_entropy": np.mean([entropy(pixels[..., c]) for c in range(3)]),
        "laplacian_var": ndimage.laplace(luma, mode="reflect").var(),
        "white_ratio": (pixels >= 250).all(-1).mean(),
        "black_ratio": (pixels <= 5).all(-1).mean(),
        "border_top": top,
        "border_bottom": bottom,
        "border_left": left,
        "border_right": right,
        "complexity": complexity(view),
    }


def hash_bytes(value: imagehash.ImageHash) -> bytes:
    """The bits of an imagehash, row by row, most significant first."""
    packed = np.packbits(value.hash.reshape(-1)).tobytes()
    assert value.hash.size != 144 or len(packed) == PHASH_BYTES
    return packed


def entropy(channel: np.ndarray) -> float:
    """Shannon entropy of an 8-bit channel, bits."""
    share = np.bincount(channel.reshape(-1), minlength=256) / channel.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def border(luma: np.ndarray) -> tuple[float, float, float, float]:
    """(top, bottom, left, right): share of the side covered by consecutive lines of one flat colour, counted from the edge.

    A line belongs to the border while it is flat in itself and equal to the edge's own line within FLAT_RANGE grey levels.
    """
    return tuple(_depth(view) for view in (luma, luma[::-1], luma.T, luma.T[::-1]))


def _depth(lines: np.ndarray) -> float:
    edge = float(np.median(lines[0]))
    # Most images have no border: look at a few lines first, and only go on where all of them are flat.
    for take in (4, len(lines)):
        low, high = np.percentile(lines[:take], (1, 99), axis=1)
        flat = (high - low <= FLAT_RANGE) & (np.abs((low + high) / 2 - edge) <= FLAT_RANGE)
        if not flat.all():
            return int(flat.argmin()) / len(lines)
    return 1.0


def complexity(view: Image.Image) -> float:
    """Bytes per pixel of a quality-75 JPEG: the transient re-encode that Z-Image uses as an image-complexity score."""
    buffer = io.BytesIO()
    view.save(buffer, "JPEG", quality=75)
    return buffer.tell() / (view.width * view.height)


def jpeg_quality(luma_table: tuple[int, ...] | None) -> int | None:
    """IJG quality (1-100) whose scaled luma table is nearest; None without a table.

    libjpeg scales table K.1 by s = 5000 / q below 50 and by s = 200 - 2 q from 50 on, in percent.
    """
    if luma_table is None:
        return None
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    tables = np.clip((_LUMA_50[None] * scale[:, None] + 50) // 100, 1, 255)
    return int(quality[np.abs(tables - np.array(luma_table)[None]).sum(1).argmin()])
