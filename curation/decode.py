"""Encoded bytes -> upright RGB pixels, bounded and robust.

One broken image is one `DecodeError` with a text that goes into the row; nothing else is caught.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own limit only warns below twice the value; `Limits.max_pixels` is checked from the header instead.
Image.MAX_IMAGE_PIXELS = None
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)


class DecodeError(Exception):
    """The bytes are not an image that we can show; the text says why."""


@dataclass(frozen=True)
class Limits:
    """What an image may cost. Beyond it the image is a broken row, decided from its header."""

    max_bytes: int = 256 << 20
    max_pixels: int = 200_000_000


LIMITS = Limits()


@dataclass(frozen=True)
class Header:
    """Facts of the file that the pixels no longer show."""

    format: str  # as Pillow names it
    mode: str  # before conversion to RGB
    width: int  # pixels, upright
    height: int
    num_frames: int
    luma_table: tuple[int, ...] | None  # 64 quantisation steps of a JPEG's luma, in natural order


VIEW_SIDE = 512  # short side of a view, pixels; smaller images are their own view
READS = ("bytes", "view", "pixels")  # what a stage may look at, each including the ones before


class Decoded(NamedTuple):
    """One image, as far as it had to be decoded."""

    header: Header
    view: np.ndarray  # uint8 (H, W, 3) RGB, upright, alpha on white; short side VIEW_SIDE to twice that, or the whole smaller image
    pixels: np.ndarray | None  # the same at full size; None unless asked for


@dataclass
class ImageBatch:
    """The decodable images of one batch, as a stage sees them. Lists have one entry per image.

    A stage that reads "bytes" sees undecodable images too, and neither pixels nor views. One that reads "view" sees `views`; one
    that reads "pixels" sees `images` as well.
    """

    uids: list[str]
    encoded: list[bytes]
    images: list[np.ndarray]  # uint8 (H, W, 3) RGB, upright, alpha on white; full size
    headers: list[Header]
    cache: dict[Any, Any] = field(default_factory=dict)  # what stages share, e.g. one forward pass per tower
    views: list[np.ndarray] = field(default_factory=list)  # as `Decoded.view`

    def __len__(self) -> int:
        return len(self.uids)


def decode(encoded: bytes | None, limits: Limits = LIMITS) -> tuple[np.ndarray, Header]:
    """Decode the first frame to uint8 (H, W, 3) RGB: EXIF orientation applied, alpha composited on white, 16 bit scaled.

    Raises:
        DecodeError: no bytes, not an image, truncated, corrupt, or larger than the limits.
    """
    if not encoded:
        raise DecodeError("no image bytes" if encoded is None else "empty file (0 bytes)")
    if len(encoded) > limits.max_bytes:
        raise DecodeError(f"file of {len(encoded)} bytes is over the limit of {limits.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF; the image is what counts
            with Image.open(io.BytesIO(encoded)) as image:
                if image.width * image.height > limits.max_pixels:
                    raise DecodeError(f"{image.width}x{image.height} pixels is over the limit of {limits.max_pixels}")
                quantisation = getattr(image, "quantization", None) or {}
                table = quantisation.get(0)
                container, mode, num_frames = image.format or "", image.mode, getattr(image, "n_frames", 1)
                image.seek(0)
                image.load()
                rgb = to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        start = bytes(encoded[:8])
        raise DecodeError(f"not an image that Pillow knows (first bytes {start!r})") from error
    except MemoryError as error:
        raise DecodeError("out of memory while decoding") from error
    except _BROKEN as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    pixels = np.asarray(rgb)
    header = Header(container, mode, rgb.width, rgb.height, num_frames, tuple(table) if table is not None and len(table) == 64 else None)
    return pixels, header


def decode_for(encoded: bytes | None, reads: str = "pixels", limits: Limits = LIMITS) -> Decoded:
    """Decode as far as `reads` ("view" or "pixels") asks for. The view is the same array whatever was asked for.

    Raises:
        DecodeError: as `decode`, with the same text whatever was asked for.
    """
    assert reads in READS[1:], reads
    pixels, header = decode(encoded, limits)
    return Decoded(header, pixels, pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: alpha on white, 16-bit greyscale scaled to 8 bit (not clipped, as Pillow's convert does)."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float64))
        top = max(float(values.max(initial=0)), 1.0)
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
