"""The figures of an SAE, against slow and obvious ways to compute them."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from curation import sae, sae_eval


def dictionary(atoms: np.ndarray, threshold: float = 0.2) -> sae.Sae:
    w = torch.from_numpy(np.asarray(atoms, np.float32))
    return sae.Sae(w.T.contiguous(), torch.zeros(len(w)), w, torch.zeros(w.shape[1]), torch.full((len(w),), threshold), {})


def test_monosemanticity_is_the_weighted_mean_cosine_over_pairs():
    rng = np.random.default_rng(0)
    values, vectors = np.maximum(rng.normal(size=(30, 5)), 0), rng.normal(size=(30, 8)) + 3
    centred = vectors - vectors.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    i, j = np.triu_indices(30, 1)
    weights = values[i] * values[j]
    expected = (weights * (unit[i] * unit[j]).sum(1)[:, None]).sum(0) / weights.sum(0)
    assert sae_eval.monosemanticity(values, vectors) == pytest.approx(expected, abs=1e-9)
    assert sae_eval.monosemanticity(values * 7, vectors) == pytest.approx(expected, abs=1e-9)


def test_a_feature_of_one_group_is_monosemantic_one_of_any_image_is_not_and_a_lone_one_is_unknown():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(4) * 10, 25, 0)
    vectors = centres + rng.normal(size=centres.shape) * 0.1
    values = np.zeros((100, 3))
    values[:25, 0], values[rng.permutation(100)[:50], 1], values[3, 2] = 1, 1, 1
    group, anybody, lone = sae_eval.monosemanticity(values, vectors)
    assert group > 0.95 and abs(anybody) < 0.1 and np.isnan(lone)


def test_neighbours_are_kept_by_a_perfect_sae_and_not_by_noise():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 16)).astype(np.float32)
    assert sae_eval.neighbours_kept(rows, rows) == 1
    assert sae_eval.neighbours_kept(rows, rng.normal(size=rows.shape)) < 0.15
    half = rows.copy()
    half[:, 8:] = 0
    assert 0.15 < sae_eval.neighbours_kept(rows, half) < 0.9


def test_zero_shot_answers_are_counted_as_kept_where_the_best_text_is_the_same():
    texts = np.eye(3)
    rows = np.array([[2.0, 1, 0], [0, 2, 1], [0, 1, 2], [3, 0, 1]])
    rebuilt = np.array([[1.0, 0, 0], [0, 1, 2], [0, 0, 1], [1, 0, 0]])
    assert sae_eval.answers_kept(rows, rebuilt, texts) == 0.75


def test_an_sae_with_its_features_in_another_order_is_the_same_and_one_of_other_atoms_is_not():
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(24, 64))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    rows = (np.maximum(rng.normal(size=(300, 24)) - 1, 0) @ atoms).astype(np.float32)
    order = rng.permutation(24)
    same = sae_eval.stability(dictionary(atoms), dictionary(atoms[order]), rows)
    assert same["matched"] == 1 and same["mean_decoder_cosine"] == pytest.approx(1, abs=1e-3)
    others = rng.normal(size=(24, 64)) / 8
    assert sae_eval.stability(dictionary(atoms), dictionary(others), rows)["matched"] < 0.2
    match, correlation = sae_eval.best_matches(dictionary(atoms), dictionary(atoms[order]), rows, np.arange(24))
    assert (order[match] == np.arange(24)).all() and correlation.min() > 0.999


class Family(NamedTuple):
    name: str
    role: str
    severity: int


class ContrastSet(NamedTuple):
    """As curation.contrast_set's."""

    families: list[Family]
    uids: list[str]
    part: np.ndarray
    vectors: np.ndarray
    tower: str


def contrasts(num: int = 120, dim: int = 16) -> ContrastSet:
    """ "seen" moves the first dimension by its severity, "unseen" moves nothing; a third of the pictures lack "seen" 1."""
    rng = np.random.default_rng(0)
    families = [Family("clean", "clean", 0), Family("seen", "damage", 1), Family("seen", "damage", 5), Family("unseen", "damage", 3)]
    families += [Family("mist", "style", 0), Family("mirror", "control", 0)]
    vectors = rng.normal(size=(num, 1, dim)) + rng.normal(size=(num, len(families), dim)) * 0.1
    vectors[:, 1, 0] += 1
    vectors[:, 2, 0] += 5
    vectors[::3, 1] = np.nan
    part = np.array(["fit", "estimate", "report"])[rng.integers(0, 3, num)]
    return ContrastSet(families, [f"a/{i}" for i in range(num)], part, vectors.astype(np.float32), "t/1")


def test_damage_that_the_tower_sees_is_found_and_damage_that_it_does_not_see_is_chance():
    found = sae_eval.artifacts(dictionary(np.eye(16)), contrasts())
    assert set(found) == {"seen", "unseen"} and found["seen"]["best"] == 0
    assert min(found["seen"][name] for name in ("feature", "features", "probe", "means")) > 0.85
    assert all(0.2 < found["unseen"][name] < 0.8 for name in ("feature", "probe", "means"))


def test_a_contrast_set_without_a_part_is_refused():
    whole = contrasts()
    with pytest.raises(ValueError, match="needs clean and damaged pictures in fit and report"):
        sae_eval.artifacts(dictionary(np.eye(16)), whole._replace(part=np.full(len(whole.uids), "fit")))
