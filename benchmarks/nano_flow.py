"""The smallest K2: an unconditional transformer of 0.2 M parameters on latents of 64 x 64 images, its training, losses and samples.

What is random is a function of the seed, the step and the place of an image in the set, so that models trained on different sets of the
same size see the same noise, times and mirroring.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from k2model import flow, optim
from k2model.dit import Config, DiT

LATENT = (16, 8, 8)
MODEL = Config(
    width=64, num_blocks=3, num_heads=2, num_kv_heads=2, text_dim=16, text_taps=1, text_heads=1, num_fusion_blocks=0, time_dim=64
)
MU = flow.resolution_mu(LATENT[1] * LATENT[2] // MODEL.patch**2)
BATCH, LR, WARMUP = 32, 3e-3, 20
TIMES = (0.2, 0.4, 0.6, 0.8)  # at which held-out images are denoised
NUM_EULER = 20


def train(latents: Tensor, held_out: Tensor, seed: int, steps: int) -> tuple[DiT, dict[int, np.ndarray]]:
    """A model trained on latents (2, N, *LATENT), as they are and mirrored.

    Args:
        latents: N of at least BATCH.
        held_out: (2, M, *LATENT), two sets to watch.
        seed: Of weights, batches and noise.
        steps: At least 8.

    Returns:
        The model, and after an eighth of the steps, a quarter, a half and all of them the `losses` of `held_out`.
    """
    torch.manual_seed(seed)
    model = DiT(MODEL)
    optimizer = optim.adamw(model, LR, weight_decay=0.01)
    order, curve = np.random.default_rng([seed, 1]), {}
    for step in range(steps):
        places = order.choice(latents.shape[1], BATCH, replace=False)
        draw = flow.draw(seed, step, [str(i) for i in places], LATENT, MU)
        clean = latents[(draw.drop < 0.5).long(), torch.from_numpy(places)]  # there is no caption to drop: the number mirrors
        optimizer.zero_grad()
        loss = flow.loss(velocity(model, flow.noisy(clean, draw.noise, draw.t), draw.t), clean, draw.noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * optim.warmup_stable_decay(step, steps, WARMUP, steps // 2)
        optimizer.step()
        if step + 1 in (steps // 8, steps // 4, steps // 2, steps):
            curve[step + 1] = losses(model, held_out)
    return model, curve


def velocity(model: DiT, x: Tensor, t: Tensor) -> Tensor:
    """Without text: one token of zeros, which the model makes a constant of."""
    return model(x, t, torch.zeros(len(x), 1, MODEL.text_taps, MODEL.text_dim))


@torch.no_grad()
def losses(model: DiT, sets: Tensor) -> np.ndarray:
    """(S, M) of S sets of latents (S, M, *LATENT): each image's loss, a mean over TIMES; the noise is that of the place, for any model."""
    total = torch.zeros(sets.shape[:2])
    for time in TIMES:
        noise = flow.draw(0, round(time * 10), [str(i) for i in range(sets.shape[1])], LATENT, MU).noise
        t = torch.full((sets.shape[1],), time)
        for row, clean in zip(total, sets, strict=True):
            row += (velocity(model, flow.noisy(clean, noise, t), t) - (noise - clean)).square().mean((1, 2, 3)) / len(TIMES)
    return total.numpy()


def sample(model: DiT, num: int, seed: int) -> Tensor:
    """(num, *LATENT), of the same noise for every model."""
    noise = flow.draw(seed, -1, [str(i) for i in range(num)], LATENT, MU).noise
    return flow.sample(functools.partial(velocity, model), None, noise, NUM_EULER, MU)
