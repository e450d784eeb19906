"""`k2 train`: the curriculum on packed shards, in one process; the same command again resumes.

Everything that a step does is a function of the recipe, the packed files and the step, so a run that was killed and started
again has the same losses as one that was never stopped (on one machine with as many threads; checked by the tests).
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from curation.shards import write_bytes
from k2model import checkpoint, flow, lora, optim
from k2model.data import Batch, Cursor, Packed, to_images, to_pixels
from k2model.dit import DiT
from k2model.flops import train_flops
from k2model.layouts import load_model, open_checkpoint
from k2model.text import Encode
from k2model.vae import FACTOR, Pca, PcaCodec, fit_pca, load_pca
from pipelines import recipes
from pipelines.cli import call
from pipelines.pictures import loss_plot, sample_grid
from pipelines.recipes import Phase, TrainRecipe
from pipelines.run_folder import check_description


class Parts(NamedTuple):
    """What a step works with, all on one device."""

    model: DiT
    optimizer: torch.optim.AdamW
    codec: Any  # PcaCodec or QwenImageCodec
    encode: Encode
    device: torch.device


class Result(NamedTuple):
    """What a step found. The weights have changed only if loss and gradient are finite."""

    loss: float
    grad_norm: float
    tokens: int  # valid text tokens and image tokens of the batch


class Span(NamedTuple):
    """A phase with its data and its place among the steps of the run."""

    phase: Phase
    packed: Packed
    start: int
    end: int


def train(
    data: str,
    recipe: str = "k2-nano",
    out: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    dry_run: bool = False,
    base: str | None = None,
) -> int:
    """Train a recipe on the packed sets of a run folder. The same command again goes on from the last checkpoint.

    Writes metrics.jsonl, loss.png, samples/<step>.png and checkpoints/<step>/ to the output folder. A phase whose packed set
    is empty is skipped. Stops with exit code 1, before the weights change, when the loss or its gradient is not finite.
    A lora-* recipe trains a LoRA on a frozen --base: its checkpoints hold the LoRA alone, and at the end
    lora-diffusers.safetensors and lora-comfyui.safetensors are there.

    Args:
        data: Run folder with packed/<policy> of every phase.
        recipe: k2-nano, k2-1b, k2, lora-nano, lora-k2, or a file of yours as my.py:name.
        out: Folder of the training run; default DATA/train/<recipe>.
        device: auto, cpu or cuda.
        threads: CPU threads of torch; default all. Losses are equal only for an equal number.
        dry_run: Print parameters, and steps, tokens and FLOPs per phase, and stop.
        base: Of a LoRA recipe: the frozen model, in any layout that k2 convert reads.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("k2 train runs in one process for now, and torchrun started more. Start it without torchrun.")
    plan: TrainRecipe = recipes.find(recipe, recipes.TRAIN)
    if not isinstance(plan, TrainRecipe):
        raise ValueError(f"--recipe {recipe!r} is a {type(plan).__name__}, not a TrainRecipe; training recipes: {', '.join(recipes.TRAIN)}")
    if base is not None and plan.lora is None:
        raise ValueError(
            f"--base is for LoRA recipes; {plan.name} trains a whole model. Leave it out, or give --recipe lora-nano or lora-k2"
        )
    spans = curriculum(plan, data)
    if dry_run:
        for line in cost(plan, spans):
            print(json.dumps(line))
        return 0
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = Path(out) if out else Path(data) / "train" / plan.name
    return run(plan, spans, place, torch.device(device), base)


def curriculum(plan: TrainRecipe, data: str) -> list[Span]:
    """The phases that have data, with their packed sets.

    Raises:
        ValueError: a packed set is missing or of another resolution, or all are empty.
    """
    packed = {phase: Packed(f"{data}/packed/{phase.policy}") for phase in plan.phases}
    spans, step = [], 0
    for phase, found in packed.items():
        if found.resolution != phase.resolution:
            raise ValueError(
                f"phase {phase.name} trains at {phase.resolution} px, but {found.directory} is packed for {found.resolution} px"
            )
        if not len(found):
            print(f"k2 train: phase {phase.name} is skipped: no image was chosen by {phase.policy}, so nothing is packed", file=sys.stderr)
            continue
        spans.append(Span(phase, found, step, step + phase.steps))
        step += phase.steps
    if not spans:
        raise ValueError(
            f"every packed set under {data}/packed is empty: no image passed the policies. See the funnels in {data}/selection"
        )
    return spans


def cost(plan: TrainRecipe, spans: list[Span]) -> list[dict[str, Any]]:
    """Parameters, then steps, images, tokens and training FLOPs per phase; buckets and batch sizes as packed."""
    with torch.device("meta"):
        model = DiT(plan.model)
    lines: list[dict[str, Any]] = [{"recipe": plan.name, "parameters": sum(parameter.numel() for parameter in model.parameters())}]
    if plan.lora:
        lines[0]["trained"] = lora.num_parameters(model, plan.lora)
    for phase, packed, start, end in spans:
        share = (end - start) / len(packed)  # epochs
        images = image_tokens = flops = 0
        for group in packed.groups:
            tokens = group["bucket_height"] * group["bucket_width"] // (FACTOR * plan.model.patch) ** 2
            images += group["num_rows"]
            image_tokens += group["num_rows"] * tokens
            flops += group["num_rows"] * train_flops(plan.model, plan.text_tokens, tokens)
        lines.append(
            {
                "phase": phase.name,
                "steps": phase.steps,
                "epochs": round(share, 3),
                "images": round(images * share),
                "image_tokens": round(image_tokens * share),
                "text_tokens": round(images * share * plan.text_tokens),
                "flops": flops * share,
            }
        )
    return lines


def run(plan: TrainRecipe, spans: list[Span], place: Path, device: torch.device, base: str | None = None) -> int:
    """Train from the last whole checkpoint to the end; 0 when done, 1 when a loss or gradient was not finite."""
    description = {"recipe": plan, "packed": {span.phase.name: span.packed.fingerprint for span in spans}}
    if plan.lora:
        description["base"] = check_base(plan, base)
    check_description(place, description, write=False)
    total = spans[-1].end
    last = checkpoint.latest(place / "checkpoints")
    done = last.step if last else 0
    if done == total:
        print(json.dumps({"out": str(place), "steps": total, "steps_now": 0}))
        return 0
    started = time.perf_counter()
    encode = plan.text.load(device)  # weights may be missing: find out before anything is written
    codec = None if isinstance(plan.vae, Pca) else plan.vae.load(device)
    check_description(place, description)
    parts = build(plan, encode, codec or fitted_codec(plan, spans[0].packed, place, base).to(device), device, base)
    cursor = Cursor()
    if last:
        parts.model.load_state_dict(last.tensors("lora" if plan.lora else "model"), strict=plan.lora is None)
        optim.load_optimizer_tensors(parts.model, parts.optimizer, last.tensors("optimizer"))
        cursor = Cursor(*last.state["cursor"])
    rows = metrics_until(place / "metrics.jsonl", done)

    with tqdm(total=total, initial=done, unit="step", file=sys.stderr) as progress, open(place / "metrics.jsonl", "a") as metrics:
        for phase, packed, start, end in spans:
            if done >= end:
                continue
            progress.set_description(f"train {phase.name} px")
            for batch, following in islice(packed.batches(plan.seed, cursor), end - done):
                clock = time.perf_counter()
                lr = phase.lr * optim.warmup_stable_decay(done - start, phase.steps, phase.warmup, phase.decay)
                result = train_step(parts, plan, phase, batch, done, lr)
                if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                    group = packed.group_at(cursor, plan.seed)
                    print(
                        f"k2 train: loss {result.loss}, gradient norm {result.grad_norm} at step {done + 1} of phase {phase.name}, "
                        f"cursor {tuple(cursor)} ({group['file']} row group {group['row_group']} of {packed.directory}: "
                        f"{', '.join(batch.uids[:4])} ...). The weights were not changed; the last checkpoint is whole. "
                        "Look at these images, or lower lr or clip.",
                        file=sys.stderr,
                    )
                    return 1
                done += 1
                row = {
                    "step": done,
                    "phase": phase.name,
                    "resolution": phase.resolution,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr": lr,
                    "images": len(batch.uids),
                    "tokens": result.tokens,
                    "images_per_s": round(len(batch.uids) / (time.perf_counter() - clock), 3),
                    "cursor": list(cursor),  # where this batch started: with the seed it names the row group
                }
                rows.append(row)
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                progress.set_postfix_str(f"loss {result.loss:.3f}", refresh=False)
                progress.update()
                cursor = following
                if done % plan.sample_every == 0 or done == end:
                    samples(parts, plan, phase, packed, place / "samples" / f"{done:06d}.png", f"step {done}, {phase.name} px")
                    loss_plot(rows, place / "loss.png")
                if done % plan.checkpoint_every == 0 or done == end:
                    # At the end of a phase the next one starts at the beginning of its own set.
                    cursor = Cursor() if done == end else cursor
                    os.fsync(metrics.fileno())  # a checkpoint must not be ahead of its metrics
                    if plan.lora and done == total:  # before the last checkpoint, which says that all is done
                        for style in ("diffusers", "comfyui"):
                            lora.save(lora.updates(parts.model), place / f"lora-{style}.safetensors", style)
                    save_checkpoint(parts, place, done, phase, cursor)
    losses = {phase.name: round(float(np.mean([row["loss"] for row in rows[start:end][-10:]])), 4) for phase, _, start, end in spans}
    seconds = round(time.perf_counter() - started, 1)
    print(
        json.dumps({"out": str(place), "steps": total, "steps_now": total - (last.step if last else 0), "loss": losses, "seconds": seconds})
    )
    return 0


def check_base(plan: TrainRecipe, base: str | None) -> str:
    """The digest of the frozen model of a LoRA run.

    Raises:
        ValueError: none is given, or it is another model than the recipe's, or has no codec where the recipe fits one.
    """
    if base is None:
        raise ValueError(f"recipe {plan.name} trains a LoRA: give its frozen model with --base, a checkpoint in any layout")
    found = open_checkpoint(base)
    if found.config != plan.model:
        raise ValueError(f"--base {base} is a model of {found.config}; recipe {plan.name} is for {plan.model}")
    if isinstance(plan.vae, Pca) and not (Path(base) / "vae.safetensors").is_file():
        raise ValueError(f"--base {base} has no vae.safetensors, the codec it was trained with. Give a training checkpoint.")
    return found.digest()


def fitted_codec(plan: TrainRecipe, packed: Packed, place: Path, base: str | None = None) -> PcaCodec:
    """The PCA codec of this run: fitted once on the first batches of the plan, and kept in vae.safetensors; or its base's."""
    if base:
        return load_pca(Path(base) / "vae.safetensors")
    path = place / "vae.safetensors"
    if not path.exists():
        first = islice(packed.batches(plan.seed, Cursor()), min(plan.vae.num_batches, len(packed)))
        write_bytes(save(fit_pca(to_pixels(batch.images) for batch, _ in first).tensors()), path)
    return load_pca(path)


def build(plan: TrainRecipe, encode: Encode, codec: Any, device: torch.device, base: str | None = None) -> Parts:
    """Model and optimizer at step 0, beside codec and text encoder."""
    if plan.lora:
        model = load_model(base, device, torch.bfloat16 if plan.precision == "bf16" else torch.float32)
        lora.attach(model, plan.lora, plan.seed)
        return Parts(model, optim.adamw(model, plan.phases[0].lr, plan.weight_decay, plan.betas), codec, encode, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)  # PyTorch's layers draw their first weights from the global generator
        model = DiT(plan.model).to(device)
    return Parts(model, optim.adamw(model, plan.phases[0].lr, plan.weight_decay, plan.betas), codec, encode, device)


def train_step(parts: Parts, plan: TrainRecipe, phase: Phase, batch: Batch, step: int, lr: float) -> Result:
    """One optimizer step on one batch; no step when loss or gradient is not finite."""
    with torch.no_grad():
        clean = parts.codec.encode(to_pixels(batch.images.to(parts.device)))
        draw = flow.draw(plan.seed, step, batch.uids, tuple(clean.shape[1:]), phase.mu)
        dropped = (draw.drop < plan.caption_dropout).tolist()
        text, mask = parts.encode(["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)])
    noise, t = draw.noise.to(parts.device), draw.t.to(parts.device)
    with torch.autocast(parts.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
        velocity = parts.model(flow.noisy(clean, noise, t), t, text, mask)
    loss = flow.loss(velocity, clean, noise)
    parts.optimizer.zero_grad()
    loss.backward()
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), plan.clip))
    result = Result(loss.item(), grad_norm, int(mask.sum()) + clean[:, 0].numel() // plan.model.patch**2)
    if math.isfinite(result.loss) and math.isfinite(grad_norm):
        for group in parts.optimizer.param_groups:
            group["lr"] = lr
        parts.optimizer.step()
    return result


@torch.no_grad()
def samples(parts: Parts, plan: TrainRecipe, phase: Phase, packed: Packed, path: Path, title: str) -> None:
    """Write a grid of samples; without prompts in the recipe, for captions of the data and beside their pictures.

    The noise is a function of seed and prompt, so that grids of different steps show the same pictures growing.
    """
    pictures = {}
    if plan.sample_prompts:
        prompts = list(plan.sample_prompts[: phase.num_samples])
        height = width = phase.resolution
    else:
        prompts, images = examples(packed, phase.num_samples)
        height, width = images.shape[2:]
        pixels = to_pixels(images.to(parts.device))
        pictures["data through the codec"] = to_images(parts.codec.decode(parts.codec.encode(pixels)))
    shape = (plan.model.channels, height // FACTOR, width // FACTOR)
    generators = [torch.Generator().manual_seed(flow.number(plan.seed, "sample", i, prompt)) for i, prompt in enumerate(prompts)]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(parts.device)
    tokens = math.prod(shape[1:]) // plan.model.patch**2

    def velocity(captions: list[str]) -> flow.Velocity:
        text, mask = parts.encode(captions)
        return lambda x, t: parts.model(x, t, text, mask)

    parts.model.eval()
    with torch.autocast(parts.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
        mu = flow.resolution_mu(tokens)
        latents = flow.sample(velocity(prompts), velocity([""] * len(prompts)), noise, plan.sample_steps, mu, plan.guidance)
    parts.model.train()
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


def save_checkpoint(parts: Parts, place: Path, step: int, phase: Phase, cursor: Cursor) -> None:
    """Model (or LoRA alone), optimizer and codec, with where the next batch starts and the description of the run."""
    trained = lora.tensors(parts.model)
    files = {
        "lora" if trained else "model": trained or parts.model.state_dict(),
        "optimizer": optim.optimizer_tensors(parts.model, parts.optimizer),
        "vae": parts.codec.tensors(),
    }
    config = json.loads((place / "run.json").read_text())
    checkpoint.save(place / "checkpoints", step, files, {"phase": phase.name, "cursor": list(cursor), "config": config})


def metrics_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows up to `step`; what a killed run wrote after its last checkpoint, half lines too, is cut off the file."""
    rows = []
    for line in path.read_text().splitlines()[:step] if path.exists() else []:
        rows.append(json.loads(line))
    assert [row["step"] for row in rows] == list(range(1, step + 1)), f"{path} does not hold steps 1 to {step}"
    write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(), path)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(train, argv, "k2 train")


if __name__ == "__main__":
    sys.exit(main())
