"""Figures of detector scores: recall against loss, reliability, generators, drift, and the heat map of one image."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from curation.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SERIES, SKY, axes, number, style


def recall_curves(curves: dict[str, list[float]]) -> Figure:
    """Mean recall over unseen generators against the loss of unseen real images, on a logarithmic axis: one line per entry but "loss"."""
    figure, axis = axes(6.4, 4.0)
    losses = np.array(curves["loss"])
    axis.plot(losses, losses, color=GREY, linewidth=1, linestyle=":")
    axis.annotate("chance", (losses[-1], losses[-1]), xytext=(4, 0), textcoords="offset points", color=GREY, fontsize=9, va="center")
    ends = []
    for (name, recall), colour in zip(((n, r) for n, r in curves.items() if n != "loss" and r), SERIES, strict=False):
        axis.plot(losses, recall, color=colour, linewidth=2.5 if name == "detector" else 1.5)
        ends.append([recall[-1], name, colour])
    for height, name, colour in _spread(ends, 0.055):
        axis.text(losses[-1] * 1.06, height, name, color=colour, fontsize=9, va="center")
    for loss in (0.01, 0.05):
        axis.axvline(loss, color=PALE, linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.set_xticks([0.002, 0.01, 0.05, 0.2, 0.5], ["0.2 %", "1 %", "5 %", "20 %", "50 %"])
    axis.set_xlim(losses[0], losses[-1] * 2.2)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("loss of real images", color=INK)
    axis.set_ylabel("recall of generated images", color=INK)
    return figure


def reliability(bins: dict[str, dict[str, Any]]) -> Figure:
    """What probabilities said against what was: one series per view, a point's area is its number of images."""
    figure, axis = axes(4.4, 4.2)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    for (name, found), colour in zip(bins.items(), SERIES, strict=False):
        said, was, num = (np.array([one[key] for one in found["bins"]]) for key in ("said", "was", "num"))
        axis.plot(said, was, color=colour, linewidth=1.5)
        axis.scatter(said, was, 12 + 180 * num / num.sum(), color=colour, alpha=0.6, linewidths=0, label=f"{name}: ECE {found['ece']:.3f}")
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("said (prior one half)", color=INK)
    axis.set_ylabel("was", color=INK)
    return figure


def generator_bars(entries: Sequence[dict[str, Any]]) -> Figure:
    """AUROC and recall at 5 % loss of each generator, lowest first, with the 95 % interval of the recall; 0.75 is marked."""
    ordered = sorted(entries, key=lambda entry: entry["auroc"])
    figure = Figure(figsize=(8.6, 1.0 + 0.3 * len(ordered)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(ordered))
    for axis, key, start, colour in ((left, "auroc", 0.5, BLUE), (right, "recall at 5%", 0.0, GREEN)):
        style(axis)
        values = np.array([entry[key] for entry in ordered])
        axis.barh(rows, values - start, left=start, color=colour, height=0.7)
        for row, value in zip(rows, values, strict=True):
            axis.text(1.01, row, f"{value:.2f}", va="center", fontsize=8.5, color=INK, transform=axis.get_yaxis_transform())
        axis.set_xlim(start, 1)
        axis.set_xlabel("AUROC" if key == "auroc" else "recall at 5 % loss of real images", color=INK)
    for row, entry in zip(rows, ordered, strict=True):
        right.plot(entry["recall at 5% interval"], [row, row], color=INK, linewidth=1)
    left.axvline(0.75, color=ORANGE, linewidth=1)
    left.set_yticks(rows, [f"{entry['generator']} ({entry['num']})" for entry in ordered])
    return figure


def heat_map(image: np.ndarray, boxes: np.ndarray, log_odds: np.ndarray, title: str) -> Figure:
    """What each crop says: its log odds over the image, orange for generated and blue for real, strongest in the middle of the scale.

    Args:
        image: uint8 (H, W, 3).
        boxes: (T, 4) top, left, height, width of the crops in pixels.
        log_odds: (T,).
        title: One line above.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(9.6, 0.9 + 4.6 * min(max(height / width, 0.4), 2.0)), layout="constrained", facecolor="white")
    plain, marked = figure.subplots(1, 2)
    for axis in (plain, marked):
        axis.imshow(image)
        axis.set_axis_off()
    reach = max(4.0, float(np.abs(log_odds).max(initial=0)))
    for (top, left, high, wide), odds in zip(boxes, log_odds, strict=True):
        colour = ORANGE if odds > 0 else BLUE
        strength = 0.1 + 0.5 * min(abs(odds) / reach, 1)
        marked.add_patch(Rectangle((left, top), wide, high, facecolor=colour, alpha=strength, edgecolor="none"))
        marked.add_patch(Rectangle((left, top), wide, high, fill=False, edgecolor=colour, linewidth=1.2))
        place = {"ha": "center", "va": "center", "fontsize": 8, "color": "white"}
        marked.text(left + wide / 2, top + high / 2, f"{odds:+.1f}", bbox={"facecolor": INK, "alpha": 0.6, "pad": 1, "lw": 0}, **place)
    marked.set_title("log odds of each crop: orange generated, blue real", fontsize=9, color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    return figure


def distributions(by_name: dict[str, np.ndarray], xlabel: str, cut: float | None = None) -> Figure:
    """One line of density per name, over one axis, with a threshold where there is one."""
    figure, axis = axes(6.4, 3.2)
    values = np.concatenate([*by_name.values(), np.zeros(1)])
    edges = np.linspace(min(values.min(), 0), max(values.max(), 1), 33)
    tops = []
    for (name, own), colour in zip(by_name.items(), (BLUE, ORANGE, GREEN, PURPLE, SKY) * (len(by_name) // 5 + 1), strict=False):
        counts, _ = np.histogram(own, edges)
        share = counts / max(counts.sum(), 1)
        axis.stairs(share, edges, color=colour, linewidth=1.6, label=f"{name} ({number(len(own))})")
        tops.append(share.max(initial=0))
    if cut is not None:
        axis.axvline(cut, color=GREY, linewidth=1, linestyle=":")
    axis.set_ylim(0, max(tops, default=1) * 1.15 or 1)
    axis.legend(frameon=False, fontsize=8)
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel("share of images", color=INK)
    return figure


def drift(names: Sequence[str], distances: Sequence[float], limits: Sequence[float]) -> Figure:
    """How far each shard's scores lie from those of all others (Kolmogorov-Smirnov), with what chance alone would do."""
    figure, axis = axes(6.4, 0.9 + 0.28 * max(len(names), 1))
    rows = np.arange(len(names))
    colours = [ORANGE if distance > limit else SKY for distance, limit in zip(distances, limits, strict=True)]
    axis.barh(rows, distances, color=colours, height=0.7)
    for row, limit in zip(rows, limits, strict=True):
        axis.plot([limit, limit], [row - 0.4, row + 0.4], color=INK, linewidth=1.2)
    axis.set_yticks(rows, [name if len(name) < 40 else "..." + name[-37:] for name in names])
    axis.set_xlim(0, 1)
    axis.set_xlabel(
        "distance of the scores to those of all other shards; the mark: 1 % of like shards lie beyond it", color=INK, fontsize=9
    )
    axis.invert_yaxis()
    return figure


def _spread(ends: list[list[Any]], gap: float) -> list[list[Any]]:
    """Labels at heights that are at least `gap` apart, lowest first."""
    placed = sorted(ends, key=lambda end: end[0])
    for before, after in pairwise(placed):
        after[0] = max(after[0], before[0] + gap)
    return placed
