"""Aligned pairs: a crop of a real image and its reconstruction by an autoencoder, equal in content, size and file history.

What is left to tell them apart is the decoder, which is what generated images share; all that makes a naive detector look good
(format, size, subject) is the same on both sides.

* The reconstruction alone as the synthetic class: Rajan et al., "Aligned Datasets Improve Detection of Latent Diffusion-Generated
  Images", ICLR 2025 (arXiv:2410.11835).
* Crops at native scale and never a resize of one side only, several fakes per real image: Guillaro et al., "A Bias-Free Training
  Paradigm for More General AI-generated Image Detection" (B-Free), CVPR 2025 (arXiv:2412.17671).
* Frequency alignment and pixel mix-up: Chen et al., "Dual Data Alignment Makes AI-Generated Image Detector Easier Generalizable",
  NeurIPS 2025 (arXiv:2505.14359). An autoencoder restores high frequencies that the real image's own JPEG had removed, so both sides
  are encoded once more with that JPEG's quality and subsampling; and part of the pixels' difference is mixed away.

A pool on disk holds pairs before the re-encoding: who trains draws the codec anew in every epoch, with `reencode`.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from curation.decode import DecodeError, decode
from curation.shards import whole_file
from curation.stages.basics import jpeg_quality

Reconstruct = Callable[[np.ndarray], np.ndarray]  # uint8 (N, H, W, 3) -> its reconstruction, uint8 (N, H, W, 3)

SIDE = 256  # pixels of a crop
MCU = 16  # pixels; a crop that starts on a multiple keeps the blocks of the image's own JPEG, whatever its subsampling
SCALED = 0.3  # share of the crops that come from the image scaled down, by a factor of U(0.5, 1)
MIXED = 0.3  # share of the reconstructions that are mixed with the real pixels
MAX_REAL = 0.8  # largest share of the real pixels in a mix: beyond it little more than rounding is left of the decoder
QUALITIES = (80, 98)  # of images that were never JPEG, or no longer are after scaling
LOSSLESS = 0.3  # share of those that stay uncompressed


class Codec(NamedTuple):
    """A JPEG encoding."""

    quality: int  # IJG, 1-100
    subsampling: str  # of simplejpeg: 444, 422, 420, 440, 411 or Gray


class Crop(NamedTuple):
    """A square of an image, with the JPEG that its pixels went through last; None when scaling or a lossless file is in between."""

    pixels: np.ndarray  # uint8 (side, side, 3)
    codec: Codec | None


def crops(encoded: bytes, count: int, rng: np.random.Generator, side: int = SIDE) -> list[Crop]:
    """`count` random crops of an image, most at native scale; none if it is smaller than `side`.

    Raises:
        DecodeError: as `decode`.
    """
    pixels, header = decode(encoded)
    if min(pixels.shape[:2]) < side:
        return []
    quality = jpeg_quality(header.luma_table)
    own = None if quality is None else Codec(quality, simplejpeg.decode_jpeg_header(encoded)[3])
    found = []
    for _ in range(count):
        image, codec = pixels, own
        factor = rng.uniform(max(0.5, side / min(pixels.shape[:2])), 1)
        if rng.random() < SCALED:
            height, width = (max(side, round(length * factor)) for length in pixels.shape[:2])
            image, codec = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), None
        top, left = (int(rng.integers((length - side) // MCU + 1)) * MCU for length in image.shape[:2])
        found.append(Crop(np.ascontiguousarray(image[top : top + side, left : left + side]), codec))
    return found


def aligned_pair(
    image: bytes, reconstruct: Reconstruct, rng: np.random.Generator, side: int = SIDE
) -> tuple[np.ndarray, np.ndarray] | None:
    """(real, reconstruction), uint8 (side, side, 3) each, of one crop of an encoded image; None if the image is smaller than that.

    Raises:
        DecodeError: as `decode`.
    """
    found = crops(image, 1, rng, side)
    if not found:
        return None
    real, codec = found[0]
    reconstruction = reconstruct(real[None])[0]
    if rng.random() < MIXED:
        reconstruction = mix(real, reconstruction, rng.uniform(0, MAX_REAL))
    codec = codec or random_codec(rng)
    return reencode(real, codec), reencode(reconstruction, codec)


def mix(real: np.ndarray, reconstruction: np.ndarray, share: float) -> np.ndarray:
    """share * real + (1 - share) * reconstruction, uint8."""
    return cv2.addWeighted(real, share, reconstruction, 1 - share, 0)


def random_codec(rng: np.random.Generator) -> Codec | None:
    """What an image that was never JPEG may meet: nothing, or a JPEG of QUALITIES."""
    quality, subsampling = int(rng.integers(QUALITIES[0], QUALITIES[1] + 1)), str(rng.choice(["420", "444"]))
    return None if rng.random() < LOSSLESS else Codec(quality, subsampling)


def reencode(pixels: np.ndarray, codec: Codec | None) -> np.ndarray:
    """uint8 (H, W, 3) through a JPEG and back."""
    if codec is None:
        return pixels
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), codec.quality, "RGB", codec.subsampling)
    return simplejpeg.decode_jpeg(encoded, "RGB")


def psnr(real: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Peak signal to noise ratio of N pairs (N, ...) uint8, dB (N,); 99 where they are equal."""
    error = np.square(real.astype(np.float32) - reconstruction).reshape(len(real), -1).mean(1)
    return np.where(error > 0, 10 * np.log10(255**2 / np.maximum(error, 1e-9)), 99.0)


def write_pairs(
    images: Sequence[tuple[str, str]],
    autoencoders: Mapping[str, Reconstruct],
    out: str | Path,
    per_image: int = 2,
    side: int = SIDE,
    seed: int = 0,
    shard: int = 32,
) -> Iterator[tuple[Path, int, float]]:
    """Write pairs of real images, not re-encoded, as `<out>/<autoencoder>-<number>.npz`, one file per `shard` images.

    A file holds real and reconstruction, uint8 (N, side, side, 3); path, source and autoencoder, str (N,); and the crop's own JPEG:
    quality, uint8 (N,), 0 where there is none, and subsampling, str (N,). Every autoencoder gets crops of its own. Images that are
    broken or smaller than `side` give no pair. Files that exist are left alone, so that a stopped run goes on where it was.

    Args:
        images: (path, source) of real images. The order is shuffled by `seed`: the first files show all sources.
        autoencoders: By the name that the pool gives them.

    Yields:
        The path, the number of pairs and the mean PSNR in dB (NaN for none) of every file that it wrote.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(images))
    for name, reconstruct in autoencoders.items():
        for number, chosen in enumerate(np.split(order, range(shard, len(order), shard))):
            path = Path(out) / f"{name}-{number:03}.npz"
            if path.exists():
                continue
            rows = [(*images[i], crop) for i in chosen for crop in _crops_of(images[i][0], name, per_image, side, seed)]
            real = np.stack([crop.pixels for *_, crop in rows]) if rows else np.zeros((0, side, side, 3), np.uint8)
            reconstruction = np.concatenate([reconstruct(part) for part in np.split(real, range(8, len(real), 8))])
            with whole_file(path) as file:
                np.savez(
                    file,
                    real=real,
                    reconstruction=reconstruction,
                    path=np.array([row[0] for row in rows], str),
                    source=np.array([row[1] for row in rows], str),
                    autoencoder=np.array([name] * len(rows), str),
                    quality=np.array([crop.codec.quality if crop.codec else 0 for *_, crop in rows], np.uint8),
                    subsampling=np.array([crop.codec.subsampling if crop.codec else "" for *_, crop in rows], str),
                )
            yield path, len(rows), float(psnr(real, reconstruction).mean()) if rows else float("nan")


def _crops_of(path: str, name: str, count: int, side: int, seed: int) -> list[Crop]:
    """Crops of a file, the same in whatever order the files come; none of a broken one."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{name}\0{path}".encode())])
    try:
        return crops(Path(path).read_bytes(), count, rng, side)
    except DecodeError:
        return []
