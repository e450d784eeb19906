"""One image with all that the detector has to say about it, for a person who asks why."""

from typing import Any, NamedTuple

import numpy as np

from curation import detector
from curation.declared import LOG_ODDS, declared
from curation.decode import decode_for
from curation.detector import PIXELS, SEMANTICS, Detector
from curation.manifest import Reader
from curation.stages.provenance import facts
from curation.towers import Tower, loaded

CROP = 256  # pixels of a square of the heat map, or the whole of a smaller image
MAX_CROPS = 36


class Evidence(NamedTuple):
    """What is known of one image."""

    columns: dict[str, Any]  # those of the stage `synthetic`, and the log odds that p_synthetic is made of
    facts: dict[str, Any]  # what the file says (columns of the stage `provenance` that have a value)
    image: np.ndarray  # uint8 (H, W, 3)
    boxes: np.ndarray  # (T, 4) top, left, height, width of squares in pixels
    crops: np.ndarray  # (T,) log odds of each square alone


def evidence(model: Detector, towers: dict[str, Tower], encoded: bytes, device: str = "cpu") -> Evidence:
    """Everything about one encoded image.

    The heat map is made by the pixel branch (by semantics where there is none), from every square as if it were the whole image. It
    covers the image, so it shows what the branch would say there, not only the crops that it looked at.

    Args:
        model: The detector.
        towers: branch -> tower.
        encoded: The file.
        device: Of the towers.

    Raises:
        DecodeError: the bytes are no image.
    """
    _, view, pixels = decode_for(encoded, "pixels")
    found = {name: value for name, value in facts(encoded, Reader()).items() if value not in (None, "")}
    word = declared(found)
    vectors = {name: _vectors(tower, [view if tower.reads == "view" else pixels], device) for name, tower in towers.items()}
    scores = detector.score(model, vectors, {name: tower.identity for name, tower in towers.items()}, [word])
    columns = {name: None if column is None else column[0].item() for name, column in scores._asdict().items()} | {"declared": word}
    raw = detector.raw_scores(model, vectors)
    odds = {name: float(values[0]) for name, values in model.calibration.log_odds(raw).items()}
    odds |= {"together": float(model.calibration.fused(raw)[0]), "declared": LOG_ODDS[word]}
    branch = PIXELS if PIXELS in towers else SEMANTICS
    places = boxes(*pixels.shape[:2])
    squares = [pixels[top : top + high, left : left + wide] for top, left, high, wide in places]
    crops = {branch: detector.raw_scores(model, {branch: _vectors(towers[branch], squares, device)})[branch]}
    columns["log_odds"] = {name: round(value, 3) for name, value in odds.items()}
    return Evidence(columns, found, pixels, places, model.calibration.log_odds(crops)[branch])


def _vectors(tower: Tower, images: list[np.ndarray], device: str) -> np.ndarray:
    return loaded(tower, device).pooled(tower.prepare(images))


def boxes(height: int, width: int) -> np.ndarray:
    """(T, 4) top, left, height, width of squares at native scale that cover an image, T <= MAX_CROPS.

    Squares have CROP pixels a side, or more where that would be too many; at the last row and column they overlap.
    """
    side = CROP
    while _num(height, side) * _num(width, side) > MAX_CROPS:
        side = side * 5 // 4
    tops, lefts = (np.linspace(0, max(length - side, 0), _num(length, side)).round().astype(int) for length in (height, width))
    return np.array([(top, left, min(side, height), min(side, width)) for top in tops for left in lefts])


def _num(length: int, side: int) -> int:
    return max(1, -(-length // side))
