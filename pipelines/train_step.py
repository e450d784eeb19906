"""One optimizer step on one global batch: micro-batches, loss, gradients, on any number of ranks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from k2model import flow, lora, optim, parallel
from k2model.data import to_pixels
from k2model.dit import DiT
from k2model.flops import train_flops
from k2model.layouts import load_model
from k2model.loader import Loaded
from k2model.parallel import World
from k2model.text import Encode
from pipelines.train_recipes import Phase, TrainRecipe


class Parts(NamedTuple):
    """What a step works with, all on one device."""

    model: DiT  # sharded, compiled and recomputed as the phase says
    optimizer: torch.optim.Optimizer
    codec: Any  # PcaCodec or QwenImageCodec; every rank has all of it
    encode: Encode
    world: World


class Result(NamedTuple):
    """What a step found, over all ranks. The weights have changed only if loss and gradient are finite."""

    loss: float  # mean over the images of the global batch
    grad_norm: float  # before clipping
    images: int
    tokens: int  # valid text tokens and image tokens
    flops: float  # of the valid tokens, without recomputation
    stop: bool  # some rank was asked to
    losses: list[float]  # of this rank's images, in the order read

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def build(plan: TrainRecipe, phase: Phase, encode: Encode, codec: Any, world: World, base: str | None = None) -> Parts:
    """Model and optimizer of a phase, with the weights of step 0."""
    if plan.lora:
        model = load_model(base, world.device, torch.float32 if phase.precision == "fp32" else torch.bfloat16)
        lora.attach(model, plan.lora, plan.seed)
    else:
        model = parallel.initial(plan.model, plan.seed, world)
    model = parallel.shard(model, world, checkpointing=phase.checkpointing, compiled=plan.compiled, precision=phase.precision)
    optimizer = optim.make(plan.optimizer, model, phase.lr, plan.weight_decay, plan.betas)
    return Parts(model, optimizer, codec, encode, world)


def train_step(
    parts: Parts, plan: TrainRecipe, phase: Phase, batches: Sequence[Loaded], num_images: int, step: int, lr: float, stop: bool = False
) -> Result:
    """One optimizer step on this rank's parts of a global batch; no step when loss or gradient is not finite on any rank.

    The loss is the mean over the images of the global batch, whatever the number of ranks and parts: each image's share of the
    gradient is 1 / num_images.

    Args:
        batches: parts of this rank; rows after `num_valid` count nothing.
        num_images: of the whole global batch.
        step: of the run, from 0; with seed and uid it gives noise, time and dropout.
        stop: this rank was asked to stop.
    """
    world, device = parts.world, parts.world.device
    parts.optimizer.zero_grad()
    total, tokens, flops, losses = torch.zeros((), device=device), 0, 0, []
    for k, batch in enumerate(batches):
        parallel.synchronize(parts.model, last=k == len(batches) - 1)
        with torch.no_grad():
            clean = latents_of(batch, parts)
            draw = flow.draw(plan.seed, step, batch.uids, tuple(clean.shape[1:]), phase.mu)
            dropped = (draw.drop < plan.caption_dropout).tolist()
            text, mask = parts.encode(["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)])
        noise, t = draw.noise.to(device), draw.t.to(device)
        with parallel.autocast(world, phase.precision):
            velocity = parts.model(flow.noisy(clean, noise, t), t, text, mask)
        each = flow.loss(velocity, clean, noise)
        counted = torch.arange(len(each), device=device) < batch.num_valid
        loss = torch.where(counted, each, 0).sum() / num_images
        (loss * world.size).backward()  # gradients are averaged over the ranks
        total += loss.detach()
        losses += each.detach()[: batch.num_valid].tolist()
        image_tokens = clean[0, 0].numel() // plan.model.patch**2
        for length in mask.sum(1).tolist()[: batch.num_valid]:
            tokens += length + image_tokens
            flops += train_flops(plan.model, length, image_tokens)
    grad_norm = float(parallel.clip_grad_norm(parts.model, plan.clip))
    sums = parallel.reduce(torch.tensor([float(total), tokens, flops, stop], dtype=torch.float64, device=device), world).tolist()
    result = Result(sums[0], grad_norm, num_images, int(sums[1]), sums[2], sums[3] > 0, losses)
    if result.finite:
        for group in parts.optimizer.param_groups:
            group["lr"] = lr
        parts.optimizer.step()
    return result


def latents_of(batch: Loaded, parts: Parts) -> torch.Tensor:
    """Clean latents (B, 16, H/8, W/8) float32 of a part: those that were packed, or its images through the codec."""
    if batch.latents is not None:
        return batch.latents.to(parts.world.device, torch.float32)
    return parts.codec.encode(to_pixels(batch.images.to(parts.world.device)))
