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
BROWN = "#8c6d31"  # where five are not enough

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


def windows(steps: np.ndarray, values: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A long series in at most `num` windows of neighbours: mean step, 5 %, median, 95 %; without values that are not finite."""
    good = np.isfinite(values)
    parts = [part for part in np.array_split(np.flatnonzero(good), min(num, max(int(good.sum()), 1))) if len(part)]
    rows = [(steps[part].mean(), *np.quantile(values[part], (0.05, 0.5, 0.95))) for part in parts]
    return tuple(np.array(rows, np.float64).reshape(-1, 4).T)


def training_curve(
    phases: Sequence[tuple[str, np.ndarray, np.ndarray]], checks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], ylabel: str
) -> Figure:
    """A loss over steps, a colour per phase: its median over windows, pale where nine tenths of the steps lie, and `checks` as rings in
    a band of one standard error to each side.

    Args:
        phases: (label, steps, values) of each, in order.
        checks: (steps, values, standard errors) of validation, one entry per phase; empty arrays where there was none, NaN for an error
            that is not known.
    """
    figure, axis = axes(8, 3.4)
    total = sum(len(values) for _, values, _ in phases)
    for i, ((label, steps, values), (at, checked, error)) in enumerate(zip(phases, checks, strict=True)):
        colour = SERIES[i % len(SERIES)]
        # At most forty windows over the run, of a dozen steps at least: the median of few shows the draw of the times, not the loss.
        middle, low, median, high = windows(steps, values, max(1, min(round(40 * len(values) / total), len(values) // 12)))
        if len(values) <= 2000:
            axis.plot(steps, values, ".", color=colour, markersize=3.5, alpha=0.45, rasterized=True, markeredgewidth=0)
        if len(middle) > 1:
            axis.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(middle, median, color=colour, linewidth=2, marker="." if len(middle) < 3 else None)
        axis.fill_between(at, checked - error, checked + error, color=INK, alpha=0.18, linewidth=0)
        if len(at) == 1:  # a band would have no width
            axis.errorbar(at, checked, np.nan_to_num(error), fmt="none", ecolor=INK, elinewidth=0.8)
        axis.plot(at, checked, "o-", color=INK, markerfacecolor="white", markersize=4.5, linewidth=0.8)
        _phase_name(axis, i, label, steps, colour)
    _loss_range(axis, [values for _, _, values in phases] + [checked for _, checked, _ in checks])
    if any(len(at) for at, _, _ in checks):
        label = "validation, ± 1 standard error" if any(np.isfinite(error).any() for _, _, error in checks) else "validation"
        axis.plot([], [], "o-", color=INK, markerfacecolor="white", markersize=4.5, linewidth=0.8, label=label)
        axis.plot([], [], color=GREY, linewidth=2, label="training, median (pale: 5 to 95 %)")
        axis.legend(frameon=False, fontsize=8.5, loc="upper right", labelcolor=INK)
    _step_axis(axis)
    axis.set_ylabel(ylabel, color=INK)
    return figure


def step_map(phases: Sequence[tuple[str, int, np.ndarray, np.ndarray]], label: str) -> Figure:
    """Loss by time (rows of a map) over steps (columns), mean of windows of rows; grey where nothing was seen.

    Args:
        phases: (label, the step before its first, steps (N,), values (N, bins)) of each phase; NaN where a bin had no image.
    """
    figure, axis = axes(6.4, 3)
    total = sum(len(steps) for _, _, steps, _ in phases)
    edges, columns = [], []
    for _, start, steps, values in phases:
        parts = np.array_split(np.arange(len(steps)), min(len(steps), max(1, round(90 * len(steps) / total))))
        for part in parts:
            seen = np.isfinite(values[part])
            sums, counts = np.where(seen, values[part], 0).sum(0), seen.sum(0)
            columns.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
            edges.append(steps[part[0] - 1] if part[0] else start)
    edges.append(phases[-1][2][-1])
    grid = np.array(columns).T
    bins = len(grid)
    axis.set_facecolor(PALE)
    known = grid[np.isfinite(grid)]
    top = float(np.quantile(known, 0.98)) if len(known) else 1.0
    drawn = axis.pcolormesh(np.array(edges), np.linspace(0, 1, bins + 1), grid, cmap="viridis", vmin=0, vmax=top, rasterized=True)
    bar = figure.colorbar(drawn, ax=axis, pad=0.01, extend="max")
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=GREY, labelcolor=INK)
    bar.outline.set_visible(False)
    for i, (name, start, steps, _) in enumerate(phases):
        _phase_name(axis, i, name, np.array([start, steps[-1]]), INK)
    _step_axis(axis)
    axis.set_ylabel("t (0 clean, 1 noise)", color=INK)
    return figure


def fans(fans: Sequence[tuple[str, Sequence[int], np.ndarray, np.ndarray]], ylabel: str) -> Figure:
    """A value by t at several steps, one pair of axes per phase, early steps pale and the last one strong, in a band of its standard error.

    Args:
        fans: (phase, steps, values (steps, times), their standard errors or NaN) of each phase.
    """
    figure = Figure(figsize=(max(4.2, 3.4 * len(fans)), 3.2), layout="constrained", facecolor="white")
    places = np.atleast_1d(figure.subplots(1, len(fans), sharey=True))
    for i, (axis, (label, steps, values, errors)) in enumerate(zip(places, fans, strict=True)):
        style(axis)
        t = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
        chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).round().astype(int))
        for rank, j in enumerate(chosen, 1):
            width = 2.2 if rank == len(chosen) else 1.2
            axis.plot(t, values[j], color=SERIES[i % len(SERIES)], alpha=0.15 + 0.85 * rank / len(chosen), linewidth=width)
        first, last, error = values[chosen[0]], values[chosen[-1]], errors[chosen[-1]]
        axis.fill_between(t, last - error, last + error, color=SERIES[i % len(SERIES)], alpha=0.2, linewidth=0)
        if abs(first[-1] - last[-1]) > 0.1 * values.max():  # else the two names would lie on one another
            axis.annotate(f"step {number(steps[chosen[0]])}", (t[-1], first[-1]), color=GREY, fontsize=8.5, ha="right", va="bottom")
        axis.annotate(f"step {number(steps[chosen[-1]])}", (t[-1], last[-1]), color=INK, fontsize=8.5, ha="right", va="top")
        axis.set_title(label, color=SERIES[i % len(SERIES)], fontsize=10)
        axis.set_xlabel("t (0 clean, 1 noise)", color=INK)
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
        if not i:
            axis.set_ylabel(ylabel, color=INK)
    return figure


def strands(named: Sequence[tuple[str, np.ndarray, np.ndarray]], ylabel: str, log: bool = False) -> Figure:
    """Several values over the same steps, medians of windows, each with its name at the right end; names keep a distance."""
    figure, axis = axes(6.4, 3.2)
    colours, ends = (INK, *SERIES, GREY, BROWN), []
    for i, (name, steps, values) in enumerate(named):
        middle, _, median, _ = windows(steps, values, 60)
        if not len(middle):
            continue
        axis.plot(middle, median, color=colours[i % len(colours)], linewidth=1.6)
        ends.append((float(median[-1]), name, colours[i % len(colours)]))
    if log and all(value > 0 for value, _, _ in ends):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    figure.draw_without_rendering()
    low, high = axis.get_ylim()
    place = axis.transData + axis.transAxes.inverted()
    heights: list[float] = []
    for value, *_ in sorted(ends):
        height = float(place.transform((0, np.clip(value, low, high)))[1])
        heights.append(max(height, heights[-1] + 0.075) if heights else height)
    spill = max(0.0, heights[-1] - 1) if heights else 0.0  # a heap at the top moves down as a whole
    for (value, name, colour), height in zip(sorted(ends), heights, strict=True):
        axis.text(1.01, height - spill, f"{name} {number(value)}", transform=axis.transAxes, color=colour, fontsize=8.5, va="center")
    _step_axis(axis)
    axis.set_ylabel(ylabel, color=INK)
    return figure


def panels(named: Sequence[tuple[str, Sequence[tuple[np.ndarray, np.ndarray]]]]) -> Figure:
    """Small charts under one another over the same steps, one per value: (label, a (steps, values) per phase). They start at 0."""
    figure = Figure(figsize=(6.4, 0.5 + 0.95 * len(named)), layout="constrained", facecolor="white")
    for axis, (label, phases) in zip(np.atleast_1d(figure.subplots(len(named), 1, sharex=True)), named, strict=True):
        style(axis)
        for i, (steps, values) in enumerate(phases):
            middle, low, median, high = windows(steps, values, 60)
            axis.fill_between(middle, low, high, color=SERIES[i % len(SERIES)], alpha=0.15, linewidth=0)
            axis.plot(middle, median, color=SERIES[i % len(SERIES)], linewidth=1.6, marker="." if len(middle) < 3 else None)
        axis.set_ylim(0, max(1e-9, axis.get_ylim()[1]))
        axis.set_ylabel(label, color=INK, fontsize=8.5, rotation=0, ha="right", va="center")
        axis.yaxis.set_major_locator(MaxNLocator(3))
    figure.align_ylabels()
    _step_axis(axis)
    return figure


def _phase_name(axis, i: int, label: str, steps: np.ndarray, colour: str) -> None:
    """The name of a phase above its steps, and a line where it begins."""
    height = 1.0 + 0.08 * (i % 2)  # short phases stand close together, so that their names take turns in height
    axis.annotate(label, ((steps[0] + steps[-1]) / 2, height), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=colour)
    if i:
        axis.axvline(steps[0], color=PALE, linewidth=1, zorder=0)


def _loss_range(axis, series: Sequence[np.ndarray]) -> None:
    """The axis from the lowest value to where all but one in two hundred lie: a spike, or the first steps, would flatten the rest."""
    values = np.concatenate([np.asarray(one, np.float64) for one in series])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(np.quantile(values, 0.995))
        room = 0.06 * max(high - low, 1e-9)
        axis.set_ylim(low - room, high + room)


def _step_axis(axis) -> None:
    axis.set_xlabel("step", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
