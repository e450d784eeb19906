"""The stage `defects`: what exposure, codecs, scalers, video and editors leave in an image, measured on pixels of full size.

None of it looks at sharpness: motion blur, soft focus, grain and shallow focus are style (K2 report), and the benchmark
`bench_defects.py` holds every column against them. A value that an image is too small or too flat to show is the innocent
one, never null, so that a rule over these columns keeps it; null is left to broken images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg

from curation.decode import ImageBatch
from curation.schema import DEFECTS

PART = 256  # side of the parts that stand for an image of more than MAX_PIXELS pixels
MAX_PIXELS = 16 * PART * PART  # the cost of an image does not grow beyond this
FRAME_SIDE = 256  # long side of the small view in which frames are looked for
LINE = 0.5  # share of the picture over which the end of a bar jumps by 8 grey levels
SMOOTH = 0.15  # the same share, at most, between rows inside a bar
GRID_SIDE = 64  # shorter sides show neither an 8 x 8 grid nor the trace of a scaler
FEWEST_PIXELS = 16_384  # fewer leave gaps in a histogram of 256 grey levels by chance
STRONGEST = 24  # grey levels at which one step of a profile is cut, so that a few edges do not drown the many small steps


@dataclass(frozen=True)
class Defects:
    """Facts that need pixels of full size and no model. `version` changes whenever a formula does."""

    version: int = 1
    name: ClassVar[str] = "defects"
    reads: ClassVar[str] = "pixels"
    schema: ClassVar[pa.Schema] = DEFECTS

    def load(self, device: str) -> Callable[[ImageBatch], dict[str, Any]]:
        """Runs on the CPU whatever the device."""
        return compute


def compute(batch: ImageBatch) -> dict[str, Any]:
    """One value per image for every column of DEFECTS."""
    rows = [facts(image, len(encoded)) for image, encoded in zip(batch.images, batch.encoded, strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def facts(image: np.ndarray, num_bytes: int) -> dict[str, Any]:
    """Facts of one uint8 (H, W, 3) RGB image that is stored in `num_bytes` bytes."""
    image = np.ascontiguousarray(image)
    chosen = parts(image)
    luma = np.stack([cv2.cvtColor(part, cv2.COLOR_RGB2GRAY) for part in chosen])
    grey = luma[0] if len(luma) == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return levels(thinned(image)) | compression(image, chosen, num_bytes) | grid(luma) | scaling(grey, luma) | lines(luma) | frames(grey)


def parts(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (1, H, W, 3), or for more than MAX_PIXELS (P, 256, 256, 3), P <= 16: an even lattice on the 8 x 8 grid."""
    height, width = image.shape[:2]
    if height * width <= MAX_PIXELS:
        return image[None]
    tall = min(PART, height)
    wide = min(PART, width)
    offsets = [sorted({int(at) // 8 * 8 for at in np.linspace(0, side - size, 4)}) for side, size in ((height, tall), (width, wide))]
    return np.stack([image[top : top + tall, left : left + wide] for top in offsets[0] for left in offsets[1]])


def thinned(image: np.ndarray) -> np.ndarray:
    """Every n-th pixel of every n-th row, so that at most a sixteenth of MAX_PIXELS are left: values as they are, nothing is mixed."""
    step = int(np.ceil(np.sqrt(image.shape[0] * image.shape[1] / (MAX_PIXELS / 16))))
    return np.ascontiguousarray(image[::step, ::step])


def levels(image: np.ndarray) -> dict[str, float]:
    """Exposure and colour of uint8 (H, W, 3): luma (BT.601) percentiles and clipping, HSV saturation, colourfulness, empty levels.

    `colorfulness` is Hasler and Suesstrunk 2003 ("Measuring colourfulness in natural images"): 0 for grey, 109 "extremely
    colourful". The others are shares and percentiles of plain histograms. White paper clips all channels alike; too much light
    clips one or two and leaves the wrong hue (`clipped_partly`), too much saturation drives one up and another down to nothing
    (`clipped_both`: at most .003 in the styles of bench_defects.py).
    """
    red, green, blue = cv2.split(image)
    high, low = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    chroma = cv2.subtract(high, low)
    red_green = cv2.subtract(red, green, dtype=cv2.CV_32F)
    yellow_blue = cv2.subtract(cv2.addWeighted(red, 0.5, green, 0.5, 0, dtype=cv2.CV_32F), blue, dtype=cv2.CV_32F)
    mean, spread = np.array([cv2.meanStdDev(plane) for plane in (red_green, yellow_blue)]).reshape(2, 2).T
    blown = high >= 254
    counts = np.bincount(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).reshape(-1), minlength=256)
    share = np.cumsum(counts) / counts.sum()
    first, last = (int(np.searchsorted(share, part)) for part in (0.01, 0.99))
    return {
        "luma_mean": float(counts @ np.arange(256) / counts.sum()),
        "luma_low": first,
        "luma_high": last,
        "clipped_low": float(share[2]),
        "clipped_high": _share(blown),
        "clipped_partly": _share(blown & (low < 250) & (low > 8)),
        "clipped_both": _share(blown & (low <= 1)),
        "saturation": cv2.mean(cv2.divide(chroma, cv2.max(high, 1), dtype=cv2.CV_32F))[0],
        "colorfulness": float(np.hypot(*spread) + 0.3 * np.hypot(*mean)),
        "level_gaps": float((counts[first : last + 1] == 0).mean()) if counts.sum() >= FEWEST_PIXELS else 0.0,
    }


def compression(image: np.ndarray, chosen: np.ndarray, num_bytes: int) -> dict[str, float]:
    """Bytes against pixels (Z-Image compares raw with file size), and against what this content takes as a JPEG of quality 75.

    The second means the same in every container: about 1 for a JPEG of quality 75, 2 at 92, .75 at 50, .6 at 20 and no less below it,
    because crushed content also takes fewer bytes the second time. It says how a file was packed; it is no rule by itself.
    """
    again = sum(len(simplejpeg.encode_jpeg(part, quality=75, colorspace="RGB", colorsubsampling="420")) for part in chosen)
    pixels = image.shape[0] * image.shape[1]
    return {"bits_per_pixel": 8 * num_bytes / pixels, "relative_bytes": num_bytes / (again * pixels / chosen[..., 0].size)}


def grid(luma: np.ndarray) -> dict[str, float | int | None]:
    """8 x 8 blocks of uint8 (P, H, W): the jump between columns (rows) by their place modulo 8, the strongest place against the median.

    Blocks survive a second save at high quality, a PNG, and a crop, which moves them: `grid_x` and `grid_y` say where a block
    starts, 0 for the place where a file's own codec puts it. The measure is `jumps`, after Wang, Sheikh and Bovik 2002.
    """
    if min(luma.shape[1:]) < GRID_SIDE:
        return {"blockiness": 0.0, "grid_x": None, "grid_y": None}
    plane = luma.astype(np.float32)
    profiles = [jumps(view, 8).mean(0) for view in (plane, plane.transpose(0, 2, 1))]
    excess = [np.log2((profile.max() + 0.1) / (np.median(profile) + 0.1)) for profile in profiles]
    start = [(int(profile.argmax()) + 1) % 8 for profile in profiles]
    return {"blockiness": float(np.mean(excess)), "grid_x": start[0], "grid_y": start[1]}


def scaling(grey: np.ndarray, luma: np.ndarray) -> dict[str, float]:
    """Traces of enlargement: `resampling` from the whole uint8 (H, W), `rolloff` from its parts.

    An interpolated pixel is smoother the further it lies from the pixels it was made of, so the mean size of the first and second
    differences repeats over the columns with the period of the scale (Gallagher 2005, "Detection of linear and cubic interpolation
    in JPEG compressed images"). No blur, grain or movement repeats. We ask for the same period across and down (their geometric mean),
    and allow for JPEG's own period: what falls on multiples of 1/8 counts only as far as it exceeds the odd ones, which no whole
    factor makes. An enlargement by exactly 2 shows in the first differences only.
    """
    if min(grey.shape) < GRID_SIDE:
        return {"resampling": 0.0, "rolloff": 1.0}
    strongest = 0.0
    for across, down in zip(_profiles(grey), _profiles(grey.T), strict=True):
        both = np.sqrt(_periods(across) * _periods(down))
        eighths = both[_NEAR_EIGHTHS].max(1)  # around 1/8, 2/8, 3/8, 4/8
        strongest = max(strongest, both[_FREE].max(), *(eighths[[1, 3]] - max(eighths[0], eighths[2])))
    return {"resampling": float(strongest), "rolloff": rolloff(luma)}


_PERIODS = 2048  # length of the padded transform
_FREQUENCY = np.arange(_PERIODS // 2 + 1) / _PERIODS  # cycles per pixel
_FREE = (np.abs(_FREQUENCY * 8 - np.rint(_FREQUENCY * 8)) / 8 > 0.008) & (_FREQUENCY > 0.08)
_NEAR_EIGHTHS = np.minimum(np.array([1, 2, 3, 4])[:, None] * _PERIODS // 8 + np.arange(-3, 4), _PERIODS // 2)


def _profiles(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean size of the first and of the second difference between neighbouring columns, for each of at most 1024 columns."""
    columns = np.ascontiguousarray(grey[:4096, :1026])
    first = cv2.subtract(columns[:, 1:], columns[:, :-1], dtype=cv2.CV_16S)
    second = cv2.subtract(first[:, 1:], first[:, :-1])
    return tuple(cv2.reduce(cv2.min(cv2.max(d, -d), STRONGEST), 0, cv2.REDUCE_AVG, dtype=cv2.CV_32F)[0] for d in (first, second))


def _periods(profile: np.ndarray) -> np.ndarray:
    """Amplitude of each frequency of a profile, as a part of its local level."""
    level = cv2.blur(profile[None], (9, 1), borderType=cv2.BORDER_REFLECT)[0]
    ripple = np.clip((profile - level) / (level + 0.3), -1, 1)
    window = np.hanning(len(ripple) + 2)[1:-1]
    return 2 * np.abs(np.fft.rfft(ripple * window, _PERIODS)) / window.sum()


def rolloff(luma: np.ndarray) -> float:
    """Frequency, as a part of Nyquist's, under which 99 % of the energy of the gradient lies, on the sharper of the two axes.

    A movement softens one axis and leaves the other. Defocus and glow soften both, as a scaler does: this number alone must
    never remove an image.
    """
    height, width = luma.shape[1:]
    found = []
    for size, rows in ((width, luma), (height, luma.transpose(0, 2, 1))):
        lines = rows[:, :: max(1, rows.shape[1] * len(rows) // 64), :512].reshape(-1, min(size, 512)).astype(np.float32)
        step = np.diff(lines, axis=1)
        power = (np.abs(np.fft.rfft(step * np.hanning(step.shape[1]), 512, axis=1)) ** 2).mean(0)[1:]
        share = np.cumsum(power) / max(power.sum(), 1e-9)
        found.append((np.searchsorted(share, 0.99) + 1) / len(power) if power.sum() > 1e-6 else 1.0)
    return float(min(max(found), 1.0))


def lines(luma: np.ndarray) -> dict[str, float]:
    """False contours and combs of uint8 (P, H, W), as shares of all places.

    `banding`: a step of 3 to 24 grey levels between two plateaus of three equal pixels, across or down; a smooth gradient of 8
    bits has steps of 1. `combing`: four rows of which the even and the odd agree with each other and differ between them by at
    least 16, more often than columns do: the two fields of interlaced video where something moved.
    """
    banding, combs = [], []
    for view in (luma, np.ascontiguousarray(luma.transpose(0, 2, 1))):  # steps along axis 2: across, then down
        step = _size(view[:, :, 1:], view[:, :, :-1])
        if step.shape[2] < 7:
            return {"banding": 0.0, "combing": 0.0}
        equal, contour = step == 0, step[:, :, 3:-3]
        flat = equal[:, :, :-6] & equal[:, :, 1:-5] & equal[:, :, 2:-4] & equal[:, :, 4:-2] & equal[:, :, 5:-1] & equal[:, :, 6:]
        banding.append(_share(flat & (contour >= 3) & (contour <= 24)))
        alike, apart = _size(view[:, :, 2:], view[:, :, :-2]) <= 8, step >= 16
        combs.append(_share(alike[:, :, :-1] & alike[:, :, 1:] & apart[:, :, :-2] & apart[:, :, 1:-1] & apart[:, :, 2:]))
    return {"banding": float(sum(banding) / 2), "combing": float(max(combs[1] - combs[0], 0.0))}


def _share(where: np.ndarray) -> float:
    return np.count_nonzero(where) / where.size


def _size(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| of uint8, without leaving uint8."""
    return np.maximum(a, b) - np.minimum(a, b)


def frames(grey: np.ndarray) -> dict[str, float]:
    """Share of the height (width) in the bars above and below (left and right) of a picture set into another; 0 when there are none.

    A bar ends in a straight line over most of the picture, at the same depth on both sides, and has at most half of the inside's
    activity. Bars of one colour are `basics.border_*`; these may be blurred, textured or a gradient.
    """
    height, width = grey.shape
    scale = min(1.0, FRAME_SIDE / max(height, width))
    if min(height, width) * scale < GRID_SIDE:
        return {"inset_y": 0.0, "inset_x": 0.0}
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
    return {"inset_y": _inset(small), "inset_x": _inset(np.ascontiguousarray(small.T))}


def _inset(rows: np.ndarray) -> float:
    size = len(rows)
    edge = (_size(rows[2:], rows[:-2]) >= 8).mean(1)  # entry y: share of a line between rows y and y + 2
    activity = _size(rows[:, 1:], rows[:, :-1]).mean(1)
    straight = np.flatnonzero(edge >= LINE)
    deepest, least = int(0.36 * size), max(int(0.04 * size), 8)
    for depth in straight[(straight >= least) & (straight < deepest)][::-1].tolist():
        below = size - depth - 1
        lowest = below - 3 + int(edge[below - 3 : below + 2].argmax())  # the bars may differ by two rows
        if edge[lowest] < LINE or max(edge[: depth - 2].mean(), edge[lowest + 3 :].mean()) > SMOOTH:
            continue
        outside = max(activity[:depth].mean(), activity[lowest + 2 :].mean())
        if outside <= 0.5 * activity[depth + 2 : lowest].mean():
            return 2 * (depth + 1) / size
    return 0.0


def jumps(plane: np.ndarray, period: int) -> np.ndarray:
    """(C, H, W) -> (C, period): mean |jump between column x and x + 1 beyond what the slopes on both sides foretell|, by x modulo
    the period; the block edge is at period - 1."""
    step = np.diff(plane, axis=2)  # (C, H, 127)
    unforeseen = np.abs(step[:, :, 1:-1] - 0.5 * (step[:, :, :-2] + step[:, :, 2:])).mean(1)  # x = 1 ... 125
    place = np.arange(1, plane.shape[2] - 2) % period
    return np.stack([unforeseen[:, place == phase].mean(1) for phase in range(period)], axis=1)
