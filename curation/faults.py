"""Known faults, planted on good images, so that a run can say how many of them its rules found.

Every function is pure: encoded bytes and an explicit generator in, encoded bytes out. The style controls at the end are
not faults: the K2 report names motion blur, soft focus and grain as style, so a rule that removes them is wrong.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

WORDS = ("SAMPLE", "PREVIEW", "STOCK PHOTO", "DO NOT COPY")


def pixels_of(encoded: bytes) -> np.ndarray:
    """The RGB pixels of an encoded image, uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def encode(pixels: np.ndarray, quality: int = 93, container: str = "JPEG") -> bytes:
    """uint8 (H, W, 3) as JPEG (4:4:4 from quality 90 on, as cameras and editors save) or another container."""
    options = {"quality": quality, "subsampling": 0 if quality >= 90 else 2} if container == "JPEG" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, container, **options)
    return buffer.getvalue()


def recompressed(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Saved as JPEG of quality 5 to 8: visible 8x8 blocks, and a file that says so."""
    return encode(pixels_of(encoded), quality=int(rng.integers(5, 9)))


def resaved(encoded: bytes, rng: np.random.Generator) -> bytes:
    """The same blocks, saved once more at quality 93, so that the file's own quantisation table looks innocent."""
    return encode(pixels_of(recompressed(encoded, rng)))


def banded(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Posterised to 2 or 3 bits per channel, stored without loss."""
    levels = 2 ** int(rng.integers(2, 4)) - 1
    steps = np.rint(pixels_of(encoded) / 255.0 * levels)
    return encode(np.rint(steps * (255.0 / levels)).astype(np.uint8), container="PNG")


def bordered(encoded: bytes, rng: np.random.Generator) -> bytes:
    """A flat white or black frame, 12 to 25 % of the short side, on all four sides or on two opposite ones."""
    pixels = pixels_of(encoded)
    width = int(min(pixels.shape[:2]) * rng.uniform(0.12, 0.25))
    sides = [(width, width, 0), (width, 0, 0), (0, width, 0)][int(rng.integers(3))]
    return encode(np.pad(pixels, [(sides[0],) * 2, (sides[1],) * 2, (0, 0)], constant_values=int(rng.choice([0, 255]))))


def watermarked(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Translucent text, slanted and repeated over the whole picture."""
    pixels = pixels_of(encoded)
    height, width = pixels.shape[:2]
    font = ImageFont.load_default(size=max(14, min(height, width) // 9))
    text = WORDS[int(rng.integers(len(WORDS)))]
    left, top, right, bottom = font.getbbox(text)
    step_x, step_y = int((right - left) * 1.25), int((bottom - top) * 3)
    side = int(1.5 * np.hypot(height, width))
    layer = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(layer)
    for row, y in enumerate(range(0, side, step_y)):
        for x in range(-step_x * (row % 2) // 2, side, step_x):
            draw.text((x, y), text, fill=255, font=font)
    layer = layer.rotate(float(rng.uniform(20, 40)), Image.Resampling.BICUBIC)
    corner_y, corner_x = (side - height) // 2, (side - width) // 2
    mask = np.asarray(layer)[corner_y : corner_y + height, corner_x : corner_x + width, None] / 255.0
    mixed = pixels + mask * rng.uniform(0.45, 0.65) * (255.0 - pixels)
    return encode(np.rint(mixed).astype(np.uint8))


def noisy(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Noise that drowns the picture: Gaussian of 60 to 90 grey values per channel, or 15 to 30 % salt and pepper."""
    pixels = pixels_of(encoded)
    if rng.random() < 0.5:
        mixed = pixels + rng.normal(0.0, rng.uniform(60, 90), pixels.shape)
        return encode(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))
    hit = rng.random(pixels.shape[:2]) < rng.uniform(0.15, 0.30)
    values = rng.integers(0, 2, pixels.shape[:2])[..., None] * 255
    return encode(np.where(hit[..., None], values, pixels).astype(np.uint8))


def truncated(encoded: bytes, rng: np.random.Generator) -> bytes:
    """A download that stopped: the first 30 to 70 % of the file."""
    return encoded[: int(len(encoded) * rng.uniform(0.3, 0.7))]


def exact_copy(encoded: bytes, rng: np.random.Generator) -> bytes:
    """The same bytes under another name."""
    return encoded


def near_copy(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Resized to 60 to 85 % and saved at quality 60 to 75, as a web site does."""
    pixels = pixels_of(encoded)
    scale = rng.uniform(0.60, 0.85)
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return encode(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)), quality=int(rng.integers(60, 76)))


def mirrored_copy(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Left and right swapped."""
    return encode(np.ascontiguousarray(pixels_of(encoded)[:, ::-1]))


def motion_blurred(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: a straight camera movement of 7 to 13 pixels."""
    length, angle = int(rng.integers(7, 14)) | 1, float(rng.uniform(0, 180))
    kernel = np.zeros((length, length))
    kernel[length // 2] = 1.0
    kernel = np.clip(ndimage.rotate(kernel, angle, reshape=False, order=1), 0, None)
    blurred = ndimage.convolve(pixels_of(encoded).astype(np.float64), (kernel / kernel.sum())[..., None], mode="nearest")
    return encode(np.clip(np.rint(blurred), 0, 255).astype(np.uint8))


def soft_focused(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: a glow, the picture mixed with its own blur (Gaussian of 2 to 4 pixels, 60 to 80 %)."""
    pixels = pixels_of(encoded).astype(np.float64)
    sigma, share = rng.uniform(2, 4), rng.uniform(0.6, 0.8)
    mixed = (1 - share) * pixels + share * ndimage.gaussian_filter(pixels, (sigma, sigma, 0))
    return encode(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def grainy(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: film grain, monochrome, 8 to 14 grey values, slightly coarser than a pixel."""
    pixels = pixels_of(encoded)
    grain = ndimage.gaussian_filter(rng.normal(0.0, 1.0, pixels.shape[:2]), 0.6)
    mixed = pixels + (grain / grain.std() * rng.uniform(8, 14))[..., None]
    return encode(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Fault:
    """One fault, and what a run has to do for it to count as found.

    `expect`: "rule" (a rule removes the image), "duplicate" (its group holds the original), "error" (its row says why it is
    broken) or "kept" (a style control: finding it would be the mistake).
    """

    plant: Callable[[bytes, np.random.Generator], bytes]
    what: str
    expect: str


FAULTS = {
    "truncated": Fault(truncated, "file cut off after 30-70 % of its bytes", "error"),
    "exact_copy": Fault(exact_copy, "the same bytes under another name", "duplicate"),
    "near_copy": Fault(near_copy, "resized to 60-85 %, JPEG quality 60-75", "duplicate"),
    "mirrored_copy": Fault(mirrored_copy, "left and right swapped", "duplicate"),
    "bordered": Fault(bordered, "flat white or black frame, 12-25 % wide", "rule"),
    "noisy": Fault(noisy, "heavy sensor noise, or salt and pepper", "rule"),
    "recompressed": Fault(recompressed, "JPEG quality 5-8", "rule"),
    "resaved": Fault(resaved, "JPEG quality 5-8, then saved again at 93", "rule"),
    "banded": Fault(banded, "posterised to 2-3 bits per channel", "rule"),
    "watermarked": Fault(watermarked, "translucent text tiled over the picture", "rule"),
    "motion_blurred": Fault(motion_blurred, "motion blur of 7-13 pixels", "kept"),
    "soft_focused": Fault(soft_focused, "soft-focus glow", "kept"),
    "grainy": Fault(grainy, "film grain", "kept"),
}
