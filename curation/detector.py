"""The AI-generated probe: a calibrated logistic regression on a tower's vector, fitted and judged across generators.

    p = sigmoid(slope * (x . weight + bias) + intercept)

Standardisation is folded into `weight` and `bias`. `slope` and `intercept` are Platt's scaling (Platt 1999), fitted on scores of
images whose own generator or source was left out: in-fold scores are over-confident. Both fits weigh the classes equally, so
p is the probability at a prior of one half; at another prior add its log odds to p's.

A random split flatters such a probe, because it learns the sources. Every figure kept with a model is therefore measured with
generators *and* real sources unseen (`disjoint`), next to what the image area alone would score.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from curation.fitted import check_identity, find, read_json
from curation.shards import write_bytes, write_json

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # sklearn's C on standardised inputs
FALSE_POSITIVE_RATES = {"fpr_5": 0.05, "fpr_1": 0.01}
AREA_BANDS = (0.05, 0.2, 0.5, 1.0)  # megapixels; a band compares images that the tower's resize treats alike
MIN_GROUP = 8  # images of a generator or source below which its own figure says nothing
REAL_FOLDS = 3
WEIGHTS_FILE, INFO_FILE = "probe.safetensors", "probe.json"


class Rows(NamedTuple):
    """Labelled vectors; every array has N entries."""

    vectors: np.ndarray  # (N, d) float
    synthetic: np.ndarray  # bool
    group: np.ndarray  # str: the generator of a synthetic image, the source of a real one
    kind: np.ndarray  # str: photo, illustration ...
    area: np.ndarray  # megapixels of the source image


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe. `info` is what `probe.json` holds: tower, data, command, evaluation, thresholds."""

    weight: np.ndarray  # (d,) float32
    bias: float
    slope: float
    intercept: float
    info: dict[str, Any]


def fit(rows: Rows, tower_identity: str, seed: int = 0) -> Probe:
    """Choose the regularisation, fit on all rows, calibrate and evaluate out of fold.

    Raises:
        ValueError: a class has too few groups to hold any out, or the vectors do not separate the classes at all.
    """
    for label, name in ((True, "generators (synthetic)"), (False, "sources (real)")):
        num = len(np.unique(rows.group[rows.synthetic == label]))
        if num < REAL_FOLDS:
            raise ValueError(f"{num} {name} in the manifest; a probe that is judged on unseen ones needs at least {REAL_FOLDS}")
    strength, tried = choose_strength(rows, seed)
    out_of_fold = leave_one_group_out(rows, strength)
    slope, intercept = platt(out_of_fold, rows.synthetic)
    if slope <= 0:
        raise ValueError(f"scores of unseen groups do not rise with the label (slope {slope:.3g}): these vectors cannot tell the two apart")
    probability = expit(slope * out_of_fold + intercept)
    thresholds = {name: threshold(probability[~rows.synthetic], rate) for name, rate in FALSE_POSITIVE_RATES.items()}
    weight, bias = fit_linear(rows.vectors, rows.synthetic, strength)
    info = {
        "tower": tower_identity,
        "dim": rows.vectors.shape[1],
        "seed": seed,
        "regularisation": {"C": strength, "grouped_auroc": tried},
        "calibration": "Platt on leave-one-group-out scores, classes weighted equally (prior 0.5)",
        "thresholds": thresholds,
        "evaluation": {
            "disjoint": disjoint(rows, strength, seed),
            "leave_one_group_out": report(probability, rows, thresholds),
            "brier": round(brier_score_loss(rows.synthetic, probability, sample_weight=balance(rows.synthetic)), 4),
            "controls": controls(rows, strength, seed),
        },
    }
    return Probe(weight, bias, slope, intercept, info)


def fit_linear(vectors: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Balanced logistic regression on standardised inputs -> (weight (d,) float32, bias) for raw inputs."""
    mean, scale = vectors.mean(0, dtype=np.float64), vectors.std(0, dtype=np.float64)
    scale[scale == 0] = 1.0
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000, tol=1e-6)
    model.fit((vectors - mean) / scale, labels)
    weight = (model.coef_[0] / scale).astype(np.float32)
    return weight, float(model.intercept_[0] - weight.astype(np.float64) @ mean)


def linear_scores(vectors: np.ndarray, weight: np.ndarray, bias: float) -> np.ndarray:
    """(N, d) -> (N,) float64 log odds before calibration. Summed row by row, so a row's score does not depend on its batch."""
    return (vectors.astype(np.float64) * weight.astype(np.float64)).sum(1) + bias


def predict(probe: Probe, vectors: np.ndarray, tower_identity: str) -> np.ndarray:
    """(N, d) vectors of the probe's own tower -> (N,) float32 P(AI-generated) at a prior of one half.

    Raises:
        ValueError: the vectors come from another tower.
    """
    check_identity("this probe", probe.info["tower"], tower_identity, "synthetic")
    return expit(probe.slope * linear_scores(vectors, probe.weight, probe.bias) + probe.intercept).astype(np.float32)


def choose_strength(rows: Rows, seed: int) -> tuple[float, dict[str, float]]:
    """The C of the best AUROC when whole generators and sources are held out (5 folds), and the AUROC of each."""
    tried = {}
    for strength in STRENGTHS:
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(rows.vectors, rows.synthetic, rows.group)
        tried[strength] = roc_auc_score(rows.synthetic, fold_scores(rows.vectors, rows.synthetic, folds, strength))
    return max(tried, key=tried.get), {str(strength): round(value, 4) for strength, value in tried.items()}


def fold_scores(vectors: np.ndarray, labels: np.ndarray, folds: Any, strength: float) -> np.ndarray:
    """Scores (N,) of each row by the model of the fold that left it out; `folds` yields (train, test) indices."""
    scores = np.full(len(labels), np.nan)
    for train, test in folds:
        scores[test] = linear_scores(vectors[test], *fit_linear(vectors[train], labels[train], strength))
    assert not np.isnan(scores).any(), "the folds do not cover every row"
    return scores


def leave_one_group_out(rows: Rows, strength: float) -> np.ndarray:
    """Scores (N,) of each image by a model that saw neither its generator nor its source."""
    folds = ((rows.group != name, rows.group == name) for name in np.unique(rows.group))
    return fold_scores(rows.vectors, rows.synthetic, folds, strength)


def platt(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the log odds in the score; two parameters, as isotonic steps would follow single sources here."""
    model = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[:, None], labels)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def balance(labels: np.ndarray) -> np.ndarray:
    """(N,) weights that give both classes the same total."""
    return np.where(labels, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))


def threshold(real_scores: np.ndarray, rate: float) -> float:
    """The score above which a new real image falls with probability at most `rate` (split conformal: an order statistic of the
    real scores, exact when the new image is exchangeable with them; images of a new source are not). 1.0 when there are too few."""
    rank = int(rate * (len(real_scores) + 1))
    return float(np.sort(real_scores)[-rank]) if rank else 1.0


def disjoint(rows: Rows, strength: float, seed: int) -> dict[str, Any]:
    """The strict figure: per generator, a model that saw neither this generator nor the real sources it is compared with.

    Real sources are dealt into 3 folds; AUROC and recall at a fixed false-positive rate (its threshold set on the held-out
    reals of the same model) are means over the folds.
    """
    names = np.unique(rows.group[~rows.synthetic])
    folds = np.array_split(np.random.default_rng(seed).permutation(names), REAL_FOLDS)
    generators = []
    for name, num in zip(*np.unique(rows.group[rows.synthetic], return_counts=True), strict=True):
        if num < MIN_GROUP:
            continue
        is_generator, figures = rows.group == name, []
        for fold in folds:
            is_real = np.isin(rows.group, fold) & ~rows.synthetic
            train = ~is_real & ~is_generator
            model = fit_linear(rows.vectors[train], rows.synthetic[train], strength)
            fake, real = (linear_scores(rows.vectors[mask], *model) for mask in (is_generator, is_real))
            recalls = [float((fake > np.quantile(real, 1 - rate, method="higher")).mean()) for rate in FALSE_POSITIVE_RATES.values()]
            figures.append([pair_auroc(fake, real), *recalls])
        auroc, *recalls = np.mean(figures, 0).round(4).tolist()
        generators.append({"generator": str(name), "num": int(num), "auroc": auroc, **_named("recall", recalls)})
    if not generators:
        return {"generators": []}
    means = {key: round(float(np.mean([g[key] for g in generators])), 4) for key in generators[0] if key not in ("generator", "num")}
    return {"generators": generators, "mean": means, "worst": min(generators, key=lambda g: g["auroc"])}


def _named(prefix: str, values: list[float]) -> dict[str, float]:
    return {f"{prefix}_at_{name}": value for name, value in zip(FALSE_POSITIVE_RATES, values, strict=True)}


def pair_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive score is above a negative one (ties count half)."""
    return roc_auc_score(np.r_[np.ones(len(positive)), np.zeros(len(negative))], np.r_[positive, negative])


def area_matched_auroc(scores: np.ndarray, rows: Rows) -> float | None:
    """AUROC over pairs of a synthetic and a real image from the same band of areas; None when no band holds both."""
    band, total, num_pairs = np.digitize(rows.area, AREA_BANDS), 0.0, 0
    for index in range(len(AREA_BANDS) + 1):
        fake, real = (scores[(band == index) & mask] for mask in (rows.synthetic, ~rows.synthetic))
        if len(fake) and len(real):
            total, num_pairs = total + pair_auroc(fake, real) * len(fake) * len(real), num_pairs + len(fake) * len(real)
    return round(total / num_pairs, 4) if num_pairs else None


def controls(rows: Rows, strength: float, seed: int) -> dict[str, float | None]:
    """What the figures would be for the wrong reasons."""
    shuffled = np.random.default_rng(seed).permutation(rows.synthetic)
    folds = [list(StratifiedKFold(5, shuffle=True, random_state=seed).split(rows.vectors, labels)) for labels in (rows.synthetic, shuffled)]
    flattering = fold_scores(rows.vectors, rows.synthetic, folds[0], strength)
    return {
        "auroc_random_split": round(roc_auc_score(rows.synthetic, flattering), 4),
        "auroc_area_only": round(roc_auc_score(rows.synthetic, rows.area), 4),
        "auroc_area_only_in_bands": area_matched_auroc(rows.area, rows),
        "auroc_permuted_labels": round(roc_auc_score(shuffled, fold_scores(rows.vectors, shuffled, folds[1], strength)), 4),
    }


def report(probability: np.ndarray, rows: Rows, thresholds: dict[str, float]) -> dict[str, Any]:
    """AUROC and, at each threshold, the share flagged (with its exact 95 % interval) per generator, real source and real kind."""

    def flagged(mask: np.ndarray) -> dict[str, Any]:
        entry: dict[str, Any] = {"num": int(mask.sum())}
        for name, value in thresholds.items():
            hits = int((probability[mask] > value).sum())
            interval = binomtest(hits, entry["num"]).proportion_ci(0.95, "exact")
            entry[f"flagged_at_{name}"] = round(hits / entry["num"], 4)
            entry[f"interval_at_{name}"] = [round(interval.low, 4), round(interval.high, 4)]
        return entry

    real, fake = ~rows.synthetic, rows.synthetic
    result: dict[str, Any] = {"real": flagged(real) if real.any() else None, "synthetic": flagged(fake) if fake.any() else None}
    if real.any() and fake.any():
        result["auroc"] = round(roc_auc_score(fake, probability), 4)
        result["auroc_area_matched"] = area_matched_auroc(probability, rows)
    for title, values, mask, other in (
        ("generators", rows.group, fake, real),
        ("sources", rows.group, real, fake),
        ("real_kinds", rows.kind, real, fake),
    ):
        result[title] = []
        for name in np.unique(values[mask]):
            chosen = mask & (values == name)
            entry = {"name": str(name), **flagged(chosen)}
            if other.any() and chosen.sum() >= MIN_GROUP:
                pair = (chosen, other) if title == "generators" else (other, chosen)
                entry["auroc"] = round(pair_auroc(probability[pair[0]], probability[pair[1]]), 4)
            result[title].append(entry)
    return result


def save(probe: Probe, folder: Path) -> None:
    """probe.safetensors (weight, bias, calibration) and probe.json; each whole or not at all."""
    scalars = {"bias": np.float64([probe.bias]), "calibration": np.float64([probe.slope, probe.intercept])}
    write_bytes(to_bytes({"weight": probe.weight, **scalars}), folder / WEIGHTS_FILE)
    write_json(probe.info, folder / INFO_FILE)


def load(model: str) -> Probe:
    """A probe by packaged name or folder.

    Raises:
        ValueError: there is none, or its files do not belong together.
    """
    folder = find(model, INFO_FILE)
    info, arrays = read_json(folder / INFO_FILE), load_file(folder / WEIGHTS_FILE)
    if arrays["weight"].shape != (info["dim"],):
        raise ValueError(f"{folder}: {WEIGHTS_FILE} holds {arrays['weight'].shape} weights, {INFO_FILE} says {info['dim']}; fit it again")
    slope, intercept = arrays["calibration"].tolist()
    return Probe(arrays["weight"], float(arrays["bias"][0]), slope, intercept, info)
