"""Rectified flow with a shifted logit-normal time, and its samplers.

x_t = (1 - t) x_0 + t noise, the model predicts the velocity noise - x_0, and the loss is its plain mean square (K2
report). All randomness of training is a function of (seed, step, uid): it does not depend on the number of ranks, on
the place in the batch, or on what ran before.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor


def resolution_mu(num_image_tokens: int) -> float:
    """Log of the time shift of the released sampler: linear from 0.5 at 256 image tokens to 1.15 at 6400, not clamped."""
    return 0.5 + (num_image_tokens - 256) * (1.15 - 0.5) / (6400 - 256)


def shift(t: Tensor, mu: float) -> Tensor:
    """t' = e^mu / (e^mu + 1/t - 1): moves times in [0, 1] towards noise for mu > 0; 0 and 1 stay."""
    return math.exp(mu) * t / (math.exp(mu) * t + 1 - t)


class Draw(NamedTuple):
    """The random numbers of one training batch."""

    noise: Tensor  # (B, C, H, W) standard normal
    t: Tensor  # (B,) in (0, 1), shifted logit-normal
    drop: Tensor  # (B,) uniform in [0, 1): below the dropout rate the caption is left out


def draw(seed: int, step: int, uids: Sequence[str], shape: tuple[int, int, int], mu: float) -> Draw:
    """Noise, time and caption dropout of a batch, each sample from its own generator, on the CPU in float32.

    Logit-normal(0, 1) times, shifted by e^mu: the same as a logit-normal with mean mu.
    """
    noise, t, drop = torch.empty(len(uids), *shape), torch.empty(len(uids)), torch.empty(len(uids))
    for i, uid in enumerate(uids):
        generator = torch.Generator().manual_seed(number(seed, step, uid))
        drop[i] = torch.rand((), generator=generator)
        t[i] = shift(torch.sigmoid(torch.randn((), generator=generator)), mu)
        noise[i] = torch.randn(shape, generator=generator)
    return Draw(noise, t, drop)


def number(*key: object) -> int:
    """A 63-bit number from a key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of clean latents (B, C, H, W) at times t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean square error of the predicted velocity of each image, (B,) float32."""
    return (velocity.float() - (noise - clean)).square().mean((1, 2, 3))


Velocity = Callable[[Tensor, Tensor], Tensor]


class Preset(NamedTuple):
    """How a released checkpoint is sampled (README of `krea-ai/krea-2`)."""

    steps: int
    guidance: float
    mu: float | None  # None: of the resolution


PRESETS = {"raw": Preset(52, 3.5, None), "turbo": Preset(8, 0.0, 1.15)}
SAMPLERS = ("euler", "er_sde")
SCHEDULES = ("linear", "simple", "beta")
TABLE = 10_000  # times from which ComfyUI's schedules choose


class SeededNoise:
    """Standard normal noise (B, *shape) in float32, each image from its own seed on the CPU: the same in any batch, on any device."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: str | torch.device = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """The next draw of every image; the first is where sampling starts."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators]).to(self.device)


def schedule_times(schedule: str, num_steps: int, mu: float) -> list[float]:
    """Times of a sampler, from 1 (noise) down to 0, shifted by e^mu.

    Args:
        schedule: `linear`, K2's own, is evenly spaced before the shift. `simple` and `beta` choose from a table of 10,000 times
            like ComfyUI, where they are made at mu 1.15 whatever the resolution: evenly, or at the quantiles of Beta(0.6, 0.6),
            which lie closer at both ends.

    Returns:
        `num_steps` + 1 times; `beta` fewer where so many steps meet an entry of the table twice.

    Raises:
        ValueError: no such schedule, or no such number of steps.
    """
    if not 1 <= num_steps <= TABLE:
        raise ValueError(f"the number of steps is {num_steps}; it must be from 1 to {TABLE}")
    if schedule == "linear":
        return shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), mu).tolist()
    table = shift(torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE, mu).tolist()
    if schedule == "simple":
        return [*(table[-1 - int(i * (TABLE / num_steps))] for i in range(num_steps)), 0.0]
    if schedule == "beta":
        quantiles = betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, num_steps, endpoint=False))
        places = np.rint(quantiles * (TABLE - 1)).astype(int).tolist()
        return [*(table[place] for place in dict.fromkeys(places)), 0.0]
    raise ValueError(f"there is no schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")


@torch.no_grad()
def sample(
    conditional: Velocity,
    unconditional: Velocity,
    noise: Tensor,
    num_steps: int,
    mu: float,
    guidance: float = 0.0,
    sampler: str = "euler",
    schedule: str = "linear",
    fresh: Callable[[], Tensor] | None = None,
) -> Tensor:
    """From noise (t = 1) to clean latents (t = 0), (B, C, H, W), in float32.

    Args:
        conditional: velocity of (x, t (B,)) with the caption.
        unconditional: the same with the encoded empty caption; not called at guidance 0.
        guidance: K2's convention, v = cond + guidance (cond - uncond): one less than the usual scale.
        sampler: `euler` or `er_sde`.
        schedule: see `schedule_times`.
        fresh: the noise of each step, standard normal (B, C, H, W); `er_sde` needs it.

    Raises:
        ValueError: no such sampler, schedule or number of steps.
    """

    def velocity(x: Tensor, now: float) -> Tensor:
        t = torch.full((len(x),), now, dtype=torch.float32, device=x.device)
        found = conditional(x, t).float()
        return found + guidance * (found - unconditional(x, t).float()) if guidance > 0 else found

    times = schedule_times(schedule, num_steps, mu)
    if sampler == "euler":
        return euler(velocity, noise, times)
    if sampler == "er_sde":
        first = float(shift(torch.tensor(1 - 1e-4, dtype=torch.float64), mu))  # at 1 there is no signal, and no ratio to noise
        return er_sde(velocity, noise, [first, *times[1:]], fresh)
    raise ValueError(f"there is no sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float]) -> Tensor:
    """Steps along the velocity of (x, t)."""
    for now, following in itertools.pairwise(times):
        x = x + (following - now) * velocity(x, now)
    return x


def er_sde(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], fresh: Callable[[], Tensor]) -> Tensor:
    """VP ER-SDE-Solver-3 (Cui et al. 2023, arXiv:2309.06169), with the noise scale and the quadrature that ComfyUI gives it.

    Everything in y = x / (1 - t) over lambda = t / (1 - t). The drift dy = (ln phi)' (y - D) d lambda, with D the clean
    latents that the model predicts, is solved exactly for a D that is constant, then linear, then quadratic in lambda,
    as soon as there are earlier predictions to take its slopes from. The noise restores the variance of lambda^2.
    """
    lambdas = [t / (1 - t) for t in times]
    clean: Tensor | None = None
    slope: Tensor | None = None
    for i, (now, following) in enumerate(itertools.pairwise(times)):
        before, clean = clean, x - now * velocity(x, now)
        if following == 0:
            return clean
        here, there = lambdas[i], lambdas[i + 1]
        ratio = _phi(there) / _phi(here)
        alpha, step = 1 - following, there - here
        x = alpha / (1 - now) * ratio * x + alpha * (1 - ratio) * clean
        if before is not None:
            width = -step / 200
            points = there + width * np.arange(200)
            slope_before, slope = slope, (clean - before) / (here - lambdas[i - 1])
            x = x + alpha * (step + _phi(there) * float(np.sum(width / _phi(points)))) * slope
            if slope_before is not None:
                curvature = (slope - slope_before) / ((here - lambdas[i - 2]) / 2)
                x = x + alpha * (step**2 / 2 + _phi(there) * float(np.sum(width * (points - here) / _phi(points)))) * curvature
        x = x + alpha * math.sqrt(max(there**2 - (ratio * here) ** 2, 0.0)) * fresh()
    return x


def _phi(level: float | np.ndarray) -> float | np.ndarray:
    """ComfyUI's noise scale of the extended reverse-time SDE at lambda; lambda itself would be the deterministic ODE."""
    return level * (np.exp(level**0.3) + 10)
