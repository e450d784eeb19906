"""Damage, styles, handling: pure functions of image, generator and severity."""

import numpy as np
import pytest

from curation import contrast
from curation.contrast import CONTROLS, DAMAGE, STYLES, view, window
from curation.contrast_damage import SEVERITIES

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*(np.linspace(20, 230, n).reshape(s) for n, s in ((60, (60, 1)), (90, (1, 90)), (1, (1, 1))))), 2)
SMOOTH = SMOOTH.astype(np.uint8)


@pytest.mark.parametrize("name", [*DAMAGE, *STYLES, *CONTROLS])
def test_every_transform_is_a_pure_function_of_image_and_generator(name):
    change = (DAMAGE | STYLES | CONTROLS)[name]
    for image in (PICTURE, SMOOTH, PICTURE[:1, :1], PICTURE[:3, :50], np.zeros((40, 40, 3), np.uint8)):
        before = image.copy()
        first, second = (change(image, np.random.default_rng(7)) for _ in range(2))
        assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3 and min(first.shape) >= 1
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(image, before)
    changed = change(SMOOTH, np.random.default_rng(7))
    assert changed.shape != SMOOTH.shape or (changed != SMOOTH).any() or name in {*CONTROLS, "mosquito", "plastic"}  # need edges, texture


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_grows_with_its_severity_and_the_strongest_is_drawn_without_one(name):
    rng = np.random.default_rng(1)
    blobs = np.kron(rng.integers(30, 226, (10, 15, 3)), np.ones((12, 12, 1)))
    image = np.clip(blobs + rng.integers(-12, 13, blobs.shape), 0, 255).astype(np.uint8)  # edges and texture
    done = [DAMAGE[name](image, np.random.default_rng(3), severity) for severity in SEVERITIES]
    sizes = [c.shape for c in done]
    if len(set(sizes)) > 1:  # bars are added
        assert sorted(sizes) == sizes
    else:
        distance = [np.abs(c.astype(float) - image).mean() for c in done]
        assert distance[0] > 0 and np.mean(distance[:2]) < np.mean(distance[3:]), distance
    drawn = {DAMAGE[name](image, np.random.default_rng(seed)).tobytes() for seed in range(3)}
    assert len(drawn) > 1


def test_there_are_fifteen_kinds_in_five_severities_and_every_kind_has_a_style_to_tell_it_from():
    assert len(DAMAGE) >= 15 and SEVERITIES == (1, 2, 3, 4, 5)
    assert {"motion_blur", "shallow_focus", "film_grain", "vignette", "low_key", "painting", "pixel_art", "halftone"} <= set(STYLES)
    assert not set(DAMAGE) & set(STYLES) and not set(STYLES) & set(CONTROLS)


def test_views_are_windows_of_bounded_size_and_a_window_is_cut_not_resized():
    big = np.random.default_rng(1).integers(0, 256, (900, 1000, 3)).astype(np.uint8)
    np.testing.assert_array_equal(window(big), big[66:834, 116:884])
    rng = np.random.default_rng(2)
    plain = [view(PICTURE, rng, damage=0, style=0) for _ in range(30)]
    assert len({cut.shape for cut in plain}) > 10
    assert all(0.2 < cut.shape[0] * cut.shape[1] / (60 * 90) <= 1 for cut in plain)


def test_views_are_damaged_and_restyled_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(contrast, "DAMAGE", {"black": lambda image, rng: np.zeros_like(image)})
    monkeypatch.setattr(contrast, "STYLES", {"white": lambda image, rng: np.full_like(image, 255)})
    rng = np.random.default_rng(4)
    means = [view(PICTURE, rng, damage=0.3, style=0.2).mean() for _ in range(400)]
    assert means.count(0) / 400 == pytest.approx(0.3, abs=0.06)
    assert means.count(255) / 400 == pytest.approx(0.2, abs=0.06)
