"""Pictures and tables of `bench_study.py`, from its lines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import t as student

from curation import plots

FAMILIES = ("photographs", "styled", "art")
COLOURS = {
    **{"uncurated": plots.GREY, "quality": plots.ORANGE, "curated": plots.BLUE, "curated+quality": plots.PURPLE, "removed": plots.INK},
    **{"scratch": plots.ORANGE, "curriculum": plots.BLUE, "longer": plots.PURPLE},
}
FIGURES = {  # of a line -> what the tables call it
    **{f"loss.{name}": f"loss, {name}" for name in FAMILIES},
    **{f"kid_{name}": f"kernel distance to {name}" for name in FAMILIES},
    "frechet_photographs": "Frechet distance to photographs",
    "vendi": "Vendi score",
    "intra_prompt": "intra-prompt distance",
}
LEGEND = "dot: a seed\nbar: mean ± standard\ndeviation over seeds\nloss, distances: lower is\nnearer to real images"
SHEET = 6  # pictures in a row of a sheet


def sheet(pictures: np.ndarray, path: Path) -> None:
    """The first pictures of every prompt, uint8 (P, N, H, H, 3), a row for a prompt, as a PNG of few colours."""
    large = pictures.shape[2] > 128
    count = SHEET - 2 * large
    rows = [np.concatenate([np.pad(one, ((1, 1), (1, 1), (0, 0)), constant_values=255) for one in row[:count]], 1) for row in pictures]
    grid = Image.fromarray(np.concatenate(rows))
    if large:
        grid = grid.resize((grid.width // 2, grid.height // 2), Image.Resampling.BOX)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.quantize(64 if large else 256, dither=Image.Dither.NONE).save(path, optimize=True)


def value(line: dict, name: str) -> float:
    """A figure of a line; `loss.art` is line["loss"]["art"]."""
    for key in name.split("."):
        line = line[key]
    return line


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student); the half is infinite for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("inf")
    return float(values.mean()), float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def gathered(lines: Sequence[dict], experiment: str) -> dict[str, dict[int, dict]]:
    """arm -> seed -> line, arms in the order of COLOURS."""
    mine = [line for line in lines if line["experiment"] == experiment]
    return {arm: found for arm in COLOURS if (found := {line["seed"]: line for line in mine if line["arm"] == arm})}


def paired(arms: dict[str, dict[int, dict]], arm: str, base: str, name: str) -> list[float]:
    """Differences of a figure, arm less base, of the seeds that both have."""
    seeds = sorted(set(arms[arm]) & set(arms[base]))
    return [value(arms[arm][seed], name) - value(arms[base][seed], name) for seed in seeds]


def table(arms: dict[str, dict[int, dict]], base: str) -> str:
    """A Markdown table: of every arm mean and standard deviation over seeds; in bold where the paired difference to `base` has a 95 %
    interval without 0 (about 1 in 20 cells would be bold by chance alone)."""
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for name, words in FIGURES.items():
        cells = []
        for arm, runs in arms.items():
            values = [value(line, name) for line in runs.values()]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
            text = f"{np.mean(values):.4g}{spread}"
            mean, half = interval(paired(arms, arm, base, name)) if arm != base else (0.0, 0.0)
            cells.append(f"**{text}**" if arm != base and abs(mean) > half else text)
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def strata(lines: Sequence[dict]) -> str:
    """A Markdown table of the losses of parts of the held-out families: of every arm the mean difference to `uncurated` of the same seed,
    with its standard deviation over seeds, in thousandths; in bold as in `table`."""
    arms = gathered(lines, "strata")
    first = next(iter(arms["uncurated"].values()))["loss"]
    others = [arm for arm in arms if arm != "uncurated"]
    rows = ["| held-out images | number | " + " | ".join(others) + " |", "|---|---|" + "---|" * len(others)]
    for family, parts in first.items():
        for part, (_, number) in parts.items():
            cells = []
            for arm in others:
                seeds = sorted(set(arms[arm]) & set(arms["uncurated"]))
                pairs = [(arms[arm][seed]["loss"][family][part][0], arms["uncurated"][seed]["loss"][family][part][0]) for seed in seeds]
                values = [1000 * (mine - base) for mine, base in pairs]
                mean, half = interval(values)
                text = f"{mean:+.0f} ± {np.std(values, ddof=min(1, len(values) - 1)):.0f}"
                cells.append(f"**{text}**" if abs(mean) > half else text)
            rows.append(f"| {family}, {part} | {number} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tables(lines: Sequence[dict]) -> str:
    """All tables as Markdown, with the number of seeds."""
    texts = []
    for experiment, base in (("data", "uncurated"), ("curriculum", "scratch")):
        arms = gathered(lines, experiment)
        if base in arms:
            texts.append(f"{experiment}: {', '.join(f'{arm} {len(runs)} seeds' for arm, runs in arms.items())}\n\n{table(arms, base)}")
    if "uncurated" in gathered(lines, "strata"):
        texts.append("strata: loss less that of uncurated, in thousandths\n\n" + strata(lines))
    return "\n\n".join(texts)


def draw(lines: Sequence[dict], folder: Path) -> None:
    """study.png (every arm and figure with error bars), study_curves.png (held-out losses over training), study_curriculum.png."""
    if data := gathered(lines, "data"):
        panels(data, "uncurated", folder / "study.png")
        curves(data, folder / "study_curves.png")
    if curriculum := gathered(lines, "curriculum"):
        panels(curriculum, "scratch", folder / "study_curriculum.png")


def panels(arms: dict[str, dict[int, dict]], base: str, path: Path) -> None:
    """A panel for a figure: a dot for a seed, the mean, and its standard deviation."""
    figure = Figure(figsize=(10.5, 5.6), layout="constrained", facecolor="white")
    for axis, (name, words) in zip(figure.subplots(2, 5).ravel(), [*FIGURES.items(), (None, None)], strict=False):
        if name is None:
            axis.axis("off")
            axis.text(
                0,
                0.5,
                LEGEND,
                fontsize=8,
            )
            continue
        plots.style(axis)
        for i, (arm, runs) in enumerate(arms.items()):
            values = np.array([value(line, name) for line in runs.values()])
            axis.plot(i + np.linspace(-0.12, 0.12, len(values)), values, ".", color=COLOURS[arm], alpha=0.5, markersize=5)
            axis.errorbar(i, values.mean(), values.std(ddof=min(1, len(values) - 1)), fmt="_", color=COLOURS[arm], capsize=4, markersize=14)
        axis.set_title(words.replace("distance to", "distance\nto"), fontsize=9)
        axis.set_xticks(range(len(arms)), [*arms], fontsize=7, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_xlim(-0.6, len(arms) - 0.4)
        axis.tick_params(axis="y", labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def curves(arms: dict[str, dict[int, dict]], path: Path) -> None:
    """Held-out loss of each family over training, less that of the uncurated arm with the same seed: mean and standard deviation."""
    figure = Figure(figsize=(10, 3.2), layout="constrained", facecolor="white")
    for axis, family in zip(figure.subplots(1, len(FAMILIES), sharey=True), FAMILIES, strict=True):
        plots.style(axis)
        for arm, runs in arms.items():
            steps = [int(step) for step in next(iter(runs.values()))["curve"]]
            seeds = sorted(set(runs) & set(arms["uncurated"]))
            rows = np.array(
                [
                    [line["curve"][str(step)][family] - arms["uncurated"][seed]["curve"][str(step)][family] for step in steps]
                    for seed, line in ((seed, runs[seed]) for seed in seeds)
                ]
            )
            place = np.array(steps) + 4 * (list(arms).index(arm) - 2)
            spread = rows.std(0, ddof=min(1, len(rows) - 1))
            axis.errorbar(place, rows.mean(0), spread, color=COLOURS[arm], marker=".", capsize=3, linewidth=1, label=arm)
        axis.set_title(f"held-out {family}", fontsize=9)
        axis.set_xlabel("step", fontsize=9)
    figure.axes[0].set_ylabel("loss less uncurated's\n(same seed)", fontsize=9)
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
