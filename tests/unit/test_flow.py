"""Rectified flow: times, loss, samplers; random numbers that depend on the sample and not on the process."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

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
    assert (flow.loss(noise - clean, clean, noise) == 0).all()
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


# What ComfyUI's two schedules give for Turbo at 8 steps (mu 1.15), as published to four digits.
SIMPLE = [1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0]
BETA = [1, 0.9812, 0.9368, 0.8655, 0.7596, 0.6080, 0.4025, 0.1610, 0]


def test_schedules_are_those_of_the_community():
    assert flow.schedule_times("simple", 8, 1.15) == pytest.approx(SIMPLE, abs=5e-5)
    assert flow.schedule_times("beta", 8, 1.15) == pytest.approx(BETA, abs=5e-5)
    assert flow.schedule_times("linear", 8, 1.15) == pytest.approx(SIMPLE, abs=5e-5)


@pytest.mark.parametrize("schedule", flow.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 52, 3000])
def test_every_schedule_goes_down_from_one_to_zero(schedule, steps):
    times = flow.schedule_times(schedule, steps, 0.9)
    assert times[0] == 1 and times[-1] == 0 and all(a > b for a, b in pairwise(times))
    assert len(times) == steps + 1 or (schedule == "beta" and len(times) < steps + 1)


def test_unknown_names_and_step_counts_are_refused_with_the_choices():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="'karras'; choose from linear, simple, beta"):
        flow.schedule_times("karras", 8, 1.0)
    with pytest.raises(ValueError, match="'heun'; choose from euler, er_sde"):
        flow.sample(lambda x, t: x, lambda x, t: x, x, 4, 0.5, sampler="heun")
    with pytest.raises(ValueError, match="number of steps is 0"):
        flow.schedule_times("linear", 0, 1.0)


def clean_of_gaussian(variance: float, x, t):
    """The mean of clean data N(0, variance) that gave x at time t."""
    return variance * (1 - t) / ((1 - t) ** 2 * variance + t**2) * x


def spread(sampler: str, schedule: str, num_steps: int, variance: float) -> float:
    """Standard deviation of what a sampler makes of N(0, variance), exactly: it is linear in its noises, so a batch of unit noises
    gives its coefficients."""
    units = iter(torch.eye(num_steps + 1, dtype=torch.float64).view(num_steps + 1, -1, 1, 1, 1))

    def velocity(x, t):
        return (x - clean_of_gaussian(variance, x, t)) / t

    times = flow.schedule_times(schedule, num_steps, 0.5)
    if sampler == "euler":
        return flow.euler(velocity, next(units), times).norm().item()
    return flow.er_sde(velocity, next(units), [1 - 1e-5, *times[1:]], lambda: next(units)).norm().item()


@pytest.mark.parametrize("schedule", flow.SCHEDULES)
@pytest.mark.parametrize("sampler", flow.SAMPLERS)
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_samplers_converge_to_the_distribution_of_the_data(sampler, schedule, variance):
    errors = [abs(spread(sampler, schedule, steps, variance) / math.sqrt(variance) - 1) for steps in (8, 32, 128)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < (0.02 if sampler == "euler" else 5e-4)


def test_er_sde_keeps_the_marginal_of_a_known_picture_at_any_number_of_steps():
    """With one possible picture the SDE's marginal at time t is (1 - t) x_0 + t noise: solved without error, so in two steps too."""
    for times in ([0.999, 0.3], [0.999, 0.7, 0.2], [0.999, 0.9, 0.8, 0.6, 0.1]):
        units = iter(torch.eye(len(times), dtype=torch.float64).view(len(times), -1, 1, 1, 1))
        start = times[0] * next(units)
        noises = flow.er_sde(lambda x, t: x / t, start, times, lambda units=units: next(units))
        assert noises.norm().item() == pytest.approx(times[-1], rel=1e-9)
        mean = flow.er_sde(
            lambda x, t: (x - 2.0) / t, torch.full((1, 1, 1, 1), 2.0 * 0.001).double(), times, lambda: torch.zeros(1, 1, 1, 1)
        )
        assert mean.item() == pytest.approx(2.0 * (1 - times[-1]), rel=1e-9)


def test_the_drift_of_er_sde_is_that_of_its_differential_equation():
    """Without noise it has to approach dy/d lambda = (ln phi)'(y - D), solved here by scipy to ten digits; D bends on purpose."""

    def clean(level):
        return np.sin(level) + 0.3 * level

    def phi_slope(level):  # d ln phi / d lambda
        power = level**0.3
        return 1 / level + 0.3 * power / level * np.exp(power) / (np.exp(power) + 10)

    first, last, start = 4.0, 0.2, 1.7
    exact = solve_ivp(lambda level, y: phi_slope(level) * (y - clean(level)), (first, last), [start], rtol=1e-11, atol=1e-12).y[0, -1]
    errors = []
    for steps in (10, 20, 40):
        times = [level / (1 + level) for level in np.linspace(first, last, steps + 1)]
        x = torch.full((1, 1, 1, 1), start * (1 - times[0]), dtype=torch.float64)
        out = flow.er_sde(lambda x, t: (x - clean(t / (1 - t))) / t, x, times, lambda: torch.zeros(1, 1, 1, 1))
        errors.append(abs(out.item() / (1 - times[-1]) - exact))
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2], errors  # at least second order
    assert errors[2] < 2e-3


def test_the_third_stage_of_er_sde_takes_the_curvature_of_its_predictions():
    """For D = lambda^2 the curvature is 2 exactly; the integrals by scipy."""
    levels, start = [4.0, 3.0, 2.0, 1.0], 5.0
    times = [level / (1 + level) for level in levels]

    def phi(level):
        return level * (np.exp(level**0.3) + 10)

    def end(times):  # y at the last of the times
        x = torch.full((1, 1, 1, 1), start * (1 - times[0]), dtype=torch.float64)
        out = flow.er_sde(lambda x, t: (x - (t / (1 - t)) ** 2) / t, x, times, lambda: torch.zeros(1, 1, 1, 1))
        return out.item() / (1 - times[-1])

    here, there, clean, slope = 2.0, 1.0, 4.0, 2.0 + 3.0
    expected = phi(there) / phi(here) * (end(times[:3]) - clean) + clean
    expected += slope * (there - here + phi(there) * quad(lambda level: 1 / phi(level), there, here)[0])
    expected += 2 * ((there - here) ** 2 / 2 + phi(there) * quad(lambda level: (level - here) / phi(level), there, here)[0])
    assert end(times) == pytest.approx(expected, abs=0.02)  # 200 points of quadrature; half the curvature is 0.1 away


def test_noise_belongs_to_the_seed_and_not_to_the_batch():
    together, alone = flow.SeededNoise([7, 8, 9], (4, 2, 2)), flow.SeededNoise([9], (4, 2, 2))
    for _ in range(3):
        whole, part = together(), alone()
        assert torch.equal(whole[2:], part) and not torch.equal(whole[:1], part)
    assert torch.equal(flow.SeededNoise([5], (3,))()[0], torch.randn(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(sampler):
    def velocity(x, t):
        return torch.tanh(x) * t.view(-1, 1, 1, 1) - 0.3

    def pictures(seeds):
        noise = flow.SeededNoise(seeds, (4, 2, 2))
        return flow.sample(velocity, velocity, noise(), 6, 1.15, 0.0, sampler, "beta", noise)

    assert torch.equal(pictures([3, 4, 5])[1:2], pictures([4]))


def test_presets_are_the_released_ones():
    assert flow.PRESETS["raw"] == (52, 3.5, None) and flow.PRESETS["turbo"] == (8, 0.0, 1.15)
