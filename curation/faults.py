"""Known faults, planted on good images, so that a run can say how many of them its rules found.

Every function is pure: encoded bytes and an explicit generator in, encoded bytes out. The style controls at the end are
not faults: the K2 report names motion blur, soft focus and grain as style, so a rule that removes them is wrong. Where a
fault has a strength, it is drawn from the range that its text names, or given.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, signal

LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
RESAMPLERS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
PRINT = ("the", "terms", "and", "of", "every", "licence", "shall", "remain", "with", "holder", "unless", "notice", "under", "copies")
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


def recompressed(encoded: bytes, rng: np.random.Generator, quality: int | None = None) -> bytes:
    """Saved as JPEG of quality 5 to 8: visible 8x8 blocks, and a file that says so."""
    return encode(pixels_of(encoded), quality=int(rng.integers(5, 9)) if quality is None else quality)


def resaved(encoded: bytes, rng: np.random.Generator, quality: int | None = None, container: str = "JPEG") -> bytes:
    """The same blocks, saved once more at quality 93 (or without loss), so that the file's own quantisation table looks innocent."""
    return encode(pixels_of(recompressed(encoded, rng, quality)), container=container)


def banded(encoded: bytes, rng: np.random.Generator, bits: int | None = None) -> bytes:
    """Posterised to 2 or 3 bits per channel, stored without loss."""
    levels = 2 ** (int(rng.integers(2, 4)) if bits is None else bits) - 1
    steps = np.rint(pixels_of(encoded) / 255.0 * levels)
    return encode(np.rint(steps * (255.0 / levels)).astype(np.uint8), container="PNG")


def bordered(encoded: bytes, rng: np.random.Generator) -> bytes:
    """A flat white or black frame, 12 to 25 % of the short side, on all four sides or on two opposite ones."""
    pixels = pixels_of(encoded)
    width = int(min(pixels.shape[:2]) * rng.uniform(0.12, 0.25))
    sides = [(width, width, 0), (width, 0, 0), (0, width, 0)][int(rng.integers(3))]
    return encode(np.pad(pixels, [(sides[0],) * 2, (sides[1],) * 2, (0, 0)], constant_values=int(rng.choice([0, 255]))))


def enlarged(encoded: bytes, rng: np.random.Generator, factor: float | None = None, how: int | None = None) -> bytes:
    """Scaled up by 2 to 4 after being scaled down by as much, as a thumbnail sold as a photograph: nearest, bilinear, bicubic or Lanczos.

    A picture too small to be scaled down (under 64 pixels left) is only scaled up.
    """
    picture = Image.fromarray(pixels_of(encoded))
    factor = float(rng.uniform(2, 4)) if factor is None else factor
    how = int(rng.choice(RESAMPLERS)) if how is None else how
    size = picture.size
    small = (round(size[0] / factor), round(size[1] / factor))
    if min(small) >= 64:
        picture = picture.resize(small, Image.Resampling.LANCZOS)
    else:
        size = (round(size[0] * factor), round(size[1] * factor))
    return encode(np.asarray(picture.resize(size, how)))


def oversaturated(encoded: bytes, rng: np.random.Generator, gain: float | None = None) -> bytes:
    """Colour differences 3 to 5 times as large as they were, cut at the ends of the scale."""
    pixels = pixels_of(encoded).astype(np.float64)
    grey = pixels @ LUMA
    mixed = grey[..., None] + (rng.uniform(3, 5) if gain is None else gain) * (pixels - grey[..., None])
    return encode(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def overexposed(encoded: bytes, rng: np.random.Generator, gain: float | None = None) -> bytes:
    """2.5 to 4 times as bright, everything above white cut off."""
    gain = float(rng.uniform(2.5, 4) if gain is None else gain)  # a whole number would wrap around in uint8
    return encode(np.clip(np.rint(pixels_of(encoded) * gain), 0, 255).astype(np.uint8))


def underexposed(encoded: bytes, rng: np.random.Generator, gain: float | None = None) -> bytes:
    """An eighth to a twentieth as bright: a picture in which hardly a tone is left."""
    gain = float(rng.uniform(0.05, 0.12) if gain is None else gain)
    return encode(np.rint(pixels_of(encoded) * gain).astype(np.uint8))


def interlaced(encoded: bytes, rng: np.random.Generator, shift: int | None = None) -> bytes:
    """Odd rows come from a moment later, in which everything moved sideways by 6 to 16 pixels."""
    pixels = pixels_of(encoded).copy()
    pixels[1::2] = np.roll(pixels[1::2], int(rng.integers(6, 17)) if shift is None else shift, axis=1)
    return encode(pixels)


def letterboxed(encoded: bytes, rng: np.random.Generator, share: float | None = None) -> bytes:
    """Set between two bars of its own blurred and darkened edges, together 25 to 45 % of the height or width."""
    pixels = pixels_of(encoded)
    share = rng.uniform(0.25, 0.45) if share is None else share
    upright = bool(rng.integers(2))
    pixels = pixels if upright else pixels.transpose(1, 0, 2)
    height, width = pixels.shape[:2]
    bar = int(height * share / 2 / (1 - share))
    middle = pixels[height // 4 : height - height // 4]
    behind = np.asarray(Image.fromarray(middle).resize((width, height + 2 * bar), Image.Resampling.BICUBIC)).astype(np.float64)
    canvas = ndimage.gaussian_filter(behind, (min(height, width) / 25, min(height, width) / 25, 0)) * 0.7
    canvas = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    canvas[bar : bar + height] = pixels
    return encode(np.ascontiguousarray(canvas if upright else canvas.transpose(1, 0, 2)))


def lettered(encoded: bytes, rng: np.random.Generator, text_height: float | None = None, share: float = 0.7) -> bytes:
    """A page of small print over `share` of the picture's height, on paper: lines of 1.8 to 3 % of the short side."""
    pixels = pixels_of(encoded)
    height, width = pixels.shape[:2]
    size = max(7, round(min(height, width) * (rng.uniform(0.018, 0.03) if text_height is None else text_height)))
    font = ImageFont.load_default(size=size)
    page = Image.fromarray(pixels)
    draw = ImageDraw.Draw(page)
    margin = width // 20
    draw.rectangle((margin // 2, 0, width - margin // 2, int(height * share)), fill=(245, 243, 238))
    for y in range(margin, int(height * share) - 2 * size, int(size * 1.45)):
        line = ""
        while font.getlength(line) < width - 3 * margin:
            line += PRINT[int(rng.integers(len(PRINT)))] + " "
        draw.text((margin, y), line.rsplit(" ", 2)[0], fill=(25, 25, 30), font=font)
    return encode(np.asarray(page))


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


def defocused(encoded: bytes, rng: np.random.Generator, radius: float | None = None) -> bytes:
    """Style control: out of focus, a disc of 2 to 5 pixels radius."""
    radius = rng.uniform(2, 5) if radius is None else radius
    y, x = np.mgrid[-int(radius) - 1 : int(radius) + 2, -int(radius) - 1 : int(radius) + 2]
    disc = np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)
    planes = [signal.fftconvolve(np.pad(plane, disc.shape[0], "edge"), disc / disc.sum(), "same") for plane in _planes(encoded)]
    inner = slice(disc.shape[0], -disc.shape[0])
    return encode(np.clip(np.rint(np.stack(planes, -1)[inner, inner]), 0, 255).astype(np.uint8))


def shallow_focused(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: a sharp middle, and a blur that grows away from it."""
    pixels = pixels_of(encoded).astype(np.float64)
    far = _from_middle(*pixels.shape[:2], rng)[..., None]
    sharp = np.clip(1.5 - 2.5 * far, 0, 1)
    blurred = ndimage.gaussian_filter(pixels, (5, 5, 0))
    return encode(np.clip(np.rint(sharp * pixels + (1 - sharp) * blurred), 0, 255).astype(np.uint8))


def black_and_white(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: luma only, with more contrast."""
    grey = 128 + (pixels_of(encoded) @ LUMA - 128) * rng.uniform(1.0, 1.3)
    return encode(np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2))


def high_key(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: bright all over by a curve, nothing cut off."""
    return encode(np.rint(255 * (pixels_of(encoded) / 255) ** rng.uniform(0.35, 0.5)).astype(np.uint8))


def low_key(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: dark all over by a curve; the lights stay."""
    return encode(np.rint(255 * (pixels_of(encoded) / 255) ** rng.uniform(1.8, 2.5)).astype(np.uint8))


def vignetted(encoded: bytes, rng: np.random.Generator) -> bytes:
    """Style control: the corners fall off to 20 to 40 % of the light."""
    pixels = pixels_of(encoded)
    far = _from_middle(*pixels.shape[:2], rng, 0.0)
    return encode(np.rint(pixels * (1 - rng.uniform(0.6, 0.8) * np.clip(far, 0, 1) ** 2)[..., None]).astype(np.uint8))


def _planes(encoded: bytes) -> np.ndarray:
    """(3, H, W) float64."""
    return pixels_of(encoded).transpose(2, 0, 1).astype(np.float64)


def _from_middle(height: int, width: int, rng: np.random.Generator, wander: float = 0.15) -> np.ndarray:
    """(H, W): distance from about the middle, 1 at the corners."""
    middle = rng.uniform(-wander, wander, 2)
    y, x = np.linspace(-1, 1, height)[:, None] - middle[0], np.linspace(-1, 1, width)[None] - middle[1]
    return np.hypot(y, x) / np.sqrt(2)


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
    "enlarged": Fault(enlarged, "scaled up by 2-4, any resampler", "rule"),
    "oversaturated": Fault(oversaturated, "colours 3-5 times as strong, cut off", "rule"),
    "overexposed": Fault(overexposed, "2.5-4 times as bright, cut off", "rule"),
    "underexposed": Fault(underexposed, "5-12 % of the light", "rule"),
    "interlaced": Fault(interlaced, "two fields, 6-16 pixels apart", "rule"),
    "letterboxed": Fault(letterboxed, "between bars of its own blur, 25-45 %", "rule"),
    "lettered": Fault(lettered, "a page of small print on 70 % of it", "rule"),
    "watermarked": Fault(watermarked, "translucent text tiled over the picture", "rule"),
    "motion_blurred": Fault(motion_blurred, "motion blur of 7-13 pixels", "kept"),
    "soft_focused": Fault(soft_focused, "soft-focus glow", "kept"),
    "grainy": Fault(grainy, "film grain", "kept"),
    "defocused": Fault(defocused, "out of focus by 2-5 pixels", "kept"),
    "shallow_focused": Fault(shallow_focused, "shallow depth of field", "kept"),
    "black_and_white": Fault(black_and_white, "black and white", "kept"),
    "high_key": Fault(high_key, "high key", "kept"),
    "low_key": Fault(low_key, "low key", "kept"),
    "vignetted": Fault(vignetted, "vignette", "kept"),
}
