"""Deterministic statistics of how an image was made, from native-resolution crops: noise, spectrum, JPEG grid, chroma, levels.

A semantic tower squashes an image to 256 x 256, which removes the traces that cameras, codecs, scalers and generators
leave between neighbouring pixels. Here nothing is ever resized: up to eight 128 x 128 crops are cut on the 8 x 8 grid of
the image, each gives the same named numbers, and the vector is their mean over the crops, with the spread of some.

The vector knows nothing of the container: no format, no size, no area, no number of crops. (Images under 256 pixels a side
have fewer distinct crops, and under 128 mirrored borders; that much of their size shows.) Linear models on such statistics
tell *sources* apart as well as they tell real from generated, so compare any detector with a probe on area alone.

The groups and where they come from: residual moments and co-occurrences (Fridrich and Kodovsky 2012, rich models);
radial spectrum and periodic peaks (Durall et al. 2020; Corvi et al. 2023); blockiness on the 8 x 8 grid (Wang, Sheikh and
Bovik 2002); DCT histograms (Fan and de Queiroz 2003). `names()` lists the entries; groups are documented at their functions.
"""

import functools

import numpy as np
from scipy import fft

VERSION = "1"  # change it with any formula: it is part of the tower's identity
CROP = 128
NUM_CROPS = 8
MAX_GRID = 8  # candidate crops per axis: the cost does not grow with the image
RADIAL_BINS = 24

_HANN = np.hanning(CROP + 1)[:CROP].astype(np.float32)
_WINDOW = _HANN[:, None] * _HANN[None, :]
_FY, _FX = np.meshgrid(np.fft.fftfreq(CROP), np.fft.rfftfreq(CROP), indexing="ij")
_FREQUENCY = np.hypot(_FY, _FX)  # cycles per pixel, 0 to .71
_ANGLE = np.arctan2(np.abs(_FY), _FX)  # 0 to pi / 2
_NEAR_AXES = np.minimum(_ANGLE, np.pi / 2 - _ANGLE) < np.pi / 8
_BANDS = {"middle": (_FREQUENCY > 0.15) & (_FREQUENCY < 0.3), "high": (_FREQUENCY > 0.3) & (_FREQUENCY < 0.5)}
_RING = np.minimum((_FREQUENCY * 2 * RADIAL_BINS).astype(np.int64), RADIAL_BINS)  # ring RADIAL_BINS: the corners beyond Nyquist
_TWICE = np.where((_FX == 0) | (_FX == 0.5), 1.0, 2.0)  # the half that rfft2 leaves out
_RING_WEIGHT = np.bincount(_RING.ravel(), _TWICE.ravel())
_ROUNDING = 1 / 12  # variance of rounding to whole grey levels: the noise floor of every 8-bit image
_DIAGONAL = np.add.outer(np.arange(8), np.arange(8))  # DCT coefficients grouped by their diagonal
_SPREAD = ("residual.", "spectrum.rolloff", "spectrum.slope", "grid.", "levels.", "chroma.")  # prefixes whose spread is kept too


def statistics(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) RGB of any size, at its native resolution -> (len(names()),) float32, finite, of the order of 1."""
    values = _per_crop(crops(image))
    table = np.stack(list(values.values()), axis=1)
    live = table[:, list(values).index("levels.live")] > 0
    # A blank crop (paper, studio background) says nothing about noise; its zeros would only dilute the others.
    table = table[live] if live.any() else table
    spread = table.std(0)[_spread_columns(tuple(values))]
    live_share = np.float64(live.mean())
    vector = np.concatenate([table.mean(0), spread, [live_share]]).clip(-30, 30).astype(np.float32)
    assert np.isfinite(vector).all(), "a forensic statistic is not finite"
    return vector


@functools.cache
def names() -> list[str]:
    """The name of each entry of the vector: "<group>.<what>", with ".spread" for the standard deviation over the crops."""
    keys = tuple(_per_crop(np.zeros((1, CROP, CROP, 3), np.uint8)))
    return [*keys, *(f"{keys[i]}.spread" for i in _spread_columns(keys)), "levels.live_share"]


def _spread_columns(keys: tuple[str, ...]) -> list[int]:
    return [i for i, key in enumerate(keys) if key.startswith(_SPREAD) and key != "levels.live"]


def crops(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (C, 128, 128, 3), C <= 8: crops from the calmest to the busiest place, on the image's 8 x 8 grid.

    Candidates lie on an even lattice of at most 8 x 8 places; they are ordered by their mean gradient, and evenly spaced
    ranks are taken, so that flat and textured places are in every vector. Smaller images are continued by mirroring.
    """
    height, width = image.shape[:2]
    missing = (max(0, CROP - height), max(0, CROP - width))
    if any(missing):
        image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    places = [(top, left) for top in _offsets(image.shape[0]) for left in _offsets(image.shape[1])]
    # Every 4th row of the green channel is enough to order the places.
    views = np.stack([image[top : top + CROP : 4, left : left + CROP, 1] for top, left in places]).astype(np.int16)
    busy = np.abs(np.diff(views, axis=2)).mean((1, 2))
    order = np.argsort(busy, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, NUM_CROPS).round().astype(int))
    chosen = [places[i] for i in order[ranks]]
    return np.stack([image[top : top + CROP, left : left + CROP] for top, left in chosen])


def _offsets(length: int) -> list[int]:
    """Where crops may start along one side: multiples of 8, so that the JPEG grid keeps its phase."""
    num = int(np.clip(1 + (length - CROP) // 64, 1, MAX_GRID))
    return sorted({int(start) // 8 * 8 for start in np.linspace(0, length - CROP, num)})


def _per_crop(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 (C, 128, 128, 3) -> name: (C,) for all statistics of a crop, in a fixed order."""
    planes = np.stack([pixels[..., i] for i in range(3)])
    rgb = planes.astype(np.float32)
    red, green, blue = rgb
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # JFIF
    chroma = np.stack([(blue - luma) * 0.564, (red - luma) * 0.713])  # Cb, Cr without the offset
    return (
        _residual(luma)
        | _cooccurrence(luma)
        | _spectrum(luma)
        | _peaks(luma)
        | _grid(luma, chroma)
        | _dct(luma)
        | _chroma(rgb, luma, chroma)
        | _levels(planes, luma)
    )


def _second(plane: np.ndarray, axis: int) -> np.ndarray:
    """Second difference along an axis, two shorter."""
    return np.diff(plane, n=2, axis=axis)


def _laplace(plane: np.ndarray) -> np.ndarray:
    """(..., H, W) -> (..., H - 2, W - 2): the 3 x 3 kernel [[1,-2,1],[-2,4,-2],[1,-2,1]] / 4, blind to any plane or ridge."""
    return _second(_second(plane, -1), -2) / 4


def _moments(prefix: str, residual: np.ndarray) -> dict[str, np.ndarray]:
    """Strength (log2 of the standard deviation with the rounding noise as a floor), tails, asymmetry, share of zeros."""
    flat = residual.reshape(len(residual), -1)
    centred = flat - flat.mean(1, keepdims=True)
    square = centred * centred
    variance = square.mean(1) + _ROUNDING
    return {
        f"{prefix}.log_std": 0.5 * np.log2(variance) / 2,
        f"{prefix}.tails": np.log2((square * square).mean(1) / variance**2 + 0.1) / 3,  # log kurtosis
        f"{prefix}.skew": np.cbrt((square * centred).mean(1) / variance**1.5),
        f"{prefix}.zeros": (np.abs(flat) < 0.5).mean(1),
    }


def _residual(luma: np.ndarray) -> dict[str, np.ndarray]:
    """Noise residuals of the luma: what is left of the image when smooth content is taken out, by four filters.

    The ratio of the first to the third difference's strength tells noise that is white (a sensor) from noise that is
    correlated (demosaicing, scaling, a decoder).
    """
    across, down, both = _second(luma, 2), _second(luma, 1), _laplace(luma)
    third = np.diff(across, axis=2)
    values = _moments("residual.across", across) | _moments("residual.down", down) | _moments("residual.laplace", both)
    strength = [np.sqrt((plane * plane).mean((1, 2)) + _ROUNDING) for plane in (np.diff(luma, axis=2), across, third, down, both)]
    values["residual.second_to_first"] = np.log2(strength[1] / strength[0])
    values["residual.third_to_second"] = np.log2(strength[2] / strength[1])
    values["residual.across_to_down"] = np.log2(strength[1] / strength[3])
    values["residual.laplace_to_second"] = np.log2(strength[4] / strength[1])
    # A sensor's noise is everywhere, a codec's follows the content: the calm tenth of 8 x 8 blocks against the median block.
    blocks = both[:, :120, :120].reshape(len(luma), 15, 8, 15, 8).std((2, 4)).reshape(len(luma), -1)
    calm, middle, busy = np.percentile(blocks, [10, 50, 90], axis=1)
    values["residual.calm"] = np.log2(calm + 0.1) / 2
    values["residual.middle_to_calm"] = np.log2((middle + 0.1) / (calm + 0.1)) / 2
    values["residual.busy_to_middle"] = np.log2((busy + 0.1) / (middle + 0.1)) / 2
    for lag in (1, 2):
        shifted = (both[:, :, lag:] * both[:, :, :-lag]).mean((1, 2)) / (both * both).mean((1, 2)).clip(_ROUNDING)
        values[f"residual.autocorrelation_{lag}"] = shifted
    return values


def _cooccurrence(luma: np.ndarray) -> dict[str, np.ndarray]:
    """Joint frequencies of neighbouring quantised residuals (-2 to 2), signs folded: 13 cells, as square roots.

    The step is 2 grey levels for "fixed", so compression and smoothing show, and the crop's own mean |residual| for "own", so
    that only the shape of the dependence is left.
    """
    residual = _second(luma, 2)
    own = np.abs(residual).mean((1, 2), keepdims=True).clip(0.5)
    values = {}
    for step, kind in ((2.0, "fixed"), (own, "own")):
        levels = np.rint(residual / step).clip(-2, 2).astype(np.int8)
        for name, first, second in (("along", levels[:, :, :-1], levels[:, :, 1:]), ("beside", levels[:, :-1], levels[:, 1:])):
            cells = np.sqrt(_folded_cells(first, second))
            values |= {f"pairs.{kind}_{name}_{i:02d}": cells[:, i] for i in range(13)}
    return values


def _folded_cells(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pairs (a, b) of int8 levels -2 to 2, each (C, H, W) -> (C, 13) frequencies; (a, b) and (-a, -b) share a cell."""
    code = 5 * first + second  # -12 to 12; the code of (-a, -b) is its negative
    counts = np.stack([np.bincount(crop.ravel(), minlength=13) for crop in np.abs(code)])
    return counts / code[0].size


def _power(plane: np.ndarray) -> np.ndarray:
    """(C, 128, 128) -> (C, 128, 65) windowed power spectrum; white noise of variance v has power v everywhere."""
    centred = plane - plane.mean((1, 2), keepdims=True)
    spectrum = fft.rfft2(centred * _WINDOW)
    return (spectrum.real**2 + spectrum.imag**2) / (_WINDOW**2).sum()


def _spectrum(luma: np.ndarray) -> dict[str, np.ndarray]:
    """Radial power spectrum (log10, its mean removed: the shape only) with slope, roll-off and direction.

    `rolloff_90` is the frequency, as a part of Nyquist's, under which 90 % of the energy of the luma's gradient lies: .97 for
    white noise, .75 to .9 for sharp photographs, .45 to .65 for the same scaled up by 2.
    """
    power = _power(luma)
    rings = np.stack([np.bincount(_RING.ravel(), (crop * _TWICE).ravel()) for crop in power]) / _RING_WEIGHT
    level = np.log10(rings[:, :RADIAL_BINS] + _ROUNDING)
    shape = level - level.mean(1, keepdims=True)
    values = {f"spectrum.ring_{i:02d}": shape[:, i] / 2 for i in range(RADIAL_BINS)}
    frequency = np.log10((np.arange(RADIAL_BINS) + 0.5) / RADIAL_BINS)
    inner = slice(2, RADIAL_BINS)
    x = frequency[inner] - frequency[inner].mean()
    values["spectrum.slope"] = (shape[:, inner] * x).sum(1) / (x * x).sum() / 3
    values["spectrum.corner"] = (np.log10(rings[:, RADIAL_BINS] + _ROUNDING) - level[:, -1]) / 2
    sharp = rings[:, :RADIAL_BINS] * _RING_WEIGHT[:RADIAL_BINS] * ((np.arange(RADIAL_BINS) + 0.5) / RADIAL_BINS) ** 2
    share = np.cumsum(sharp + 1e-9, axis=1)
    share /= share[:, -1:]
    for part in (50, 90):
        values[f"spectrum.rolloff_{part}"] = np.stack(
            [np.interp(part / 100, row, np.arange(1, RADIAL_BINS + 1) / RADIAL_BINS) for row in share]
        )
    for name, band in _BANDS.items():
        straight, slanted = (np.log10(power[:, band & where].mean(1) + _ROUNDING) for where in (_NEAR_AXES, ~_NEAR_AXES))
        values[f"spectrum.{name}_axes_to_diagonals"] = straight - slanted
    return values


def _peaks(luma: np.ndarray) -> dict[str, np.ndarray]:
    """Periodic traces: log10 power at multiples of 1/16 cycles per pixel against the frequencies beside it.

    Upsampling by 2, 4, 8 or 16 (decoders, scalers) and 8 x 8 codecs leave them as a pattern that repeats over the crop (`axis`:
    the other frequency is 0; `point`: both are multiples of 1/8) or as copies of the content (`line`: mean over the other
    frequency). Across and down are averaged; `larger` is by how much they differ.
    """
    power = np.log10(_power(luma) + _ROUNDING)
    half = CROP // 2
    lines = np.stack([power.mean(1), power[:, : half + 1].mean(2)])  # over fx, over fy: (2, C, 65)
    axes = np.stack([power[:, 0], power[:, : half + 1, 0]])
    values = {}
    for k in range(1, 9):
        at = 8 * k
        around = [i for i in (at - 4, at - 3, at + 3, at + 4) if i <= half]  # the window spreads a peak over 2 bins on each side
        excess = lines[:, :, at] - lines[:, :, around].mean(2)
        values[f"peaks.line_{k}_16"] = excess.mean(0)
        values[f"peaks.larger_{k}_16"] = np.abs(excess[0] - excess[1])
        values[f"peaks.axis_{k}_16"] = (axes[:, :, at] - axes[:, :, around].mean(2)).mean(0) / 2
    near = [(-3, 0), (3, 0), (0, -3), (0, 3), (-3, -3), (3, 3)]
    for name, points in (("eighths", (16, 48)), ("quarters", (32,)), ("half", (64,))):
        excess = []
        for fy in points:
            for fx in points:
                around = np.stack([power[:, (fy + dy) % CROP, half - abs(half - (fx + dx))] for dy, dx in near])
                excess.append(power[:, fy, fx] - around.mean(0))
        values[f"peaks.point_{name}"] = np.mean(excess, axis=0) / 2
    return values


def _grid(luma: np.ndarray, chroma: np.ndarray) -> dict[str, np.ndarray]:
    """8 x 8 JPEG blockiness: the jump between columns (rows) by their place modulo 8, against what is usual at the crop.

    `grid.blockiness` is the excess at the image's own grid (log2; on photographs about 0 without JPEG, .5 to 1 at quality 75,
    over 1.3 at 30), `grid.elsewhere` the largest excess at another phase (cropped after compression, or pasted),
    `grid.chroma_*` the same of the chroma planes, whose blocks are 16 x 16 with 4:2:0.
    """
    across, down = jumps(luma, 8), jumps(luma.transpose(0, 2, 1), 8)
    values = {}
    for name, profile in (("across", across), ("down", down)):
        typical = np.median(profile, axis=1)
        excess = np.log2((profile + 0.1) / (typical + 0.1)[:, None])
        values[f"grid.blockiness_{name}"] = excess[:, 7]
        values[f"grid.elsewhere_{name}"] = excess[:, 1:6].max(1)  # 0 and 6 feel the jump beside them
    values["grid.blockiness"] = 0.5 * (values["grid.blockiness_across"] + values["grid.blockiness_down"])
    for plane, name in zip(chroma, ("cb", "cr"), strict=True):
        profile = 0.5 * (jumps(plane, 16) + jumps(plane.transpose(0, 2, 1), 16))
        level = np.median(profile, axis=1) + 0.05
        values[f"grid.chroma_16_{name}"] = np.log2((profile[:, 15] + 0.05) / level)
        values[f"grid.chroma_8_{name}"] = np.log2((profile[:, 7] + 0.05) / level)
        # Chroma at half resolution: jumps inside a pixel pair differ from those between pairs.
        values[f"grid.chroma_2_{name}"] = np.log2((profile[:, 1::2].mean(1) + 0.05) / (profile[:, 0::2].mean(1) + 0.05))
    return values


def jumps(plane: np.ndarray, period: int) -> np.ndarray:
    """(C, H, W) -> (C, period): mean |jump between column x and x + 1 beyond what the slopes on both sides foretell|, by x modulo
    the period; the block edge is at period - 1."""
    step = np.diff(plane, axis=2)  # (C, H, 127)
    unforeseen = np.abs(step[:, :, 1:-1] - 0.5 * (step[:, :, :-2] + step[:, :, 2:])).mean(1)  # x = 1 ... 125
    place = np.arange(1, plane.shape[2] - 2) % period
    return np.stack([unforeseen[:, place == phase].mean(1) for phase in range(period)], axis=1)


def _dct(luma: np.ndarray) -> dict[str, np.ndarray]:
    """8 x 8 DCT on the image's grid: log energy and share of near-zeros by diagonal, and the comb that quantisation leaves.

    A JPEG of low quality has its high coefficients at zero (up to rounding), and its low ones at multiples of a step.
    """
    blocks = luma.reshape(len(luma), CROP // 8, 8, CROP // 8, 8).transpose(0, 1, 3, 2, 4).reshape(len(luma), -1, 8, 8)
    size = np.abs(fft.dctn(blocks - 128, axes=(2, 3), norm="ortho"))
    values = {}
    for name, low, high in (("1", 1, 1), ("2", 2, 2), ("3_4", 3, 4), ("5_6", 5, 6), ("7_8", 7, 8), ("9_10", 9, 10), ("11_14", 11, 14)):
        chosen = size[:, :, (low <= _DIAGONAL) & (high >= _DIAGONAL)]
        values[f"dct.log_{name}"] = np.log2(chosen.mean((1, 2)) + 0.1) / 3
        values[f"dct.zeros_{name}"] = (chosen < 0.5).mean((1, 2))
        values[f"dct.inner_zeros_{name}"] = (chosen < 0.5).mean((1, 2)) / (chosen < 2).mean((1, 2)).clip(1e-3)
    low_band = size[:, :, (_DIAGONAL >= 1) & (_DIAGONAL <= 4)].reshape(len(luma), -1)
    for step in (2, 3, 4, 6, 8):  # 1 when every coefficient is a multiple of the step, about 0 when there is no comb
        large = low_band > step / 2
        values[f"dct.comb_{step}"] = (np.cos(2 * np.pi * low_band / step) * large).sum(1) / large.sum(1).clip(1)
    return values


def _chroma(rgb: np.ndarray, luma: np.ndarray, chroma: np.ndarray) -> dict[str, np.ndarray]:
    """Noise of the colour-difference planes, and how much the residuals of R, G and B have in common."""
    values = _moments("chroma.cb", _laplace(chroma[0])) | _moments("chroma.cr", _laplace(chroma[1]))
    grey = _moments("luma", _laplace(luma))["luma.log_std"]
    values["chroma.cb_to_luma"] = values["chroma.cb.log_std"] - grey
    values["chroma.cr_to_luma"] = values["chroma.cr.log_std"] - grey
    residual = _laplace(rgb)
    residual = residual - residual.mean((2, 3), keepdims=True)
    variance = (residual * residual).mean((2, 3)) + _ROUNDING
    for name, a, b in (("rg", 0, 1), ("rb", 0, 2), ("gb", 1, 2)):
        values[f"chroma.residual_{name}"] = (residual[a] * residual[b]).mean((1, 2)) / np.sqrt(variance[a] * variance[b])
    values["chroma.red_to_green"] = 0.5 * np.log2(variance[0] / variance[1])
    values["chroma.blue_to_green"] = 0.5 * np.log2(variance[2] / variance[1])
    # Demosaicing: the residual of green has another strength on one half of the pixels, as on a chess board.
    board = (np.indices(residual.shape[2:]).sum(0) % 2).astype(bool)
    green = residual[1] ** 2
    values["chroma.chessboard"] = np.abs(np.log2((green[:, board].mean(1) + _ROUNDING) / (green[:, ~board].mean(1) + _ROUNDING)))
    return values


def _levels(planes: np.ndarray, luma: np.ndarray) -> dict[str, np.ndarray]:
    """Grey levels: how many are used, gaps in the histogram (stretched contrast), flat runs (banding, drawings), clipping."""
    grey = np.rint(luma).astype(np.uint8)
    counts = np.stack([np.bincount(crop.ravel(), minlength=256) for crop in grey])
    used = counts > 0
    first, last = used.argmax(1), 255 - used[:, ::-1].argmax(1)
    equal = grey[:, :, 1:] == grey[:, :, :-1]
    quiet = equal[:, :, :-3] & equal[:, :, 1:-2] & equal[:, :, 2:-1] & equal[:, :, 3:]  # five equal pixels in a row
    same = (planes[..., 1:] == planes[..., :-1]).all(0)
    return {
        "levels.live": (last - first >= 2).astype(np.float64),
        "levels.used": used.mean(1),
        "levels.gaps": 1 - used.sum(1) / (last - first + 1),
        "levels.most_common": counts.max(1) / counts.sum(1),
        "levels.equal_neighbours": equal.mean((1, 2)),
        "levels.equal_rgb_neighbours": same.mean((1, 2)),
        "levels.quiet_runs": quiet.mean((1, 2)),
        "levels.black": (planes.max(0) <= 2).mean((1, 2)),
        "levels.white": (planes.min(0) >= 253).mean((1, 2)),
        "levels.log_std": np.log2(luma.std((1, 2)) + 0.5) / 4,
    }
