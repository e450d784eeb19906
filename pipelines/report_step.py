"""`k2 report --step`: from a step of a training run back to its images, with every annotation that the run folder has of them.

Which images a step saw is a function of recipe, packed sets and step (k2model.order), so nothing is searched and nothing had to be
remembered while training; metrics.jsonl adds the losses.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
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
from pipelines.metrics import read_rows
from pipelines.report import breakable, picture
from pipelines.train import curriculum
from pipelines.train_loop import Span
from pipelines.train_recipes import TRAIN, Phase, TrainRecipe
from pipelines.train_step import given

COLUMNS = ["uid", "image", "caption", "caption_source", "other_captions", "shard", "key", "source_height", "source_width"]
COLUMNS += ["crop_top", "crop_left", "crop_height", "crop_width"]
SHEET_COLUMNS, SHEET_SIDE = 8, 160
SAID = ("step", "phase", "index", "losses")  # of metrics.jsonl, which the page says by itself


def report_step(run: str, step: int, training: str | None = None, recipe: str | None = None) -> int:
    """Write RUN/train/<recipe>/step-<N>.html and .png, and print a JSON line per image and one for the page.

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
    metrics = {"step": step, "phase": span.phase.name, "index": index} | step_metrics(place, step)
    return write(run, place, metrics, seen(step_images(span.order, index), plan, span.phase, step))


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


def step_metrics(place: Path, step: int) -> dict[str, Any]:
    """The row of metrics.jsonl of one step; nothing of the step after the last row, which may have stopped the run."""
    rows = read_rows(place / "metrics.jsonl")
    found = next((row for row in rows if row["step"] == step), {})
    last = rows[-1]["step"] if rows else 0
    if not found and step != last + 1:
        raise ValueError(f"there is no step {step} in {place}/metrics.jsonl; its last step is {last}")
    return found


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
    """The same rows with `given`: the caption that the step gave the model with the image, empty where it was dropped."""
    uids, texts = [row["uid"] for row in rows], [[row["caption"], *row["other_captions"]] for row in rows]
    drop = draw(plan.seed, step - 1, uids, (1, 1, 1), phase.mu).drop.tolist()
    return [row | {"given": text} for row, text in zip(rows, given(plan, phase, step - 1, uids, texts, drop), strict=True)]


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

    `metrics` is the step's row; where it has `losses`, they are those of `images`, in their order.
    """
    losses = metrics.get("losses") or [None] * len(images)
    if len(losses) != len(images):
        raise ValueError(f"step {metrics['step']} has {len(losses)} losses for {len(images)} images: it was trained on others")
    annotations = annotations_of(run, images)
    rows = [row | {"loss": loss, "annotations": annotations[row["uid"]]} for row, loss in zip(images, losses, strict=True)]
    for row in rows:
        print(json.dumps({name: value for name, value in row.items() if name != "image"} | {"step": metrics["step"]}))
    shown = sorted(rows, key=lambda row: -_of_loss(row["loss"]))  # stable: without losses in the order of the step
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in shown]
    labels = [f"{'' if row['loss'] is None else number(row['loss']) + '  '}{row['uid']}" for row in shown]
    sheet, buffer = contact_sheet(pictures, labels, SHEET_COLUMNS, SHEET_SIDE), io.BytesIO()
    sheet.save(buffer, "PNG")
    name = f"step-{metrics['step']}"
    write_bytes(buffer.getvalue(), place / f"{name}.png")
    for row, image in zip(shown, pictures, strict=True):
        row |= {"picture": picture(image), "tables": list(_tables(row["annotations"]))}
    page = render(place.name, metrics, shown).encode()
    write_bytes(page, place / f"{name}.html")
    print(json.dumps({"page": str(place / f"{name}.html"), "sheet": str(place / f"{name}.png"), "images": len(rows)}))
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


def render(training: str, metrics: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The page of a step, as HTML without a script."""
    environment = Environment(
        loader=PackageLoader("pipelines"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"breakable": breakable, "printable": printable, "number": number}
    facts = [(name, _text(plain(value))) for name, value in metrics.items() if name not in SAID]
    groups = len({(row["packed"], row["file"], row["row_group"]) for row in rows})
    return environment.get_template("step.html.j2").render(training=training, metrics=metrics, facts=facts, rows=rows, num_groups=groups)
