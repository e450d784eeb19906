"""Rectified flow: times, loss, sampler; random numbers that depend on the sample and not on the process."""

import math

import pytest
import torch

from k2model import flow


def test_mu_and_shift_are_those_of_the_released_sampler():
    assert [round(flow.resolution_mu(tokens), 3) for tokens in (256, 1024, 4096, 6400)] == [0.5, 0.581, 0.906, 1.15]
    turbo = flow.shift(torch.linspace(1, 0, 9), 1.15)
    assert turbo.tolist() == pytest.approx([1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0], abs=1e-4)


def test_times_are_logit_normal_with_the_shift_as_mean():
    t = flow.draw(0, 1, [str(i) for i in range(4000)], (1, 1, 1), mu=0.9).t
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(0.9, abs=0.06) and logit.std().item() == pytest.approx(1.0, abs=0.05)


def test_random_numbers_belong_to_the_sample_and_not_to_its_place_in_the_batch():
    whole = flow.draw(3, 7, ["a", "b", "c"], (4, 2, 2), 0.5)
    part = flow.draw(3, 7, ["c", "a"], (4, 2, 2), 0.5)
    assert torch.equal(part.noise[0], whole.noise[2]) and part.t[1] == whole.t[0] and part.drop[0] == whole.drop[2]
    later, elsewhere = flow.draw(3, 8, ["a"], (4, 2, 2), 0.5), flow.draw(4, 7, ["a"], (4, 2, 2), 0.5)
    assert not torch.equal(later.noise, whole.noise[:1]) and not torch.equal(elsewhere.noise, whole.noise[:1])


def test_the_loss_is_zero_exactly_for_the_true_velocity():
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert flow.loss(noise - clean, clean, noise) == 0
    assert torch.equal(flow.noisy(clean, noise, torch.tensor([0.0, 1.0]))[1], noise[1])


def test_the_sampler_finds_the_data_of_a_model_that_knows_it():
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)

    def velocity(x, t):
        return (x - clean) / t.view(-1, 1, 1, 1)

    assert torch.allclose(flow.sample(velocity, velocity, noise, 5, mu=0.5), clean, atol=1e-5)


def test_guidance_follows_k2_and_is_not_paid_for_at_zero():
    calls = []

    def unconditional(x, t):
        calls.append(1)
        return torch.zeros_like(x)

    def conditional(x, t):
        return torch.ones_like(x)

    assert flow.sample(conditional, unconditional, torch.zeros(1, 1, 1, 1), 4, 0.0).item() == pytest.approx(-1) and not calls
    assert flow.sample(conditional, unconditional, torch.zeros(1, 1, 1, 1), 4, 0.0, guidance=3.5).item() == pytest.approx(-4.5)
    assert len(calls) == 4 and math.isclose(flow.resolution_mu(256), 0.5)
