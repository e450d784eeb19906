"""Feature cards: what a person looks at before saying what a feature of an SAE means.

    looked = firing.of_run(firing.read_fitted("sae-compact"), "my-run")
    card(looked, 208)                 # strips of images, rates, nearest features, evidence: plain values
    plot(looked, 208)                 # their histogram, for a notebook
    decide("sae-compact", 208, "artifact", reviewer="Ada", tag="watermark")

A card shows images over the whole range of a feature and not only its best ones, because the best ones of any feature look
convincing; the rows just above and just below the threshold are where a sign-off is decided.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import beta

from curation import firing, plots, reviews
from curation.firing import Firing, Fitted
from curation.fitted import read_json
from curation.protocol import auroc

STRONGEST, STRIP = 12, 8  # images of the first row, and of every other
QUANTILES = {"upper": 0.75, "middle": 0.5, "lower": 0.25}  # of the images on which the feature fires
BLOCK = 32_000_000  # values that are held at a time
NEAR = 6  # features
BINS = 40
REPORT = "report"  # the part of a contrast set that took no part in any choice


def strips(values: np.ndarray, threshold: float, fires: float, below: bool) -> dict[str, np.ndarray]:
    """Which images to show of a feature: row name -> (n,) indices, largest value first.

    Args:
        values: (N,) of the feature.
        threshold: Of its tag.
        fires: Of the SAE.
        below: Whether values under `fires` are known.
    """
    order = np.argsort(-values, kind="stable")
    firing_now = order[: int((values > fires).sum())]
    found = {"strongest": firing_now[:STRONGEST]}
    rest = firing_now[STRONGEST:]
    for name, quantile in QUANTILES.items():
        middle = round((1 - quantile) * len(firing_now)) - STRONGEST
        start = max(0, min(middle - STRIP // 2, len(rest) - STRIP))
        found[name] = np.array([i for i in rest[start : start + STRIP] if not any(i in shown for shown in found.values())], np.int64)
    num_above = int((values > threshold).sum())
    found["above"] = order[max(0, num_above - STRIP) : num_above]
    under = order[num_above : num_above + STRIP]
    found["below"] = under if below else under[values[under] > fires]
    return found


def thresholds(fitted: Fitted) -> np.ndarray:
    """(m,) per feature the threshold of its tag, else the SAE's own."""
    found = fitted.sae.threshold.numpy().astype(np.float64).copy()
    for feature, entry in _evidence(fitted).items():
        found[feature] = entry.get("threshold", found[feature])
    for row in reviews.read_rows(fitted.folder):
        found[row["feature"]] = row["threshold"]
    return found


def card(looked: Firing, feature: int) -> dict[str, Any]:
    """What is known of one feature, without pictures: see `cards`."""
    return next(cards(looked, [feature]))


def cards(
    looked: Firing, features: Iterable[int] | None = None, contrast: Any = None, other: Fitted | None = None
) -> Iterator[dict[str, Any]]:
    """One card per feature (all of the SAE when None), as plain values; images are indices into `looked.uids`.

    Args:
        looked: The images.
        features: Which ones.
        contrast: A `contrast_set.ContrastSet` of the same tower: adds how the feature answers to damage, style and controls.
        other: An SAE of another seed on the same tower: adds the feature of it that fires most alike. Needs the vectors of a run.

    Yields:
        feature, threshold (of the tag), fires (the SAE's), rate (share of the images on which it fires), above (images over the
        threshold), largest, strips {name: [[image, value]]}, histogram {low, high, counts {group: [BINS]}}, near [[feature, cosine]],
        and where known made (of a tag: see `made`), families [{name, role, severity, num, share, upper, auroc}], match {feature,
        correlation}, row (of the tag table), evidence (of tags.json).
    """
    fitted, num = looked.fitted, len(looked.uids)
    chosen = np.arange(fitted.sae.num_features) if features is None else np.array(list(features), np.int64)
    cut, fires = thresholds(fitted), fitted.sae.threshold.numpy()
    rows, evidence = {row["feature"]: row for row in reviews.read_rows(fitted.folder)}, _evidence(fitted)
    atoms = _unit(fitted.sae.w_dec.numpy())
    per_row = num + (0 if contrast is None else contrast.vectors.shape[0] * contrast.vectors.shape[1])
    for start in range(0, len(chosen), size := max(1, BLOCK // per_row)):
        block = chosen[start : start + size]
        values = looked.columns(block)
        changed = None if contrast is None else _contrast_columns(fitted, contrast, block)
        alike = _matches(looked, block, other) if other is not None else None
        for j, feature in enumerate(block):
            column = values[:, j]
            near = atoms @ atoms[feature]
            near[feature] = -1
            found = {
                "feature": int(feature),
                "threshold": float(cut[feature]),
                "fires": float(fires[feature]),
                "rate": float((column > fires[feature]).mean()),
                "above": int((column > cut[feature]).sum()),
                "num": num,
                "largest": float(column.max()),
                "strips": {
                    name: [[int(i), float(column[i])] for i in chosen_rows]
                    for name, chosen_rows in strips(column, cut[feature], fires[feature], looked.below).items()
                },
                "near": [[int(i), float(near[i])] for i in np.argsort(-near, kind="stable")[:NEAR]],
                "row": rows.get(int(feature)),
                "evidence": evidence.get(int(feature), {}),
            }
            groups = {"images": column}
            if changed is not None:
                found["families"] = families(contrast, changed[:, :, j], cut[feature])
                groups |= _by_role(contrast, changed[:, :, j])
                found["made"] = made(contrast, changed[:, :, j]) if found["row"] or found["evidence"] else []
            found["histogram"] = histogram(groups, [cut[feature], fires[feature]])
            if alike is not None:
                found["match"] = {"feature": int(alike[0][j]), "correlation": float(alike[1][j])}
            yield found


def histogram(groups: dict[str, np.ndarray], marks: Iterable[float]) -> dict[str, Any]:
    """Counts of each group in BINS equal bins that hold all but the lowest hundredth of the values, and the marks."""
    known = {name: values[np.isfinite(values)] for name, values in groups.items()}
    everything = np.concatenate([*known.values(), np.array(list(marks), np.float32)])
    low, high = float(np.quantile(everything, 0.01)), float(everything.max())
    high = high if high > low else low + 1.0
    counts = {name: np.histogram(np.maximum(values, low), BINS, (low, high))[0].tolist() for name, values in known.items() if len(values)}
    return {"low": low, "high": high, "counts": counts}


def families(contrast: Any, values: np.ndarray, threshold: float) -> list[dict[str, Any]]:
    """How a feature answers to each family of a contrast set, on the pictures that took no part in any choice.

    Args:
        contrast: The set of N pictures in F families.
        values: (N, F) of the feature; NaN where a picture lacks the family.
        threshold: Of its tag.

    Returns:
        Per family: name, role, severity, num (pictures), share (above the threshold), upper (95 % bound of that share, Clopper and
        Pearson 1934, one-sided) and auroc (against the clean pictures; None for those).
    """
    part = contrast.part == REPORT
    clean = [i for i, family in enumerate(contrast.families) if family.role == "clean"]
    ground = values[part][:, clean].ravel()
    ground = ground[np.isfinite(ground)]
    found = []
    for i, family in enumerate(contrast.families):
        column = values[part, i]
        column = column[np.isfinite(column)]
        if not len(column):
            continue
        above = int((column > threshold).sum())
        upper = 1.0 if above == len(column) else float(beta.ppf(0.95, above + 1, len(column) - above))
        against = None if i in clean or not len(ground) else float(auroc(column, ground))
        entry = {"name": family.name, "role": family.role, "severity": int(family.severity), "num": len(column)}
        found.append(entry | {"share": above / len(column), "upper": upper, "auroc": against})
    return found


def made(contrast: Any, values: np.ndarray) -> list[list[float]]:
    """The damaged pictures to which a feature answers most, each picture once: [picture, family, value]. Values (N, F) as `families`."""
    damage = [i for i, family in enumerate(contrast.families) if family.role == "damage"]
    column = np.nan_to_num(values[:, damage], nan=-np.inf)
    best = column.argmax(1)
    largest = column[np.arange(len(column)), best]
    order = [i for i in np.argsort(-largest, kind="stable")[:STRIP] if np.isfinite(largest[i])]
    return [[int(i), damage[best[i]], float(largest[i])] for i in order]


def _by_role(contrast: Any, values: np.ndarray) -> dict[str, np.ndarray]:
    roles = np.array([family.role for family in contrast.families])
    return {role: values[:, roles == role].ravel() for role in ("clean", "damage", "style") if (roles == role).any()}


def _contrast_columns(fitted: Fitted, contrast: Any, block: np.ndarray) -> np.ndarray:
    """(N, F, len(block)) values, NaN where the vector is."""
    flat = contrast.vectors.reshape(-1, contrast.vectors.shape[-1])
    values = flat @ fitted.sae.w_enc.numpy()[:, block] + fitted.sae.b_enc.numpy()[block]
    return values.reshape(*contrast.vectors.shape[:2], len(block))


def _matches(looked: Firing, block: np.ndarray, other: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """Per feature the one of the other SAE whose activations on these images correlate most, and how much."""
    from curation.sae_eval import best_matches

    if looked.vectors is None:
        raise ValueError("a match in another SAE needs the vectors of the tower, and this run holds only codes")
    rows = looked.vectors[:: max(1, len(looked.uids) // 20_000)].astype(np.float32)
    return best_matches(looked.fitted.sae, other.sae, rows, block)


def _evidence(fitted: Fitted) -> dict[int, dict[str, Any]]:
    """What `k2 sae tag` found, per feature."""
    path = fitted.folder / "tags.json"
    found = read_json(path).get("features", {}) if path.is_file() else {}
    return {int(feature): entry for feature, entry in found.items()}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


# --- in a notebook ---


def items(looked: Firing, found: dict[str, Any], strip: str) -> list[dict[str, Any]]:
    """One row of a card as items for `explore.show`."""
    return [{"uid": looked.uids[i], "label": plots.number(value)} for i, value in found["strips"][strip]]


def overview(looked: Firing, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cards as rows for `explore.table`."""
    rows = []
    for one in found:
        row = one["row"] or {}
        shown = {"feature": str(one["feature"]), "tag": row.get("tag", ""), "verdict": row.get("verdict", "")}
        shown |= {"reviewers": row.get("reviewers", ""), "threshold": one["threshold"]}
        rows.append(shown | {"fires on": f"{one['rate']:.1%}", "above": one["above"], "largest": one["largest"]})
    return rows


def plot(looked: Firing, feature: int) -> Figure:
    """How a feature's values are spread over the images on which it fires, with its threshold."""
    found = card(looked, feature)
    values = looked.columns([feature])[:, 0]
    cut = found["threshold"]
    return plots.histogram(values[values > found["fires"]], f"feature {feature}", [("", ">", cut, found["above"])])


def decide(model: str, feature: int, verdict: str, reviewer: str, tag: str | None = None) -> dict[str, Any]:
    """Sign a verdict on a feature: the row of the tag table that follows.

    Raises:
        ValueError: as `reviews.sign`.
    """
    fitted = firing.read_fitted(model)
    choice = {"verdict": verdict} | ({"tag": tag} if tag else {})
    fires = fitted.sae.threshold.tolist()
    return reviews.sign(fitted.folder, fitted.tower.identity, fitted.weights, reviewer, {str(feature): choice}, fires)[0]
