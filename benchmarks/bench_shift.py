"""Which shift of the training times is best at which resolution? Every mu for equal steps, sampled at one constant shift.

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python benchmarks/bench_shift.py --run RUN --images DIR       # the small sweep of docs/study.md
    PYTHONPATH=$PWD python benchmarks/bench_shift.py --run RUN --recipe my.py:sweep --device cuda   # packed sets of one's own

Every phase of the recipe is trained alone, from new weights, with each mu in the place of its own, by `k2 train`. What is not swept stays:
data, order, noise, steps, learning rate, and the shift at which samples are drawn, `flow.resolution_mu` of the resolution. A finished run
is a line of shift.jsonl at once and is not done again, so a sweep may be stopped and started, and `--report` draws what there is. With
`--images` (a folder with a MANIFEST.tsv) the data are made from it, and lines and picture go to benchmarks/results and docs/images; else
to RUN. docs/study.md says what the small sweep shows and what it cannot.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from bench_study import COMPONENTS, LR, ROOT, SMALL, TEXT, TEXT_TOKENS, done, embedded, record, shared_codec
from matplotlib.figure import Figure
from study_heap import SIDE, pools
from study_plots import interval

from curation import diversity, plots
from curation.faults import encode
from curation.shards import write_bytes
from k2model import flow
from k2model.data import Packed, to_images, to_pixels
from k2model.layouts import load_model
from k2model.vae import FACTOR, Pca, load_pca
from k2model.validation import fixed_times
from pipelines import recipes
from pipelines.annotate import annotate
from pipelines.filter import filter
from pipelines.metrics import read_rows
from pipelines.pack import pack
from pipelines.train import train
from pipelines.train_recipes import TRAIN, Phase, TrainRecipe

MUS = (-1.5, -0.5, 0.5, 1.5)  # 0.5 is about `flow.resolution_mu` at up to 256 tokens
STEPS, BATCH = {64: 320, 128: 200}, {64: 16, 128: 8}  # of the small sweep, by resolution
NUM_CAPTIONS, NUM_EACH = 24, 4  # samples: noises for each caption
NUM_EULER = 12
ROWS = 16  # samples that are made at once
REFERENCE = 2048  # most images that samples are held against
POLICY = """-- resolution: {side}
SELECT basics.uid, basics.error IS NULL AS decoded, least(width, height) >= {least} AS large_enough FROM basics
"""
RECIPE = """from dataclasses import replace

from pipelines import recipes
from pipelines.train_recipes import TRAIN

whole = recipes.find({recipe!r}, TRAIN)
phase = replace(whole.phases[{number}], mu={mu}, merge_last=0)
plan = replace(whole, name={name!r}, seed={seed}, phases=(phase,), validate_every=10**9, sample_every=10**9, sample_steps=4)
"""
FIGURES = {  # of a line
    "loss": "validation loss",
    "kid": "kernel distance",
    "frechet": "Frechet distance",
    "vendi": "Vendi score",
    "intra": "intra-prompt",
}
VARIETY = ("Vendi score", "intra-prompt")  # has no best value: noise is varied too


# --- data and recipe of the small sweep ---


def small() -> TrainRecipe:
    """The study's model at 16 and 64 image tokens; the steps are what a core bears in half an hour with four mus and three seeds."""
    phases = tuple(
        Phase(str(side), f"shift_{side}", side, steps, LR, 20, 2 * steps // 5, 0.5, num_samples=1) for side, steps in STEPS.items()
    )
    text = {"text": TEXT, "text_tokens": TEXT_TOKENS}
    return TrainRecipe("shift-small", SMALL, vae=Pca(), phases=phases, hold_out=5, checkpoint_every=10**9, keep_last=1, **text)


def prepare(images: str, run: Path) -> None:
    """Packed sets of the same images, the real pictures of the study of SIDE pixels, at every resolution of `small`."""
    if not (run / "source").exists():
        real, *_ = pools(images)
        for number, one in enumerate(one for one in real if len(one.pixels) == SIDE):
            write_bytes(encode(one.pixels, 95), run / "source" / f"{number:04d}.jpg")
            write_bytes(one.caption.encode(), run / "source" / f"{number:04d}.txt")
    failed = annotate(str(run / "source"), str(run), "basics", ray="off")
    for side in STEPS:
        policy = run / "policies" / f"shift_{side}.sql"
        write_bytes(POLICY.format(side=side, least=SIDE).encode(), policy)
        failed = failed or filter(str(run), str(policy)) or pack(str(run), policy.stem, BATCH[side], ray="off", remainder="drop")
    if failed:
        raise SystemExit("a verb failed; see above, then start again")


# --- a run and its judge ---


def trained(run: Path, recipe: str, plan: TrainRecipe, number: int, mu: float, seed: int, device: str) -> Path:
    """`k2 train` of one phase with this mu and seed, to its end; the folder of the run."""
    name = f"{plan.name}-{plan.phases[number].name}-mu{mu:g}-{seed}"
    file, place = run / "recipes" / f"{name}.py", run / "train" / name
    write_bytes(RECIPE.format(recipe=recipe, number=number, mu=mu, name=name, seed=seed).encode(), file)
    if isinstance(plan.vae, Pca):  # one for all runs, or their losses could not be compared
        sets = [found for phase in plan.phases for found, _ in phase.mixture]
        write_bytes(shared_codec(run, sets, plan.name).read_bytes(), place / "vae.safetensors")
    if train(str(run), f"{file}:plan", str(place), device=device, threads=1 if device == "cpu" else None):
        raise SystemExit(f"{name} did not train; see above")
    return place


class Judge:
    """What a phase's samples are held against: its packed images, through the codec of the models."""

    def __init__(self, run: Path, plan: TrainRecipe, phase: Phase, device: str):
        self.plan, self.side, self.device = plan, phase.resolution, device
        self.encode = plan.text.load(device)
        if isinstance(plan.vae, Pca):
            self.codec = load_pca(run / "codecs" / f"{plan.name}.safetensors").to(device)
        else:
            self.codec = plan.vae.load(device)
        pictures, captions = [], []
        for packed in (Packed(f"{run}/packed/{name}") for name, _ in phase.mixture):
            for group in packed.groups[: REFERENCE // packed.description["batch_size"]]:
                batch = packed.read(group)
                captions += batch.captions
                pictures += [*to_images(self.codec.decode(self.codec.encode(to_pixels(batch.images.to(device)))))]
        self.vectors = embedded(pictures)
        self.mean = self.vectors.mean(0)
        self.basis = np.linalg.svd(self.vectors - self.mean, full_matrices=False)[2][:COMPONENTS]
        chosen = np.linspace(0, len(captions) - 1, NUM_CAPTIONS).round().astype(int)
        self.captions = sorted(captions[i] for i in chosen for _ in range(NUM_EACH))
        tokens = (self.side // FACTOR // plan.model.patch) ** 2
        self.mu = flow.resolution_mu(tokens)  # of the sampler: the same for every model of this resolution

    @torch.no_grad()
    def sampled(self, place: Path) -> np.ndarray:
        """uint8 (N, side, side, 3) of the run's last checkpoint, without guidance; the same captions and noise for every model."""
        model = load_model(sorted((place / "checkpoints").glob("[0-9]*"))[-1], self.device).eval()
        shape, pictures = (self.plan.model.channels, self.side // FACTOR, self.side // FACTOR), []
        for part in torch.arange(len(self.captions)).split(ROWS):
            noise = flow.SeededNoise([flow.number("shift", i) for i in part.tolist()], shape, self.device)()
            text, mask = self.encode([self.captions[i] for i in part])
            latents = flow.sample(lambda x, t, text=text, mask=mask: model(x, t, text, mask), None, noise, NUM_EULER, self.mu)
            pictures.append(to_images(self.codec.decode(latents)))
        return np.concatenate(pictures)

    def figures(self, place: Path) -> dict[str, float]:
        """Of samples: kernel and Frechet distance to the packed images, Vendi score, distance among samples of one caption."""
        vectors = embedded(self.sampled(place))
        flat, real = ((x - self.mean) @ self.basis.T for x in (vectors, self.vectors))
        centred, captions = vectors - self.mean, np.array(self.captions)
        alike = [diversity.mean_cosine_distance(centred[captions == caption]) for caption in dict.fromkeys(self.captions)]
        found = {
            "kid": diversity.kernel_distance(vectors, self.vectors),
            "frechet": diversity.frechet_distance(flat, real),
            "vendi": diversity.vendi_score(centred),
            "intra": float(np.mean(alike)),
        }
        return {name: round(value, 5) for name, value in found.items()}


def sweep(run: Path, recipe: str, mus: Sequence[float], seeds: int, device: str, results: Path) -> None:
    """Every run that is not yet in the results: all of a seed before the next one, so that a part of a sweep has every mu."""
    plan: TrainRecipe = recipes.find(recipe, TRAIN)
    if not plan.hold_out:
        raise ValueError(f"recipe {plan.name} holds nothing out, so there is no validation loss to compare. Set hold_out")
    judges: dict[int, Judge] = {}
    for seed in range(seeds):
        for number, phase in enumerate(plan.phases):
            for mu in mus:
                key = {"recipe": plan.name, "phase": phase.name, "steps": phase.steps, "mu": mu, "seed": seed}
                if any(key.items() <= line.items() for line in done(results)):
                    continue
                clock = time.process_time()
                place = trained(run, recipe, plan, number, mu, seed, device)
                spent = time.process_time() - clock
                judge = judges[number] = judges.get(number) or Judge(run, plan, phase, device)
                validation = read_rows(place / "metrics.jsonl")[-1]["validation"]
                by_t = [round(value, 5) for value in validation["by_t"]]
                line = key | {"resolution": phase.resolution, "inference_mu": round(judge.mu, 4)}
                line |= {"loss": round(validation["loss"], 5), "by_t": by_t, **judge.figures(place)}
                record(line | {"train_cpu_seconds": round(spent, 1), "cpu_seconds": round(time.process_time() - clock, 1)}, results)


# --- what the lines say ---


class Cells:
    """The lines of one phase: `values[figure]` is (seeds, mus), of the seeds that have every mu."""

    def __init__(self, lines: Sequence[dict]):
        self.first = lines[0]
        self.mus = sorted({line["mu"] for line in lines})
        found = {(line["seed"], line["mu"]): line for line in lines}
        self.seeds = [seed for seed in sorted({line["seed"] for line in lines}) if all((seed, mu) in found for mu in self.mus)]
        rows = [[found[seed, mu] for mu in self.mus] for seed in self.seeds]
        self.values = {name: np.array([[line[name] for line in row] for row in rows]) for name in FIGURES}
        self.by_t = np.array([[line["by_t"] for line in row] for row in rows])  # (seeds, mus, times)
        self.base = int(np.argmin(np.abs(np.array(self.mus) - self.first["inference_mu"])))  # the mu that a recipe has unswept


def optimum(mus: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through the lowest value and its two neighbours is lowest; the end of the grid where that is the lowest."""
    best = int(np.argmin(values))
    if best in (0, len(mus) - 1):
        return float(mus[best])
    near = slice(best - 1, best + 2)
    a, b, _ = np.polyfit(mus[near], values[near], 2)
    return float(-b / (2 * a)) if a > 0 else float(mus[best])


def best_mus(cells: Cells, name: str) -> list[float]:
    """The `optimum` of every seed."""
    return [optimum(cells.mus, row) for row in cells.values[name]]


def table(cells: Cells) -> str:
    """Markdown: of every mu mean and standard error over seeds; in bold where the 95 % interval (Student) of the difference to the unswept
    mu, paired by seed, leaves out 0; and the best mu of the mean, and of single seeds."""
    heads = [f"mu {mu:g}" for mu in cells.mus]
    rows = ["| | " + " | ".join(heads) + " | best: of the mean; of seeds |", "|---|" + "---|" * (len(heads) + 1)]
    times = {f"loss at t = {t:.2f}": cells.by_t[:, :, i] for i, t in enumerate(fixed_times(cells.by_t.shape[2]))}
    for words, values in ({FIGURES[name]: values for name, values in cells.values.items()} | times).items():
        texts = []
        for i in range(len(cells.mus)):
            error = f" ± {values[:, i].std(ddof=1) / np.sqrt(len(values)):.2g}" if len(values) > 1 else ""
            mean, half = interval(values[:, i] - values[:, cells.base])
            text = f"{values[:, i].mean():.4g}{error}"
            texts.append(f"**{text}**" if i != cells.base and abs(mean) > half else text)
        best = f"{optimum(cells.mus, values.mean(0)):.2f}; {', '.join(f'{optimum(cells.mus, row):.2f}' for row in values)}"
        rows.append(f"| {words} | " + " | ".join(texts) + f" | {'' if words in VARIETY else best} |")
    return "\n".join(rows)


def tables(phases: Sequence[Cells]) -> str:
    """Every phase, then how far the best mu moves from the first resolution to the last: by the log of the root of the ratio of tokens, if
    the rule of SD3 (arXiv:2403.03206, eq. 23) held for the optimum."""
    texts = [f"{cells.first['resolution']} px, {cells.first['steps']} steps, seeds {cells.seeds}\n\n{table(cells)}" for cells in phases]
    low, high = phases[0], phases[-1]
    if low is not high:
        expected = math.log(high.first["resolution"] / low.first["resolution"])
        for name in ("loss", "kid", "frechet"):
            pairs = zip(best_mus(low, name), best_mus(high, name), strict=False)
            mean, half = interval([there - here for here, there in pairs])
            texts.append(f"{FIGURES[name]}: the best mu moves by {mean:+.2f} ± {half:.2f} (95 %); by SD3's rule {expected:+.2f}")
    return "\n\n".join(texts)


def draw(phases: Sequence[Cells], path: Path) -> None:
    """A row for a resolution: validation loss, kernel distance and Vendi score over mu; validation loss by t less the unswept one's."""
    figure = Figure(figsize=(11.5, 2.9 * len(phases)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(phases), 4, squeeze=False)
    for row, cells in zip(grid, phases, strict=True):
        for axis, name in zip(row, ("loss", "kid", "vendi"), strict=False):
            plots.style(axis)
            values = cells.values[name]
            for line in values:
                axis.plot(cells.mus, line, ".-", color=plots.SKY, linewidth=0.7, markersize=5)
            error = values.std(0, ddof=min(1, len(values) - 1)) / np.sqrt(len(values))
            axis.errorbar(cells.mus, values.mean(0), error, color=plots.BLUE, marker="_", capsize=4, linewidth=1.6)
            axis.axvline(cells.first["inference_mu"], color=plots.ORANGE, linewidth=1, linestyle=":")
            axis.set_title(FIGURES[name], fontsize=10)
        row[0].set_ylabel(f"{cells.first['resolution']} px", fontsize=10)
        plots.style(row[3])
        times, change = fixed_times(cells.by_t.shape[2]), (cells.by_t - cells.by_t[:, [cells.base]]).mean(0)
        for mu, colour, line in zip(cells.mus, (*plots.SERIES, plots.INK, plots.BROWN, plots.GREY), change, strict=False):
            row[3].plot(times, line, ".-", color=colour, linewidth=1.2, label=f"mu {mu:g}")
        row[3].set_title(f"loss by t, less that of mu {cells.mus[cells.base]:g}", fontsize=10)
        row[3].legend(fontsize=7, frameon=False)
    for axis, words in zip(grid[-1], ["mu of training (dotted: of sampling)"] * 3 + ["t (0 clean, 1 noise)"], strict=True):
        axis.set_xlabel(words, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    run: str, images: str = "", recipe: str = "", mus: tuple[float, ...] = MUS, seeds: int = 3, device: str = "cpu", report: bool = False
) -> None:
    """Train and judge what is not yet in the results, draw, and print the tables.

    Args:
        run: A run folder: with the packed sets of the recipe, or for those that are made of `images`.
        images: A folder with a MANIFEST.tsv: the small sweep of the study.
        recipe: Of your own, as my.py:name. Every phase of it is swept.
        mus: Shifts of the training times.
        seeds: Of weights, order, noise and held-out rows.
        device: cpu or cuda.
        report: Only draw and print.
    """
    if bool(images) == bool(recipe):
        raise ValueError("give --images for the small sweep, or --recipe for one of your own")
    place, pictures = (ROOT / "benchmarks" / "results", ROOT / "docs" / "images") if images else (Path(run), Path(run))
    if images:
        recipe = f"{Path(__file__).resolve()}:small"
    if not report:
        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        if images:
            prepare(images, Path(run))
        sweep(Path(run), recipe, mus, seeds, device, place / "shift.jsonl")
    plan: TrainRecipe = recipes.find(recipe, TRAIN)
    lines = [line for line in done(place / "shift.jsonl") if line["recipe"] == plan.name]
    phases = [[line for line in lines if (line["phase"], line["steps"]) == (phase.name, phase.steps)] for phase in plan.phases]
    cells = [found for found in (Cells(own) for own in phases if own) if found.seeds]
    if not cells:
        raise SystemExit(f"no seed in {place / 'shift.jsonl'} has every mu yet")
    draw(cells, pictures / "shift.png")
    print(tables(cells))


if __name__ == "__main__":
    tyro.cli(main)
