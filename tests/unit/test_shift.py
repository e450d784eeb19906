"""The sweep of the training shift: where a sweep is lowest, which seeds count, what is marked."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_shift  # noqa: E402

MUS = (-1.0, 0.5, 2.0)


def line(mu: float, seed: int, loss: float) -> dict:
    return {
        **{"phase": "64", "resolution": 64, "steps": 9, "mu": mu, "seed": seed, "inference_mu": 0.47},
        **{"loss": loss, "kid": 0.2, "frechet": 60.0, "vendi": 5.0, "intra": 0.3, "by_t": [loss, loss]},
    }


def test_the_optimum_is_that_of_the_parabola_and_never_outside_the_grid():
    mus = [-1.0, -0.25, 0.5, 1.25, 2.0]
    assert bench_shift.optimum(mus, [(mu - 0.8) ** 2 for mu in mus]) == pytest.approx(0.8)
    assert bench_shift.optimum(mus, [(mu + 3) ** 2 for mu in mus]) == -1
    assert bench_shift.optimum(mus, [-mu for mu in mus]) == 2


def test_a_seed_counts_when_it_has_every_mu():
    lines = [line(mu, seed, 1.0) for seed in (0, 1) for mu in MUS] + [line(-1.0, 2, 9.0)]
    cells = bench_shift.Cells(lines[::-1])
    assert cells.seeds == [0, 1] and cells.values["loss"].shape == (2, 3) and cells.values["loss"].max() == 1
    assert cells.mus[cells.base] == 0.5


def test_a_difference_is_marked_by_its_pairs_and_not_by_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    lines = []
    for seed in range(3):
        level = 1 + 0.5 * seed  # seeds differ far more than shifts do
        lines += [line(mu, seed, level + extra + 1e-3 * rng.normal()) for mu, extra in zip(MUS, (0.1, 0, 0), strict=True)]
    row = next(row for row in bench_shift.table(bench_shift.Cells(lines)).splitlines() if row.startswith("| validation loss"))
    cells = row.split("|")
    assert "**" in cells[2] and "**" not in cells[3] and "**" not in cells[4]


def test_every_recipe_of_the_sweep_trains_one_phase_with_its_shift(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bench_shift, "train", lambda data, recipe, *_, **__: asked.append(recipe) or 0)
    monkeypatch.setattr(bench_shift, "shared_codec", lambda *_: Path(__file__))
    plan = bench_shift.TRAIN["k2-nano"]()
    bench_shift.trained(tmp_path, "k2-nano", plan, 1, 2.0, 7, "cpu")
    found = bench_shift.recipes.find(asked[0], {})
    assert (found.seed, found.name, found.hold_out) == (7, "k2-nano-512-mu2-7", plan.hold_out)
    assert [(phase.name, phase.mu, phase.steps, phase.data) for phase in found.phases] == [("512", 2.0, 24, "pretrain_512")]
