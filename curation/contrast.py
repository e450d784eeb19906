"""Contrast sets: the same picture damaged, restyled, or handled harmlessly, to find out what a feature answers to.

Damage is what the K2 report calls artifacts. Styles are what it says must stay: blur, grain, odd light, odd colour. Controls
change nothing that one should see: a feature that answers to them answers to our pipeline. Every function takes an RGB image
(uint8 (H, W, 3)) and a generator, draws its own strength, and returns an RGB image; strengths are in pixels of the source, so
that damage happens before any tower's resize. They share no code with `curation.faults`: what a run is tested with must not be
what its models learned from.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
MAX_SIDE = 768  # of larger pictures a window is changed: a transform then costs at most about 0.1 s
MARKS = ("© photo agency", "proof", "www.example.org", "sample image", "licensed preview")


def window(image: np.ndarray, max_side: int = MAX_SIDE) -> np.ndarray:
    """The middle of the image, at most `max_side` pixels a side: cut, not resized, so that its pixels stay what they were."""
    height, width = image.shape[:2]
    top, left = max(0, height - max_side) // 2, max(0, width - max_side) // 2
    return np.ascontiguousarray(image[top : top + max_side, left : left + max_side])


def view(image: np.ndarray, rng: np.random.Generator, damage: float = 0.2, style: float = 0.15) -> np.ndarray:
    """A training view: a random window (30 to 100 % of the area), mirrored half of the time, sometimes damaged or restyled.

    A sparse autoencoder spends no feature on what it rarely sees, so damage is mixed into its rows; no label enters its loss.
    """
    height, width = image.shape[:2]
    area, aspect = rng.uniform(0.3, 1.0), np.exp(rng.uniform(-0.3, 0.3))
    tall = min(height, MAX_SIDE, max(1, round(height * np.sqrt(area / aspect))))
    wide = min(width, MAX_SIDE, max(1, round(width * np.sqrt(area * aspect))))
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    cut = image[top : top + tall, left : left + wide]
    cut = np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)
    draw = rng.random()
    if draw >= damage + style:
        return cut
    chosen = list((DAMAGE if draw < damage else STYLES).values())
    return chosen[int(rng.integers(len(chosen)))](cut, rng)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _through_jpeg(image: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer).convert("RGB"))


# --- damage ---


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 8 to 20, 4:2:0."""
    return _through_jpeg(image, int(rng.integers(8, 21)), 2)


def posterise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """3 to 8 levels per channel, no dither."""
    steps = int(rng.integers(2, 8))
    return _to_bytes(np.rint(image / 255.0 * steps) * (255.0 / steps))


def sensor_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """High-gain noise: per channel, stronger in the light, with coarse colour blotches."""
    strength = rng.uniform(25, 60)
    shot = rng.normal(0, 1, image.shape) * strength * np.sqrt(0.3 + 0.7 * image / 255.0)
    blotches = gaussian_filter(rng.normal(0, 1, image.shape), (2, 2, 0)) * strength * 2
    return _to_bytes(image + shot + blotches)


def nearest_upscale(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reduced 3 to 5 times, then enlarged with square pixels."""
    factor = rng.uniform(3, 5)
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(1, int(width / factor)), max(1, int(height / factor))), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def letterbox(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flat bars of 8 to 25 % at top and bottom, left and right, or all around; black, white or grey."""
    height, width = image.shape[:2]
    share, where = rng.uniform(0.08, 0.25), int(rng.integers(3))
    tall, wide = (int(height * share) + 1) * (where != 1), (int(width * share) + 1) * (where != 0)
    return np.pad(image, ((tall, tall), (wide, wide), (0, 0)), constant_values=int(rng.choice([0, 0, 255, 128])))


def watermark(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A text in rows over the whole picture, 30 to 60 % opaque, white or black."""
    height, width = image.shape[:2]
    font = ImageFont.load_default(size=max(10, int(min(height, width) * rng.uniform(0.06, 0.12))))
    text, layer = MARKS[int(rng.integers(len(MARKS)))], Image.new("L", (width, height), 0)
    left, top, right, bottom = font.getbbox(text)
    for row, y in enumerate(range(0, height, int((bottom - top) * rng.uniform(2.0, 3.5)) + 4)):
        for x in range(-(row % 3) * (right - left) // 3, width, int((right - left) * 1.2) + 4):
            ImageDraw.Draw(layer).text((x, y), text, fill=255, font=font)
    alpha = np.asarray(layer)[..., None] / 255.0 * rng.uniform(0.3, 0.6)
    return _to_bytes(image * (1 - alpha) + alpha * int(rng.choice([255, 255, 0])))


def oversharpen(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unsharp mask of radius 1 to 3 at 300 to 600 %: halos along every edge."""
    mask = ImageFilter.UnsharpMask(radius=rng.uniform(1, 3), percent=int(rng.integers(300, 601)), threshold=0)
    return np.asarray(Image.fromarray(image).filter(mask))


def chroma_shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour displaced by 4 to 16 pixels against the luma, and smeared."""
    luma, *chroma = np.moveaxis(np.asarray(Image.fromarray(image).convert("YCbCr")), 2, 0)
    shift = [int(s) for s in rng.integers(4, 17, 2) * rng.choice([-1, 1], 2)]
    moved = [_to_bytes(gaussian_filter(np.roll(plane.astype(np.float32), shift, (0, 1)), rng.uniform(2, 6))) for plane in chroma]
    return np.asarray(Image.fromarray(np.stack([luma, *moved], 2), "YCbCr").convert("RGB"))


def interlace(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every second row displaced by 4 to 20 pixels: two fields of a moving camera."""
    combed = image.copy()
    combed[1::2] = np.roll(image[1::2], int(rng.integers(4, 21)) * int(rng.choice([-1, 1])), axis=1)
    return combed


# --- style ---


def _convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    radius = max(kernel.shape) // 2
    padded = np.pad(image.astype(np.float32), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    return _to_bytes(fftconvolve(padded, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1)))


def motion_blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A straight movement over 1.5 to 4 % of the short side (at least 5 pixels)."""
    length = max(5, int(min(image.shape[:2]) * rng.uniform(0.015, 0.04))) | 1
    stroke = Image.new("L", (length, length), 0)
    middle, angle = length // 2, rng.uniform(0, np.pi)
    dx, dy = middle * np.cos(angle), middle * np.sin(angle)
    ImageDraw.Draw(stroke).line((middle - dx, middle - dy, middle + dx, middle + dy), fill=255)
    return _convolved(image, np.asarray(stroke, np.float32))


def defocus(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The whole picture through a disc of radius 0.7 to 2 % of the short side (at least 2 pixels)."""
    radius = max(2, int(min(image.shape[:2]) * rng.uniform(0.007, 0.02)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return _convolved(image, (x * x + y * y <= radius * radius).astype(np.float32))


def shallow_focus(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sharp around one point, ever softer away from it."""
    height, width = image.shape[:2]
    soft = gaussian_filter(image.astype(np.float32), (min(height, width) * 0.02, min(height, width) * 0.02, 0))
    y, x = np.mgrid[:height, :width]
    distance = np.hypot((x / width - rng.uniform(0.3, 0.7)), (y / height - rng.uniform(0.3, 0.7)))
    blur = np.clip((distance - 0.15) / 0.25, 0, 1)[..., None]
    return _to_bytes(image * (1 - blur) + soft * blur)


def film_grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Monochrome grain of 6 to 14 grey values, a little coarser than a pixel, strongest in the middle tones."""
    grain = gaussian_filter(rng.normal(0, 1, image.shape[:2]), rng.uniform(0.5, 0.9))
    luma = image.mean(2) / 255.0
    return _to_bytes(image + (grain / max(float(grain.std()), 1e-6) * rng.uniform(6, 14) * (0.5 + 2 * luma * (1 - luma)))[..., None])


def monochrome(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black and white, or sepia, with a film-like contrast."""
    grey = Image.fromarray(image).convert("L")
    grey = ImageEnhance.Contrast(grey).enhance(rng.uniform(1.0, 1.4))
    return np.asarray(ImageOps.colorize(grey, "#1a0f05", "#fff2dc") if rng.random() < 0.3 else grey.convert("RGB"))


def vignette(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Corners darkened by 50 to 85 %."""
    y, x = np.linspace(-1, 1, image.shape[0])[:, None], np.linspace(-1, 1, image.shape[1])[None]
    fall = 1 - rng.uniform(0.5, 0.85) * np.clip((x * x + y * y) / 2, 0, 1) ** rng.uniform(0.8, 1.5)
    return _to_bytes(image * fall[..., None])


def low_key(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mostly dark: a gamma of 1.8 to 3."""
    return _to_bytes(255 * (image / 255.0) ** rng.uniform(1.8, 3))


def high_key(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mostly light: a gamma of 0.35 to 0.6."""
    return _to_bytes(255 * (image / 255.0) ** rng.uniform(0.35, 0.6))


def mist(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft and pale: mixed with its own blur and with light grey."""
    soft = gaussian_filter(image.astype(np.float32), (3, 3, 0))
    glow, pale = rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.4)
    return _to_bytes((image * (1 - glow) + soft * glow) * (1 - pale) + 225 * pale)


# --- nothing that one should see ---


def mirror(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left and right swapped."""
    return np.ascontiguousarray(image[:, ::-1])


def resave(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 97, 4:4:4."""
    return _through_jpeg(image, 97, 0)


DAMAGE: dict[str, Transform] = {
    f.__name__: f for f in (jpeg, posterise, sensor_noise, nearest_upscale, letterbox, watermark, oversharpen, chroma_shift, interlace)
}
STYLES: dict[str, Transform] = {
    f.__name__: f for f in (motion_blur, defocus, shallow_focus, film_grain, monochrome, vignette, low_key, high_key, mist)
}
CONTROLS: dict[str, Transform] = {f.__name__: f for f in (mirror, resave)}
