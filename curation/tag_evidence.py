"""What is measured of proposed tags on `report`, on natural pairs and on controls: the file tags.json beside the SAE."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from curation import sae
from curation import tag_statistics as statistics
from curation.contrast_set import ContrastSet
from curation.tag_select import VISIBLE, Rules, Selection, Values, feature_values, harmless, kinds, score, select


def evidence(
    selection: Selection,
    report: Values,
    stability: Mapping[int, float | None],
    concepts: np.ndarray,
    names: Mapping[int, list[dict[str, Any]]],
    own: np.ndarray,
) -> dict[str, Any]:
    """The features of tags.json: text of the feature's number -> what was measured on `report`, which had no part in any choice.

    `stability` is the correlation with the best match in other SAEs (None: there was none); `concepts` (R,) the cluster of each row;
    `own` (m,) the SAE's thresholds.
    """
    clean, families, found = report.values[report.named("clean")], harmless(report), {}
    damages = kinds(report.families, "damage")
    for feature, tagged in selection.features.items():
        cut, column = float(selection.cuts.at[feature]), report.values[:, feature]
        area = {name: _area(column[report.named(name, VISIBLE)], clean[:, feature]) for name in damages}
        areas = area | {name: _area(v[:, feature], clean[:, feature]) for name, v in families.items() if name != "clean"}
        hits = report.named(tagged[0], VISIBLE)
        discovery = selection.discoveries[tagged[0]]
        gained, lost = int(discovery.gained[feature]), int(discovery.lost[feature])
        found[str(feature)] = {
            "tag": "+".join(tagged),
            "threshold": float(f"{own[feature] + cut:.6g}"),
            "auroc": areas,
            "cliffs_delta": _delta(column[hits], clean[:, feature]),
            "recall": {name: _by_severity(report, name, column > cut) for name in damages},
            "removed": {name: _removed(v[:, feature] > cut) for name, v in families.items()},
            "p": float(f"{discovery.adjusted[feature]:.3g}"),
            "pairs": [gained, lost],
            "odds_ratio": [round(min(x, 1e6), 3) for x in statistics.matched_odds_ratio(gained, lost)],
            "dose": round(float(discovery.dose[feature]), 3),
            "selectivity": _selectivity(area, areas, list(families)),
            "sources": statistics.reach(column[hits] > cut, report.groups[hits]),
            "concepts": statistics.reach(column[hits] > cut, concepts[hits]),
            "stability": None if stability.get(feature) is None else round(float(stability[feature]), 3),
            "names": names.get(feature, []),
        }
    return found


def _area(positive: np.ndarray, negative: np.ndarray) -> float | None:
    return round(float(statistics.auroc(positive, negative)), 4) if len(positive) else None


def _delta(positive: np.ndarray, negative: np.ndarray) -> list[float] | None:
    """Cliff's delta with its interval: 2 AUROC - 1."""
    return [round(2 * x - 1, 4) for x in statistics.auroc_interval(positive, negative)] if len(positive) else None


def _by_severity(report: Values, name: str, hit: np.ndarray) -> list[float | None]:
    rows = [report.named(name, s) & ~report.named(name, s + 1) for s in range(1, 6)]
    return [round(float(hit[chosen].mean()), 4) if chosen.any() else None for chosen in rows]


def _removed(hit: np.ndarray) -> list[float]:
    """Share, and the largest share that this does not refute."""
    return [round(float(hit.mean()), 4), round(statistics.upper_bound(int(hit.sum()), len(hit)), 4)]


def _selectivity(area: Mapping[str, float | None], areas: Mapping[str, float | None], families: Sequence[str]) -> float:
    worst = max([0.5, *(areas[name] for name in families if name != "clean" and areas[name] is not None)])
    return round(max([x for x in area.values() if x is not None], default=0.5) - worst, 4)


def together(selection: Selection, report: Values, rules: Rules) -> dict[str, Any]:
    """What all tags together do on `report`: per kind the AUROC of its set and the recall of any tag, per harmless family what goes."""
    every = list(selection.features)
    holds = score(report.values, every, selection.cuts) > 0
    clean = report.values[report.named("clean")]
    damage = {}
    for name, chosen in selection.sets.items():
        rows = report.named(name, VISIBLE)
        if not rows.any():
            continue
        values = (score(v, chosen, selection.cuts) for v in (report.values[rows], clean))
        area = statistics.auroc_interval(*values) if chosen else (0.5, 0.5, 0.5)
        damage[name] = {
            "num": int(rows.sum()),
            "auroc": [round(float(x), 4) for x in area],
            "recall": round(float(holds[rows].mean()), 4),
            "recall_by_severity": _by_severity(report, name, holds),
            "features": chosen,
        }
    removed = {}
    for name, values in harmless(report).items():
        hit = score(values, every, selection.cuts) > 0
        removed[name] = {"num": len(hit), "removed": int(hit.sum()), "share": round(float(hit.mean()), 4), "upper": _removed(hit)[1]}
        removed[name]["provable"] = round(statistics.provable(len(hit), rules.budget), 4)
    worst = max(removed, key=lambda name: (removed[name]["share"], removed[name]["upper"]))
    return {"damage": damage, "removed": removed, "worst_family": {"family": worst, **removed[worst]}}


def concepts_of(contrast: ContrastSet, part: str, seed: int) -> np.ndarray:
    """(R,) for the rows of `feature_values` of a part: the cluster of the clean picture, one per 8 pictures, at most 50."""
    chosen = contrast.part == part
    clean = contrast.vectors[chosen, 0].astype(float)
    clean = clean / np.maximum(np.linalg.norm(clean, axis=1, keepdims=True), 1e-12)
    centred = clean - clean.mean(0)
    num = min(50, max(2, len(clean) // 8))
    label = KMeans(num, n_init=4, random_state=seed).fit(centred).labels_ if len(clean) > num else np.zeros(len(clean), int)
    owner = np.nonzero(~np.isnan(contrast.vectors[chosen][:, :, 0]))[0]
    return label[owner]


def stability_of(model: sae.Sae, others: Sequence[sae.Sae], contrast: ContrastSet, features: Sequence[int]) -> dict[int, float | None]:
    """feature -> the smallest, over the other SAEs, of its best match: the correlation of values on every row of `estimate` and `report`.

    Decoder rows alone would not do: SAEs of one data set learn different features (arXiv:2501.16615).
    """
    if not others or not features:
        return dict.fromkeys(features)
    held_out = contrast.vectors[contrast.part != "fit"]
    rows = torch.from_numpy(held_out[~np.isnan(held_out[:, :, 0])])
    ours = sae.activations(model, rows).numpy()[:, list(features)]
    matches = [statistics.matched(ours, sae.activations(other, rows).numpy()) for other in others]
    return dict(zip(features, np.min(matches, axis=0).tolist(), strict=True))


def random_like(model: sae.Sae, clean: np.ndarray, rng: np.random.Generator) -> sae.Sae:
    """An SAE that learned nothing: random encoder rows of the same norms, each firing as often on clean pictures (n, d) as the feature
    in whose place it stands (once at least in 2 n)."""
    rows = torch.from_numpy(clean)
    rate = (sae.activations(model, rows) > 0).double().mean(0).numpy()
    w_enc = torch.from_numpy(rng.standard_normal(tuple(model.w_enc.shape)).astype(np.float32))
    w_enc = w_enc / w_enc.norm(dim=0) * model.w_enc.norm(dim=0)
    pre = (rows @ w_enc).numpy()
    level = np.array([np.quantile(pre[:, j], 1 - min(max(r, 0.5 / len(pre)), 1)) for j, r in enumerate(rate)], np.float32)
    return sae.Sae(w_enc, torch.from_numpy(-level), model.w_dec, model.b_dec, torch.zeros_like(model.threshold), {})


def random_control(model: sae.Sae, contrast: ContrastSet, seed: int, rules: Rules) -> dict[str, Any]:
    """The whole protocol on an SAE that learned nothing: what passes there would be a tag without any learning."""
    rng = np.random.default_rng(seed)
    random = random_like(model, contrast.vectors[contrast.part == "fit", 0], rng)
    fit, estimate, report = (feature_values(random, contrast, part) for part in ("fit", "estimate", "report"))
    selection = select(fit, estimate, rng, rules)
    measured = together(selection, report, rules)
    return {
        "num_tags": len(selection.features),
        "damage": {
            name: {"candidates": row["candidates"], "auroc": measured["damage"].get(name, {}).get("auroc", [None])[0]}
            for name, row in selection.funnel.items()
        },
        "worst_family": measured["worst_family"],
    }
