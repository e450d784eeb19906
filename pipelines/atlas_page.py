"""The atlas as files: index.html, one small script and a few JPEGs per feature; opens from a disk as from an object store.

    index.html atlas.css atlas.js   the same for every atlas, but for the title
    data.js                         one array per column of the list of features
    features/N.js                   the card of feature N, loaded when it is opened
    features/N.jpg N-detail.jpg N-cover.jpg

Scripts, because a page from a disk may load scripts and pictures, and nothing else. The files of features are not flushed to the disk
one by one, which would take longer than making them: index.html comes last, and the command again makes all of them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from curation import sprites
from curation.contrast import DAMAGE
from curation.shards import write_bytes
from curation.sprites import jpeg, sprite, unpacked

TEMPLATES = Path(__file__).parent / "templates"
FILES = {"index.html", "atlas.css", "atlas.js", "data.js", "features"}
COVER, COVERS = (276, 184), ((3, 2), (2, 1), (1, 1))  # pixels (across, down) of a cover, and how pictures share it
COLUMNS = (
    "feature", "tag", "name", "words", "verdict", "reviewers", "threshold", "rate", "above", "largest", "kind", "auroc", "style",
    "match", "cover",
)  # fmt: skip


def check_out(out: str) -> Path:
    """The folder of an atlas.

    Raises:
        ValueError: it holds something that is not an atlas.
    """
    folder = Path(out)
    strange = {path.name for path in folder.iterdir()} - FILES if folder.exists() else set()
    if strange:
        raise ValueError(f"{out} holds {min(strange)!r}, which is no part of an atlas; give a new folder")
    (folder / "features").mkdir(parents=True, exist_ok=True)
    return folder


def write_feature(
    found: dict[str, Any],
    uids: list[str],
    below: bool,
    thumbnails: dict[int, bytes],
    details: list[dict[str, Any]],
    damaged: list[tuple[str, float, bytes]],
    folder: Path,
) -> dict[str, Any]:
    """Write the files of one feature and return its line in the list.

    Args:
        found: A card of `curation.atlas.cards`.
        uids: Of the images that its strips point to.
        below: Whether values under the SAE's threshold are known.
        thumbnails: image -> JPEG; an image that could not be read is not in it.
        details: Per image shown in detail: uid, heat (JPEG or None) and crop (JPEG).
        damaged: Pictures that were damaged on purpose: label, value, JPEG.
        folder: Of the atlas.
    """
    place = folder / "features"
    shown = list(dict.fromkeys(i for rows in found["strips"].values() for i, _ in rows if i in thumbnails))
    sheet, boxes = sprite([unpacked(thumbnails[i]) for i in shown] + [unpacked(encoded) for *_, encoded in damaged])
    where = dict(zip(shown, boxes, strict=False))
    content = {
        key: found[key] for key in ("feature", "threshold", "fires", "rate", "above", "num", "largest", "histogram", "near", "evidence")
    }
    content["below"] = below
    content["strips"] = {name: [[uids[i], value, where.get(i)] for i, value in rows] for name, rows in found["strips"].items()}
    content["strips"]["damaged"] = [[*one[:2], box] for one, box in zip(damaged, boxes[len(shown) :], strict=True)]
    content["families"] = found.get("families", [])
    content["match"] = found.get("match")
    content["sprite"] = _size(boxes)
    if boxes:
        (place / f"{found['feature']}.jpg").write_bytes(sheet)
    fired = list(dict.fromkeys(i for rows in found["strips"].values() for i, value in rows if value > found["fires"] and i in thumbnails))
    if fired:
        (place / f"{found['feature']}-cover.jpg").write_bytes(cover([unpacked(thumbnails[i]) for i in fired[:6]]))
    parts = [(one["uid"], [one[name] for name in ("heat", "crop")]) for one in details]
    sheet, boxes = sprite([unpacked(part) for _, pair in parts for part in pair if part], 90)
    if parts:
        (place / f"{found['feature']}-detail.jpg").write_bytes(sheet)
    left = iter(boxes)
    content["details"] = [[uid, *(next(left) if part else None for part in pair)] for uid, pair in parts]
    content["detail_sprite"] = _size(boxes)
    script = f"feature({found['feature']}, {_json(rounded(content))});\n"
    (place / f"{found['feature']}.js").write_bytes(script.encode())
    return line(found, bool(fired))


def line(found: dict[str, Any], covered: bool) -> dict[str, Any]:
    """A card's line in the list of features: COLUMNS."""
    row, evidence, damage = found["row"] or {}, found["evidence"], {}
    for family in found.get("families", []):
        if family["role"] == "damage" and family["auroc"] is not None:
            damage.setdefault(family["name"], []).append(family["auroc"])
    best = {name: float(np.mean(values)) for name, values in damage.items()}
    measured = {name: value for name, value in evidence.get("auroc", {}).items() if name in DAMAGE and value is not None}
    best = measured or best
    kind = max(best, key=best.get, default=None)
    names = [name if isinstance(name, str) else str(name.get("name", "")) for name in evidence.get("names", [])]
    return {
        "feature": found["feature"],
        "tag": row.get("tag") or evidence.get("tag") or "",
        "name": next(iter(names), ""),
        "words": " ".join(names),
        "verdict": row.get("verdict", ""),
        "reviewers": row.get("reviewers", ""),
        "threshold": found["threshold"],
        "rate": found["rate"],
        "above": found["above"],
        "largest": found["largest"],
        "kind": (kind or "").replace("_", " "),
        "auroc": best.get(kind),
        "style": max((family["share"] for family in found.get("families", []) if family["role"] == "style"), default=None),
        "match": found["match"]["correlation"] if found.get("match") else None,
        "cover": int(covered),
    }


def write_index(lines: Iterable[dict[str, Any]], facts: dict[str, Any], folder: Path) -> None:
    """index.html with its script, style and the list of features; written last, so that what it lists is there.

    Args:
        lines: Of `line`.
        facts: `curation.firing.summary`, and `other`: the SAE of another seed, or None.
    """
    rows = list(lines)
    data = {name: facts[name] for name in ("model", "tower", "weights", "other")}
    data["columns"] = {name: [rounded(row[name]) for row in rows] for name in COLUMNS}
    about = f"{facts['num_images']:,} images · tower {facts['tower']} · weights {facts['weights']}"
    if "l0" in facts["evaluation"]:
        kept = facts["evaluation"]["explained_variance"]
        about += f" · {facts['evaluation']['l0']:g} features fire on an image, explained variance {kept:.2f}"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    page = environment.get_template("atlas.html.j2").render(model=facts["model"], num_features=len(rows), about=about)
    write_bytes(f"window.ATLAS = {_json(data)};\n".encode(), folder / "data.js")
    for name in ("atlas.css", "atlas.js"):
        write_bytes((TEMPLATES / name).read_bytes(), folder / name)
    write_bytes(page.encode(), folder / "index.html")


def cover(pictures: list[np.ndarray]) -> bytes:
    """One, two or six pictures side by side, as JPEG: what a feature looks like in the list."""
    across, down = next(grid for grid in COVERS if len(pictures) >= grid[0] * grid[1])
    width, height = COVER[0] // across, COVER[1] // down
    rows = [np.concatenate([sprites.filled(one, width, height) for one in pictures[i * across :][:across]], 1) for i in range(down)]
    return jpeg(np.concatenate(rows), 75)


def rounded(value: Any) -> Any:
    """Floats to four digits: what a page shows, at half the bytes."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def _size(boxes: list[list[int]]) -> list[int]:
    return [max((box[i] + box[i + 2] for box in boxes), default=1) for i in (0, 1)]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: no text of an image ends a script
