"""Who said what of a feature, and the tag table that follows from it.

A review is one person's verdict on one feature at one threshold. Reviews lie in the SAE's folder (reviews.json); the tag table
beside it holds, per feature, the verdict on which all reviewers agree ("mixed" where they do not) and their names. A row without
reviewers is a proposal of `k2 sae tag`, and removes nothing.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curation.fitted import read_json
from curation.shards import write_json
from curation.tags import VERDICTS, Tag, read_csv, write_csv

KIND = "k2 sae choices"  # what the page exports
REVIEWS_FILE = "reviews.json"
UNNAMED = "unnamed"

Row = dict[str, Any]  # of the tag table: the fields of a Tag


def table_path(folder: Path) -> Path:
    """Where the tag table of an SAE's folder lies."""
    return folder.parent / f"{folder.name}.tags.csv"


def read_rows(folder: Path) -> list[Row]:
    """The tag table of an SAE's folder; none when there is no table yet."""
    path = table_path(folder)
    return [asdict(tag) for tag in read_csv(path)] if path.is_file() else []


def write_rows(rows: list[Row], folder: Path) -> None:
    """Write the tag table, by feature."""
    write_csv([Tag(**row) for row in sorted(rows, key=lambda row: row["feature"])], table_path(folder))


def read_choices(path: str) -> dict[str, Any]:
    """What a page exported: kind, model, tower, weights, reviewer, choices {feature: {verdict, tag, threshold}}.

    Raises:
        ValueError: it is something else.
    """
    found = read_json(Path(path))
    if found.get("kind") != KIND or not isinstance(found.get("choices"), dict):
        raise ValueError(f"{path} holds no choices of an atlas (kind {found.get('kind')!r}); export them with the button of the page")
    return found


def sign(folder: Path, tower: str, weights: str, reviewer: str, choices: Mapping[str, Mapping[str, Any]], fires: list[float]) -> list[Row]:
    """Add one reviewer's choices to the reviews of an SAE and write its tag table; returns the rows of the table that they touch.

    Args:
        folder: The SAE's.
        tower: Identity of its tower.
        weights: Hash of its weights.
        reviewer: A name, in one line and without a semicolon.
        choices: feature -> verdict, and perhaps tag and threshold; without them those of the proposal count, else the feature's own
            threshold. Choosing again replaces this reviewer's earlier choice.
        fires: The SAE's thresholds, per feature.

    Raises:
        ValueError: an empty name, a verdict or feature that we do not know, or a threshold that is no longer that of the table:
            the reviewer looked at other images then.
    """
    name = reviewer.strip()
    if not name or ";" in name or not name.isprintable():
        raise ValueError(f"reviewer {reviewer!r}: give a name in one line, without a semicolon; a sign-off is somebody's")
    rows = {row["feature"]: row for row in read_rows(folder) if row["weights"] == weights}
    reviews = read_reviews(folder, tower, weights)
    for key, choice in choices.items():
        feature, verdict = _feature(key, len(fires)), choice.get("verdict")
        if verdict not in VERDICTS:
            raise ValueError(f"feature {feature}: verdict {verdict!r}; choose from {', '.join(VERDICTS)}")
        known = rows.get(feature)
        default = known["threshold"] if known else fires[feature]
        threshold = float(choice.get("threshold", default))
        if known and not math.isclose(threshold, default, rel_tol=1e-3):
            raise ValueError(
                f"feature {feature} was reviewed at threshold {threshold:.6g}, the tag table now has {default:.6g}: other images lie above "
                f"it. Make the atlas again (`k2 sae atlas --model {folder}`) and look once more."
            )
        if threshold < fires[feature] * (1 - 1e-3):
            raise ValueError(
                f"feature {feature}: threshold {threshold:.6g} lies below {fires[feature]:.6g}, where the feature starts to fire"
            )
        tag = " ".join(str(choice.get("tag") or (known or {}).get("tag") or UNNAMED).split())
        entry = {"verdict": verdict, "tag": tag, "threshold": default if known else threshold, "at": datetime.now(UTC).date().isoformat()}
        said = reviews.setdefault(str(feature), {})
        said.pop(name, None)
        said[name] = entry  # the last one is the newest
    touched = []
    for key in choices:
        known = rows.get(int(key), {})
        said = reviews[str(int(key))]
        threshold = known.get("threshold", next(reversed(said.values()))["threshold"])
        said = {who: one for who, one in said.items() if math.isclose(one["threshold"], threshold, rel_tol=1e-3)}  # others saw other images
        verdicts, tags = {one["verdict"] for one in said.values()}, {one["tag"] for one in said.values()} - {UNNAMED}
        rows[int(key)] = {
            "model": folder.name,
            "feature": int(key),
            "tag": known["tag"] if known.get("tag") and len(tags) != 1 else min(tags, default=UNNAMED),
            "verdict": verdicts.pop() if len(verdicts) == 1 else "mixed",
            "threshold": threshold,
            "reviewers": ";".join(sorted(said)),
            "tower": tower,
            "weights": weights,
        }
        touched.append(rows[int(key)])
    write_json({"tower": tower, "weights": weights, "reviews": reviews}, folder / REVIEWS_FILE)
    write_rows(list(rows.values()), folder)
    return touched


def read_reviews(folder: Path, tower: str, weights: str) -> dict[str, dict[str, Any]]:
    """feature -> reviewer -> review, of this very SAE: what was said of other weights does not count."""
    path = folder / REVIEWS_FILE
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found.get("reviews", {}) if (found.get("tower"), found.get("weights")) == (tower, weights) else {}


def _feature(key: Any, num_features: int) -> int:
    try:
        feature = int(key)
    except ValueError:
        feature = -1
    if not 0 <= feature < num_features:
        raise ValueError(f"there is no feature {key!r}: this SAE has 0 to {num_features - 1}")
    return feature
