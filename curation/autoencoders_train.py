"""Training of the small autoencoders of `curation.autoencoders`.

* The patch discriminator joins from half of the steps on: Rombach et al. 2022 (arXiv:2112.10752). The adversarial weight that balances
  the gradients of the last layer: Esser et al. 2021 (arXiv:2012.09841), section 3.2; its hinge loss: Lim and Ye 2017 (arXiv:1705.02894).
* Codes that were idle are restarted from latents of the batch, else most of a codebook is never used.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curation.autoencoders import Assigned, Net, Small, to_tensor

ADVERSARIAL = 0.5  # of the reconstruction's gradient at the last layer
RESTART = 10  # steps without use after which a code is restarted


def train_small(
    description: Small, images: Sequence[np.ndarray], steps: int, seed: int = 0, device: str = "cpu", side: int = 48, batch: int = 8
) -> tuple[Net, list[dict[str, float]]]:
    """Train on random crops of real images, uint8 (H, W, 3) of at least `side`, and return the network with a history of figures.

    On one CPU with one number of threads the same seed gives the same weights. 900 steps of 8 crops of 48 pixels take 1 to 2 minutes
    on one core.

    Raises:
        ValueError: an image is too small, or the loss is not finite.
    """
    if not images or min(min(image.shape[:2]) for image in images) < side or side % description.factor:
        sides = f"the smallest side is {min(min(image.shape[:2]) for image in images)}" if images else "there is none"
        raise ValueError(f"{len(images)} images ({sides}) for crops of {side} pixels at factor {description.factor}; leave small ones out")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, critic = (model.to(device, memory_format=torch.channels_last) for model in (Net(description), _critic()))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=5e-4, betas=(0.5, 0.9))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    last, history = net.decode[-1].weight, []
    idle = torch.full((description.num_codes,), RESTART, device=device)  # steps since a code was used; at first all start on latents
    for step in range(steps):
        real = to_tensor(np.stack([_crop(images[rng.integers(len(images))], side, rng) for _ in range(batch)])).to(device)
        latents, bottleneck, assigned = net.encode(real, generator)
        fake = net.decode(latents)
        reconstruction = loss = pyramid_loss(fake, real)
        if description.adversarial and step >= steps // 2:
            fooled = -critic(fake).mean()
            pull, push = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, fooled))
            loss = reconstruction + ADVERSARIAL * (pull / (push + 1e-4)).clamp(max=1e3) * fooled
        optimizer.zero_grad(set_to_none=True)
        (loss + bottleneck).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise ValueError(f"the gradient of {description.name} is {norm} at step {step} of {steps}; try another seed")
        optimizer.step()
        rate.step()
        if description.adversarial and step >= steps // 2:
            hinge = F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean()
            critic_optimizer.zero_grad(set_to_none=True)
            hinge.backward()
            critic_optimizer.step()
        if assigned is not None:
            _restart(net, idle, assigned, generator)
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            decibel = -10 * np.log10((fake.detach().clamp(-1, 1) - real).square().mean().item() / 4)
            history.append({"step": step, "loss": loss.item(), "bottleneck": bottleneck.item(), "psnr": decibel})
    return net.eval(), history


def pyramid_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute error of the pixels, of their differences along both axes, and of the images at half and at a quarter."""
    loss = F.l1_loss(fake, real)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(fake.diff(dim=axis), real.diff(dim=axis))
    return loss + sum(0.5 * F.l1_loss(F.avg_pool2d(fake, size), F.avg_pool2d(real, size)) for size in (2, 4))


def _critic() -> nn.Module:
    """The patch discriminator: one logit per 4 pixels each way."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 3, padding=1)),
    )


@torch.no_grad()
def _restart(net: Net, idle: Tensor, assigned: Assigned, generator: torch.Generator) -> None:
    """Move the codes that were idle for RESTART steps onto latents of this batch."""
    idle += 1
    idle[assigned.codes.unique()] = 0
    dead = (idle >= RESTART).nonzero()[:, 0]
    rows = assigned.latents.permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randint(len(rows), (len(dead),), generator=generator).to(rows.device)
    net.codebook[dead] = rows[chosen]
    idle[dead] = 0


def _crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
    crop = image[top : top + side, left : left + side]
    return crop[:, ::-1] if rng.random() < 0.5 else crop
