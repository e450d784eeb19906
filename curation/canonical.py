"""One look at every labelled image that leaves nothing but the picture to judge by: a native-scale square, encoded once, the same way.

A detector that is judged on files as they come is judged on their containers: formats, qualities and sizes differ between the
sources of real and of generated images, and a resize to one size only turns size into sharpness. So the evaluation sees

    pixels -> the central SIDE x SIDE square, never resized -> JPEG of quality 90, 4:2:0 -> pixels

of both classes alike. Images with a side under SIDE are left out of it rather than continued by mirroring: the seam would be a cue
to their size, and size is a cue to the source (Grommelt et al. 2024, arXiv:2403.17608, measure what such cues are worth).
"""

import io

import cv2
import numpy as np
from PIL import Image

SIDE = 256  # pixels
QUALITY, SUBSAMPLING = 90, "4:2:0"
DEGRADATIONS = ("jpeg 75", "half size", "webp 60", "blur")
VIEWS = ("whole", "crop", *DEGRADATIONS)  # whole: the image as a stage sees it
QUALITIES = (65, 96)  # of the crops that a head is trained on: not the evaluation's alone


def fits(height: int, width: int) -> bool:
    """Whether an image has a canonical crop."""
    return min(height, width) >= SIDE


def crop(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), both sides at least SIDE -> the central square (SIDE, SIDE, 3) at native scale, not yet encoded."""
    height, width = pixels.shape[:2]
    assert fits(height, width), f"{width} x {height} has no square of {SIDE} pixels"
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])


def canonical(square: np.ndarray, view: str = "crop") -> np.ndarray:
    """The square as one view shows it; "crop" is the plain one.

    Degradations come before the last encoding, or in its place: a quality of 75, WebP of quality 60, half the size (area means: 128
    pixels, so that the content is the same), a Gaussian blur of one pixel.

    Raises:
        ValueError: there is no such view.
    """
    if view == "jpeg 75":
        return recoded(square, "JPEG", 75)
    if view == "webp 60":
        return recoded(square, "WEBP", 60)
    if view == "half size":
        square = cv2.resize(square, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    elif view == "blur":
        square = cv2.GaussianBlur(square, (0, 0), 1.0)
    elif view != "crop":
        raise ValueError(f"there is no view {view!r} of a crop; choose from {', '.join(VIEWS[1:])}")
    return recoded(square, "JPEG", QUALITY)


def random_crop(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square from anywhere, encoded at a random quality: what a head is trained on beside the whole image."""
    height, width = pixels.shape[:2]
    assert fits(height, width), f"{width} x {height} has no square of {SIDE} pixels"
    top, left = int(rng.integers(height - SIDE + 1)), int(rng.integers(width - SIDE + 1))
    return recoded(pixels[top : top + SIDE, left : left + SIDE], "JPEG", int(rng.integers(*QUALITIES)))


def recoded(pixels: np.ndarray, container: str, quality: int) -> np.ndarray:
    """uint8 (H, W, 3) after a lossy encoding and back."""
    stream = io.BytesIO()
    how = {"subsampling": SUBSAMPLING} if container == "JPEG" else {}
    Image.fromarray(pixels).save(stream, container, quality=quality, **how)
    return np.asarray(Image.open(stream).convert("RGB"))
