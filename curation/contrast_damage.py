"""Damage: what the K2 report calls artifacts, in five severities each, done to the pixels of the source before any tower's resize.

Every function takes an RGB image (uint8 (H, W, 3)), a generator and a severity from 1 (one has to look for it) to 5 (nobody would
keep it); without a severity it draws one of 3 to 5. A severity fixes the strength up to a jitter of 8 %; lengths are pixels of the
source. The kinds follow KADID-10k, ImageNet-C and PIPAL where these name damage; what they call damage and people do on purpose
(motion blur, defocus, grain, darkness) is in `curation.contrast_style`.
"""

import io

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SEVERITIES = (1, 2, 3, 4, 5)
MARKS = ("© photo agency", "proof", "www.example.org", "sample image", "licensed preview")
Levels = tuple[float, float, float, float, float]


def drawn(rng: np.random.Generator, severity: int | None) -> int:
    """The severity, or one of 3 to 5."""
    return int(rng.integers(3, 6)) if severity is None else severity


def strength(rng: np.random.Generator, severity: int, levels: Levels) -> float:
    """The level of a severity, with a jitter of 8 %."""
    return levels[severity - 1] * float(np.exp(rng.uniform(-0.08, 0.08)))


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Any numbers as uint8, rounded and cut to 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def soft(values: np.ndarray, sigma: float | tuple[float, float]) -> np.ndarray:
    """Gaussian blur in float32; `sigma` in pixels, or (rows, columns)."""
    rows, columns = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    blurred = cv2.GaussianBlur(np.ascontiguousarray(values, np.float32), (0, 0), max(columns, 1e-3), sigmaY=max(rows, 1e-3))
    return blurred.reshape(values.shape)


def through_jpeg(image: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    """An image as JPEG gives it back; subsampling 0 is 4:4:4, 2 is 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized(image: np.ndarray, height: int, width: int, method: Image.Resampling) -> np.ndarray:
    """An image at another size."""
    return np.asarray(Image.fromarray(image).resize((max(1, width), max(1, height)), method))


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float32 standard normal numbers."""
    return rng.standard_normal(shape, np.float32)


# --- codecs ---


def jpeg(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """JPEG of quality 50 down to 8, 4:2:0, up to three times with a grid that moves between the saves."""
    severity = drawn(rng, severity)
    quality = max(5, round(strength(rng, severity, (50, 32, 20, 13, 8))))
    for _ in range(int(rng.integers(1, 2 + severity // 2))):
        shift = tuple(int(step) for step in rng.integers(0, 8, 2))
        image = np.roll(through_jpeg(np.roll(image, shift, (0, 1)), quality, 2), (-shift[0], -shift[1]), (0, 1))
    return image


def mosquito(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """What JPEG of quality 45 to 8 leaves beside edges; flat areas stay as they were, so that no block shows."""
    severity = drawn(rng, severity)
    coded = through_jpeg(image, max(5, round(strength(rng, severity, (45, 30, 20, 13, 8)))), 2)
    luma = soft(image.astype(np.float32).mean(2), 1)
    edges = np.hypot(cv2.Sobel(luma, cv2.CV_32F, 1, 0).reshape(luma.shape), cv2.Sobel(luma, cv2.CV_32F, 0, 1).reshape(luma.shape))
    near = np.clip(soft((edges > 60).astype(np.float32), 5) * 4, 0, 1)[..., None]
    return to_bytes(image * (1 - near) + (2.0 * coded - image) * near)


def posterise(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """24 down to 3 levels per channel, no dither, some through a gamma first: bands in every gradient."""
    steps = max(2, round(strength(rng, drawn(rng, severity), (23, 13, 7, 4, 2))))
    gamma = rng.uniform(0.7, 1.4)
    return to_bytes((np.rint((image / 255.0) ** gamma * steps) / steps) ** (1 / gamma) * 255)


def plastic(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Denoised until skin and foliage are wax: a bilateral filter one to three times over."""
    severity = drawn(rng, severity)
    sigma, smooth = strength(rng, severity, (18, 28, 40, 55, 75)), np.ascontiguousarray(image)
    for _ in range((severity + 1) // 2):
        smooth = cv2.bilateralFilter(smooth, 9, sigma, 5)
    return smooth


# --- scalers and sharpeners ---


def soft_upscale(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Reduced 1.6 to 7 times, then enlarged smoothly: all detail gone alike, at every depth."""
    factor = strength(rng, drawn(rng, severity), (1.6, 2.3, 3.3, 4.8, 7))
    height, width = image.shape[:2]
    small = resized(image, int(height / factor), int(width / factor), Image.Resampling.BOX)
    method = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)[int(rng.integers(3))]
    return resized(small, height, width, method)


def nearest_upscale(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Reduced 1.5 to 5 times, with or without a low pass, then enlarged with square pixels: stairs along every edge."""
    factor = strength(rng, drawn(rng, severity), (1.5, 2, 3, 4, 5))
    height, width = image.shape[:2]
    method = Image.Resampling.BOX if rng.random() < 0.5 else Image.Resampling.NEAREST
    return resized(resized(image, int(height / factor), int(width / factor), method), height, width, Image.Resampling.NEAREST)


def oversharpen(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Unsharp mask of radius 1 to 3 at 100 to 600 %: halos along every edge."""
    percent = round(strength(rng, drawn(rng, severity), (100, 180, 300, 430, 600)))
    return np.asarray(Image.fromarray(image).filter(ImageFilter.UnsharpMask(rng.uniform(1, 3), percent, 0)))


# --- cameras and tapes ---


def sensor_noise(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """High-gain noise of 8 to 60 grey values: per channel, stronger in the light, with coarse colour blotches and hot pixels."""
    gain = strength(rng, drawn(rng, severity), (8, 15, 25, 40, 60))
    shot = noise(rng, image.shape) * gain * np.sqrt(0.3 + 0.7 * image.astype(np.float32) / 255)
    noisy = image + shot + soft(noise(rng, image.shape), 2) * gain * 2
    hot = rng.integers(0, image.shape[0] * image.shape[1], image.shape[0] * image.shape[1] // 4000)
    noisy.reshape(-1, 3)[hot, int(rng.integers(3))] = 255
    return to_bytes(noisy)


def chroma_shift(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Colour displaced by 2 to 16 pixels against the luma, and smeared."""
    distance = strength(rng, drawn(rng, severity), (2, 3.5, 6, 10, 16))
    luma, *chroma = np.moveaxis(np.asarray(Image.fromarray(image).convert("YCbCr")), 2, 0)
    shift = [round(distance * share) for share in rng.uniform(0.6, 1, 2) * rng.choice([-1, 1], 2)]
    moved = [to_bytes(soft(np.roll(plane, shift, (0, 1)), distance / 3)) for plane in chroma]
    return np.asarray(Image.fromarray(np.stack([luma, *moved], 2), "YCbCr").convert("RGB"))


def interlace(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Every second row displaced by 2 to 20 pixels: two fields of a moving camera."""
    combed = image.copy()
    distance = max(1, round(strength(rng, drawn(rng, severity), (2, 3, 5, 10, 20))))
    combed[1::2] = np.roll(image[1::2], distance * int(rng.choice([-1, 1])), axis=1)
    return combed


def vhs(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Tape: colour smeared along the rows, rows that jitter, white dropouts, and a torn bar of head switching at the bottom."""
    amount = strength(rng, drawn(rng, severity), (0.12, 0.25, 0.45, 0.7, 1))
    height, width = image.shape[:2]
    luma, *chroma = np.moveaxis(np.asarray(Image.fromarray(image).convert("YCbCr")).astype(np.float32), 2, 0)
    planes = np.stack([soft(luma, (0, 1.5 * amount)), *(soft(plane, (1, 12 * amount)) for plane in chroma)], 2)
    jitter = np.rint(soft(noise(rng, (height, 1)), (2, 0))[:, 0] * 12 * amount).astype(int)
    torn = max(1, int(height * 0.06 * amount))
    jitter[-torn:] += rng.integers(width // 12 + 1, width // 4 + 2, torn)
    taken = (np.arange(width)[None] + jitter[:, None]) % width
    planes = np.take_along_axis(planes, taken[..., None], 1)
    for _ in range(int(2 + 30 * amount)):
        row, start, length = int(rng.integers(height)), int(rng.integers(width)), int(rng.integers(width // 30 + 1, width // 6 + 2))
        planes[row, start : start + length, 0] = 240
    planes[..., 0] += noise(rng, (height, width)) * 14 * amount
    return np.asarray(Image.fromarray(to_bytes(planes), "YCbCr").convert("RGB"))


def moire(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """A screen photographed: the product of two turned gratings, whose beat lies over the picture in each colour differently."""
    amount = strength(rng, drawn(rng, severity), (0.05, 0.09, 0.15, 0.24, 0.36))
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    pitch, angle, turn = rng.uniform(2.2, 3.2), rng.uniform(0, np.pi), rng.uniform(0.02, 0.08)
    beat = []
    for phase in rng.uniform(0, 2 * np.pi, 3):
        gratings = [
            np.cos(2 * np.pi / p * (x * np.cos(a) + y * np.sin(a)) + phase) for p, a in ((pitch, angle), (pitch * 1.04, angle + turn))
        ]
        beat.append(gratings[0] * gratings[1] + 0.5 * gratings[0])
    return to_bytes(image * (1 + 1.4 * amount * np.stack(beat, 2)))


# --- what others put on it ---


def letterbox(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """Flat bars of 2 to 25 % at top and bottom, left and right, or all around; black, white or grey."""
    share, where = strength(rng, drawn(rng, severity), (0.02, 0.04, 0.08, 0.15, 0.25)), int(rng.integers(3))
    height, width = image.shape[:2]
    tall, wide = (int(height * share) + 1) * (where != 1), (int(width * share) + 1) * (where != 0)
    return np.pad(image, ((tall, tall), (wide, wide), (0, 0)), constant_values=int(rng.choice([0, 0, 255, 128])))


def watermark(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """A text in rows over the whole picture, or once and large across it, 12 to 65 % opaque, white or black."""
    opaque = strength(rng, drawn(rng, severity), (0.12, 0.2, 0.32, 0.47, 0.65))
    height, width = image.shape[:2]
    text, layer = MARKS[int(rng.integers(len(MARKS)))], Image.new("L", (width, height), 0)
    draw, once = ImageDraw.Draw(layer), rng.random() < 0.25
    share = 1.4 / len(text) * width / min(height, width) if once else rng.uniform(0.06, 0.12)
    font = ImageFont.load_default(size=max(10, int(min(height, width) * share)))
    left, top, right, bottom = font.getbbox(text)
    if once:
        draw.text(((width - right) / 2, height * rng.uniform(0.3, 0.6)), text, fill=255, font=font)
    else:
        for row, y in enumerate(range(0, height, int((bottom - top) * rng.uniform(2.0, 3.5)) + 4)):
            for x in range(-(row % 3) * (right - left) // 3, width, int((right - left) * 1.2) + 4):
                draw.text((x, y), text, fill=255, font=font)
    alpha = np.asarray(layer, np.float32)[..., None] / 255 * opaque
    return to_bytes(image * (1 - alpha) + alpha * int(rng.choice([255, 255, 0])))


def screenshot(image: np.ndarray, rng: np.random.Generator, severity: int | None = None) -> np.ndarray:
    """A picture of a screen: a bar with clock and icons on top, from severity 2 an address line, then a subtitle, a cursor, a bar below."""
    severity = drawn(rng, severity)
    height, width = image.shape[:2]
    bar = max(6, int(height * strength(rng, severity, (0.03, 0.045, 0.06, 0.08, 0.1))))
    back, ink = ((245, 245, 247), (40, 40, 45)) if rng.random() < 0.5 else ((28, 28, 32), (235, 235, 238))
    canvas = Image.fromarray(image)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(5, int(bar * 0.6)))

    def strip(top: int, text: str) -> None:
        draw.rectangle((0, top, width, top + bar), fill=back)
        draw.text((bar * 0.4, top + bar * 0.15), text, fill=ink, font=font)

    strip(0, f"{int(rng.integers(24)):02}:{int(rng.integers(60)):02}")
    for icon in range(3):
        right = width - bar * (0.4 + 0.9 * icon)
        draw.ellipse((right - bar * 0.5, bar * 0.25, right, bar * 0.75), fill=ink)
    if severity >= 2:
        strip(bar, "https://www.example.org/gallery/view")
    if severity >= 3:
        text = ("and then he was gone", "I never said that to her", "what do we do now?")[int(rng.integers(3))]
        large = ImageFont.load_default(size=max(8, int(height * 0.055)))
        _, top, right, bottom = draw.textbbox((0, 0), text, font=large)
        x, y = (width - right) / 2, height * 0.85 - bottom
        draw.rectangle((x - 6, y + top - 4, x + right + 6, y + bottom + 4), fill=(0, 0, 0))
        draw.text((x, y), text, fill=(255, 255, 255), font=large)
    if severity >= 4:
        x, y, size = width * rng.uniform(0.2, 0.8), height * rng.uniform(0.3, 0.7), max(8, height * 0.06)
        shape = ((0, 0), (0, 1), (0.27, 0.77), (0.45, 1.1), (0.6, 1.03), (0.43, 0.7), (0.72, 0.7))
        draw.polygon([(x + size * dx, y + size * dy) for dx, dy in shape], fill=(255, 255, 255), outline=(0, 0, 0))
    if severity >= 5:
        strip(height - bar, "page 1 of 12   share   save   print")
    return np.asarray(canvas)


# The first nine are the oldest; networks that learned from them draw these by name.
DAMAGES = (jpeg, posterise, sensor_noise, nearest_upscale, letterbox, watermark, oversharpen, chroma_shift, interlace)
DAMAGES += (mosquito, soft_upscale, moire, screenshot, vhs, plastic)
