"""`k2 report --step`: from a step of a training run back to its images, with every annotation that the run folder has of them.

Which images a step saw, and at which times, is a function of recipe, packed sets and step (k2model.order, k2model.flow), so nothing is
searched and nothing had to be remembered while training; losses.f32 adds the loss of each, in batches of any size from any number of
ranks, and of the step too that stopped a run and has no row in metrics.jsonl.
"""

import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from curation.explore import contact_sheet
from curation.plots import number
from curation.printable import printable
from curation.shards import write_bytes
from k2model.flow import draw
from k2model.order import Order
from pipelines import recipes
from pipelines.metrics import LOSSES, end_of, read_losses, read_rows
from pipelines.report import breakable, picture
from pipelines.train import curriculum
from pipelines.train_loop import Span
from pipelines.train_recipes import TRAIN, Phase, TrainRecipe
from pipelines.train_step import given

COLUMNS = ["uid", "image", "caption", "caption_source", "other_captions", "shard", "key", "source_height", "source_width"]
COLUMNS += ["crop_top", "crop_left", "crop_height", "crop_width"]
SHEET_COLUMNS, SHEET_SIDE = 8, 160
MOST = 128  # images on the page and the sheet: those with the highest losses; the lines have all
SAID = ("step", "phase", "index", "losses_at")  # of metrics.jsonl, which the page says by itself


def report_step(run: str, step: int, training: str | None = None, recipe: str | None = None) -> int:
    """Write RUN/train/<recipe>/step-<N>.html and .png, and print a JSON line per image and one for the page.

    Each image has its loss and its time t, on which the loss depends as well as on the image. Of large batches the page and the
    sheet show the images with the highest losses; the lines are of all, in the order of the step.

    Args:
        run: Run folder in which was packed and trained.
        step: Step of the training run, as in metrics.jsonl.
        training: Folder of the training run; default the only one under RUN/train.
        recipe: The recipe that was trained, where it is a file of yours; default the one of the folder's name.

    Raises:
        ValueError: there is no such step, or the run was packed or described anew since.
    """
    place = training_folder(run, training)
    plan, span, index = where(run, place, recipe, step)
    row, at = step_row(place, step)
    images = step_images(span.order, index)
    if row and row["images"] != len(images):
        raise ValueError(f"step {step} has losses for {row['images']} images, and its batch is of {len(images)}: it was trained on others")
    losses = None if at is None else read_losses(place, at, len(images))
    if losses is None:
        print(f"k2 report: {place / LOSSES} has no losses of step {step}", file=sys.stderr)
    for i, image in enumerate(images):
        image["loss"] = None if losses is None else float(f"{losses[i]:.6g}")
    metrics = {"step": step, "phase": span.phase.name, "index": index} | row
    return write(run, place, metrics, seen(images, plan, span.phase, step))


def training_folder(run: str, training: str | None) -> Path:
    """The folder of the training run: the one that is named, or the only one of the run folder."""
    if training is not None:
        named = Path(training)
        place = named if (named / "metrics.jsonl").exists() else Path(run, "train", training)
        if not (place / "metrics.jsonl").exists():
            raise ValueError(f"--training {training!r}: neither it nor {place} holds a metrics.jsonl")
        return place
    found = sorted(path.parent for path in Path(run, "train").glob("*/metrics.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{run}/train must hold one training run, or name one with --training; there: {names}")
    return found[0]


def step_row(place: Path, step: int) -> tuple[dict[str, Any], int | None]:
    """The row of metrics.jsonl of one step, and where its losses begin in losses.f32, if they were kept.

    The step after the last row, which may have stopped the run, has an empty one, and its losses come after those of that row. Line N is
    that of step N, so that of a long run only two are read.
    """
    path = place / "metrics.jsonl"
    near = read_rows(path, max(step - 2, 0), step)
    found = next((row for row in near if row["step"] == step), None)
    if found:
        return found, found.get("losses_at")
    before = near[-1] if near else {"step": 0, "losses_at": 0, "images": 0}
    if before["step"] != step - 1:
        last = read_rows(path)[-1:]
        raise ValueError(f"there is no step {step} in {path}; its last step is {last[0]['step'] if last else 0}")
    return {}, end_of(before) if "losses_at" in before else None


def where(run: str, place: Path, recipe: str | None, step: int) -> tuple[TrainRecipe, Span, int]:
    """Recipe, phase with its order, and number of the global batch there, of a step of a training run: from recipe and packed sets alone.

    Raises:
        ValueError: a packed set is not the one that was trained on, or the recipe has no such step.
    """
    description = json.loads((place / "run.json").read_text())["description"]
    plan: TrainRecipe = recipes.find(recipe or description["recipe"]["name"], TRAIN)
    spans = curriculum(plan, run)
    span = next((span for span in spans if span.start < step <= span.end), None)
    if span is None:
        raise ValueError(
            f"recipe {plan.name} has steps 1 to {spans[-1].end}, not {step}; was it trained with another one (--recipe my.py:name)?"
        )
    trained = description["packed"].get(span.phase.name)
    if trained is None or len(trained) != len(span.order.sets):
        raise ValueError(f"{place} was trained without phase {span.phase.name!r} as recipe {plan.name} has it; name its own with --recipe")
    for packed, fingerprint in zip(span.order.sets, trained, strict=True):
        if fingerprint != packed.fingerprint:
            raise ValueError(
                f"{packed.directory} was packed anew since step 1: its fingerprint is {packed.fingerprint}, and {place} was trained "
                f"on {fingerprint}. Pack again with the selection of then, which gives the same bytes"
            )
    return plan, span, step - 1 - span.start


def step_images(order: Order, index: int) -> list[dict[str, Any]]:
    """The images of global batch `index` in the order in which the step saw them: row groups, and rows in each.

    Returns:
        One row per image: uid, caption, caption_source, other_captions, shard and key of the source; packed (folder), file, row_group,
        row; bucket (height, width); source (height, width) and crop (top, left, height, width) in pixels of the upright source image;
        image (bytes).
    """
    rows = []
    for group in order.batch(index):
        packed, described = order.sets[group.source], order.describe(group)
        table = packed.table(described, COLUMNS).slice(0, described["num_rows"])
        for number_in_group, row in enumerate(table.to_pylist()):
            place = {"packed": packed.directory, "file": described["file"], "row_group": described["row_group"], "row": number_in_group}
            rows.append(
                {name: row[name] for name in ("uid", "caption", "caption_source", "other_captions", "shard", "key")}
                | place
                | {"bucket": (described["bucket_height"], described["bucket_width"])}
                | {"source": (row["source_height"], row["source_width"])}
                | {"crop": tuple(row[f"crop_{side}"] for side in ("top", "left", "height", "width"))}
                | {"image": row["image"]}
            )
    return rows


def seen(rows: Sequence[dict[str, Any]], plan: TrainRecipe, phase: Phase, step: int) -> list[dict[str, Any]]:
    """The same rows with `t`, the time of the image's noise, and `given`, the caption that the model got with it: empty where dropped."""
    uids, texts = [row["uid"] for row in rows], [[row["caption"], *row["other_captions"]] for row in rows]
    _, times, drop = draw(plan.seed, step - 1, uids, (1, 1, 1), phase.mu)
    found = zip(rows, times.tolist(), given(plan, phase, step - 1, uids, texts, drop.tolist()), strict=True)
    return [row | {"t": round(t, 4), "given": text} for row, t, text in found]


def annotations_of(run: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{uid: {stage: {column: value}}}: every annotation that the run folder has of these images; values as `plain` gives them."""
    shards = {row["shard"] for row in rows}
    wanted = pa.table({"uid": sorted({row["uid"] for row in rows})})
    found: dict[str, dict[str, dict[str, Any]]] = {uid: {} for uid in wanted["uid"].to_pylist()}
    for folder in sorted(path for path in Path(run, "annotations").glob("*") if path.is_dir()):
        files = sorted(folder.glob("*.parquet"))
        near = [path for path in files if path.stem in shards or path.stem == "all"] or files  # one file per shard, or one of all
        if not near:
            continue
        with duckdb.connect() as connection:
            connection.register("wanted", wanted)
            listed = ", ".join("'" + str(path).replace("'", "''") + "'" for path in near)
            table = connection.sql(f"SELECT * FROM read_parquet([{listed}]) SEMI JOIN wanted USING (uid)").to_arrow_table()
        for row in table.to_pylist():
            found[row["uid"]][folder.name] = {name: plain(value) for name, value in row.items() if name != "uid"}
    return found


def plain(value: Any) -> Any:
    """A value as JSON has it; bytes (embeddings) as their number, a number that is not finite as text."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write(run: str, place: Path, metrics: dict[str, Any], images: Sequence[dict[str, Any]]) -> int:
    """Write the page and the contact sheet of a step, and print its lines; 0.

    `metrics` is the step's row, `images` are its images with their `loss` (None: not known) and `t`, in the order of the step.
    """
    annotations = annotations_of(run, images)
    rows = [row | {"annotations": annotations[row["uid"]]} for row in images]
    for row in rows:
        said = {name: value for name, value in row.items() if name != "image"}
        print(json.dumps(said | {"loss": plain(row["loss"]), "step": metrics["step"]}))
    shown = sorted(rows, key=lambda row: -_of_loss(row["loss"]))[:MOST]  # stable: without losses in the order of the step
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in shown]
    for row in shown:
        row["loss_text"] = "" if row["loss"] is None else number(row["loss"]) if math.isfinite(row["loss"]) else str(row["loss"])
    labels = [f"{row['loss_text']} t {row['t']:.2f}  {row['uid']}".strip() for row in shown]
    sheet, buffer = contact_sheet(pictures, labels, SHEET_COLUMNS, SHEET_SIDE), io.BytesIO()
    sheet.save(buffer, "PNG")
    name = f"step-{metrics['step']}"
    write_bytes(buffer.getvalue(), place / f"{name}.png")
    for row, image in zip(shown, pictures, strict=True):
        row |= {"picture": picture(image), "tables": list(_tables(row["annotations"]))}
    page = render(place.name, metrics, rows, shown).encode()
    write_bytes(page, place / f"{name}.html")
    made = {"page": str(place / f"{name}.html"), "sheet": str(place / f"{name}.png"), "images": len(rows), "shown": len(shown)}
    print(json.dumps(made))
    return 0


def _of_loss(loss: float | None) -> float:
    """What the page is sorted by: the worst first, and a loss that is no number before all."""
    return 0.0 if loss is None else loss if math.isfinite(loss) else math.inf


def _tables(annotations: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(stage, [(column, text)]) of the annotations of one image; columns without a value are named together at the end."""
    for stage, columns in annotations.items():
        without = [name for name, value in columns.items() if value is None]
        yield (
            stage,
            [(name, _text(value)) for name, value in columns.items() if value is not None]
            + ([("no value", ", ".join(without))] if without else []),
        )


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def render(training: str, metrics: dict[str, Any], rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> str:
    """The page of a step, as HTML without a script: `shown` are those of its `rows` that it shows."""
    environment = Environment(
        loader=PackageLoader("pipelines"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"breakable": breakable, "printable": printable, "number": number}
    facts = [(name, _text(plain(value))) for name, value in metrics.items() if name not in SAID]
    losses = np.array([row["loss"] for row in rows if row["loss"] is not None])
    finite = losses[np.isfinite(losses)]
    if len(finite):
        low, middle, high = (number(value) for value in np.quantile(finite, (0.05, 0.5, 0.95)))
        facts.append(("losses of the images", f"median {middle}, nine tenths {low} to {high}, highest {number(finite.max())}"))
    if len(losses) > len(finite):
        facts.append(("images whose loss is not finite", f"{len(losses) - len(finite):,}"))
    groups = len({(row["packed"], row["file"], row["row_group"]) for row in rows})
    context = {"training": training, "metrics": metrics, "facts": facts, "rows": shown, "num_images": len(rows), "num_groups": groups}
    return environment.get_template("step.html.j2").render(context, has_losses=len(losses) > 0)
