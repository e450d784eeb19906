"""Encoded bytes -> upright sRGB pixels, bounded and robust.

    bytes -> header (Pillow, no pixels) -> limits -> view: JPEG by libjpeg's scaled DCT, others decoded and reduced
                                                  -> pixels: full size, only where a stage reads them

One broken image is one `DecodeError` with a text that goes into the row; nothing else is caught. The verdict is the same whatever
is asked for: libjpeg-turbo is used where it has nothing to complain about, and Pillow's full decode decides everything else.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import pillow_heif
import simplejpeg
from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from pillow_jxl import JpegXLImagePlugin

from curation.color import array_to_srgb, to_rgb
from curation.formats import (
    FORMATS,
    MAX_FRAMES,
    MAX_TAG_VALUES,
    TIFF_STARTS,
    early_size,
    gif_frames,
    jpeg_scans,
    looks_like,
    png_is_short,
    tiff_pages,
)

# One core per decode: the workers beside this one have the others.
cv2.setNumThreads(1)
pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
JpegXLImagePlugin.DECODE_THREADS = 0
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
Image.init()  # registers every plugin of Pillow; `Image.open` is told which of them it may try

# Pillow's own limit only warns below twice the value; `Limits.max_pixels` is checked from the header instead.
Image.MAX_IMAGE_PIXELS = None
# What Pillow and its plugins raise on broken bytes; RuntimeError is libheif's and libjxl's.
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# What libjpeg says when pixels are missing and it went on with grey or with noise. Its other warnings are about the file's form.
_DAMAGE = ("premature end", "bad huffman code", "instead of rst", "inconsistent progression")


class DecodeError(Exception):
    """The bytes are not an image that we can show; the text says why."""


@dataclass(frozen=True)
class Limits:
    """What an image may cost. Beyond it the image is a broken row, decided from its header."""

    max_bytes: int = 256 << 20
    max_pixels: int = 200_000_000
    max_metadata: int = 32 << 20  # bytes of a JPEG before its first scan
    max_scans: int = 100  # of a JPEG; usual progressive ones have about 10
    max_scan_pixels: int = 4_000_000_000  # scans x pixels of a JPEG: every scan goes over all blocks, however few its bytes


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
    has_alpha: bool = False  # some pixel is not opaque; it was composited on white
    icc: str = "none"  # none, srgb (a profile that changes nothing), converted, or broken (a profile that was ignored)
    warning: str | None = None  # what libjpeg complained about in a JPEG that Pillow still shows, e.g. corrupt data in a scan


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
    """Decode the first frame to uint8 (H, W, 3) RGB at full size: upright, in sRGB, alpha on white, 16 bit scaled.

    Raises:
        DecodeError: no bytes, not an image, truncated, corrupt, or beyond the limits.
    """
    decoded = decode_for(encoded, "pixels", limits)
    assert decoded.pixels is not None
    return decoded.pixels, decoded.header


def decode_for(encoded: bytes | None, reads: str = "pixels", limits: Limits = LIMITS) -> Decoded:
    """Decode as far as `reads` ("view" or "pixels") asks for. The view is the same array whatever was asked for.

    A view is the image over the largest power of two that leaves its short side at least VIEW_SIDE, so below twice VIEW_SIDE;
    sides are rounded up, as libjpeg does. JPEG is scaled inside the DCT down to an eighth, everything else by area means.

    Raises:
        DecodeError: as `decode`, with the same text whatever was asked for.
    """
    assert reads in READS[1:], reads
    if not encoded:
        raise DecodeError("no image bytes" if encoded is None else "empty file (0 bytes)")
    if len(encoded) > limits.max_bytes:
        raise DecodeError(f"file of {len(encoded)} bytes is over the limit of {limits.max_bytes}")
    _check_unopened(encoded, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF; the image is what counts
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                _check_size(image.size, limits)
                if image.format in ("JPEG", "MPO"):
                    return _jpeg(encoded, image, reads, limits)
                return _other(encoded, image, reads, limits)
    except UnidentifiedImageError as error:
        name = looks_like(encoded)
        what = f"a {name} whose header cannot be read" if name in FORMATS else f"not an image that can be decoded, it looks like {name}"
        raise DecodeError(what) from error
    except MemoryError as error:
        raise DecodeError("out of memory while decoding") from error
    except _BROKEN as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise DecodeError(f"{type(error).__name__}: {reason}") from error


def _check_unopened(encoded: bytes, limits: Limits) -> None:
    """What must be known before Pillow opens the file: some plugins take memory or read all tags as they open it."""
    size = early_size(encoded)
    if size is not None:
        _check_size(size, limits)
    if encoded[:4] in TIFF_STARTS:
        _, values = tiff_pages(encoded)
        if values > MAX_TAG_VALUES:
            raise DecodeError(f"{values} values in the tags of the TIFF are over the limit of {MAX_TAG_VALUES}")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise DecodeError(f"{width}x{height} pixels is over the limit of {limits.max_pixels}")
    if width < 1 or height < 1:
        raise DecodeError(f"{width}x{height} pixels: the image is empty")


def _jpeg(encoded: bytes, image: Image.Image, reads: str, limits: Limits) -> Decoded:
    """A JPEG whose header Pillow has read."""
    width, height = image.size
    scans, metadata, ended = jpeg_scans(encoded, limits.max_scans)
    if metadata > limits.max_metadata:
        raise DecodeError(f"{metadata} bytes of metadata are over the limit of {limits.max_metadata}")
    if scans > limits.max_scans or scans * width * height > limits.max_scan_pixels:
        at_least = "more than " if scans > limits.max_scans else ""
        raise DecodeError(
            f"{at_least}{min(scans, limits.max_scans)} scans of {width}x{height} pixels are over the limit of "
            f"{limits.max_scans} scans and {limits.max_scan_pixels} pixels in all scans"
        )
    if not ended:
        raise DecodeError("truncated: the JPEG has no end-of-image marker")
    table = image.quantization.get(0)
    header = Header(
        image.format or "",
        image.mode,
        width,
        height,
        min(getattr(image, "n_frames", 1), MAX_FRAMES),
        tuple(table) if table is not None and len(table) == 64 else None,
    )
    profile, orientation = image.info.get("icc_profile"), _orientation(image)
    factor = view_factor(width, height)
    pixels = None
    try:
        if image.mode == "CMYK":  # libjpeg-turbo reads it, so that damage is found, but leaves the colours to others
            _turbo(encoded, width, height, 8, "CMYK")
            raise ValueError
        view, icc = array_to_srgb(_turbo(encoded, width, height, min(factor, 8)), profile, image.mode)
        view = _reduce(view, factor // min(factor, 8))
        has_alpha, warning = False, None
    except ValueError as error:
        warning = str(error) or None
        if warning is not None and any(sign in warning.lower() for sign in _DAMAGE):
            raise DecodeError(f"damaged: {warning}") from error
        image.load()
        rgb, icc, has_alpha = to_rgb(image)
        pixels = np.asarray(rgb)
        view = _reduce(pixels, factor)
    if reads == "pixels" and pixels is None:
        pixels = view if factor == 1 else array_to_srgb(_full(encoded, image), profile, image.mode)[0]
    return _upright(header, view, pixels if reads == "pixels" else None, orientation, has_alpha, icc, warning)


def _other(encoded: bytes, image: Image.Image, reads: str, limits: Limits) -> Decoded:
    """Any other format, always decoded in full."""
    if image.format == "TIFF":
        num_frames, _ = tiff_pages(encoded)
    else:
        num_frames = gif_frames(encoded) if image.format == "GIF" else min(getattr(image, "n_frames", 1), MAX_FRAMES)
    # An image of a HEIF file may be another than the first; its plugin opens the one that the file names.
    if image.format != "HEIF":
        image.seek(0)
    mode = image.mode
    image.load()
    if image.format == "PNG" and ("interlace" in image.info or not _bottom_row(image).any()) and png_is_short(encoded):
        raise DecodeError(f"truncated: the PNG has fewer pixels than the {image.width}x{image.height} of its header")
    _check_size(image.size, limits)  # what was decoded may differ from what the header said
    # HEIF and JPEG XL come upright from their decoders, TIFF from `load`; a JPEG inside a JPEG XL does not.
    turned = image.format == "HEIF" or (image.format == "JXL" and not image.jpeg)
    orientation = 1 if turned else _orientation(image)
    rgb, icc, has_alpha = to_rgb(image)
    pixels = np.asarray(rgb)
    header = Header(image.format or "", mode, image.width, image.height, num_frames, None)
    view = _reduce(pixels, view_factor(image.width, image.height))
    return _upright(header, view, pixels if reads == "pixels" else None, orientation, has_alpha, icc, None)


def _bottom_row(image: Image.Image) -> np.ndarray:
    return np.asarray(image.crop((0, image.height - 1, image.width, image.height)))


def view_factor(width: int, height: int) -> int:
    """The power of two that an image is divided by to be its view."""
    return 1 << max(0, (min(width, height) // VIEW_SIDE).bit_length() - 1)


def _turbo(encoded: bytes, width: int, height: int, factor: int, space: str = "RGB") -> np.ndarray:
    """libjpeg-turbo's pixels over `factor` (1, 2, 4, 8), sides rounded up.

    Raises:
        ValueError: libjpeg has something to say, be it an error or a warning.
    """
    size = (-(-height // factor), -(-width // factor))
    pixels = simplejpeg.decode_jpeg(encoded, space, min_height=size[0], min_width=size[1])
    if pixels.shape[:2] != size:
        raise ValueError(f"decoded to {pixels.shape[1]}x{pixels.shape[0]} where {size[1]}x{size[0]} was asked for")
    return pixels


def _full(encoded: bytes, image: Image.Image) -> np.ndarray:
    """RGB at full size of a JPEG whose view libjpeg-turbo had no complaint about, so that both read the same scans without one."""
    try:
        return _turbo(encoded, image.width, image.height, 1)
    except ValueError:
        return np.asarray(image.convert("RGB"))


def _reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Area means over `factor` x `factor` pixels, sides rounded up."""
    if factor == 1:
        return pixels
    height, width = pixels.shape[:2]
    return cv2.resize(pixels, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except _BROKEN:
        return 1
    return orientation if orientation in _TURNS else 1


# EXIF 2.32, 4.6.4: (transposed first, then rows reversed, then columns reversed)
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def _upright(
    header: Header, view: np.ndarray, pixels: np.ndarray | None, orientation: int, has_alpha: bool, icc: str, warning: str | None
) -> Decoded:
    """Turn the arrays, and complete the header with what decoding found."""
    transposed, rows, columns = _TURNS[orientation]
    width, height = (header.height, header.width) if transposed else (header.width, header.height)

    def turn(array: np.ndarray) -> np.ndarray:
        turned = array.transpose(1, 0, 2) if transposed else array
        return np.ascontiguousarray(turned[:: -1 if rows else 1, :: -1 if columns else 1])

    whole = pixels if pixels is None else view if pixels is view else turn(pixels)
    return Decoded(
        Header(header.format, header.mode, width, height, header.num_frames, header.luma_table, has_alpha, icc, warning),
        turn(view),
        turn(view) if whole is view else whole,
    )
