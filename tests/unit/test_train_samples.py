"""Sample grids of a training run."""

from dataclasses import replace

import torch
from small_k2 import SMALL, small_model

from k2model import flow, parallel
from k2model.attention import by_segment
from k2model.vae import fit_pca
from pipelines import train_samples
from pipelines.train_recipes import k2_nano
from pipelines.train_step import Parts


def test_samples_are_drawn_at_the_shift_of_the_resolution_whatever_the_shift_of_training(tmp_path, monkeypatch):
    plan = replace(k2_nano(), model=SMALL, sample_prompts=("a fox", "a lake"), sample_steps=2)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = Parts(small_model(), None, fit_pca([images]), plan.text.load("cpu"), parallel.start("cpu"), None, None, by_segment)
    shifts, sample = [], flow.sample
    monkeypatch.setattr(flow, "sample", lambda *given: shifts.append(given[4]) or sample(*given))
    for mu in (-1.0, 3.0):  # as in a sweep
        phase = replace(plan.phases[0], resolution=64, mu=mu)
        train_samples.samples(parts, plan, phase, None, tmp_path / f"{mu}.png", "samples")
    assert shifts == [flow.resolution_mu(16)] * 2
    assert (tmp_path / "-1.0.png").read_bytes() == (tmp_path / "3.0.png").read_bytes()
