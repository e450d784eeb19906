"""Pictures of a training run, made from the rows of its metrics.jsonl: matplotlib figures for the page, PNG files for the run folder.

A row needs `step`, `phase` and `loss`; a picture whose values no row has is left out, so logs of old runs have fewer.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from curation import plots
from curation.shards import write_bytes

Row = Mapping[str, Any]
SPEED = (  # key of a row, what it is called, factor
    ("images_per_s", "images/s", 1),
    ("data_wait", "waiting for\ndata, %", 100),
    ("mfu", "MFU, %", 100),
    ("memory_gib", "memory, GiB", 1),
)


def write(rows: Sequence[Row], place: Path) -> list[str]:
    """Write every picture that the rows are enough for as `place`/<name>.png; their names."""
    names = []
    for name, draw in PICTURES.items():
        if figure := draw(rows):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            write_bytes(buffer.getvalue(), place / f"{name}.png")
            names.append(name)
    return names


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Name to figure of every picture that the rows are enough for, in the order of a page."""
    return {name: figure for name, draw in PICTURES.items() if (figure := draw(rows))}


def loss(rows: Sequence[Row]) -> Figure | None:
    """Training loss per phase with the validation loss and its standard error over the held-out images."""
    if not rows:
        return None
    phases = by_phase(rows)
    checks = [[row for row in mine if row.get("validation")] for _, mine in phases]
    return plots.training_curve(
        [(f"{name} px", column(mine, "step"), column(mine, "loss")) for name, mine in phases],
        [
            (column(mine, "step"), column(found, "loss"), column(found, "standard_error"))
            for mine in checks
            for found in [[row["validation"] for row in mine]]
        ],
        "loss (velocity, mean square)",
    )


def loss_by_t(rows: Sequence[Row]) -> Figure | None:
    """Training loss by time over steps, as a map."""
    found = []
    for name, mine in by_phase(rows):
        if seen := [row for row in mine if row.get("loss_by_t")]:
            values = np.array([row["loss_by_t"] for row in seen], np.float64)  # None becomes NaN
            found.append((f"{name} px", mine[0]["step"] - 1, column(seen, "step"), values))
    return plots.step_map(found, "training loss") if found else None


def validation_by_t(rows: Sequence[Row]) -> Figure | None:
    """Validation loss by time at several steps, the last one with its standard error."""
    phases = [(name, [row for row in mine if (row.get("validation") or {}).get("by_t")]) for name, mine in by_phase(rows)]
    found = [
        (f"{name} px", [row["step"] for row in mine], values, errors)
        for name, mine in phases
        if mine
        for values in [np.array([row["validation"]["by_t"] for row in mine], np.float64)]
        for errors in [np.array([_errors(row["validation"]) for row in mine], np.float64)]
    ]
    return plots.fans(found, "validation loss") if found else None


def loss_by_kind(key: str, ylabel: str) -> Callable[[Sequence[Row]], Figure | None]:
    """Training loss by bucket or by source, where there is more than one."""

    def draw(rows: Sequence[Row]) -> Figure | None:
        mine = [row for row in rows if row.get(key)]
        names = dict.fromkeys(name for row in mine for name in row[key])
        if len(names) < 2:
            return None
        found = {name: [row for row in mine if name in row[key]] for name in names}
        most = sorted(names, key=lambda name: -len(found[name]))[:7]  # as many as have a colour
        return plots.strands(
            [(name, column(found[name], "step"), np.array([row[key][name] for row in found[name]])) for name in most], ylabel
        )

    return draw


def grad_norms(rows: Sequence[Row]) -> Figure | None:
    """Gradient norm of all and of each part of the model."""
    mine = [row for row in rows if row.get("grad_norms")]
    names = list(dict.fromkeys(name for row in mine for name in row["grad_norms"]))
    parts = [(name, column(mine, "step"), np.array([_number(row["grad_norms"].get(name)) for row in mine])) for name in names]
    all_rows = [row for row in rows if row.get("grad_norm") is not None]
    whole = [("all", column(all_rows, "step"), column(all_rows, "grad_norm"))] if all_rows else []
    return plots.strands(whole + parts, "gradient norm", log=True) if whole or parts else None


def align(rows: Sequence[Row]) -> Figure | None:
    """Cosine of the image tokens, projected, to the teacher's, while there is an alignment."""
    mine = [row for row in rows if row.get("align") is not None]
    return plots.strands([("cosine", column(mine, "step"), -column(mine, "align"))], "cosine to the teacher") if mine else None


def speed(rows: Sequence[Row]) -> Figure | None:
    """Images per second, share of a step that waits for data, MFU and memory, as far as they were written."""
    phases = by_phase(rows)
    named = []
    for key, label, factor in SPEED:
        parts = [[row for row in mine if row.get(key) is not None] for _, mine in phases]
        if any(parts):
            named.append((label, [(column(mine, "step"), factor * column(mine, key)) for mine in parts]))
    return plots.panels(named) if named else None


PICTURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "loss": loss,
    "loss_by_t": loss_by_t,
    "validation_by_t": validation_by_t,
    "loss_by_bucket": loss_by_kind("loss_by_bucket", "training loss by bucket"),
    "loss_by_source": loss_by_kind("loss_by_source", "training loss by source"),
    "grad_norms": grad_norms,
    "align": align,
    "speed": speed,
}


def by_phase(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of each phase, in order."""
    return [(name, list(mine)) for name, mine in groupby(rows, key=lambda row: str(row["phase"]))]


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """One value of every row, NaN where it is missing."""
    return np.array([_number(row.get(key)) for row in rows], np.float64)


def _errors(check: Mapping[str, Any]) -> Sequence[float]:
    """Standard errors by time of a validation; NaN where they are not known, as those of a single image."""
    return check.get("standard_error_by_t") or [np.nan] * len(check["by_t"])


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)
