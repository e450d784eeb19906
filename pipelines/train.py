"""`k2 train`: the curriculum on packed shards, on one process or many; the same command again resumes.

Everything that a step does is a function of the recipe, the packed files and the step, so a run that was killed and started
again has the same losses as one that was never stopped (bit for bit on one process of one machine with as many threads, else within
rounding; checked by the tests).
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from k2model import lora, memory, parallel
from k2model.data import Packed
from k2model.dit import DiT
from k2model.flops import PEAK, train_flops
from k2model.layouts import open_checkpoint
from k2model.order import Order, check_world
from k2model.vae import FACTOR, Pca
from pipelines import cluster, merge, recipes
from pipelines.cli import call
from pipelines.metrics import read_rows
from pipelines.train_loop import Machine, Span, run
from pipelines.train_recipes import TRAIN, Phase, TrainRecipe

HALF = PEAK["H100"] / 2


def train(
    data: str,
    recipe: str = "k2-nano",
    out: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    decoders: int = 4,
    tp: int = 1,
    fsdp: int | None = None,
    max_rows: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    ray: str = "off",
    workers: int = 1,
    gpus: int = 1,
    dry_run: bool = False,
    base: str | None = None,
) -> int:
    """Train a recipe on the packed sets of a run folder. The same command again goes on from the last checkpoint.

    Starts in one process, or in many under torchrun (docs/training.md). Writes metrics.jsonl, loss.png, samples/<step>.png and
    checkpoints/<step>/ to the output folder. A phase whose packed set is empty is skipped. Stops with exit code 1, before the
    weights change, when the loss or its gradient is not finite on any rank; and after a checkpoint when SIGTERM asks for it.
    A lora-* recipe trains a LoRA on a frozen --base: its checkpoints hold the LoRA alone, and at the end
    lora-diffusers.safetensors and lora-comfyui.safetensors are there. `k2 train merge` averages checkpoints.

    Args:
        data: Run folder with packed/<policy> of every phase.
        recipe: k2-nano, k2-1b, k2, lora-nano, lora-k2, or a file of yours as my.py:name.
        out: Folder of the training run; default DATA/train/<recipe>.
        device: auto, cpu or cuda.
        threads: CPU threads of torch; default all. Losses are equal only for an equal number.
        decoders: Threads of each rank that decode images ahead of the step.
        tp: Processes that share each matrix (tensor parallelism); 1 is right up to some hundred GPUs.
        fsdp: Ranks over which one copy of the model is spread; default all. Less, as the GPUs of a node: several copies (HSDP).
        max_rows: Most images of a rank that go through the model at once: less memory, the same batches (gradients are added up).
        tensorboard: Write events to OUT/tensorboard too.
        wandb: Log to this project of Weights & Biases too.
        ray: Start --workers ranks with Ray Train on the cluster at this address (auto: the one at hand), and wait for them.
        workers: Ranks that Ray starts, each with a GPU where the cluster has any.
        gpus: Of --dry-run: for how many GPUs it counts memory and time.
        dry_run: Print parameters, then images, tokens, FLOPs, memory of a GPU and hours of every phase, and stop.
        base: Of a LoRA recipe: the frozen model, in any layout that k2 convert reads.
    """
    plan: TrainRecipe = recipes.find(recipe, TRAIN)
    if not isinstance(plan, TrainRecipe):
        raise ValueError(f"--recipe {recipe!r} is a {type(plan).__name__}, not a TrainRecipe; training recipes: {', '.join(TRAIN)}")
    if base is not None and plan.lora is None:
        raise ValueError(
            f"--base is for LoRA recipes; {plan.name} trains a whole model. Leave it out, or give --recipe lora-nano or lora-k2"
        )
    if plan.lora and any(phase.precision.startswith("float8") for phase in plan.phases):
        raise ValueError(f"recipe {plan.name} trains a LoRA, whose layers have no float8. Take precision bf16")
    if plan.latents and any(phase.align for phase in plan.phases):
        raise ValueError(f"recipe {plan.name} reads latents, and its teacher needs images. Leave out latents or align")
    place = Path(out) if out else Path(data) / "train" / plan.name
    spans = curriculum(plan, data)
    if dry_run:
        for line in cost(plan, spans, parallel.divide(gpus, tp, fsdp), max_rows, measured_rates(place)):
            print(json.dumps(line))
        return 0
    digest = check_base(plan, base) if plan.lora else None
    if ray != "off":
        parallel.divide(workers, tp, fsdp)
        given = {"data": data if "://" in data else str(Path(data).resolve()), "recipe": recipe, "out": str(place.resolve())}
        given |= {"device": device, "threads": threads, "decoders": decoders, "tp": tp, "fsdp": fsdp, "max_rows": max_rows}
        given |= {"tensorboard": tensorboard, "wandb": wandb, "base": base and str(Path(base).resolve())}
        return cluster.ranks(train, given, workers, str(place.resolve() / "ray"), ray)
    if threads is not None:
        torch.set_num_threads(threads)
    world = parallel.start(device, tp, fsdp)
    for span in spans:
        check_world(span.phase.num_groups, world.size)
    code = run(plan, spans, place, Machine(world, max_rows, decoders, tensorboard, wandb), base, digest)
    world.stop()  # waits for all; a rank that fails must not come here
    return code


def curriculum(plan: TrainRecipe, data: str) -> list[Span]:
    """The phases that have data, with the order in which they read it.

    Raises:
        ValueError: a packed set is missing or of another resolution, or all are empty.
    """
    spans, step = [], 0
    for phase in plan.phases:
        found = [(Packed(f"{data}/packed/{name}"), weight) for name, weight in phase.mixture]
        for packed, _ in found:
            if packed.resolution != phase.resolution:
                raise ValueError(
                    f"phase {phase.name} trains at {phase.resolution} px, but {packed.directory} is packed for {packed.resolution} px"
                )
        names = " and ".join(name for name, _ in phase.mixture)
        if not all(len(packed) for packed, _ in found):
            print(f"k2 train: phase {phase.name} is skipped: no image was chosen by {names}, so nothing is packed", file=sys.stderr)
            continue
        sets, weights = zip(*found, strict=True)
        spans.append(Span(phase, Order(sets, weights, phase.num_groups, plan.seed, plan.hold_out), step, step + phase.steps))
        step += phase.steps
    if not spans:
        raise ValueError(
            f"every packed set under {data}/packed is empty: no image passed the policies. See the funnels in {data}/selection"
        )
    return spans


def measured_rates(place: Path) -> dict[str, float]:
    """Images a second of each phase that this folder's run has trained in: the median of its rows."""
    rates: dict[str, list[float]] = {}
    for row in read_rows(place / "metrics.jsonl"):
        rates.setdefault(row["phase"], []).append(row["images_per_s"])
    return {phase: statistics.median(found) for phase, found in rates.items()}


def cost(
    plan: TrainRecipe, spans: list[Span], degrees: parallel.Degrees, max_rows: int | None, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """Parameters, then a line per phase; buckets and batch sizes as packed.

    * flops: of matrix products, forward and backward, without recomputation; flops_share of all phases.
    * memory_gib: of one GPU, see `k2model.memory`; text encoder and autoencoder come on top.
    * hours: at the rate that was measured in the output folder, or else `hours_at_half_peak`: at half of an H100's bf16 rate.
    """
    with torch.device("meta"):
        model = DiT(plan.model)
    lines: list[dict[str, Any]] = [{"recipe": plan.name, "parameters": sum(parameter.numel() for parameter in model.parameters())}]
    if plan.lora:
        lines[0]["trained"] = lora.num_parameters(model, plan.lora)
    for phase, order, start, end in spans:
        images = image_tokens = flops = 0.0
        shares = [weight / sum(weight for _, weight in phase.mixture) for _, weight in phase.mixture]
        for packed, share in zip(order.sets, shares, strict=True):
            repeats = share * (end - start) * phase.num_groups / len(packed)  # epochs of this set
            for group in packed.groups:
                tokens = group["bucket_height"] * group["bucket_width"] // (FACTOR * plan.model.patch) ** 2
                images += repeats * group["num_rows"]
                image_tokens += repeats * group["num_rows"] * tokens
                flops += repeats * group["num_rows"] * train_flops(plan.model, plan.text_tokens, tokens)
        lines.append(
            {
                "phase": phase.name,
                "steps": phase.steps,
                "epochs": round((end - start) / order.num_batches, 3),
                "images": round(images),
                "image_tokens": round(image_tokens),
                "text_tokens": round(images * plan.text_tokens),
                "flops": flops,
                "memory_gib": None if plan.lora else memory_gib(plan, phase, order, degrees, max_rows),
                **hours(images, flops, math.prod(degrees), rates.get(phase.name)),
            }
        )
    total = sum(line["flops"] for line in lines[1:])
    return [lines[0], *(line | {"flops_share": round(line["flops"] / total, 3)} for line in lines[1:])]


def hours(images: float, flops: float, gpus: int, rate: float | None) -> dict[str, float]:
    """Of a phase, at a measured rate in images a second, or else at half of the peak of H100s; three digits."""
    if rate is None:
        return {"hours_at_half_peak": float(f"{flops / HALF / gpus / 3600:.3g}")}
    return {"hours": float(f"{images / rate / 3600:.3g}")}


def memory_gib(plan: TrainRecipe, phase: Phase, order: Order, degrees: parallel.Degrees, max_rows: int | None) -> dict[str, float]:
    """What a GPU holds in a step of a phase, by kind and at its peak."""
    rows = max(packed.description["batch_size"] for packed in order.sets)
    rows = -(-rows // max(1, degrees.replicas * degrees.fsdp // phase.num_groups))
    tokens = max(group["bucket_height"] * group["bucket_width"] for packed in order.sets for group in packed.groups)
    found = memory.plan(
        plan.model,
        min(rows, max_rows or rows),
        tokens // (FACTOR * plan.model.patch) ** 2,
        plan.text_tokens,
        precision=phase.precision,
        checkpointing=phase.checkpointing,
        fsdp=degrees.fsdp if math.prod(degrees) > 1 else None,
        tp=degrees.tp,
    )
    kinds = ("parameters", "optimizer", "gradients", "activations", "peak")
    return {kind: round(getattr(found, kind) / 2**30, 3) for kind in kinds}


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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; `k2 train merge` is `pipelines.merge`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return merge.main(argv[1:]) if argv[:1] == ["merge"] else call(train, argv, "k2 train")


if __name__ == "__main__":
    sys.exit(main())
