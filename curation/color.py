"""Any Pillow mode to 8-bit RGB in sRGB: alpha on white, 16 bit scaled, ICC profiles applied."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE = 4 << 20  # bytes; CMYK profiles have 0.5 to 3 MB
SAME = 2  # a profile that moves no colour by more than this many levels of 255 is sRGB
_GRID = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).astype(np.uint8)] * 3), -1).reshape(1, -1, 3)
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}


def to_rgb(image: Image.Image) -> tuple[Image.Image, str, bool]:
    """(RGB image in sRGB, what became of its ICC profile, is a pixel not opaque).

    The profile is "none", "srgb" (it changes nothing), "converted", or "broken" (unreadable, or of another colour space than the
    pixels; ignored). 16-bit greyscale is scaled, not clipped as Pillow's convert does. Transparency is composited on white.
    """
    profile = image.info.get("icc_profile")
    image, opacity = _to_8_bit(image)
    icc = "none"
    if profile:
        kind, transform = _transform(bytes(profile), image.mode)
        if transform is not None:
            image = ImageCms.applyTransform(image, transform)
        icc = kind
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if opacity is None:
        return rgb, icc, False
    return Image.composite(rgb, Image.new("RGB", rgb.size, (255, 255, 255)), opacity), icc, opacity.getextrema()[0] < 255


def array_to_srgb(pixels: np.ndarray, profile: bytes | None, mode: str) -> tuple[np.ndarray, str]:
    """(uint8 (H, W, 3) RGB in sRGB, as in `to_rgb`) of decoded RGB pixels, grey ones repeated, of a file in `mode` "RGB" or "L"."""
    if not profile:
        return pixels, "none"
    kind, transform = _transform(bytes(profile), mode)
    if transform is None:
        return pixels, kind
    image = Image.fromarray(pixels if mode == "RGB" else np.ascontiguousarray(pixels[..., 0]))
    return np.array(ImageCms.applyTransform(image, transform)), kind


def _to_8_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(the colours in mode RGB, L or CMYK, the opacity in mode L where the image has one)."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        if image.mode == "F":
            top = max(float(values.max(initial=0)), 1.0)
        else:
            top = 65535.0 if image.mode != "I" or values.max(initial=0) > 255 else 255.0
        grey = np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8)
        key = image.info.get("transparency")
        opacity = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return Image.fromarray(grey), opacity
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("LA", "La")
        rgba = image.convert("RGBA")
        return (image.convert("LA").getchannel("L") if grey else rgba.convert("RGB")), rgba.getchannel("A")
    if image.mode in _SPACES:
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(what becomes of the profile, the transform to sRGB where one is needed). The measure is what it does, not what it is called."""
    if len(profile) > MAX_PROFILE:
        return "broken", None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _SPACES[mode]:
            return "broken", None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            ImageCms.applyTransform(Image.new(mode, (1, 1)), transform)
        else:
            grid = _GRID if mode == "RGB" else np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, -1)
            image = Image.fromarray(grid if mode == "RGB" else np.ascontiguousarray(grid[..., 0]))
            moved = np.asarray(ImageCms.applyTransform(image, transform)).astype(int) - grid
            if np.abs(moved).max() <= SAME:
                return "srgb", None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, MemoryError):
        return "broken", None
    return "converted", transform
