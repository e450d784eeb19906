"""The stage `basics`: cheap facts of K2's CPU filters (report, "Pretraining Data"): hashes, entropy, noise, borders, complexity.

The report names the filters but neither thresholds nor the size at which statistics are computed; sizes here are ours.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from curation.decode import VIEW_SIDE, ImageBatch
from curation.schema import BASICS, PHASH_BYTES

HASH_SIDE = 12  # bits of a phash per side
SAMPLE_SIDE = 128  # short side of the grid of pixels that colours are counted on
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

    version: int = 3
    name: ClassVar[str] = "basics"
    schema: ClassVar[pa.Schema] = BASICS
    reads: ClassVar[str] = "view"

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """Basics run on the CPU whatever the device."""
        return compute


def compute(batch: ImageBatch) -> dict[str, Any]:
    """One value per image for every column of BASICS that needs pixels or header."""
    rows = [
        facts(view)
        | {
            "width": h.width,
            "height": h.height,
            "format": h.format,
            "mode": h.mode,
            "num_frames": h.num_frames,
            "has_alpha": h.has_alpha,
            "icc": h.icc,
            "decode_warning": h.warning,
            "jpeg_quality": jpeg_quality(h.luma_table),
        }
        for view, h in zip(batch.views, batch.headers, strict=True)
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def facts(view: np.ndarray) -> dict[str, Any]:
    """Facts of the pixels of one uint8 (H, W, 3) view (curation.decode): the phashes of the whole view, texture and borders at
    short side <= VIEW_SIDE, and what counts colours on a grid of short side <= SAMPLE_SIDE."""
    height, width = view.shape[:2]
    # A view is less than twice too large: there bilinear means do as well as area means, and 7 times faster.
    pixels = _shrunk(view, VIEW_SIDE, cv2.INTER_LINEAR)
    # Colours are picked and not averaged: means would take the colour out of grain and thin lines.
    sample = _shrunk(view, SAMPLE_SIDE, cv2.INTER_NEAREST)
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    phash, mirror = phashes(luma if pixels is view else cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))
    top, bottom, left, right = border(luma)
    # With the edge mirrored the Laplacian sums to zero, so that its variance is its mean square.
    edges = cv2.Laplacian(luma, cv2.CV_16S, ksize=1, borderType=cv2.BORDER_REFLECT)
    return {
        "width": width,
        "height": height,
        "phash": phash,
        "phash_mirror": mirror,
        "colorhash": colorhash(sample),
        "rgb_entropy": sum(entropy(sample, c) for c in range(3)) / 3,
        "laplacian_var": cv2.norm(edges, cv2.NORM_L2SQR) / edges.size,
        "white_ratio": cv2.countNonZero(cv2.inRange(sample, (250, 250, 250), (255, 255, 255))) / (sample.size // 3),
        "black_ratio": cv2.countNonZero(cv2.inRange(sample, (0, 0, 0), (5, 5, 5))) / (sample.size // 3),
        "border_top": top,
        "border_bottom": bottom,
        "border_left": left,
        "border_right": right,
        "complexity": complexity(pixels),
    }


def _shrunk(view: np.ndarray, side: int, how: int) -> np.ndarray:
    """The view with a short side of at most `side` pixels."""
    height, width = view.shape[:2]
    scale = side / min(height, width)
    return view if scale >= 1 else cv2.resize(view, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=how)


def phashes(luma: np.ndarray) -> tuple[bytes, bytes]:
    """imagehash.phash(hash_size=12) of a uint8 (H, W) luma and of its mirror: the signs of the lowest 12 x 12 frequencies of a
    48 x 48 picture against their median. Within 1 bit of the library on full pixels (tests/unit/test_basics.py)."""
    # Means over 2, 4 or 8 pixels first hardly touch the 12th frequency, and leave the Lanczos resize little to read. A side that does
    # not divide is filled up, and what was added is cut off by `box`: without it the whole picture would move.
    height, width = luma.shape
    side, factor = 4 * HASH_SIDE, 1
    while min(height, width) >= 4 * side * factor:
        factor *= 2
    if factor > 1:
        luma = cv2.copyMakeBorder(luma, 0, -height % factor, 0, -width % factor, cv2.BORDER_REPLICATE)
    for _ in range(factor.bit_length() - 1):  # by halves, for which OpenCV has vector code
        luma = cv2.resize(luma, (luma.shape[1] // 2, luma.shape[0] // 2), interpolation=cv2.INTER_AREA)
    box = (0, 0, width / factor, height / factor)
    small = np.asarray(Image.fromarray(luma).resize((side, side), Image.Resampling.LANCZOS, box), np.float64)
    low = _cosines() @ small @ _cosines().T
    # A flat picture has zeros here, whatever the last bits of a sum say.
    low = low.round(6) + 0.0
    mirror = low * _MIRROR
    return _bits(low > _median(low)), _bits(mirror > _median(mirror))


def _median(values: np.ndarray) -> float:
    """np.median of an even number of values, without its checks."""
    ordered = np.sort(values, axis=None)
    return (ordered[ordered.size // 2 - 1] + ordered[ordered.size // 2]) / 2


_MIRROR = np.where(np.arange(HASH_SIDE) % 2, -1.0, 1.0)  # mirroring an image turns the sign of its odd horizontal frequencies


@functools.cache
def _cosines() -> np.ndarray:
    """(12, 48): the lowest rows of the DCT-II as scipy.fftpack.dct scales it."""
    side = 4 * HASH_SIDE
    return 2 * np.cos(np.pi * np.arange(HASH_SIDE)[:, None] * (2 * np.arange(side) + 1) / (2 * side))


def _bits(values: np.ndarray) -> bytes:
    packed = np.packbits(values.reshape(-1)).tobytes()
    assert values.size != 8 * PHASH_BYTES or len(packed) == PHASH_BYTES
    return packed


# imagehash.colorhash cuts Pillow's hue into 6 equal bins of 0 to 255, and saturation into grey (< 85), faint (< 170) and bright
# (> 170). The same cuts on OpenCV's HSV, which rounds where Pillow truncates: 99.5 % of all colours fall into the same bin.
_BINS = np.zeros((1, 256, 3), np.uint8)  # per channel of HSV: 0-5 of hue, and 0, 6, 12 or 18 of saturation; value counts nothing
_BINS[0, :, 0] = np.searchsorted([44, 85, 129, 171, 214], np.arange(256), side="right")
_BINS[0, :, 1] = [0] * 85 + [6] * 85 + [18] + [12] * 85
_SUM = np.array([[1, 1, 0]], np.float32)


def colorhash(sample: np.ndarray) -> bytes:
    """imagehash.colorhash(binbits=3) of uint8 (H, W, 3) pixels."""
    bins = cv2.transform(cv2.LUT(cv2.cvtColor(sample, cv2.COLOR_RGB2HSV_FULL), _BINS), _SUM)
    lit = cv2.inRange(cv2.cvtColor(sample, cv2.COLOR_RGB2GRAY), 32, 255)
    counts = cv2.calcHist([bins], [0], lit, [24], [0, 24]).reshape(-1).astype(np.float64)
    number, grey = bins.size, counts[:6].sum()
    colored = max(1.0, counts[6:].sum())
    shares = [(number - counts.sum()) / number, grey / number, *(counts[6:18] / colored)]
    levels = np.minimum(7, (np.array(shares) * 8).astype(np.uint8))
    return _bits(np.unpackbits(levels[:, None], axis=1)[:, 5:])


def entropy(pixels: np.ndarray, channel: int) -> float:
    """Shannon entropy of one channel of uint8 (H, W, C) pixels, bits."""
    counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).reshape(-1).astype(np.float64)
    share = counts[counts > 0] / (pixels.shape[0] * pixels.shape[1])
    return max(0.0, float(-(share * np.log2(share)).sum()))


def border(luma: np.ndarray) -> tuple[float, float, float, float]:
    """(top, bottom, left, right): share of the side covered by consecutive lines of one flat colour, counted from the edge.

    A line belongs to the border while it is flat in itself and equal to the edge's own line within FLAT_RANGE grey levels.
    """
    return tuple(_depth(view) for view in (luma, luma[::-1], luma.T, luma.T[::-1]))


def _depth(lines: np.ndarray) -> float:
    # Most images have no border, and the order statistics just inside the two percentiles of the first line tell so.
    first = np.sort(lines[0])
    inside = (len(first) - 1) // 100 + 1
    if len(first) > 2 * inside and int(first[-1 - inside]) - int(first[inside]) > FLAT_RANGE:
        return 0.0
    edge = _percentile(first[None], 0.5)
    for take in (8, 64, len(lines)):  # further in only while all of them are flat
        ordered = np.sort(lines[:take], axis=1)
        low, high = _percentile(ordered, 0.01), _percentile(ordered, 0.99)
        flat = (high - low <= FLAT_RANGE) & (np.abs((low + high) / 2 - edge) <= FLAT_RANGE)
        if not flat.all():
            return int(flat.argmin()) / len(lines)
    return 1.0


def _percentile(ordered: np.ndarray, share: float) -> np.ndarray:
    """np.percentile of each sorted row: linear between the two nearest values."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    return ordered[:, below] + (place - below) * (ordered[:, above].astype(np.float64) - ordered[:, below])


def complexity(pixels: np.ndarray) -> float:
    """Bytes per pixel of a quality-75 JPEG: the transient re-encode that Z-Image uses as an image-complexity score."""
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 75, "RGB", "420")
    return len(encoded) / (pixels.shape[0] * pixels.shape[1])


@functools.lru_cache(maxsize=4096)
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
