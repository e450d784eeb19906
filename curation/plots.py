"""Figures: numbers in, matplotlib Figure out. Light background, direct labels, colours told apart with any colour vision."""

from collections.abc import Sequence
from textwrap import wrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's palette.
INK, GREY, PALE, BLUE, SKY, ORANGE, GREEN, PURPLE = "#1b1f24", "#5b6470", "#dde3ea", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY)

matplotlib.rcParams["svg.hashsalt"] = "k2"  # the same figure is the same SVG
matplotlib.rcParams["text.parse_math"] = False  # a $ in a rule's or a column's name is a $


def number(value: float) -> str:
    """A number as people read it: 1,234  0.0123  6."""
    if value is None or not np.isfinite(value):
        return "none"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def axes(width: float, height: float):
    """A figure of one pair of axes in our style: no box, grey ticks, room for labels."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axis = figure.add_subplot()
    style(axis)
    return figure, axis


def style(axis) -> None:
    """No box, grey ticks."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GREY)
    axis.tick_params(colors=GREY, labelcolor=INK, labelsize=9)


def bars(names: Sequence[str], kept: Sequence[int], failed: Sequence[int], alone: Sequence[int], total: int) -> Figure:
    """A funnel: images left after each rule, what the rule takes from the rest, and what no other rule would have taken."""
    figure, axis = axes(9, 0.9 + 0.42 * (len(names) + 1))
    before = [total, *kept[:-1]]
    rows = np.arange(len(names)) + 1
    axis.barh(0, total, color=PALE, height=0.7)
    axis.barh(rows, kept, color=BLUE, height=0.7)
    axis.barh(rows, np.subtract(before, kept), left=kept, color=ORANGE, height=0.7)
    for row, left in enumerate([total, *kept]):
        axis.text(total * 0.008, row, number(left), va="center", color="white" if row and left > total * 0.08 else INK, fontsize=9)
    for row, all_failed, only in zip(rows, failed, alone, strict=True):
        text = f"removes {number(all_failed)}, alone {number(only)}" if all_failed else "removes none"
        axis.text(total * 1.01, row, text, va="center", color=INK if all_failed else GREY, fontsize=9)
    axis.set_yticks(range(len(names) + 1), ["all images", *names])
    axis.set_xlim(0, total * 1.28)
    axis.invert_yaxis()
    axis.xaxis.set_visible(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    return figure


def histogram(values: np.ndarray, name: str, thresholds: Sequence[tuple[str, str, float, int]]) -> Figure:
    """How a score is spread, and where the rules cut; each threshold is (label, operator, value, images that it removes)."""
    figure, axis = axes(5.4, 2.7)
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    cuts = [cut for _, _, cut, _ in thresholds]
    low, high = min([*values, *cuts], default=0.0), max([*values, *cuts], default=1.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    log = low > 0 and len(values) > 0 and np.quantile(values, 0.99) > 30 * np.median(values[values <= np.median(values)])
    edges = np.geomspace(low, high, 41) if log else np.linspace(low, high, 41)
    counts, edges = np.histogram(values, edges)
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=SKY, edgecolor="white", linewidth=0.4)
    if log:
        axis.set_xscale("log")
    by_cut: dict[tuple[str, float], list[tuple[str, int]]] = {}
    for label, operator, cut, removed in thresholds:
        by_cut.setdefault((operator, cut), []).append((label, removed))
    # Text runs away from the nearer edge, and the outer lines are the higher ones, so that no text crosses a line of its side.
    ordered = sorted(by_cut.items(), key=lambda item: abs(float(np.searchsorted(edges, item[0][1])) - 20))
    room = 0.02 + 0.11 * len(ordered)  # of the height, above the bars
    for i, ((operator, cut), marks) in enumerate(ordered):
        height = 1 - room + 0.08 + 0.11 * i
        axis.plot([cut, cut], [0, height], color=ORANGE, linewidth=1.3, transform=axis.get_xaxis_transform())
        counted = list(dict.fromkeys(number(count) for _, count in marks))
        words = f"{operator} {number(cut)}  removes {' / '.join(counted)}"
        words += f"  ({', '.join(label for label, _ in marks)})" if any(label for label, _ in marks) else ""
        side = "right" if cut > edges[20] else "left"
        place = {"ha": side, "va": "center", "fontsize": 8.5, "color": INK, "transform": axis.get_xaxis_transform()}
        axis.text(cut, height, f" {words} ", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, **place)
    top, filled = max(int(counts.max(initial=1)), 1), counts[counts > 0]
    if len(filled) and top > 40 * np.median(filled):  # one bin would hide all others
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, float(top) ** (1 / (1 - room)))
        axis.set_yticks([t for t in (0, 1, 10, 100, 1000, 10**4, 10**5, 10**6) if t <= top], minor=False)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_ylabel("images (log)", color=INK, fontsize=9)
    else:
        axis.set_ylim(0, top / (1 - room))
        axis.set_ylabel("images", color=INK, fontsize=9)
        axis.set_yticks([t for t in MaxNLocator(4, integer=True).tick_values(0, top) if t <= top])
    axis.set_xlabel("\n".join(wrap(name, 60)), color=INK, fontsize=10 if len(name) < 40 else 8)
    return figure


def curve(phases: Sequence[tuple[str, np.ndarray, np.ndarray]], ylabel: str) -> Figure:
    """A value over training steps, one colour per phase, raw points pale and their running median strong."""
    figure, axis = axes(7.5, 3)
    for i, (label, steps, values) in enumerate(phases):
        colour = SERIES[i % len(SERIES)]
        axis.plot(steps, values, ".", color=colour, markersize=3, alpha=0.35)
        reach = max(1, len(values) // 20)
        smooth = [np.median(values[max(0, j - reach) : j + reach + 1]) for j in range(len(values))]
        axis.plot(steps, smooth, color=colour, linewidth=2)
        height = 1.0 + 0.09 * (i % 2)  # short phases stand close together, so that their names take turns in height
        axis.annotate(label, (steps[len(steps) // 2], height), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=colour)
        if i:
            axis.axvline(steps[0], color=PALE, linewidth=1, zorder=0)
    if phases:
        axis.annotate(f" {number(round(float(smooth[-1]), 3))}", (phases[-1][1][-1], smooth[-1]), color=INK, fontsize=9, va="center")
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    return figure


def overlaps(names: Sequence[str], together: np.ndarray) -> Figure:
    """How many images two rules remove together; the diagonal is what each removes. `together` is int (rules, rules)."""
    figure, axis = axes(1.8 + 0.62 * len(names), 1.2 + 0.5 * len(names))
    diagonal = np.maximum(np.diag(together), 1)
    share = together / np.minimum(diagonal[:, None], diagonal[None, :])
    lower = np.tril(np.ones_like(share, bool))
    axis.imshow(np.where(lower, share, np.nan), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for row, column in zip(*np.nonzero(lower), strict=True):
        if together[row, column]:
            colour = "white" if share[row, column] > 0.7 else INK
            axis.text(column, row, number(together[row, column]), ha="center", va="center", fontsize=9, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def rates(values: np.ndarray, xlabel: str, ylabel: str) -> Figure:
    """Positive values, largest first, on a logarithmic scale, with their number in words."""
    figure, axis = axes(6, 3)
    ordered = np.sort(np.asarray(values, np.float64))[::-1]
    assert len(ordered) == 0 or ordered[-1] > 0, "a logarithmic scale has no zero"
    axis.plot(np.arange(1, len(ordered) + 1), ordered, color=BLUE, linewidth=2)
    axis.set_yscale("log")
    axis.set_xlabel(xlabel, color=INK)
    axis.set_ylabel(ylabel, color=INK)
    axis.text(0.98, 0.95, f"{number(len(ordered))} in all", transform=axis.transAxes, ha="right", va="top", color=INK)
    return figure


def sweeps(found: Sequence[dict]) -> Figure:
    """How many images each threshold keeps, one pair of axes per entry of `curation.sweep.sweep`; the present threshold is marked."""
    figure = Figure(figsize=(6.4, 3.1 * max(len(found), 1)), layout="constrained", facecolor="white")
    for axis, one in zip(np.atleast_1d(figure.subplots(max(len(found), 1))), found, strict=False):
        style(axis)
        cuts = [row["threshold"] for row in one["rows"]]
        for name, colour, label in (("alone", SKY, "this comparison holds"), ("kept", BLUE, "the whole policy keeps")):
            counts = [row[name] for row in one["rows"]]
            axis.plot(cuts, counts, ".-", color=colour, linewidth=2, markersize=5)
            end = -1 if one["operator"] in ("<", "<=") else 0
            if counts:
                place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "left" if end == 0 else "right", "fontsize": 9}
                axis.annotate(label, (cuts[end], counts[end]), color=colour, **place)
        positive = [cut for cut in cuts if cut > 0]
        if len(positive) == len(cuts) > 2 and cuts[-1] > 100 * np.median(cuts):  # a long tail would hide where most images lie
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        if one["threshold"] is not None:
            axis.axvline(one["threshold"], color=ORANGE, linewidth=1.3)
            kept = next(row["kept"] for row in one["rows"] if row["present"])
            words = f" now {one['operator']} {number(one['threshold'])}: keeps {number(kept)} "
            right = one["threshold"] > np.median(cuts)
            place = {"transform": axis.get_xaxis_transform(), "ha": "right" if right else "left", "fontsize": 9}
            axis.text(one["threshold"], 1.02, words, color=ORANGE, **place)
        axis.set_ylim(0, max(1, *(row["alone"] for row in one["rows"])) * 1.12 if one["rows"] else 1)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_ylabel("images", color=INK, fontsize=9)
        label = f"{one['column']} {one['operator']}" + (f"   ({one['rule']})" if one["rule"] else "")
        axis.set_xlabel("\n".join(wrap(label, 70)), color=INK, fontsize=10 if len(label) < 50 else 8)
    return figure
