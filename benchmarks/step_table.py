"""The rows of bench_step.py for people: a line each, and a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def table(rows: list[dict[str, Any]]) -> str:
    """A line a case."""
    lines = []
    for row in rows:
        form = f"{row['side']:5} {row['who']:8} {row['precision']:17} {row.get('kernel') or '-':15} {row['checkpointing'] or '-':9} "
        form += f"{'compiled' if row['compiled'] else 'eager':8} {row['rows'] or '':3} "
        if "error" in row:
            lines.append(form + row["error"].splitlines()[0][:110])
            continue
        numbers = [f"{row['images_per_s']:8.2f} images/s", f"data wait {row['data_wait']:.2%}"]
        numbers += [f"MFU {row[name]:.1%}{of}" for name, of in (("mfu", ""), ("mfu_model", " of the model")) if row.get(name)]
        if row.get("memory_gib"):
            numbers.append(f"{row['memory_gib']:.1f} GiB" + (f" (plan {row['plan_gib']:.1f})" if "plan_gib" in row else ""))
        numbers += [f"{name} {share:.0%}" for name, share in row.get("parts", {}).items()]
        lines.append(form + ", ".join(numbers))
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Images per second of every case, by side."""
    good = [row for row in rows if "error" not in row]
    sides = sorted({row["side"] for row in good})
    figure, axes = pyplot.subplots(1, len(sides), figsize=(5 * len(sides), 4), layout="constrained", squeeze=False)
    for axis, side in zip(axes[0], sides, strict=True):
        own = [row for row in good if row["side"] == side]
        forms = [[row["who"], row["precision"], row.get("kernel"), "" if row["compiled"] else "eager", row["checkpointing"]] for row in own]
        names = [" ".join(filter(None, form)) for form in forms]
        axis.barh([f"{i + 1} {name}" for i, name in enumerate(names)], [row["images_per_s"] for row in own], color="#4477aa")
        axis.invert_yaxis()
        axis.set_title(f"{side} px, images/s")
        axis.tick_params(labelsize=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
