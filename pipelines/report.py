"""`k2 report`: one self-contained HTML page of a run folder. Whatever the folder does not hold is left out of the page."""

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from curation import explore
from curation.plots import number
from curation.shards import write_bytes
from pipelines import train_plots
from pipelines.cli import call
from pipelines.metrics import read_rows

DEDUP = ("duplicates", "semantic", "concepts")  # annotations of `k2 dedup`
THUMBNAIL = 224  # pixels; a page of some hundred pictures stays below 12 MB
SAMPLE_GRID = 1400  # pixels
PER_RULE, PER_GROUP, NUM_GROUPS, NUM_BROKEN, NUM_PACKED = 8, 6, 20, 100, 8


def report(run: str, step: int | None = None, training: str | None = None, recipe: str | None = None) -> int:
    """Write RUN/report.html, one page that needs no network and no script; with --step the page of the images of a training step.

    Args:
        run: Run folder; annotations are enough, everything else is shown when it is there.
        step: A step of a training run: writes step-<N>.html and .png there, with source, loss and annotations of its images.
        training: With --step: the folder of the training run, or its name under RUN/train; default the only one there.
        recipe: With --step: the recipe, where it is a file of yours (my.py:name); default what the training run says.
    """
    if step is not None:
        from pipelines.report_step import report_step  # it loads torch, which the report of a run does without

        return report_step(run, step, training, recipe)
    if not Path(run, "annotations").is_dir():
        raise FileNotFoundError(f"{run} holds no annotations; run `k2 annotate --source ... --out {run}` first")
    page = render(run)
    path = Path(run, "report.html")
    write_bytes(page.encode(), path)
    print(json.dumps({"report": str(path), "bytes": len(page.encode())}))
    return 0


def render(run: str) -> str:
    """The page of a run folder, as HTML."""
    environment = Environment(
        loader=PackageLoader("pipelines"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = breakable
    script = environment.loader.get_source(environment, "report.js")[0]
    context: dict[str, Any] = {"name": Path(run).resolve().name, "annotations": stages(run), "made_by": made_by(run)}
    steps = (planted, funnels, histograms, duplicates, broken, packed, training)
    for step in tqdm(steps, desc="report", unit="section", file=sys.stderr, delay=5):
        context |= step(run)
    add_pictures(run, context)
    context["tiles"] = tiles(context)
    context["contents"] = [(anchor, title) for anchor, title, key in CONTENTS if context[key]]
    context |= {"script": Markup(script), "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}
    return environment.get_template("report.html.j2").render(context)


def breakable(text: str) -> Markup:
    """A text, escaped, that may go on in the next line after / and _, as long paths have to."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_])", text))


CONTENTS = (
    ("funnel", "Funnel", "funnels"),
    ("planted", "Planted faults", "planted"),
    ("rules", "Rules: what they removed", "funnels"),
    ("scores", "Scores and thresholds", "histograms"),
    ("duplicates", "Duplicate groups", "duplicates"),
    ("broken", "Broken images", "broken"),
    ("packed", "Packed for training", "packed"),
    ("training", "Training", "training"),
    ("made-by", "Stages and models", "annotations"),
)


def tiles(context: dict[str, Any]) -> list[tuple[str, str]]:
    """(value, what it counts) of the head of the page."""
    images = max((stage["rows"] for stage in context["annotations"]), default=0)
    found = [(number(images), "images"), (number(context["num_broken"]), "broken")]
    found += [(number(funnel["num_kept"]), f"kept by {funnel['policy']}") for funnel in context["funnels"]]
    if context["planted"]:
        found.append((f"{context['planted']['found']} / {context['planted']['total']}", "planted faults found"))
    found += [(run["steps"], f"training steps of {run['name']}") for run in context["training"]]
    return found


# --- sections: each reads the run folder and returns its part of the template's context ---


def stages(run: str) -> list[dict[str, Any]]:
    """The annotations, with the description that run.json holds of their stage."""
    described = _run_json(run).get("description", {}).get("stages", {})
    for stage in (rows := explore.annotations(run)):
        text = described.get(stage["stage"], {}).get("description")
        stage["description"] = json.dumps(text) if text else "k2 dedup" if stage["stage"] in DEDUP else ""
    return rows


def made_by(run: str) -> list[tuple[str, str]]:
    """Source, commit and package versions."""
    found = _run_json(run)
    rows = [("source", found.get("description", {}).get("source")), ("commit", found.get("commit"))]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())))
    return [(key, value) for key, value in rows if value]


def _run_json(run: str) -> dict[str, Any]:
    path = Path(run, "run.json")
    return json.loads(path.read_text()) if path.exists() else {}


def planted(run: str) -> dict[str, Any]:
    """What was found of the faults in RUN/faults.json, by the lowest policy."""
    names = explore.policies(run)
    if not names or not Path(run, "faults.json").exists():
        return {"planted": None}
    found = explore.planted(run, names[0])
    faults = [row for row in found["faults"] if row["expect"] not in ("kept", "clean")]
    return {
        "planted": {
            "policy": names[0],
            "faults": faults,
            "controls": [row for row in found["faults"] if row["expect"] == "kept"],
            "clean": next(row for row in found["faults"] if row["expect"] == "clean"),
            "found": sum(row["right"] for row in faults),
            "total": sum(row["planted"] for row in faults),
            "missed": found["missed"][: 2 * PER_RULE],
            "wrong": found["wrong"][: 2 * PER_RULE],
        }
    }


def funnels(run: str) -> dict[str, Any]:
    """The funnel of every policy, and a contact sheet per rule; a rule that is the same in two policies is shown once."""
    found, shown, idle = [], {}, set()
    for policy in explore.policies(run):
        funnel = explore.funnel(run, policy)
        total, readable = max(funnel["num_images"], 1), funnel["num_images"] - funnel["num_errors"]
        # A policy whose first rule is about errors shows the broken images as that rule's; another one gets a line for them.
        funnel["show_broken"] = bool(funnel["num_errors"]) and "error" not in funnel["rules"][0]["expression"]
        funnel["readable_percent"] = round(100 * readable / total, 2)
        before = readable if funnel["show_broken"] else funnel["num_images"]
        for rule in funnel["rules"]:
            rule["left_percent"] = round(100 * rule["kept_so_far"] / total, 2)
            rule["lost_percent"] = round(100 * (before - rule["kept_so_far"]) / total, 2)
            before, rule["anchor"] = rule["kept_so_far"], None
            rule["undecided"] = max(rule["unknown"] - funnel["num_errors"], 0)
            if rule["failed"]:
                key = (rule["name"], rule["expression"], rule["failed"])
                entry = shown.setdefault(key, rule | {"anchor": f"rule-{len(shown) + 1}", "used_by": []})
                entry["used_by"].append(policy)
                rule["anchor"] = entry["anchor"]
            else:
                idle.add(rule["name"])
        found.append(funnel)
    order = list(dict.fromkeys(rule["name"] for rule in shown.values()))  # thresholds of one rule stand side by side
    listed = sorted(shown.values(), key=lambda rule: order.index(rule["name"]))
    for rule in listed:
        rule["policies"] = ", ".join(rule["used_by"])
        rule["removed"] = explore.removed_by(run, rule["used_by"][0], rule["name"], PER_RULE)
        rule["kept"] = explore.nearest_kept(run, rule["used_by"][0], rule["name"], PER_RULE)
    idle_rules = ", ".join(sorted(idle - set(order)))
    return {"funnels": found, "rules": listed, "idle_rules": idle_rules}


def histograms(run: str) -> dict[str, Any]:
    """One chart per score that a rule cuts."""
    figures = explore.score_histograms(run, explore.policies(run))
    return {"histograms": [chart(figure, f"histogram of {name} with the thresholds of the rules") for name, figure in figures.items()]}


def broken(run: str) -> dict[str, Any]:
    """The images with an error."""
    try:
        rows = explore.broken(run)
    except FileNotFoundError:
        rows = []
    return {"broken": {"rows": rows[:NUM_BROKEN], "more": max(len(rows) - NUM_BROKEN, 0)} if rows else None, "num_broken": len(rows)}


def duplicates(run: str) -> dict[str, Any]:
    """The largest duplicate groups."""
    try:
        groups = explore.duplicate_groups(run, NUM_GROUPS)
    except FileNotFoundError:
        return {"duplicates": None}
    for row in (row for group in groups for row in group):
        bits = "same bytes" if row["kind"] == "exact" else f"{row['distance']} of 144 bits apart"
        row["label"] = "kept" if row["representative"] else bits + (", mirrored" if row["mirrored"] else "")
    count = explore.num_duplicates(run)
    summary = f"{number(count['groups'])} groups hold {number(count['images'])} images; {number(count['extra'])} of them are not needed."
    if count["groups"] > len(groups):
        summary += f" The {len(groups)} largest are shown."
    return {"duplicates": {"summary": summary, "groups": [group[:PER_GROUP] for group in groups]} if groups else None}


def packed(run: str) -> dict[str, Any]:
    """Buckets and samples of every packed dataset."""
    found = []
    made = {path.parent.name: json.loads(path.read_text())["resolution"] for path in Path(run, "packed").glob("*/dataset.json")}
    for policy in sorted(made, key=lambda name: (made[name], name)):
        buckets = explore.packed_buckets(run, policy)
        most = max((bucket["images"] for bucket in buckets), default=1)
        samples = [sample | picture(sample.pop("image")) for sample in explore.packed_samples(run, policy, NUM_PACKED)]
        for sample in samples:
            sample["uid"] = sample["caption"]
        found.append(
            {
                "policy": policy,
                "num_rows": sum(bucket["images"] for bucket in buckets),
                "num_batches": sum(bucket["batches"] for bucket in buckets),
                "buckets": [bucket | {"percent": round(100 * bucket["images"] / most, 1)} for bucket in buckets],
                "samples": samples,
            }
        )
    return {"packed": found}


def training(run: str) -> dict[str, Any]:
    """Curves, phases and sample grids of every training run in the folder."""
    return {"training": [one for path in sorted(Path(run, "train").glob("*/metrics.jsonl")) if (one := _training(path))]}


def _training(metrics: Path) -> dict[str, Any] | None:
    rows = read_rows(metrics)
    if not rows:
        return None
    phases, ends = [], {}
    for name, mine in train_plots.by_phase(rows):
        losses, tenth = [row["loss"] for row in mine], max(1, len(mine) // 10)
        ends[mine[-1]["step"]] = name
        phases.append(
            {
                "name": name,
                "steps": number(len(mine)),
                "images": number(sum(row.get("images", 0) for row in mine)),
                "seconds": f"{sum(row['images'] / row['images_per_s'] for row in mine if row.get('images_per_s')):.0f}",
                "first": f"{np.mean(losses[:tenth]):.3f}",
                "last": f"{np.mean(losses[-tenth:]):.3f}",
                "validation": _validation(mine),
            }
        )
    grids = sorted(metrics.parent.glob("samples/*.png"))
    grids = [grid for grid in grids if int(grid.stem) in ends] or grids[-1:]
    samples = [{"title": f"step {number(int(grid.stem))}"} | picture(Image.open(grid), SAMPLE_GRID, 85) for grid in grids]
    words = "; ".join(f"{phase['name']}: {phase['first']} to {phase['last']}" for phase in phases)
    charts = [
        chart(figure, f"{title}, {words}" if name == "loss" else f"{title} of {metrics.parent.name}") | {"name": name, "caption": caption}
        for name, figure in train_plots.figures(rows).items()
        for title, caption in [TRAINING_CHARTS[name]]
    ]
    return {"name": metrics.parent.name, "steps": number(len(rows)), "phases": phases, "samples": samples, "charts": charts}


def _validation(rows: list[dict[str, Any]]) -> str:
    """The last validation loss of a phase, with its standard error and of how many images."""
    found = next((row["validation"] for row in reversed(rows) if row.get("validation")), None)
    if found is None:
        return ""
    error = f" ± {found['standard_error']:.3f}" if found.get("standard_error") is not None else ""
    return f"{found['loss']:.3f}{error}" + (f" ({number(found['images'])} images)" if "images" in found else "")


TRAINING_CHARTS = {  # name: what it shows, and how to read it
    "loss": (
        "training loss",
        "Dots are steps, the line their median over neighbouring steps, rings the loss on images that are not trained on, at fixed times "
        "and noise, in a band of one standard error over these images: how far the mean of other images would lie. Steps and runs on the "
        "same images are told apart by less, for the deviation is common to them. The loss jumps where a phase with another resolution "
        "and timestep shift begins.",
    ),
    "loss_by_t": ("training loss by time", "Training loss by time t of the noise, over steps. Grey: no image had this time."),
    "validation_by_t": (
        "validation loss by time",
        "Validation loss by time; early steps pale, the last one strong, in a band of one standard error over the images.",
    ),
    "loss_by_bucket": ("training loss by bucket", "Training loss by bucket (width x height), with its last value."),
    "loss_by_source": ("training loss by source", "Training loss by packed set, with its last value."),
    "grad_norms": ("gradient norm by part", "Norm of the gradient before clipping, of all and of each part of the model."),
    "align": ("alignment", "Cosine of early image tokens, projected, to those of the teacher, as long as the alignment lasts."),
    "speed": ("speed", "Images per second, share of a step that waits for data, model FLOPs utilisation on valid tokens, memory."),
}


def add_pictures(run: str, context: dict[str, Any]) -> None:
    """Give every item that names an image its thumbnail; the source is read once."""
    items = [item for rule in context.get("rules", []) for item in rule["removed"] + rule["kept"]]
    items += [item for group in (context["duplicates"] or {"groups": []})["groups"] for item in group]
    items += [item for key in ("missed", "wrong") for item in (context["planted"] or {}).get(key, [])]
    found: dict[str, Any] = {}
    if Path(run, "shards.parquet").exists():
        found = {uid: picture(image) for uid, image in explore.thumbnails(run, {item["uid"] for item in items}, THUMBNAIL).items()}
    for item in items:
        item |= found.get(item["uid"], {"src": None})
    for rule in context["rules"] if context["funnels"] else []:
        rule["removed"] = [item for item in rule["removed"] if item["src"]]


# --- pictures as data URIs ---


def data_uri(data: bytes, kind: str) -> str:
    """Bytes inside the page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(image: Image.Image, size: int = THUMBNAIL, quality: int = 80) -> dict[str, Any]:
    """A picture as JPEG of at most `size` pixels a side: src, width, height."""
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return {"src": data_uri(buffer.getvalue(), "image/jpeg"), "width": image.width, "height": image.height}


def chart(figure: Figure, alt: str) -> dict[str, Any]:
    """A figure as SVG: src, alt, width, height."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    width, height = (round(float(inches) * 100) for inches in figure.get_size_inches())
    return {"src": data_uri(buffer.getvalue(), "image/svg+xml"), "alt": alt, "width": width, "height": height}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(report, argv, "k2 report")


if __name__ == "__main__":
    sys.exit(main())
