"""Read-only queries and pictures of a run folder, for notebooks and `k2 report`.

Queries return dicts and lists in a fixed order; pictures are matplotlib figures or PIL images. Nothing here writes a file.
"""

import html
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from curation import plots
from curation.decode import DecodeError, decode
from curation.faults import FAULTS
from curation.judged import COMPARE, FAILS, funnel, judge, short
from curation.plots import number
from curation.shards import read_fingerprint
from curation.sources import fetch, load_listing

# --- what is in a run folder ---


def annotations(run: str) -> list[dict[str, Any]]:
    """One entry per annotation: stage, files, rows, errors, fingerprint."""
    found = []
    for folder in sorted(path for path in Path(run, "annotations").glob("*") if path.is_dir()):
        files = sorted(folder.glob("*.parquet"))
        if files:
            counts = _rows(f"SELECT count(*) AS rows, count(error) AS errors FROM {_parquet(files)}")[0]
            found.append({"stage": folder.name, "files": len(files), "fingerprint": read_fingerprint(files[0])} | counts)
    return found


def policies(run: str) -> list[str]:
    """The policies that were run, lowest resolution first."""
    found = [json.loads(path.read_text()) for path in Path(run, "selection").glob("*.funnel.json")]
    return [row["policy"] for row in sorted(found, key=lambda row: (row.get("resolution") or 0, row["policy"]))]


def broken(run: str) -> list[dict[str, Any]]:
    """The images that could not be read: uid, bytes, error."""
    return _rows(f"SELECT uid, bytes, error FROM {_annotation(run, 'basics')} WHERE error IS NOT NULL ORDER BY uid")


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table, for a notebook; texts are escaped, for captions and file names are anybody's."""
    names = list(columns or (rows[0] if rows else ()))
    lines = [names, ["---"] * len(names)] + [[_escaped(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(value: Any) -> str:
    if isinstance(value, int | float):
        return number(value)
    text = html.escape("" if value is None else str(value)).replace("\n", " ")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def duplicate_groups(run: str, n: int = 20) -> list[list[dict[str, Any]]]:
    """The largest `n` groups of duplicates, each with its representative first."""
    table = _annotation(run, "duplicates")
    rows = _rows(
        f"""SELECT uid, "group", kind, representative, distance, mirrored FROM {table}
        WHERE "group" IN (SELECT "group" FROM {table} WHERE "group" IS NOT NULL GROUP BY "group" ORDER BY count(*) DESC, "group" LIMIT {n})
        ORDER BY group_size DESC, "group", representative DESC, distance, uid"""
    )
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return list(groups.values())


def num_duplicates(run: str) -> dict[str, int]:
    """Counts of `k2 dedup`: groups, images in them, and extra (images that are not their group's representative)."""
    return _rows(
        f"""SELECT count(DISTINCT "group") AS groups, count("group") AS images,
        count("group") FILTER (NOT representative) AS extra FROM {_annotation(run, "duplicates")}"""
    )[0]


def exemplars(run: str, feature: int, n: int = 9) -> list[dict[str, Any]]:
    """The images on which an SAE feature fires most: uid, value, label."""
    rows = _rows(
        f"""SELECT uid, code.value AS value FROM (SELECT uid, unnest(codes) AS code FROM {_annotation(run, "artifacts")})
        WHERE code.feature = {int(feature)} ORDER BY value DESC, uid LIMIT {int(n)}"""
    )
    return [row | {"label": number(row["value"])} for row in rows]


def firing_rates(run: str) -> list[dict[str, Any]]:
    """Every SAE feature that fires: feature, images, share of the images, mean and largest value; most frequent first."""
    return _rows(
        f"""WITH firing AS (SELECT unnest(codes) AS code FROM {_annotation(run, "artifacts")}),
        total AS (SELECT count(*) AS images FROM {_annotation(run, "artifacts")} WHERE error IS NULL)
        SELECT code.feature AS feature, count(*) AS images, count(*) / any_value(total.images) AS share,
            avg(code.value) AS mean, max(code.value) AS largest
        FROM firing, total GROUP BY feature ORDER BY images DESC, feature"""
    )


def packed_buckets(run: str, policy: str) -> list[dict[str, Any]]:
    """The buckets of a packed dataset: height, width, images, batches; fullest first."""
    buckets: dict[tuple[int, int], list[int]] = {}
    for batch in _dataset(run, policy)["batches"]:
        buckets.setdefault((batch["bucket_height"], batch["bucket_width"]), []).append(batch["num_rows"])
    rows = [{"height": h, "width": w, "images": sum(sizes), "batches": len(sizes)} for (h, w), sizes in buckets.items()]
    return sorted(rows, key=lambda row: (-row["images"], row["height"]))


def packed_samples(run: str, policy: str, n: int = 8) -> list[dict[str, Any]]:
    """`n` images as training sees them, spread over the batches: uid, caption, caption_source, label, image (PIL)."""
    folder, batches, found = Path(run, "packed", policy), _dataset(run, policy)["batches"], []
    for i in sorted({round(x) for x in np.linspace(0, len(batches) - 1, min(n, len(batches)))} if batches else ()):
        file = pq.ParquetFile(folder / batches[i]["file"])
        columns = ["uid", "image", "caption", "caption_source", "bucket_height", "bucket_width"]
        for row in file.read_row_group(batches[i]["row_group"], columns=columns).to_pylist()[
            : min(batches[i]["num_rows"], -(-n // len(batches)))
        ]:
            row["image"] = Image.open(io.BytesIO(row["image"])).convert("RGB")
            found.append(row | {"label": f"{row['bucket_width']} × {row['bucket_height']}"})
    return found[:n]


def _dataset(run: str, policy: str) -> dict[str, Any]:
    path = Path(run, "packed", policy, "dataset.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run `k2 pack --run {run} --policy {policy}` first")
    return json.loads(path.read_text())


def _annotation(run: str, stage: str) -> str:
    """One annotation as a table in a FROM clause."""
    files = sorted(Path(run, "annotations", stage).glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{run} has no annotation {stage!r}; run `k2 {'dedup' if stage == 'duplicates' else 'annotate'}` first")
    return _parquet(files)


def _parquet(files: Iterable[Path]) -> str:
    return "read_parquet([{}])".format(", ".join("'" + str(file).replace("'", "''") + "'" for file in files))


def _rows(sql: str) -> list[dict[str, Any]]:
    return duckdb.connect().sql(sql).to_arrow_table().to_pylist()


# --- rules: what they removed, and how near the rest was ---


def removed_by(run: str, policy: str, rule: str, n: int = 12) -> list[dict[str, Any]]:
    """The images that a rule removes, worst first: uid, value, label."""
    judged = judge(run, policy)
    found = judged.rule(rule)
    failed = np.flatnonzero(judged.verdicts[rule] == 0)
    beyond, _ = judged.worst_term(found)
    return judged.items(found, failed[np.argsort(-beyond[failed], kind="stable")][:n])


def nearest_kept(run: str, policy: str, rule: str, n: int = 12) -> list[dict[str, Any]]:
    """The kept images whose value is nearest to the rule's threshold: uid, value, label; none for a rule without a threshold."""
    judged = judge(run, policy)
    found = judged.rule(rule)
    if not found.terms:
        return []
    kept = np.flatnonzero(judged.kept)
    beyond, _ = judged.worst_term(found)
    return judged.items(found, kept[np.argsort(-beyond[kept], kind="stable")][:n])


def planted(run: str, policy: str) -> dict[str, list[dict[str, Any]]]:
    """How a policy fared against the truth in RUN/faults.json.

    Returns:
        faults: one entry per fault, and one called "clean" for images in which nothing was planted: fault, what, expect, planted,
            right (found; for style controls and clean images: kept) and by (the rules that removed them, with counts).
        missed: faults that were not found; wrong: style controls that were removed; both as items for a contact sheet.
    """
    truth = json.loads(Path(run, "faults.json").read_text())
    judged = judge(run, policy)
    place = {uid: i for i, uid in enumerate(judged.uids.to_pylist())}
    groups = {row["uid"]: row["group"] for row in _rows(f'SELECT uid, "group" FROM {_annotation(run, "duplicates")}')}
    errors = {row["uid"] for row in broken(run)}
    entries = {name: {"fault": name.replace("_", " "), "what": fault.what, "expect": fault.expect} for name, fault in FAULTS.items()}
    entries["clean"] = {"fault": "clean", "what": "nothing planted", "expect": "clean"}
    tally = {name: {"planted": 0, "right": 0, "rules": Counter()} for name in entries}
    result: dict[str, list[dict[str, Any]]] = {"faults": [], "missed": [], "wrong": []}
    originals = {row["original"] for row in truth.values()}
    for uid, i in place.items():
        name, original = (truth[uid]["fault"], truth[uid]["original"]) if uid in truth else ("clean", None)
        if name == "clean" and uid in originals:
            continue  # of a copy and its original either one may be kept
        failed = [rule.name for rule in judged.rules if judged.verdicts[rule.name][i] == 0]
        expect, count = entries[name]["expect"], tally[name]
        if expect == "duplicate":
            right, by = groups.get(uid) is not None and groups[uid] == groups.get(original), ["duplicates of k2 dedup"]
        elif expect == "error":
            right, by = uid in errors, ["error of decoding"]
        else:
            right, by = bool(judged.kept[i]) == (expect in ("kept", "clean")), failed
        count["planted"] += 1
        count["right"] += right
        if right == (expect not in ("kept", "clean")):
            count["rules"].update(by)
        if not right and expect != "clean":
            result["wrong" if expect == "kept" else "missed"].append({"uid": uid, "label": name.replace("_", " "), "value": None})
    for name, count in tally.items():
        by = ", ".join(f"{rule} {n}" for rule, n in count["rules"].most_common())
        if count["planted"]:
            result["faults"].append(entries[name] | {"planted": count["planted"], "right": count["right"], "by": by})
    return result


# --- pictures ---


def thumbnails(run: str, uids: Collection[str], size: int = 224) -> dict[str, Image.Image]:
    """RGB pictures of at most `size` pixels a side, from the source; an image that is broken or gone is left out."""
    found = {}
    for row in fetch(load_listing(run), uids):
        try:
            pixels, _ = decode(row["image"])
        except DecodeError:
            continue
        picture = Image.fromarray(pixels)
        picture.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
        found[row["uid"]] = picture
    return found


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str] = (), columns: int = 6, size: int = 160) -> Image.Image:
    """Pictures in rows on white, each with a line of text under it; text that does not fit ends in dots."""
    labels = list(labels) + [""] * (len(images) - len(labels))
    font, gap, line = ImageFont.load_default(size=12), 8, 18
    rows = -(-len(images) // columns)
    width = min(columns, max(len(images), 1)) * (size + gap) + gap
    sheet = Image.new("RGB", (width, max(rows, 1) * (size + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = gap + (i % columns) * (size + gap), gap + (i // columns) * (size + line + gap)
        small = ImageOps.contain(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + (size - small.width) // 2, top + size - small.height))
        text = label.encode("latin-1", "replace").decode("latin-1")  # the bundled font has no more
        while text and draw.textlength(text, font=font) > size:
            text = text[:-4] + "..." if len(text) > 4 else ""
        draw.text((left, top + size + 2), text, fill=plots.INK, font=font)
    return sheet


def show(run: str, items: Sequence[dict[str, Any]], columns: int = 6, size: int = 160) -> Image.Image:
    """Contact sheet of items with `uid` and `label`, as the queries above return them."""
    pictures = thumbnails(run, [item["uid"] for item in items], 2 * size)
    shown = [item for item in items if item["uid"] in pictures]
    return contact_sheet([pictures[item["uid"]] for item in shown], [str(item["label"]) for item in shown], columns, size)


def plot_firing_rates(run: str) -> Figure:
    """How often each SAE feature fires."""
    return plots.rates(np.array([row["share"] for row in firing_rates(run)]), "features that fire, most frequent first", "share of images")


def score_histograms(run: str, names: Sequence[str]) -> dict[str, Figure]:
    """One figure per score that a rule of these policies cuts, with the thresholds of all of them: {column: figure}."""
    marks: dict[str, list[tuple[str, str, float, int]]] = {}
    values: dict[str, np.ndarray] = {}
    for policy in names:
        judged = judge(run, policy)
        for term in (term for rule in judged.rules for term in rule.terms):
            column = judged.values[term.column]
            removed = int((COMPARE[FAILS[term.operator]](column, term.threshold)).sum())
            mark = (policy.removeprefix("pretrain_"), FAILS[term.operator], term.threshold, removed)
            if mark not in marks.setdefault(term.column, []):
                marks[term.column].append(mark)
            values[term.column] = column
    return {name: plots.histogram(values[name], short(name) or name, marks[name]) for name in marks}


def plot_funnel(run: str, policy: str) -> Figure:
    """The funnel of a policy as a bar chart."""
    found = funnel(run, policy)
    rules = found["rules"]
    columns = {key: [rule[key] for rule in rules] for key in ("name", "kept_so_far", "failed", "failed_alone")}
    return plots.bars(columns["name"], columns["kept_so_far"], columns["failed"], columns["failed_alone"], found["num_images"])


def plot_overlaps(run: str, policy: str) -> Figure:
    """How many images two rules remove together; rules that remove nothing are left out."""
    found = funnel(run, policy)
    together = np.array(found["failed_together"], np.int64)
    some = np.flatnonzero(np.diag(together))
    return plots.overlaps([found["rules"][i]["name"] for i in some], together[np.ix_(some, some)])
