"""One optimizer step on one global batch: micro-batches, loss, gradients, on any number of ranks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from k2model import align, captions, flow, lora, optim, parallel
from k2model.attention import Kernel, by_segment, variable_length
from k2model.checkpoint import Checkpoint
from k2model.data import to_pixels
from k2model.dit import DiT
from k2model.flops import train_flops
from k2model.layouts import open_checkpoint
from k2model.loader import Loaded
from k2model.order import Order
from k2model.parallel import World
from k2model.text import Encode
from k2model.transfer import send
from k2model.validation import Ledger
from pipelines.train_recipes import Phase, TrainRecipe


class Alignment:
    """iREPA beside the model: tap, projector and teacher, with an optimizer of its own. It is there in the first epoch only."""

    def __init__(self, irepa: align.Irepa, model: DiT, plan: TrainRecipe, lr: float, world: World):
        self.irepa, self.patch = irepa, plan.model.patch
        self.teacher = irepa.teacher.load(world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            projector = align.Projector(plan.model.width, irepa.teacher.dim).to(world.device)
        self.projector = parallel.shard_part(projector, world)
        self.optimizer = optim.adamw(self.projector, lr, plan.weight_decay, plan.betas)
        self.tap = align.Tap(model, irepa.block)

    def tensors(self) -> dict[str, Tensor]:
        """Of a checkpoint."""
        moments = optim.optimizer_tensors(self.projector, self.optimizer)
        return {f"projector.{name}": tensor for name, tensor in self.projector.state_dict().items()} | {
            f"optimizer.{name}": tensor for name, tensor in moments.items()
        }

    def load(self, found: Checkpoint) -> None:
        """Put back what `tensors` gave."""
        owners = {f"{kind}.{name}": p for kind in ("projector", "optimizer") for name, p in self.projector.named_parameters()}
        own: dict[str, dict[str, Tensor]] = {"projector": {}, "optimizer": {}}
        for full_name, tensor in found.like("alignment", owners).items():
            kind, _, name = full_name.partition(".")
            own[kind][name] = tensor
        self.projector.load_state_dict(own["projector"])
        optim.load_optimizer_tensors(self.projector, self.optimizer, own["optimizer"])

    def loss(self, images: Tensor, clean: Tensor) -> Tensor:
        """(B,) of the last forward pass on these images uint8 (B, 3, H, W) and latents, not weighted."""
        found = self.projector(self.tap.take(), align.grid_of(clean, self.patch))
        return align.loss(found, align.target(self.teacher(images), found.shape[1:3], self.irepa.gamma))


class Parts(NamedTuple):
    """What the steps of a phase work with, all on one device."""

    model: DiT  # sharded, compiled and recomputed as the phase says
    optimizer: optim.Optimizer
    codec: Any  # PcaCodec or QwenImageCodec; every rank has all of it
    encode: Encode
    world: World
    ledger: Ledger
    alignment: Alignment | None
    kernel: Kernel


class Result(NamedTuple):
    """What a step found, over all ranks. The weights have changed only if loss and gradients are finite."""

    loss: float  # mean over the images of the global batch; alignment is not in it
    align: float | None  # the same of the alignment's loss, not weighted
    grad_norms: dict[str, float]  # by part of the model and `total`, before clipping
    tokens: int  # valid text tokens and image tokens
    flops: float  # of the valid tokens, without recomputation
    stop: bool  # some rank was asked to
    parts: dict[str, Any]  # the loss by time, bucket and source
    losses: np.ndarray  # (num_images,) float32, of every image of the global batch: row groups in order, and the rows of each

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.align or 0.0, self.grad_norms["total"])))


def build(
    plan: TrainRecipe, phase: Phase, order: Order, encode: Encode, codec: Any, world: World, base: str | None, aligned: bool
) -> Parts:
    """Model and optimizer of a phase, with the weights of step 0."""
    with torch.device("meta"):
        model = DiT(plan.model)
    if plan.lora:
        lora.attach(model.to(torch.float32 if phase.precision == "fp32" else torch.bfloat16), plan.lora)
    model = parallel.shard(model, world, checkpointing=phase.checkpointing, compiled=plan.compiled, precision=phase.precision)
    if plan.lora:
        parallel.load(model, open_checkpoint(base))
        lora.init(model, plan.seed)
    else:
        parallel.init(model, plan.seed)
    make = {"adamw": optim.adamw, "muon": optim.muon}[plan.optimizer]
    optimizer = make(model, phase.lr, plan.weight_decay, plan.betas)
    alignment = Alignment(phase.align, model, plan, phase.lr, world) if aligned else None
    groups = [group for packed in order.sets for group in packed.groups]
    ledger = Ledger([bucket_of(group) for group in groups], [name for name, _ in phase.mixture], device=world.device)
    kernel = variable_length if world.device.type == "cuda" and phase.precision != "fp32" else by_segment
    return Parts(model, optimizer, codec, encode, world, ledger, alignment, kernel)


def bucket_of(group: dict) -> str:
    """`<height>x<width>` of a row group's entry in dataset.json."""
    return f"{group['bucket_height']}x{group['bucket_width']}"


def train_step(
    parts: Parts, plan: TrainRecipe, phase: Phase, batches: Sequence[Loaded], num_images: int, step: int, lr: float, stop: bool = False
) -> Result:
    """One optimizer step on this rank's parts of a global batch; no step when loss or gradient is not finite on any rank.

    The loss is the mean over the images of the global batch, whatever the number of ranks and parts: each image's share of the
    gradient is 1 / num_images.

    Args:
        batches: parts of this rank; rows after `num_valid` count nothing, the others have their `places` in the global batch.
        num_images: of the whole global batch.
        step: of the run, from 0; with seed and uid it gives noise, time and dropout.
        stop: this rank was asked to stop.
    """
    world, device, alignment = parts.world, parts.world.device, parts.alignment
    optimizers = [parts.optimizer] + ([alignment.optimizer] if alignment else [])
    for optimizer in optimizers:
        optimizer.zero_grad()
    # Nothing below waits for the GPU before the last part has been asked of it: numbers that are there are read at the end.
    sums, losses, places, tokens, flops = torch.zeros(2, dtype=torch.float64, device=device), [], [], 0, 0
    for k, batch in enumerate(batches):
        parallel.synchronize(parts.model, k == len(batches) - 1)
        with torch.no_grad():
            clean = latents_of(batch, parts)
            draw = flow.draw(plan.seed, step, batch.uids, tuple(clean.shape[1:]), phase.mu)
            text, mask = parts.encode(given(plan, phase, step, batch.uids, batch.captions, draw.drop.tolist()))
        noise, t, valid = send(draw.noise, device), send(draw.t, device), batch.num_valid
        with parallel.autocast(world, phase.precision):
            velocity = parts.model(flow.noisy(clean, noise, t), t, text, mask, parts.kernel)
            aligned = alignment.loss(batch.images, clean) if alignment else torch.zeros(len(t), device=device)
        each = flow.loss(velocity, clean, noise)
        total, beside = each[:valid].sum() / num_images, aligned[:valid].sum() / num_images
        loss = total + alignment.irepa.weight * beside if alignment else total
        loss.backward()  # gradients of the ranks are added up
        each, lengths, image_tokens = each.detach()[:valid], mask[:valid].sum(1).tolist(), clean[0, 0].numel() // plan.model.patch**2
        parts.ledger.add(each, t[:valid], f"{batch.bucket[0]}x{batch.bucket[1]}", phase.mixture[batch.group.source][0])
        losses.append(each)
        places += batch.places
        flops += sum(train_flops(plan.model, length, image_tokens) for length in lengths)
        tokens += sum(lengths) + valid * image_tokens
        sums += torch.stack([total.detach(), beside.detach()]).double()
    norms = optim.grad_norms(parts.model)
    sums = torch.cat([sums, send(torch.tensor([tokens, flops], dtype=torch.float64), device)])
    of_images = torch.zeros(num_images, dtype=torch.float64, device=device)  # each rank fills in its own: a sum puts them together
    of_images[send(torch.tensor(places, dtype=torch.long), device)] = torch.cat(losses).double()
    bins = parts.ledger.sums
    together = parallel.reduce(torch.cat([sums, bins.flatten(), of_images]), world)
    sums, ledger, of_images = together.split([len(sums), bins.numel(), num_images])
    parts.ledger.sums = ledger.view_as(bins)
    found, by_part = sums.tolist(), {name: float(norm) for name, norm in norms.items()}
    asked = parallel.agree(stop, world)
    each = of_images.float().cpu().numpy()
    result = Result(found[0], found[1] if alignment else None, by_part, int(found[2]), found[3], asked, parts.ledger.read(), each)
    if result.finite:
        optim.clip_gradients(parts.model.parameters(), norms["total"], plan.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    return result


def given(
    plan: TrainRecipe, phase: Phase, step: int, uids: Sequence[str], texts: Sequence[Sequence[str]], drop: Sequence[float]
) -> list[str]:
    """The caption that a step gives the model with each image, out of all of the image's; empty where it is dropped.

    Args:
        drop: of `flow.draw`.
    """
    chosen = [captions.choose(own, phase.caption_mix, plan.seed, step, uid) for uid, own in zip(uids, texts, strict=True)]
    return ["" if value < plan.caption_dropout else caption for value, caption in zip(drop, chosen, strict=True)]


def latents_of(batch: Loaded, parts: Parts) -> Tensor:
    """Clean latents (B, 16, H/8, W/8) float32 of a part: those that were packed, or its images through the codec."""
    if batch.latents is not None:
        return send(batch.latents, parts.world.device).float()
    return parts.codec.encode(to_pixels(send(batch.images, parts.world.device)))
