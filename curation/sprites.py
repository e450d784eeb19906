"""Many small pictures in one JPEG, and a feature's heat map over an image."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from curation import compact
from curation.towers import EFFNET_SIDE, Compact, EffNet, Tower

THUMBNAIL = 128  # pixels of the longer side
CROP = 192  # of a view at native scale
WIDTH = 1056  # of a sprite: eight thumbnails
HOT = np.array([240, 110, 20], np.float32)  # colour of a feature


def thumbnail(image: np.ndarray, size: int = THUMBNAIL) -> np.ndarray:
    """uint8 (H, W, 3) of any size -> at most `size` a side."""
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(small)


def filled(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The middle of a picture that fills width x height."""
    return np.asarray(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS))


def sprite(pictures: list[np.ndarray], quality: int = 80) -> tuple[bytes, list[list[int]]]:
    """Pictures in rows on grey -> (JPEG, [left, top, width, height] of each); no bytes without pictures."""
    if not pictures:
        return b"", []
    boxes, left, top, tall = [], 0, 0, 0
    for picture in pictures:
        height, width = picture.shape[:2]
        if left and left + width > WIDTH:
            left, top, tall = 0, top + tall + 4, 0
        boxes.append([left, top, width, height])
        left, tall = left + width + 4, max(tall, height)
    right, bottom = (max(box[i] + box[i + 2] for box in boxes) for i in (0, 1))
    sheet = np.full((bottom, right, 3), 128, np.uint8)
    for picture, (x, y, width, height) in zip(pictures, boxes, strict=True):
        sheet[y : y + height, x : x + width] = picture
    return jpeg(sheet, quality), boxes


def jpeg(image: np.ndarray, quality: int = 80) -> bytes:
    """As a JPEG without chroma subsampling: one must not review artifacts through other ones."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0 if quality > 85 else 2)
    return buffer.getvalue()


def unpacked(encoded: bytes) -> np.ndarray:
    """A JPEG of `jpeg` as pixels."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def places(tower: Tower, image: np.ndarray) -> np.ndarray | None:
    """(T, 4) top, left, bottom, right in pixels of the image that each token of the tower looks at, in the order of the tokens;
    None for a tower whose vector is not the mean of its tokens, so that a feature has no value at a place."""
    height, width = image.shape[:2]
    if isinstance(tower, Compact):
        return compact.boxes(image)
    if not isinstance(tower, EffNet):
        return None
    side = min(height, width) * EFFNET_SIDE / 292
    lines = [np.linspace(middle - side / 2, middle + side / 2, 10) for middle in (height / 2, width / 2)]
    cells = [(lines[0][i], lines[1][j], lines[0][i + 1], lines[1][j + 1]) for i in range(9) for j in range(9)]
    return np.rint(cells).astype(int)


def overlay(image: np.ndarray, boxes: np.ndarray, values: np.ndarray, top: float) -> np.ndarray:
    """The thumbnail of an image, dim where a feature is silent or nobody looked, coloured where it is strong.

    Args:
        image: uint8 (H, W, 3).
        boxes: (T, 4) of `places`.
        values: (T,) of the feature at each place; their mean is its value on the image.
        top: The value that gets the full colour.
    """
    small = thumbnail(image)
    scale = small.shape[0] / image.shape[0]
    field = np.full(small.shape[:2], -1.0, np.float32)
    for (a, b, c, d), value in sorted(
        zip(np.rint(boxes * scale).astype(int).tolist(), values.tolist(), strict=True), key=lambda one: one[1]
    ):
        field[max(a, 0) : max(c, a + 1), max(b, 0) : max(d, b + 1)] = np.clip(value / max(top, 1e-6), 0, 1)
    if len(boxes) > 16:
        field = gaussian_filter(field, small.shape[0] / 30)
    strength = np.clip(field, 0, 1)[..., None]
    dim = small * np.where(field[..., None] < 0, 0.4, 0.7)
    return np.rint(dim * (1 - strength) + (0.45 * small + 0.55 * HOT) * strength).clip(0, 255).astype(np.uint8)


def native(image: np.ndarray, box: Any | None) -> np.ndarray:
    """The pixels around the middle of a box (of the image, when None), not resized: at most CROP a side."""
    height, width = image.shape[:2]
    y, x = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) if box is not None else (height / 2, width / 2)
    top = int(np.clip(y - CROP / 2, 0, max(0, height - CROP)))
    left = int(np.clip(x - CROP / 2, 0, max(0, width - CROP)))
    return image[top : top + CROP, left : left + CROP]
