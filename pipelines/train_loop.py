"""The training loop: phases, checkpoints, metrics, and what stops it.

A phase starts from a checkpoint, the one that the phase before has left, so that going on in another phase, going on after a
kill and going on with another number of ranks are one thing.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import save
from tqdm import tqdm

from curation.shards import write_bytes
from k2model import checkpoint, lora, optim, parallel
from k2model.data import to_pixels
from k2model.loader import Loader
from k2model.order import Order
from k2model.parallel import World
from k2model.text import Encode
from k2model.vae import Pca, PcaCodec, fit_pca, load_pca
from pipelines.metrics import Metrics
from pipelines.run_folder import check_description
from pipelines.survival import Signals, Watchdog
from pipelines.train_recipes import Phase, TrainRecipe
from pipelines.train_samples import samples
from pipelines.train_step import Parts, Result, build, train_step


class Span(NamedTuple):
    """A phase with the order of its data and its place among the steps of the run."""

    phase: Phase
    order: Order
    start: int
    end: int


class Job(NamedTuple):
    """What stays the same over the phases of a run."""

    plan: TrainRecipe
    place: Path
    world: World
    encode: Encode
    codec: Any
    metrics: Metrics
    saver: checkpoint.Saver
    signals: Signals
    watchdog: Watchdog
    progress: tqdm
    max_rows: int | None
    threads: int


def run(
    plan: TrainRecipe,
    spans: list[Span],
    place: Path,
    world: World,
    base: str | None = None,
    base_digest: str | None = None,
    max_rows: int | None = None,
    threads: int = 4,
) -> int:
    """Train from the last whole checkpoint to the end.

    Returns:
        0 when done; 1 when a loss or gradient was not finite, or when a signal asked to stop and a checkpoint was written.
    """
    first = world.rank == 0
    description = describe(plan, spans, base_digest)
    check_description(place, description, write=False)
    last = checkpoint.latest(place / "checkpoints")
    done = started_at = last.step if last else 0
    total = spans[-1].end
    if done == total:
        if first:
            print(json.dumps({"out": str(place), "steps": total, "steps_now": 0}))
        return 0
    clock = time.perf_counter()
    encode = plan.text.load(world.device)  # weights may be missing: find out before anything is written
    codec = None if isinstance(plan.vae, Pca) else plan.vae.load(world.device)
    if first:
        check_description(place, description)
        if codec is None:
            fit_codec(plan, spans[0].order, place, base)
    parallel.barrier(world)
    codec = codec or load_pca(place / "vae.safetensors").to(world.device)
    with (
        Signals() as signals,
        Watchdog() as watchdog,
        Metrics(place, done, write=first) as metrics,
        tqdm(total=total, initial=done, unit="step", file=sys.stderr, disable=not first) as progress,
        checkpoint.Saver(place / "checkpoints", world, plan.keep_last, plan.keep_every) as saver,
    ):
        job = Job(plan, place, world, encode, codec, metrics, saver, signals, watchdog, progress, max_rows, threads)
        for span in spans:
            if done < span.end:
                parts = restore(job, span, base, done)
                done, stopped = run_phase(job, span, parts, done)
                saver.wait()
                if stopped:
                    return 1
        rows = metrics.rows
    if first:
        losses = {
            span.phase.name: round(float(np.mean([row["loss"] for row in rows[span.start : span.end][-10:]])), 4) for span in spans
        }
        seconds = round(time.perf_counter() - clock, 1)
        print(json.dumps({"out": str(place), "steps": total, "steps_now": total - started_at, "loss": losses, "seconds": seconds}))
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
    codec: PcaCodec
    if base:
        codec = load_pca(Path(base) / "vae.safetensors")
    else:
        groups = dict.fromkeys(order.group(j)[::2] for j in range(plan.vae.num_batches))  # a small set comes round again
        images = (order.sets[source].read(order.sets[source].groups[number]).images for source, number in groups)
        codec = fit_pca(map(to_pixels, images))
    write_bytes(save(codec.tensors()), path)


def restore(job: Job, span: Span, base: str | None, done: int) -> Parts:
    """The model and optimizer of a phase, with the weights and moments of the last checkpoint."""
    parts = build(job.plan, span.phase, job.encode, job.codec, job.world, base)
    if done:
        found = checkpoint.latest(job.place / "checkpoints")
        assert found and found.step == done, f"the last whole checkpoint of {job.place} is not that of step {done}"
        starts = done == span.start
        merged = span.phase.merge_last if starts else 0
        checkpoint.load(found, parts.model, parts.optimizer if span.phase.keep_optimizer or not starts else None, merged)
    return parts


def run_phase(job: Job, span: Span, parts: Parts, done: int) -> tuple[int, bool]:
    """Steps of one phase from step `done` on; returns the last step, and whether it was stopped before the end."""
    plan, world, phase = job.plan, job.world, span.phase
    first = done - span.start
    job.progress.set_description(f"train {phase.name} px")
    with Loader(span.order, world.rank, world.size, first, threads=job.threads, latents=plan.latents, max_rows=job.max_rows) as loader:
        waited, clock = 0.0, time.perf_counter()
        for batches, index in loader:
            lr = phase.lr * optim.warmup_stable_decay(index, phase.steps, phase.warmup, phase.decay)
            result = train_step(parts, plan, phase, batches, span.order.num_images(index), done, lr, job.signals.stop)
            if not result.finite:
                if world.rank == 0:
                    print(not_finite(span, result, done, index), file=sys.stderr)
                return done, True
            done += 1
            seconds, waited_now = time.perf_counter() - clock, loader.waited - waited
            job.metrics.add(row(span, result, done, index, lr, seconds, waited_now, world))
            job.progress.set_postfix_str(f"loss {result.loss:.3f}", refresh=False)
            job.progress.update()
            job.watchdog.beat()
            at_end = done == span.end
            if done % plan.sample_every == 0 or at_end:
                path = job.place / "samples" / f"{done:06d}.png"
                samples(parts, plan, phase, span.order.sets[0], path, f"step {done}, {phase.name} px")
                job.metrics.picture(path, done)
            if done % plan.checkpoint_every == 0 or at_end or result.stop:
                if plan.lora and done == total(job):  # before the last checkpoint, which says that all is done
                    for style in ("diffusers", "comfyui"):
                        lora.save(lora.updates(parts.model), job.place / f"lora-{style}.safetensors", style)
                save(job, parts, span, done)
            if at_end or result.stop:
                return done, result.stop and not at_end
            job.watchdog.beat()
            waited, clock = loader.waited, time.perf_counter()
    raise AssertionError("the loader never ends")


def not_finite(span: Span, result: Result, done: int, index: int) -> str:
    """What a person needs who has to find out why."""
    places = [
        f"{span.order.sets[group.source].directory}/{span.order.describe(group)['file']} row group {span.order.describe(group)['row_group']}"
        for group in span.order.batch(index)
    ]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    return (
        f"k2 train: loss {result.loss}, gradient norm {result.grad_norm} at step {done + 1} of phase {span.phase.name}, "
        f"cursor {index} ({shown}). The weights were not changed; the last checkpoint is whole. "
        f"Look at these images (k2 report RUN --step {done + 1}), or lower lr or clip."
    )
