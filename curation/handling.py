"""What happens to any picture on its way, whoever made it: resizing, softening, recompression.

A detector that is not shown these on both classes learns them instead of the generator: real photographs were scaled and saved
more often than pictures that come straight from a model (synthetic-anchors, section E).
"""

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image

NATIVE, REDUCED = 0.5, 0.4  # shares of the crops at native scale, and scaled down; the rest is enlarged
SMALLEST, LARGEST = 0.35, 1.5  # scales
SOFTENED, UNTOUCHED, TWICE, WEBP = 0.1, 0.15, 0.25, 0.25  # shares: blurred; not recompressed; recompressed twice; WebP among encodings
JPEG_QUALITIES, WEBP_QUALITIES = (50, 99), (40, 99)
SAMPLINGS = ("444", "420", "422")
KERNELS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_LANCZOS4)


def region(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of uint8 (H, W, 3) that `handled` brings to `side`: of that side, larger (reduced later) or smaller."""
    draw = rng.random()
    scale = rng.uniform(*((1, 1), (SMALLEST, 1), (1, LARGEST))[(draw >= NATIVE) + (draw >= NATIVE + REDUCED)])
    size = min(round(side / scale), max(side, min(image.shape[:2])))
    missing = [max(0, size - length) for length in image.shape[:2]]
    if any(missing):
        image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    top, left = (int(rng.integers(length - size + 1)) for length in image.shape[:2])
    cut = image[top : top + size, left : left + size]
    return np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)


def handled(square: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (S, S, 3) -> (side, side, 3): resized where it has to be, sometimes softened, mostly recompressed."""
    if square.shape[0] != side:
        square = cv2.resize(square, (side, side), interpolation=KERNELS[int(rng.integers(len(KERNELS)))])
    if rng.random() < SOFTENED:
        square = cv2.GaussianBlur(square, (0, 0), rng.uniform(0.4, 1.5))
    if rng.random() < UNTOUCHED:
        return square
    for _ in range(2 if rng.random() < TWICE else 1):
        square = recompressed(square, rng)
    return square


def recompressed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Through a JPEG or WebP of random quality and back."""
    if rng.random() < WEBP:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", quality=int(rng.integers(*WEBP_QUALITIES)), method=0)
        return np.asarray(Image.open(file).convert("RGB"))
    quality, sampling = int(rng.integers(*JPEG_QUALITIES)), str(rng.choice(SAMPLINGS))
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", sampling), "RGB")
