"""The scores of the stage `synthetic` in a run: how they are spread, where they are likely wrong, and which shards differ from the rest."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from scipy.special import logit
from scipy.stats import ks_2samp

from curation.declared import CAMERA, LOG_ODDS, PLAIN, SIGNED
from curation.plots import number

KOLMOGOROV = 1.628  # of 1 %: two samples of one distribution lie further apart than this * sqrt((n + m) / (n m)) (Smirnov 1948)


def scores(run: str) -> dict[str, np.ndarray]:
    """The columns of the stage for every image that has a score, sorted by uid, with `shard`; and `pictured`, the log odds without what
    the file declares.

    Raises:
        FileNotFoundError: the run has no annotation synthetic.
    """
    files = sorted(str(path) for path in Path(run, "annotations", "synthetic").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{run} has no annotation 'synthetic'; run `k2 annotate` first")
    query = "SELECT * FROM read_parquet(?) WHERE p_synthetic IS NOT NULL ORDER BY uid"
    table = duckdb.connect().sql(query, params=[files]).to_arrow_table()
    found = {name: np.array(table[name].to_pylist(), object) for name in table.column_names if name != "error"}
    for name in ("p_synthetic", "p_pixels", "p_semantics", "real_share"):
        found[name] = found[name].astype(float)
    found["shard"] = np.array([uid.partition("/")[0] for uid in found["uid"]], object)
    said = np.array([LOG_ODDS[word] for word in found["declared"]], float)
    found["pictured"] = logit(np.clip(found["p_synthetic"], 1e-7, 1 - 1e-7)) - said
    return found


def summary(run: str, allowed: float = 0.05) -> list[dict[str, Any]]:
    """Per kind: images, how many a loss of `allowed` removes, how many are in doubt (up to three times that), and the median score."""
    found = scores(run)
    kinds = np.array([kind or "unknown" for kind in found["kind"]], object)
    rows = []
    for kind in sorted(set(kinds.tolist())):
        share = found["real_share"][kinds == kind]
        doubt = (share > allowed) & (share <= 3 * allowed)
        row = {"kind": kind, "images": len(share), "removed": int((share <= allowed).sum()), "in doubt": int(doubt.sum())}
        rows.append(row | {"median p_synthetic": float(np.median(found["p_synthetic"][kinds == kind]))})
    return rows


def by_kind(run: str) -> dict[str, np.ndarray]:
    """kind -> p_synthetic of its images."""
    found = scores(run)
    kinds = np.array([kind or "unknown" for kind in found["kind"]], object)
    return {kind: found["p_synthetic"][kinds == kind] for kind in sorted(set(kinds.tolist()))}


def extremes(run: str, highest: bool = True, n: int = 12) -> list[dict[str, Any]]:
    """The images of the highest (or lowest) p_synthetic, as items for a contact sheet."""
    found = scores(run)
    order = np.argsort(-found["p_synthetic"] if highest else found["p_synthetic"], kind="stable")
    return _items(found, order[:n])


def mistakes(run: str, missed: bool = True, n: int = 12, labels: dict[str, bool] | None = None) -> list[dict[str, Any]]:
    """Where the picture alone speaks most loudly against what is known, worst first, as items for a contact sheet.

    Args:
        run: Run folder.
        missed: Generated images that look real; otherwise real ones that look generated.
        n: How many at most.
        labels: uid -> whether a model made it. Without labels the files' own words stand in: declared AI, and cameras.
    """
    found = scores(run)
    if labels is None:
        known = [True if word in (SIGNED, PLAIN) else False if word == CAMERA else None for word in found["declared"]]
    else:
        known = [labels.get(uid) for uid in found["uid"]]
    sign = -1 if missed else 1
    wrong = np.flatnonzero([truth is not None and truth == missed for truth in known] & (sign * found["pictured"] > 0))
    return _items(found, wrong[np.argsort(-sign * found["pictured"][wrong], kind="stable")][:n])


def drift(run: str) -> list[dict[str, Any]]:
    """Per shard, the Kolmogorov-Smirnov distance of its log odds to those of all others, largest first, and the one that chance alone
    exceeds in 1 % of like shards; nothing for a run of one shard."""
    found = scores(run)
    rows = []
    for shard in sorted(set(found["shard"].tolist())):
        own = found["shard"] == shard
        here, others = found["pictured"][own], found["pictured"][~own]
        if len(here) and len(others):
            limit = KOLMOGOROV * np.sqrt((len(here) + len(others)) / (len(here) * len(others)))
            shift = float(np.median(here) - np.median(others))
            distance = float(ks_2samp(here, others, method="asymp").statistic)
            rows.append({"shard": shard, "images": len(here), "distance": distance, "limit": min(float(limit), 1.0), "median shift": shift})
    return sorted(rows, key=lambda row: (-row["distance"], row["shard"]))


def _items(found: dict[str, np.ndarray], chosen: np.ndarray) -> list[dict[str, Any]]:
    """uid, value and a label with the evidence: together, pixels, semantics, and what is declared."""
    items = []
    for i in chosen.tolist():
        parts = [f"{name} {number(found[key][i])}" for name, key in (("p", "p_synthetic"), ("px", "p_pixels"), ("se", "p_semantics"))]
        word = found["declared"][i]
        items.append(
            {"uid": found["uid"][i], "value": float(found["p_synthetic"][i]), "label": " ".join(parts) + (f" {word}" if word else "")}
        )
    return items
