"""Aspect buckets: the few (height, width) that images of one resolution are trained at, and the crop that leads there.

K2 does not publish its buckets (report section 27). Ours have the aspect ratios of Qwen-Image (arXiv 2508.02324: 1:1, 2:3, 3:2,
3:4, 4:3, 9:16, 16:9) with 1:2 and 2:1 in place of its 1:3 and 3:1, because a ratio that few images have makes short batches.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

STEP = 16  # K2's patch of 2 on a latent of 1/8: one token is 16 x 16 pixels
ASPECTS = ((1, 1), (4, 3), (3, 2), (16, 9), (2, 1))  # width : height; each one also lies on its side
FILL = 0.88  # a bucket has at least this share of the square's area, so that every batch costs about the same


class Placed(NamedTuple):
    """Where images go: int64 arrays of one length. Crops are in pixels of the upright source image."""

    bucket_height: np.ndarray
    bucket_width: np.ndarray
    crop_top: np.ndarray
    crop_left: np.ndarray
    crop_height: np.ndarray
    crop_width: np.ndarray

    @property
    def scale(self) -> np.ndarray:
        """Source pixels per trained pixel, along the side where there are fewer; below 1 the image would be enlarged."""
        return np.minimum(self.crop_height / self.bucket_height, self.crop_width / self.bucket_width)


@lru_cache
def buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of every bucket: multiples of 16, at most resolution^2 pixels, as near to its ratio as 16-pixel steps allow.

    Raises:
        ValueError: the resolution is not a positive multiple of 16.
    """
    if resolution < STEP or resolution % STEP:
        raise ValueError(f"resolution {resolution} must be a positive multiple of {STEP}, the pixels of one token")
    tokens = (resolution // STEP) ** 2
    sides = np.arange(1, 2 * resolution // STEP + 1)
    height, width = np.meshgrid(sides, sides, indexing="ij")
    fits = (height * width <= tokens) & (height * width >= FILL * tokens) & (width >= height)
    height, width = height[fits], width[fits]
    found: list[tuple[int, int]] = []
    for wide, high in ASPECTS:
        off = np.abs(np.log(width / height * high / wide)).round(9)
        best = np.lexsort((-height * width, off))[0]
        shape = int(height[best]) * STEP, int(width[best]) * STEP
        found += [shape, shape[::-1]]
    return tuple(dict.fromkeys(found))  # at a small resolution two ratios can share a shape


def place(heights: ArrayLike, widths: ArrayLike, resolution: int) -> Placed:
    """The bucket of nearest log aspect, and the crop, of images (N,) and (N,) pixels high and wide, all at least 1.

    Where two buckets are equally near, the earlier one of `buckets(resolution)` is taken.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    assert (heights > 0).all() and (widths > 0).all(), "an image has at least one pixel"
    h, w = heights.astype(np.float64), widths.astype(np.float64)
    shapes, cuts = _ordered(resolution)
    chosen = sum(((h * h * a > w * w * b) | (closed & (h * h * a == w * w * b)) for a, b, closed in cuts), np.zeros(h.shape, np.int64))
    high, wide = np.array(shapes)[chosen].T
    return Placed(high, wide, *_crop(heights, widths, high, wide))


def place_sql(resolution: int, images: str) -> str:
    """`place` as a SELECT of DuckDB: uid, the columns of `Placed` and `scale`, of the rows of `images` (uid, height, width).

    The same doubles and the same integers, so that it gives the same rows; a database does it as the rows stream by.
    """
    shapes, cuts = _ordered(resolution)
    steps = " + ".join(f"(h * h * {a} {'>=' if closed else '>'} w * w * {b})::INTEGER" for a, b, closed in cuts)
    high, wide = ([shape[side] for shape in shapes] for side in (0, 1))
    return f"""
        WITH sized AS (SELECT uid, height::DOUBLE AS h, width::DOUBLE AS w, height::BIGINT AS height, width::BIGINT AS width FROM {images}),
        chosen AS (SELECT uid, height, width, {steps} AS i FROM sized),
        shaped AS (SELECT uid, height, width, {high}[i + 1]::BIGINT AS high, {wide}[i + 1]::BIGINT AS wide FROM chosen),
        cropped AS (
            SELECT uid, height, width, high, wide,
                CASE WHEN height * wide > width * high
                    THEN least(greatest((2 * width * high + wide) // (2 * wide), 1), height) ELSE height END AS crop_height,
                CASE WHEN height * wide > width * high
                    THEN width ELSE least(greatest((2 * height * wide + high) // (2 * high), 1), width) END AS crop_width
            FROM shaped
        )
        SELECT uid, high::INTEGER AS bucket_height, wide::INTEGER AS bucket_width,
            ((height - crop_height) // 2)::INTEGER AS crop_top, ((width - crop_width) // 2)::INTEGER AS crop_left,
            crop_height::INTEGER AS crop_height, crop_width::INTEGER AS crop_width,
            least(crop_height / high, crop_width / wide) AS scale
        FROM cropped"""


def _ordered(resolution: int) -> tuple[list[tuple[int, int]], list[tuple[float, float, bool]]]:
    """The buckets from wide to high, and between each and the next the cut (a, b, closed): the next is nearer where h^2 a > w^2 b.

    Between h1/w1 and h2/w2 the logarithms are equally far at (h/w)^2 = (h1 h2) / (w1 w2); `closed` says that the next takes this too.
    """
    shapes = buckets(resolution)
    order = sorted(range(len(shapes)), key=lambda i: shapes[i][0] / shapes[i][1])
    pairs = list(pairwise(order))
    cuts = [(float(shapes[i][1] * shapes[j][1]), float(shapes[i][0] * shapes[j][0]), j < i) for i, j in pairs]
    return [shapes[i] for i in order], cuts


def nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) of the bucket with the nearest log aspect."""
    placed = place([height], [width], resolution)
    return int(placed.bucket_height[0]), int(placed.bucket_width[0])


def crop_box(height: int, width: int, bucket_height: int, bucket_width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest centred box with the bucket's aspect, to the nearest pixel."""
    return tuple(int(value[0]) for value in _crop(*(np.array([v], np.int64) for v in (height, width, bucket_height, bucket_width))))


def _crop(height: np.ndarray, width: np.ndarray, high: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, ...]:
    """(top, left, height, width) of the crops. Integers throughout, so that no machine rounds another way."""
    too_high = height * wide > width * high
    crop_height = np.where(too_high, np.clip((2 * width * high + wide) // (2 * wide), 1, height), height)
    crop_width = np.where(too_high, width, np.clip((2 * height * wide + high) // (2 * high), 1, width))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
