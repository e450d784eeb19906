"""The training loop: phases, checkpoints, metrics, and what stops it.

A phase starts from a checkpoint, the one that the phase before has left, so that going on in another phase, going on after a
kill and going on with another number of ranks are one thing.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from tqdm import tqdm

from curation.shards import write_bytes
from k2model import checkpoint, lora, optim, parallel, validation
from k2model.data import to_pixels
from k2model.flops import peak_flops
from k2model.loader import Loader
from k2model.merge import merge, weights_of
from k2model.order import Order
from k2model.parallel import World
from k2model.text import Encode, Qwen3VLText
from k2model.vae import Pca, fit_pca, load_pca
from pipelines import train_plots
from pipelines.latents import check_latents
from pipelines.merge import choose
from pipelines.metrics import Metrics, read_rows
from pipelines.run_folder import check_description
from pipelines.survival import AGAIN, Signals, Watchdog
from pipelines.train_recipes import Phase, TrainRecipe
from pipelines.train_samples import samples
from pipelines.train_step import Parts, Result, build, train_step

VALIDATION_TIMES = 8
AN_HOUR = 3600.0  # what samples, validation or a checkpoint may take


class Span(NamedTuple):
    """A phase with the order of its data and its place among the steps of the run."""

    phase: Phase
    order: Order
    start: int
    end: int

    @property
    def align_end(self) -> int:
        """The step of the run after which nothing is aligned: the first epoch of the phase's data."""
        return self.start + self.order.num_batches if self.phase.align else self.start


class Machine(NamedTuple):
    """What the numbers do not depend on."""

    world: World
    max_rows: int | None = None  # most images that go through the model at once
    threads: int = 4  # that decode
    tensorboard: bool = False
    wandb: str | None = None


class Job(NamedTuple):
    """What stays the same over the phases of a run."""

    plan: TrainRecipe
    total: int  # steps
    place: Path
    machine: Machine
    base: str | None
    encode: Encode
    codec: Any
    metrics: Metrics | None  # of the first rank
    signals: Signals
    watchdog: Watchdog
    progress: tqdm
    saver: checkpoint.Saver


def run(plan: TrainRecipe, spans: list[Span], place: Path, machine: Machine, base: str | None = None, digest: str | None = None) -> int:
    """Train from the last whole checkpoint to the end.

    Args:
        base: the frozen model of a LoRA recipe.
        digest: of the base.

    Returns:
        0 when done; 1 when a loss or gradient was not finite; AGAIN (75) when a signal asked to end and a checkpoint was written.
    """
    world, total = machine.world, spans[-1].end
    first = world.is_main
    description = describe(plan, spans, digest)
    check_description(place, description, write=False)
    last = checkpoint.latest(place / "checkpoints", world.writers)
    done = before = last.step if last else 0
    if done == total:
        if first:
            print(json.dumps({"out": str(place), "steps": total, "steps_now": 0}))
        return 0
    clock = time.perf_counter()
    encode = plan.text.load(world.device)  # weights may be missing: find out before anything is written
    if isinstance(plan.text, Qwen3VLText):
        parallel.shard_encoder(encode.model, world)
    codec = None if isinstance(plan.vae, Pca) else plan.vae.load(world.device)
    if first:
        check_description(place, description)
        if codec is None:
            fit_codec(plan, spans[0].order, place, base)
    parallel.barrier(world)
    codec = codec or load_pca(place / "vae.safetensors").to(world.device)
    if plan.latents:
        for packed in (packed for span in spans for packed in span.order.sets):
            check_latents(packed, str(place / "vae.safetensors") if isinstance(plan.vae, Pca) else plan.vae.path)
    with ExitStack() as stack:
        metrics = stack.enter_context(Metrics(place, done, machine.tensorboard, machine.wandb, {"recipe": plan.name})) if first else None
        signals, watchdog = stack.enter_context(Signals()), stack.enter_context(Watchdog())
        progress = stack.enter_context(tqdm(total=total, initial=done, unit="step", file=sys.stderr, disable=not first))
        saver = checkpoint.Saver(place / "checkpoints", world.writers, plan.keep_last, plan.keep_every or None)
        stack.callback(saver.wait)
        job = Job(plan, total, place, machine, base, encode, codec, metrics, signals, watchdog, progress, saver)
        for span in spans:
            if done < span.end:
                done, code = run_phase(job, span, restore(job, span, done), done)
                if code is not None:
                    return code
    if first:
        rows = read_rows(place / "metrics.jsonl")
        losses = {span.phase.name: round(float(np.mean([row["loss"] for row in rows[span.start : span.end][-10:]])), 4) for span in spans}
        seconds = round(time.perf_counter() - clock, 1)
        print(json.dumps({"out": str(place), "steps": total, "steps_now": total - before, "loss": losses, "seconds": seconds}))
    return 0


def describe(plan: TrainRecipe, spans: list[Span], base_digest: str | None) -> dict[str, Any]:
    """What decides the numbers of a run: recipe and data, and the frozen model of a LoRA. Not the machine."""
    packed = {span.phase.name: [packed.fingerprint for packed in span.order.sets] for span in spans}
    return {"recipe": plan, "packed": packed} | ({"base": base_digest} if plan.lora else {})


def fit_codec(plan: TrainRecipe, order: Order, place: Path, base: str | None) -> None:
    """The PCA codec of this run, in vae.safetensors: its base's, or fitted once on the first row groups of the order."""
    path = place / "vae.safetensors"
    if path.exists():
        return
    if base:
        codec = load_pca(Path(base) / "vae.safetensors")
    else:
        groups = dict.fromkeys((group.source, group.number) for group in map(order.group, range(plan.vae.num_batches)))
        codec = fit_pca(to_pixels(order.sets[source].read(order.sets[source].groups[number]).images) for source, number in groups)
    write_bytes(to_bytes(codec.tensors()), path)


def restore(job: Job, span: Span, done: int) -> Parts:
    """Model, optimizer and alignment of a phase at step `done`, from the last checkpoint, or new ones at the start of a run."""
    phase, plan = span.phase, job.plan
    parts = build(plan, phase, span.order, job.encode, job.codec, job.machine.world, job.base, aligned=done < span.align_end)
    if not done:
        return parts
    last = checkpoint.latest(job.place / "checkpoints", job.machine.world.writers)
    assert last and last.step == done, f"the last whole checkpoint in {job.place} is not that of step {done}"
    begins, weights = done == span.start, last
    if begins and phase.merge_last:
        weights = merged(job, phase, done)
    parameters = dict(parts.model.named_parameters())
    parts.model.load_state_dict(weights.like("lora" if plan.lora else "model", parameters), strict=plan.lora is None)
    if phase.keep_optimizer or not begins:
        optim.load_optimizer_tensors(parts.model, parts.optimizer, last.like("optimizer", parameters))
    if parts.alignment and not begins:
        parts.alignment.load(last)
    return parts


def run_phase(job: Job, span: Span, parts: Parts, done: int) -> tuple[int, int | None]:
    """Steps of one phase from step `done` on; returns the last step, and the exit code if it was stopped before the end."""
    plan, phase, order, machine = job.plan, span.phase, span.order, job.machine
    world = machine.world
    job.progress.set_description(f"train {phase.name} px")
    with Loader(
        order, world.rank, world.size, done - span.start, 2, machine.threads, plan.latents, machine.max_rows, phase.steps
    ) as loader:
        waited, clock = 0.0, time.perf_counter()
        for batches, index in loader:
            lr = phase.lr * optim.warmup_stable_decay(index, phase.steps, phase.warmup, phase.decay)
            result = train_step(parts, plan, phase, batches, order.num_images(index), done, lr, job.signals.by is not None)
            losses_at = job.metrics.keep(result.losses) if job.metrics else None  # those of a step that stops the run too
            if not result.finite:
                print_once(world, not_finite(span, result, done, index))
                return done, 1
            done += 1
            seconds, waiting = time.perf_counter() - clock, loader.waited - waited
            at_end = done == span.end
            row = row_of(span, result, done, index, lr, seconds, waiting, world) | {"losses_at": losses_at}
            if order.held_out and (done % plan.validate_every == 0 or at_end):
                with job.watchdog.allowing(AN_HOUR):
                    each = validate(job, span, parts)
                row["validation"] = validation.summary(each)
                if job.metrics:
                    row["validation"]["losses_at"] = job.metrics.keep(each.numpy())
            if job.metrics:
                job.metrics.write(row)
            job.progress.set_postfix_str(f"loss {result.loss:.3f}", refresh=False)
            job.progress.update()
            if parts.alignment and done == span.align_end:
                parts.alignment.tap.remove()
                parts = parts._replace(alignment=None)
            if done % plan.sample_every == 0 or at_end:
                with job.watchdog.allowing(AN_HOUR):
                    show(job, span, parts, done)
            if done % plan.checkpoint_every == 0 or at_end or result.stop:
                with job.watchdog.allowing(AN_HOUR):
                    save(job, span, parts, done, wait=at_end or result.stop)
            if at_end:
                return done, None
            if result.stop:
                print_once(world, f"k2 train: {job.signals.by or 'another process'} asked to end; the checkpoint of step {done} is written")
                return done, AGAIN
            job.watchdog.beat()
            waited, clock = loader.waited, time.perf_counter()
    raise AssertionError("the loader never ends")


def print_once(world: World, text: str) -> None:
    """To stderr, from one process."""
    if world.is_main:
        print(text, file=sys.stderr)


def not_finite(span: Span, result: Result, done: int, index: int) -> str:
    """What a person needs who has to find out why: the row groups, and only those with a loss that is not finite where there are any."""
    groups = span.order.batch(index)
    ends = np.cumsum([span.order.describe(group)["num_rows"] for group in groups])
    bad = np.flatnonzero(~np.isfinite(result.losses))
    named = np.unique(np.searchsorted(ends, bad, side="right")) if len(bad) else range(len(groups))
    places = [span.order.sets[groups[j].source].place(span.order.describe(groups[j])) for j in named]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    return (
        f"k2 train: loss {result.loss}, gradient norm {result.grad_norms['total']} at step {done + 1} of phase {span.phase.name}, "
        f"cursor {index}: the loss of {len(bad)} of {len(result.losses)} images is not finite ({shown}). "
        f"The weights were not changed; the last checkpoint is whole. "
        f"Look at these images (k2 report RUN --step {done + 1}), or lower lr or clip."
    )


def row_of(span: Span, result: Result, done: int, index: int, lr: float, seconds: float, waiting: float, world: World) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    images = len(result.losses)
    row = {
        "step": done,
        "phase": span.phase.name,
        "resolution": span.phase.resolution,
        "index": index,  # the cursor: with the recipe and the packed sets it names the images
        "loss": result.loss,
        "grad_norm": result.grad_norms["total"],
        "grad_norms": {part: norm for part, norm in result.grad_norms.items() if part != "total"},
        "lr": lr,
        "images": images,
        "tokens": result.tokens,
        **result.parts,
        "images_per_s": round(images / seconds, 3),
        "data_wait": round(waiting / seconds, 4),
        "mfu": mfu(result.flops / seconds, world),
        "memory_gib": peak_memory_gib(world),
    }
    if result.align is not None:
        row["align"] = result.align
    return row


def mfu(rate: float, world: World) -> float | None:
    """Share of the GPUs' bf16 peak that `rate`, the FLOP/s of valid tokens, is."""
    peak = peak_flops(world.device)
    return None if peak is None else round(rate / (peak * world.size * world.tp), 4)


def peak_memory_gib(world: World) -> float:
    """The most that this process has held: of the GPU's memory, or of the machine's where there is none."""
    if world.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(world.device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # kibibytes on Linux


def validate(job: Job, span: Span, parts: Parts) -> torch.Tensor:
    """(images, times) losses of the row groups that are held out, at fixed times and noise. Each rank takes its share of them."""
    order, world = span.order, job.machine.world
    firsts = [0, *accumulate(order.describe(group)["num_rows"] for group in order.held_out)]
    rounds = -(-len(order.held_out) // world.size)

    def batches() -> Iterator[validation.Held]:
        for k in range(rounds):
            place = k * world.size + world.rank
            group = order.held_out[place % len(order.held_out)]  # all ranks make as many passes: the model may be sharded
            batch = order.sets[group.source].read(order.describe(group))
            text, mask = parts.encode(batch.captions)
            clean = parts.codec.encode(to_pixels(batch.images.to(world.device)))
            places = range(firsts[place], firsts[place + 1]) if place < len(order.held_out) else ()
            yield validation.Held(clean, text, mask, batch.uids, places)

    parts.model.eval()
    with parallel.autocast(world, span.phase.precision):
        velocity = partial(parts.model, kernel=parts.kernel)
        each = validation.validation_losses(velocity, batches(), firsts[-1], VALIDATION_TIMES, job.plan.seed)
    parts.model.train()
    return parallel.reduce(each.to(world.device), world).cpu()


def show(job: Job, span: Span, parts: Parts, done: int) -> None:
    """A grid of samples, and the curves."""
    path = job.place / "samples" / f"{done:06d}.png"
    samples(parts, job.plan, span.phase, span.order.sets[0], path, f"step {done}, {span.phase.name} px")
    if job.metrics:
        job.metrics.picture("samples", done, path)
        train_plots.write(read_rows(job.place / "metrics.jsonl"), job.place)


def save(job: Job, span: Span, parts: Parts, done: int, wait: bool) -> None:
    """A checkpoint: model (or LoRA alone), optimizer, alignment and codec, with the cursor and the description of the run."""
    trained = lora.tensors(parts.model)
    if trained and done == job.total:  # before the last checkpoint, which says that all is done
        updates = lora.updates(parts.model)
        for style in ("diffusers", "comfyui") if job.machine.world.is_main else ():
            lora.save(updates, job.place / f"lora-{style}.safetensors", style)
    files = {
        "lora" if trained else "model": trained or parts.model.state_dict(),
        "optimizer": optim.optimizer_tensors(parts.model, parts.optimizer),
        "vae": job.codec.tensors(),
    }
    if parts.alignment:
        files["alignment"] = parts.alignment.tensors()
    config = json.loads((job.place / "run.json").read_text())
    if job.metrics:
        job.metrics.sync()  # a checkpoint must not be ahead of its metrics
    state = {"phase": span.phase.name, "cursor": done - span.start, "keep": done == span.end, "config": config}
    job.saver.save(done, files, state, wait=wait)


def merged(job: Job, phase: Phase, done: int) -> checkpoint.Checkpoint:
    """The mean of the last checkpoints of the phase before (PMA), kept in RUN/merged/<step>."""
    place = job.place / "merged" / f"{done:06d}"
    if job.machine.world.is_main and not place.exists():  # it is there whole or not at all
        chosen = choose(job.place, phase.merge_last, 1)
        merge(chosen, weights_of("sma", len(chosen)), place, {"method": "sma"})
    parallel.barrier(job.machine.world)
    return checkpoint.Checkpoint(done, json.loads((place / "state.json").read_text()), place)
