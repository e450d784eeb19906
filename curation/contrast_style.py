"""Styles: what the K2 report says must stay, done to a clean picture; and handling, which changes nothing that one should see.

Every function takes an RGB image (uint8 (H, W, 3)) and a generator, draws its own strength, and returns an RGB image. A feature that
fires on these may not remove; each damage of `curation.contrast_damage` has a twin here that looks like it to a careless feature
(pixel art to nearest upscaling, halftone to moire, a painting to over-denoising, soft focus to upscaling).
"""

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy.signal import fftconvolve

from curation.contrast_damage import noise, resized, soft, through_jpeg, to_bytes

# --- lens and shutter ---


def _convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    radius = max(kernel.shape) // 2
    padded = np.pad(image.astype(np.float32), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    return to_bytes(fftconvolve(padded, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1)))


def motion_blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A straight movement over 1.5 to 4 % of the short side (at least 5 pixels)."""
    length = max(5, int(min(image.shape[:2]) * rng.uniform(0.015, 0.04))) | 1
    stroke = Image.new("L", (length, length), 0)
    middle, angle = length // 2, rng.uniform(0, np.pi)
    dx, dy = middle * np.cos(angle), middle * np.sin(angle)
    ImageDraw.Draw(stroke).line((middle - dx, middle - dy, middle + dx, middle + dy), fill=255)
    return _convolved(image, np.asarray(stroke, np.float32))


def panning(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The surroundings drawn out sideways by 5 to 12 % of the width, the subject in the middle sharp."""
    height, width = image.shape[:2]
    length = max(5, int(width * rng.uniform(0.05, 0.12)))
    moved = cv2.blur(image, (length, 1)).reshape(image.shape)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    far = np.clip((np.hypot(x / 0.6, y / 0.8) - 0.6) / 0.4, 0, 1)[..., None]
    return to_bytes(image * (1 - far) + moved * far)


def spin_blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A turn of 3 to 10 degrees around the middle, or the same as a zoom, while the shutter was open."""
    height, width = image.shape[:2]
    total, turn, num = np.zeros(image.shape, np.float32), rng.uniform(3, 10), 12
    turned = rng.random() < 0.6
    for step in np.linspace(-0.5, 0.5, num):
        how = cv2.getRotationMatrix2D((width / 2, height / 2), turn * step * turned, 1 + turn * 0.012 * step * (not turned))
        total += cv2.warpAffine(np.ascontiguousarray(image), how, (width, height), borderMode=cv2.BORDER_REPLICATE).reshape(image.shape)
    return to_bytes(total / num)


def long_exposure(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The lower part of the picture as water in ten seconds of light: smooth and pale, the upper part untouched."""
    height = image.shape[0]
    moved = soft(image, (max(1, height * 0.01), max(1, image.shape[1] * 0.03))) * 0.9 + 25
    edge = rng.uniform(0.45, 0.65)
    below = np.clip((np.linspace(0, 1, height, dtype=np.float32) - edge) / 0.1, 0, 1)[:, None, None]
    return to_bytes(image * (1 - below) + moved * below)


def defocus(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The whole picture through a disc of radius 0.7 to 2 % of the short side (at least 2 pixels)."""
    radius = max(2, int(min(image.shape[:2]) * rng.uniform(0.007, 0.02)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return _convolved(image, (x * x + y * y <= radius * radius).astype(np.float32))


def shallow_focus(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sharp around one point, ever softer away from it."""
    height, width = image.shape[:2]
    blurred = soft(image, min(height, width) * 0.02)
    y, x = np.mgrid[:height, :width]
    distance = np.hypot((x / width - rng.uniform(0.3, 0.7)), (y / height - rng.uniform(0.3, 0.7)))
    blur = np.clip((distance - 0.15) / 0.25, 0, 1)[..., None]
    return to_bytes(image * (1 - blur) + blurred * blur)


def soft_focus(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A diffusion filter: the picture with a screen of its own glow over it."""
    glow = soft(image, max(1.5, min(image.shape[:2]) * 0.02))
    share = rng.uniform(0.4, 0.8)
    return to_bytes(image * (1 - share) + (255 - (255 - image) * (255 - glow) / 255) * share * 0.9)


def mist(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft and pale: mixed with its own blur and with light grey."""
    glow, pale = rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.4)
    return to_bytes((image * (1 - glow) + soft(image, 3) * glow) * (1 - pale) + 225 * pale)


# --- film and light ---


def film_grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Monochrome grain of 6 to 14 grey values, a little coarser than a pixel, strongest in the middle tones."""
    grain = soft(noise(rng, image.shape[:2]), rng.uniform(0.5, 0.9))
    luma = image.mean(2) / 255.0
    return to_bytes(image + (grain / max(float(grain.std()), 1e-6) * rng.uniform(6, 14) * (0.5 + 2 * luma * (1 - luma)))[..., None])


def monochrome(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black and white, or sepia, with a film-like contrast."""
    grey = Image.fromarray(image).convert("L")
    grey = ImageEnhance.Contrast(grey).enhance(rng.uniform(1.0, 1.4))
    return np.asarray(ImageOps.colorize(grey, "#1a0f05", "#fff2dc") if rng.random() < 0.3 else grey.convert("RGB"))


def vignette(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Corners darkened by 50 to 85 %."""
    y, x = np.linspace(-1, 1, image.shape[0])[:, None], np.linspace(-1, 1, image.shape[1])[None]
    fall = 1 - rng.uniform(0.5, 0.85) * np.clip((x * x + y * y) / 2, 0, 1) ** rng.uniform(0.8, 1.5)
    return to_bytes(image * fall[..., None])


def low_key(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mostly dark: a gamma of 1.8 to 3."""
    return to_bytes(255 * (image / 255.0) ** rng.uniform(1.8, 3))


def high_key(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mostly light: a gamma of 0.35 to 0.6."""
    return to_bytes(255 * (image / 255.0) ** rng.uniform(0.35, 0.6))


def cross_process(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Film in the wrong bath: a curve per channel, so that shadows and lights have opposite casts."""
    values, bend = image / 255.0, rng.uniform(0.08, 0.2, 3) * rng.choice([-1, 1], 3)
    return to_bytes(255 * (values + bend * np.sin(2 * np.pi * values)))


def light_leak(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Warm light that fell on the film from one side."""
    height, width = image.shape[:2]
    x = np.abs(np.linspace(0, 1, width, dtype=np.float32) - int(rng.integers(2)))[None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] - rng.uniform(-0.6, 0.6)
    leak = np.exp(-((x / rng.uniform(0.15, 0.4)) ** 2) - (y / 0.9) ** 2)[..., None] * rng.uniform(0.5, 0.9)
    return to_bytes(255 - (255 - image) * (1 - leak * np.array([1.0, rng.uniform(0.3, 0.6), 0.15], np.float32)))


def double_exposure(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture and its own upside-down mirror on one frame."""
    share = rng.uniform(0.3, 0.5)
    return to_bytes(image * (1 - share) + image[::-1, ::-1].astype(np.float32) * share)


# --- by hand ---


def painting(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brush strokes: the colour of the strongest of five hues in a neighbourhood, on a canvas with a little relief."""
    size, num = int(rng.integers(2, 4)), 7
    grey = (cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY).reshape(image.shape[:2]).astype(np.int32) * num) // 256
    best, result = np.full(grey.shape, -1.0, np.float32), np.zeros(image.shape, np.float32)
    box = (2 * size + 3, 2 * size + 3)
    for level in range(num):  # Oilify: per tone its share and its mean colour around each pixel; the largest share wins
        inside = (grey == level).astype(np.float32)
        share = cv2.boxFilter(inside, -1, box).reshape(grey.shape)
        color = cv2.boxFilter(image.astype(np.float32) * inside[..., None], -1, box).reshape(image.shape)
        wins = share > best
        best = np.where(wins, share, best)
        result = np.where(wins[..., None], color / np.maximum(share, 1e-6)[..., None], result)
    canvas = soft(noise(rng, grey.shape), (0.6, 1.5)) * 4
    return to_bytes((result - 128) * 1.1 + 128 + canvas[..., None])


def ink(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black lines where tones meet, on white or tinted paper, with a wash of the picture."""
    luma = image.astype(np.float32).mean(2)
    sigma = rng.uniform(0.8, 1.6)
    line = 1 / (1 + np.exp(-(soft(luma, sigma) - 0.98 * soft(luma, 1.6 * sigma) - 1) * 0.8))  # XDoG (Winnemoeller 2011), without its ramp
    wash = 255 - (255 - luma) * rng.uniform(0.05, 0.4)
    return to_bytes((line * wash)[..., None] * np.array([1.0, rng.uniform(0.93, 1), rng.uniform(0.82, 1)], np.float32))


def pixel_art(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """40 to 90 whole pixels a side in 8 to 32 colours, each a square of the same size."""
    height, width = image.shape[:2]
    size = max(2, round(min(height, width) / rng.uniform(40, 90)))
    small = Image.fromarray(resized(image, max(1, height // size), max(1, width // size), Image.Resampling.BOX))
    drawing = ImageEnhance.Color(small).enhance(1.3).quantize(int(2 ** rng.uniform(3, 5)), dither=Image.Dither.NONE).convert("RGB")
    return np.asarray(drawing).repeat(size, 0).repeat(size, 1)


def halftone(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Printed with dots of 4 to 8 pixels, black or in three inks, each ink's grid turned."""
    pitch, y, x = rng.uniform(4, 8), *np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    tones = soft(image, pitch / 3) if rng.random() < 0.5 else soft(image, pitch / 3).mean(2, keepdims=True).repeat(3, 2)
    printed = []
    for channel, angle in enumerate(np.deg2rad(rng.uniform(0, 90)) + np.deg2rad((15, 75, 0)) * (np.ptp(tones, 2).max() > 0)):
        across, along = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        screen = 127.5 + 63.75 * (np.cos(2 * np.pi * across / pitch) + np.cos(2 * np.pi * along / pitch))
        printed.append(255 / (1 + np.exp(np.clip((screen - tones[..., channel]) / 12, -40, 40))))
    return to_bytes(np.stack(printed, 2))


# --- nothing that one should see ---


def mirror(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left and right swapped."""
    return np.ascontiguousarray(image[:, ::-1])


def resave(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 98, 4:4:4."""
    return through_jpeg(image, 98, 0)


def trim(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One row and one column less."""
    return np.ascontiguousarray(image[1:, 1:]) if min(image.shape[:2]) > 1 else image


STYLISTS = (motion_blur, panning, spin_blur, long_exposure, defocus, shallow_focus, soft_focus, mist, film_grain, monochrome, vignette)
STYLISTS += (low_key, high_key, cross_process, light_leak, double_exposure, painting, ink, pixel_art, halftone)
HANDLING = (mirror, resave, trim)
