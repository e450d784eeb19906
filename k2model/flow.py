"""Rectified flow with a shifted logit-normal time, and the Euler sampler of K2.

x_t = (1 - t) x_0 + t noise, the model predicts the velocity noise - x_0, and the loss is its plain mean square (K2
report). All randomness of training is a function of (seed, step, uid): it does not depend on the number of ranks, on
the place in the batch, or on what ran before.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
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
    """Mean square error of the predicted velocity, over all values of the batch, in float32."""
    return (velocity.float() - (noise - clean)).square().mean()


Velocity = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def sample(conditional: Velocity, unconditional: Velocity, noise: Tensor, num_steps: int, mu: float, guidance: float = 0.0) -> Tensor:
    """Euler steps from noise (t = 1) to clean latents (t = 0), (B, C, H, W).

    Args:
        conditional: velocity of (x, t (B,)) with the caption.
        unconditional: the same with the encoded empty caption; not called at guidance 0.
        guidance: K2's convention, v = cond + guidance (cond - uncond): one less than the usual scale.
    """
    times = shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), mu).tolist()
    x = noise
    for now, following in itertools.pairwise(times):
        t = torch.full((len(x),), now, dtype=torch.float32, device=x.device)
        velocity = conditional(x, t).float()
        if guidance > 0:
            velocity = velocity + guidance * (velocity - unconditional(x, t).float())
        x = x + (following - now) * velocity
    return x
