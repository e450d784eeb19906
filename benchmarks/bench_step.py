"""The training step of K2-1B on a GPU at 256, 512 and 1024 px: images/s, MFU, memory against the plan, float8, kernels, and diffusers.

    PYTHONPATH=. python3 benchmarks/bench_step.py

One command, ten minutes at most (`--budget` seconds, the most important cases first). It needs torch >= 2.11, numpy, scipy, pyarrow,
pillow, fsspec, tqdm, safetensors, transformers >= 5, tokenizers, matplotlib, scikit-image; and, where they are not there, wheels of
simplejpeg, tyro, docstring_parser, typeguard, diffusers, pillow_heif, pillow_jxl_plugin, and torchao for float8 (0.17 with torch 2.11;
without it those rows are errors).

A step is that of `k2 train`: the recipe `k2-1b` (precision, recomputation, compile and micro-batch of each phase), JPEGs of a set that
`k2 pack` made read by the Loader, text encoder (Qwen3-VL-4B) and autoencoder (Qwen-Image) of the true sizes with random weights.
Two things are not: a global batch has `--groups` row groups and not 8, and all pictures are square, so that a case is compiled once.
Peers are the step of bench_train.py: diffusers' class under autocast, text of 512 tokens (`released`) or cut after the longest caption
(`trimmed`), its micro-batch halved until it fits.

A case is warmed up, then timed step by step; the median counts. `mfu` is k2model.flops of valid tokens over the time of the whole step,
frozen parts included, and the GPU's bf16 peak; `mfu_model` over the time of the model's forward and backward alone. `parts` are shares
of the step on the GPU's timeline, `data_wait` the share that the loop waited for the Loader. `memory_gib` is beyond the frozen parts,
`plan_gib` what `k2 train --dry-run` says. A case that fails is a row with `error`. Every row is written to
benchmarks/results/step.jsonl when its case is done, by a process that is replaced if it dies.
`--device cpu` runs the same code on a tiny model.
"""

import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from bench_dit import theirs
from bench_train import Plain
from step_parts import SCALES, Clock, language_model, packed_sets, quick_weights, recipe, video_vae, words
from step_table import draw, table
from torch import nn

from k2model import parallel
from k2model.attention import by_segment, flexible, variable_length
from k2model.flops import peak_flops, train_flops
from k2model.loader import Loaded, Loader
from pipelines.run_folder import commit, versions
from pipelines.train import curriculum, memory_gib
from pipelines.train_loop import Machine, Span, run
from pipelines.train_recipes import TrainRecipe
from pipelines.train_step import build, train_step

KERNELS = {"by_segment": by_segment, "variable_length": variable_length, "flexible": flexible}
RESULTS = Path(__file__).parent / "results"
DEAD = 3  # exit code of a worker whose GPU answers no more


@dataclass(frozen=True)
class Case:
    """A way to make a step; what is empty is as the recipe has it."""

    side: int
    who: str = "ours"  # ours; released and trimmed: diffusers; loop: `k2 train` itself
    precision: str = ""
    kernel: str = ""
    checkpointing: str = ""
    compiled: bool = True
    rows: int | None = None  # most images that go through the model at once
    profile: bool = False


def cases(sides: Sequence[int]) -> list[Case]:
    """In the order of what one would not want to miss."""
    low, middle, high = sides
    return [
        *(Case(side, profile=True) for side in sides),
        Case(low, "trimmed", compiled=False),
        Case(low, precision="float8_tensorwise"),
        Case(low, precision="float8_rowwise"),
        Case(low, compiled=False),
        Case(high, "trimmed", compiled=False),
        Case(middle, "trimmed", compiled=False),
        Case(low, "loop"),
        Case(middle, precision="float8_rowwise"),
        Case(low, kernel="by_segment", compiled=False),
        Case(low, kernel="flexible"),
        Case(low, "trimmed"),
        Case(low, "released", compiled=False),
        Case(low, checkpointing="none"),
        Case(high, checkpointing="full"),
        Case(high, kernel="by_segment", compiled=False),
        Case(high, kernel="flexible"),
        Case(high, precision="float8_rowwise"),
    ]


class Narrowed(nn.Module):
    """diffusers' class behind the linear that narrows the text, which it has not."""

    def __init__(self, model: nn.Module, wide: int, narrow: int):
        super().__init__()
        self.model, self.narrow = model, nn.Linear(wide, narrow, bias=False)

    def forward(self, tokens: torch.Tensor, text: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return self.model(tokens, self.narrow(text), *rest, **options)


class Bench:
    """What the cases of a process share."""

    def __init__(self, data: Path, scale: str, device: str, groups: int, warmup: int, steps: int, threads: int):
        self.data, self.scale, self.groups = data, scale, groups
        self.warmup, self.steps, self.threads = warmup, steps, threads
        self.world = parallel.start(device)
        self.device = self.world.device
        self.frozen: tuple[Any, Any] | None = None  # ours: encoder and codec, kept from case to case

    def measure(self, case: Case) -> Iterator[dict[str, Any]]:
        """The row of a case; before it, rows that say how many images did not fit at once."""
        while True:
            row = asdict(case) | {"device": self.name(), "torch": torch.__version__, "groups": self.groups}
            try:
                yield row | self.cleaned({"ours": self.ours, "loop": self.loop}.get(case.who, self.plain))(case)
                return
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
                full = isinstance(error, torch.OutOfMemoryError)
            yield row
            rows = (case.rows or SCALES[self.scale].batches[case.side]) // 2
            if not full or not rows:
                return
            case = replace(case, rows=rows)

    def cleaned(self, call: Callable[[Case], dict[str, Any]]) -> Callable[[Case], dict[str, Any]]:
        """The function, on a GPU that holds nothing of the case before."""
        gc.collect()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return call

    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor() or platform.machine()

    def span(self, case: Case) -> tuple[TrainRecipe, Span]:
        """The recipe as the case wants it, and its phase with the order of the data."""
        plan = recipe(self.scale, self.groups)
        phase = next(phase for phase in plan.phases if phase.resolution == case.side)
        changed = {name: getattr(case, name) for name in ("precision", "checkpointing") if getattr(case, name)}
        plan = replace(plan, compiled=case.compiled, phases=(replace(phase, **changed),))
        return plan, curriculum(plan, str(self.data / str(case.side)))[0]

    def ours(self, case: Case) -> dict[str, Any]:
        """The step of `k2 train`."""
        plan, span = self.span(case)
        phase, order = span.phase, span.order
        if self.frozen is None:
            self.frozen = plan.text.load(self.device), plan.vae.load(self.device)
        held, clock = self.held(), Clock(self.device)
        with quick_weights():
            parts = build(plan, phase, order, *self.frozen, self.world, None, aligned=False)
        parts = clock.watch(parts._replace(kernel=KERNELS[case.kernel]) if case.kernel else parts)
        results = []

        def step(batches: list[Loaded], index: int) -> float:
            results.append(train_step(parts, plan, phase, batches, order.num_images(index), index, phase.lr))
            if not results[-1].finite:
                raise RuntimeError(f"loss {results[-1].loss}, gradient norms {results[-1].grad_norms}: not finite, so no step was made")
            return results[-1].loss

        found = self.timed(step, span, case, clock)
        flops, model = statistics.mean(result.flops for result in results), found["spent"].get("forward", 0) + found["spent"]["backward"]
        counters = torch._dynamo.utils.counters
        found |= {
            "precision": phase.precision,
            "checkpointing": phase.checkpointing,
            "kernel": parts.kernel.__name__,
            "memory_gib": found["memory_gib"] - held,
            "frozen_gib": held,
            "plan_gib": memory_gib(plan, phase, order, parallel.divide(1), case.rows)["peak"],
            "mfu": self.mfu(flops / found["seconds"]),
            "mfu_model": self.mfu(flops / model),
            "parts": {name: seconds / found["seconds"] for name, seconds in found.pop("spent").items()},
            "graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": {reason[:200]: count for reason, count in counters["graph_break"].items()},
        }
        return found

    def plain(self, case: Case) -> dict[str, Any]:
        """The step of PyTorch, transformers and diffusers."""
        self.frozen = None  # theirs is another
        gc.collect()
        plan, span = self.span(case)
        scale, dtype = SCALES[self.scale], "bfloat16"
        encoder, vae = language_model(scale, dtype, self.device, "sdpa"), video_vae(scale, dtype, self.device)
        held = self.held()
        with torch.device(self.device):
            model = Narrowed(theirs(plan.model), plan.model.text_dim, plan.model.fusion_dim)
        whole = Plain(words(), encoder, vae, model, case.who == "trimmed", case.compiled, scale.taps, "bf16")
        found = self.timed(
            lambda batches, index: whole.step(plan, span.phase, batches, index, span.phase.lr), span, case, Clock(self.device)
        )
        found["memory_gib"] -= held
        text, image = plan.text_tokens, (case.side // 16) ** 2
        flops = train_flops(plan.model, text, image) * found["images_per_s"]  # of a usual caption: what is valid, not what it computes
        del found["spent"]
        return found | {"frozen_gib": held, "mfu": self.mfu(flops), "precision": "bf16", "checkpointing": "none"}

    def loop(self, case: Case) -> dict[str, Any]:
        """`k2 train` with its metrics, and a checkpoint and a sample at the end."""
        self.frozen = None
        gc.collect()
        plan, span = self.span(case)
        steps = self.warmup + self.steps
        phase = replace(span.phase, steps=steps, num_samples=1)
        plan = replace(plan, phases=(phase,), sample_steps=2, sample_every=10**6, checkpoint_every=10**6)
        with tempfile.TemporaryDirectory() as place, quick_weights():
            clock = time.perf_counter()
            code = run(plan, [span._replace(phase=phase, end=steps)], Path(place), Machine(self.world, threads=self.threads))
            seconds = time.perf_counter() - clock
            rows = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
        if code:
            raise RuntimeError(f"k2 train ended with {code}")
        late = rows[self.warmup :]
        found = {name: statistics.median(row[name] for row in late) for name in ("images_per_s", "data_wait") if late[0][name] is not None}
        trained = sum(row["images"] / row["images_per_s"] for row in rows)
        return found | {"mfu": late[-1]["mfu"], "seconds_beside_steps": seconds - trained, "losses": [row["loss"] for row in rows]}

    def timed(self, step: Callable[[list[Loaded], int], float], span: Span, case: Case, clock: Clock) -> dict[str, Any]:
        """Warm up, then time: medians of steps, the peak of memory, and with `profile` what one more step asks of the GPU."""
        seconds, waits, spent, losses, warm = [], [], [], [], 0.0
        began = time.perf_counter()
        with Loader(span.order, threads=self.threads, max_rows=case.rows) as loader:
            waited, start = 0.0, time.perf_counter()
            for number, (batches, index) in enumerate(itertools.islice(loader, self.warmup + self.steps)):
                losses.append(step(batches, index))
                self.wait()
                if number >= self.warmup:
                    seconds.append(time.perf_counter() - start)
                    waits.append(loader.waited - waited)
                    spent.append(clock.read())
                else:
                    clock.read()
                    warm = time.perf_counter() - began
                    if self.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(self.device)
                waited, start = loader.waited, time.perf_counter()
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
            busiest = self.profiled(lambda: step(*next(loader))) if case.profile else {}
        median, images = statistics.median(seconds), span.order.num_images(0)
        return busiest | {
            "images": images,
            "seconds": median,
            "seconds_of_steps": seconds,
            "warmup_s": warm,
            "images_per_s": images / median,
            "data_wait": statistics.median(wait / second for wait, second in zip(waits, seconds, strict=True)),
            "memory_gib": peak,
            "losses": losses,
            "spent": {name: statistics.median(one[name] for one in spent) for name in spent[0]},
        }

    def profiled(self, call: Callable[[], Any]) -> dict[str, Any]:
        """The kernels (on a CPU the operators) of a step that take most, in milliseconds, and all of them over the step's time."""
        kinds = [torch.profiler.ProfilerActivity.CUDA if self.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU]
        start = time.perf_counter()
        with torch.profiler.profile(activities=kinds) as profile:
            call()
            self.wait()
            whole = time.perf_counter() - start
        name = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        found = sorted(((getattr(one, name) / 1e3, one.count, one.key[:120]) for one in profile.key_averages()), reverse=True)
        return {"busy": sum(one[0] for one in found) / 1e3 / whole, "kernels": found[:20]}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def held(self) -> float:
        """GiB that are taken."""
        return torch.cuda.memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0

    def mfu(self, rate: float) -> float | None:
        peak = peak_flops(self.device)
        return None if peak is None else rate / peak


def work(bench: Bench, chosen: list[Case], first: int, deadline: float, out: Path, label: str) -> int:
    """The cases from `first` on; a line of `out` for each."""
    same = {"run": label, "commit": commit(), "versions": versions()}
    for number, case in list(enumerate(chosen))[first:]:
        if time.time() > deadline:
            return 0
        print(f"case {number + 1} of {len(chosen)}: {case}", file=sys.stderr, flush=True)
        for row in bench.measure(case):
            with out.open("a") as file:
                file.write(json.dumps({"number": number} | row | same) + "\n")
            if "CUDA error" in row.get("error", ""):
                return DEAD
    return 0


def rows_of(out: Path, label: str) -> list[dict[str, Any]]:
    """What a run has written."""
    return [row for row in map(json.loads, out.read_text().splitlines()) if row["run"] == label] if out.exists() else []


def supervise(command: list[str], chosen: list[Case], deadline: float, out: Path, label: str) -> None:
    """Workers one after the other, until all cases have a row or the time is up."""
    first = 0
    while first < len(chosen) and time.time() < deadline:
        worker = subprocess.Popen([*command, "--first", str(first)])
        try:
            code = worker.wait(deadline - time.time() + 5)
        except subprocess.TimeoutExpired:
            worker.kill()
            code = worker.wait()
        done = {row["number"] for row in rows_of(out, label)}
        first = max(done, default=first - 1) + 1
        if code == 0:
            return
        if code != DEAD and first < len(chosen):
            said = "the budget was spent" if time.time() > deadline else f"the process ended with {code}"
            with out.open("a") as file:
                file.write(json.dumps({"number": first} | asdict(chosen[first]) | {"error": said, "run": label}) + "\n")
            first += 1


def main(
    device: str = "cuda",
    budget: float = 540,
    groups: int = 2,
    warmup: int = 3,
    steps: int = 5,
    threads: int = 8,
    only: str = "",
    out: Path = RESULTS / "step.jsonl",
    data: Path | None = None,
    first: int | None = None,
    deadline: float = 0,
    label: str = "",
) -> int:
    """Measure and record.

    Args:
        device: cuda, or cpu for a tiny model.
        budget: Seconds after which no case is begun and the one at hand is stopped.
        groups: Row groups in a global batch (the recipe: 8).
        warmup: Steps before the timed ones; the first compile.
        steps: Timed steps.
        threads: That decode.
        only: Numbers of cases from 1, as 1,5,6: those that an earlier run did not reach.
        out: JSON lines are appended to it; a plot of the same name goes beside it.
        data: For the worker: packed sets.
        first: For the worker: the case to begin with.
        deadline: For the worker.
        label: For the worker: of this run.
    """
    scale = "k2-1b" if device == "cuda" else "tiny"
    chosen = cases(list(SCALES[scale].batches))
    chosen = [chosen[int(number) - 1] for number in only.split(",")] if only else chosen
    if first is not None and data:
        return work(Bench(data, scale, device, groups, warmup, steps, threads), chosen, first, deadline, out, label)
    deadline, label = time.time() + budget, uuid.uuid4().hex[:8]
    flags = {"device": device, "groups": groups, "warmup": warmup, "steps": steps, "threads": threads, "out": out}
    flags |= {"deadline": deadline, "label": label} | ({"only": only} if only else {})
    with tempfile.TemporaryDirectory() as place:
        packed_sets(Path(place), scale)
        command = [sys.executable, __file__, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]
        supervise([*command, "--data", place], chosen, deadline, out, label)
    rows = rows_of(out, label)
    print(table(rows))
    if missing := [str(number + 1) for number in range(len(chosen)) if number not in {row["number"] for row in rows}]:
        print(f"not reached: cases {','.join(missing)}; run again with --only {','.join(missing)}")
    if any("error" not in row for row in rows):
        draw(rows, out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
