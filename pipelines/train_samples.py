"""Sample grids of a training run: the same noise and captions at every step, so that one sees pictures grow."""

import math
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import torch

from k2model import flow, parallel
from k2model.data import Packed, to_images, to_pixels
from k2model.vae import FACTOR
from pipelines.pictures import sample_grid
from pipelines.train_recipes import Phase, TrainRecipe
from pipelines.train_step import Parts


@torch.no_grad()
def samples(parts: Parts, plan: TrainRecipe, phase: Phase, packed: Packed, path: Path, title: str) -> None:
    """Write a grid of samples; without prompts in the recipe, for captions of the data and beside their pictures.

    The noise is a function of seed and prompt. Every rank has to call this, for the model is sharded over all of them; the
    first one writes.
    """
    pictures, device = {}, parts.world.device
    if plan.sample_prompts:
        prompts = list(plan.sample_prompts[: phase.num_samples])
        height = width = phase.resolution
    else:
        prompts, images = examples(packed, phase.num_samples)
        height, width = images.shape[2:]
        pictures["data through the codec"] = to_images(parts.codec.decode(parts.codec.encode(to_pixels(images.to(device)))))
    shape = (plan.model.channels, height // FACTOR, width // FACTOR)
    generators = [torch.Generator().manual_seed(flow.number(plan.seed, "sample", i, prompt)) for i, prompt in enumerate(prompts)]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    tokens = math.prod(shape[1:]) // plan.model.patch**2

    def velocity(captions: list[str]) -> flow.Velocity:
        text, mask = parts.encode(captions)
        return lambda x, t: parts.model(x, t, text, mask, parts.kernel)

    parts.model.eval()
    with parallel.autocast(parts.world, phase.precision):
        mu = flow.resolution_mu(tokens)
        latents = flow.sample(velocity(prompts), velocity([""] * len(prompts)), noise, plan.sample_steps, mu, plan.guidance)
    parts.model.train()
    if parts.world.is_main:
        pictures["samples"] = to_images(parts.codec.decode(latents))
        sample_grid(pictures, prompts, f"{title}, guidance {plan.guidance:g}, {plan.sample_steps} Euler steps", path)


def examples(packed: Packed, count: int) -> tuple[list[str], torch.Tensor]:
    """Captions and pictures, uint8 (N, 3, H, W), of at most `count` images of the commonest bucket, from as many row groups as it has."""
    sizes = Counter()
    for group in packed.groups:
        sizes[group["bucket_height"], group["bucket_width"]] += group["num_rows"]
    common = sizes.most_common(1)[0][0]
    groups = [group for group in packed.groups if (group["bucket_height"], group["bucket_width"]) == common][:count]
    rows = [zip(batch.captions, batch.images, strict=True) for batch in map(packed.read, groups)]
    chosen = [example for level in zip_longest(*rows) for example in level if example is not None][:count]
    return [caption for caption, _ in chosen], torch.stack([image for _, image in chosen])
