"""Natural pairs: the best and the worst copy of one picture in a run, as the web damaged it. They confirm what synthetic pairs found.

`k2 dedup` groups the copies. The best copy of a group is its representative; the worst is the one with the fewest bytes, which
heavy compression and reduction both take away. Values come from the annotation `artifacts`; no pixel is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np

from curation import tag_statistics as statistics
from curation.policy import annotated_with
from curation.tags import Tag

WORSE = 0.5  # of the best copy's bytes, at most: a copy of the same quality tells nothing
PAIRS = f"""
WITH copies AS (
  SELECT d."group", d.kind, d.representative, b.uid, b.bytes
  FROM read_parquet($duplicates) AS d JOIN read_parquet($basics) AS b USING (uid)
  WHERE d."group" IS NOT NULL AND b.error IS NULL
), worst AS (
  SELECT "group", arg_min(uid, (bytes, uid)) AS uid, min(bytes) AS bytes
  FROM copies WHERE NOT representative AND kind = 'perceptual' GROUP BY "group"
)
SELECT best.uid AS best, worst.uid AS worst
FROM copies AS best JOIN worst USING ("group") WHERE best.representative AND worst.bytes <= {WORSE} * best.bytes ORDER BY best.uid
"""


class Pairs(NamedTuple):
    """Uids of the best and the worst copy of each picture."""

    best: list[str]
    worst: list[str]


def find_pairs(run_dir: str | Path) -> Pairs:
    """One pair per group of duplicates whose worst copy has at most half of the bytes of the best; copies of equal bytes are one file.

    Raises:
        FileNotFoundError: the run has no duplicates or no basics; the text names the command.
    """
    places = {}
    for stage, command in (("basics", "k2 annotate"), ("duplicates", "k2 dedup")):
        places[stage] = sorted(str(path) for path in Path(run_dir, "annotations", stage).glob("*.parquet"))
        if not places[stage]:
            raise FileNotFoundError(f"{run_dir} has no annotation {stage}; run `{command}` first")
    with duckdb.connect() as con:
        rows = con.execute(PAIRS, places).fetchall()
    return Pairs([best for best, _ in rows], [worst for _, worst in rows])


def values_of(run_dir: str | Path, uids: Sequence[str], features: Sequence[int]) -> np.ndarray:
    """(len(uids), len(features)) values from the annotation `artifacts`; 0 where a feature does not fire, NaN of an image without codes."""
    paths = sorted(str(path) for path in Path(run_dir, "annotations", "artifacts").glob("*.parquet"))
    with duckdb.connect() as con:
        con.execute("CREATE TABLE wanted AS SELECT unnest($uids) AS uid", {"uids": list(uids)})
        rows = con.execute(
            "SELECT uid, codes FROM read_parquet($paths) JOIN wanted USING (uid) WHERE error IS NULL", {"paths": paths}
        ).fetchall()
    at = {feature: column for column, feature in enumerate(features)}
    found = {uid: {at[code["feature"]]: code["value"] for code in codes or [] if code["feature"] in at} for uid, codes in rows}
    values = np.full((len(uids), len(features)), np.nan)
    for row, uid in enumerate(uids):
        if uid in found:
            values[row] = [found[uid].get(column, 0.0) for column in range(len(features))]
    return values


def confirm(run_dir: str | Path, tags: Sequence[Tag]) -> dict[str, Any]:
    """What every tag says of the natural pairs: on how many worst copies alone it holds, on how many best copies alone, and the exact test.

    Raises:
        ValueError: the run was annotated with another encoder or SAE, whose features have nothing in common with these.
    """
    made = annotated_with(run_dir)
    wanted = {(tag.tower, tag.weights) for tag in tags}
    if wanted and wanted != {made}:
        raise ValueError(f"{run_dir} was annotated with encoder {made[0]} and SAE {made[1]}, not with {wanted.pop()}; annotate it again")
    pairs, features = find_pairs(run_dir), [tag.feature for tag in tags]
    if not tags or not pairs.best:
        return {"num_pairs": len(pairs.best), "tags": {}}
    cuts = np.array([tag.threshold for tag in tags])
    best, worst = (values_of(run_dir, uids, features) for uids in pairs)
    known = ~(np.isnan(best) | np.isnan(worst)).any(1)
    best, worst = np.maximum(best[known] - cuts, 0), np.maximum(worst[known] - cuts, 0)
    gained, lost, p = statistics.mcnemar(best, worst)
    per_tag = {
        str(feature): {"only_worst": int(g), "only_best": int(x), "p": float(f"{q:.3g}")}
        for feature, g, x, q in zip(features, gained, lost, p, strict=True)
    }
    return {
        "num_pairs": int(known.sum()),
        "any_tag_on_worst": round(float((worst > 0).any(1).mean()), 4) if known.any() else None,
        "any_tag_on_best": round(float((best > 0).any(1).mean()), 4) if known.any() else None,
        "tags": per_tag,
    }
