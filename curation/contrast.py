"""Contrast sets: the same picture damaged, restyled, or handled harmlessly, to find out what a feature answers to.

Damage is what the K2 report calls artifacts (`curation.contrast_damage`, five severities). Styles are what it says must stay: blur,
grain, odd light, odd colour, paint (`curation.contrast_style`). Controls change nothing that one should see: a feature that answers to
them answers to our pipeline. They share no code with `curation.faults`: what a run is tested with must not be what its models learned
from.
"""

from collections.abc import Callable

import numpy as np

from curation.contrast_damage import DAMAGES
from curation.contrast_style import HANDLING, STYLISTS

MAX_SIDE = 768  # of larger pictures a window is changed: a transform then costs at most about 0.1 s
DAMAGE: dict[str, Callable[..., np.ndarray]] = {f.__name__: f for f in DAMAGES}  # (image, rng, severity 1 to 5, or 3 to 5 by chance)
STYLES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {f.__name__: f for f in STYLISTS}
CONTROLS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {f.__name__: f for f in HANDLING}


def window(image: np.ndarray, max_side: int = MAX_SIDE) -> np.ndarray:
    """The middle of the image, at most `max_side` pixels a side: cut, not resized, so that its pixels stay what they were."""
    height, width = image.shape[:2]
    top, left = max(0, height - max_side) // 2, max(0, width - max_side) // 2
    return np.ascontiguousarray(image[top : top + max_side, left : left + max_side])


def view(image: np.ndarray, rng: np.random.Generator, damage: float = 0.5, style: float = 0.15) -> np.ndarray:
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
