"""The AI-generated detector: three kinds of evidence, one calibrated probability, and the share of real images that score as high.

    pixels (compact tower) ----- head, Platt -> log odds --+
    semantics (frozen tower) --- head, Platt -> log odds --+-> fusion -> + declared origin -> p_synthetic, real_share
                               \\- head of the kinds -> kind ------------------------------------------------^

Frozen encoders with a linear head tell best in the wild, but do not see a decoder's traces and age with their training data (Guo et al.
2025, arXiv:2509.12995); a network on native pixels is the reverse. So both have a head, and a logistic regression puts their log odds
together, fitted on scores of images whose own generator or source neither head had seen. Where one is missing the other one's own
calibrated log odds stand alone. All of it is at a prior of one half (`probe.to_prior` moves it).

The vectors may come from a network that was itself trained on the labelled images. Then a head fitted on them would only repeat what
the network knows by heart: such a branch brings its own head, and scores of its training folds (`Rows.given`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes
from scipy.special import expit

from curation import probe
from curation.conformal import Reals, calibrate, real_share, thresholds
from curation.declared import LOG_ODDS
from curation.fitted import check_identity, find, read_json
from curation.probe import Head, Labels
from curation.shards import write_bytes, write_json
from curation.towers import Tower

PIXELS, SEMANTICS = BRANCHES = ("pixels", "semantics")
VIEWS = ("whole", "crop", "random 1", "random 2", "random 3")  # of every labelled image; those after them are only judged
NUM_CALIBRATED = 2  # the first views, which calibration is fitted on: what a stage sees, and what the evaluation does
KIND_STRENGTH = 1.0
LEAST_GROUPS = 3
WEIGHTS_FILE, INFO_FILE = "detector.safetensors", "detector.json"


class Rows(NamedTuple):
    """Labelled images; N of them, in V views, the first being VIEWS. NaN where an image does not have a view."""

    labels: Labels
    vectors: dict[str, np.ndarray]  # branch -> (N, V, d)
    given: dict[str, np.ndarray]  # branch -> (N, V) raw scores of images that the branch's own training had left out; may be empty
    heads: dict[str, Head]  # branch of `given` -> the head that makes such scores from the tower's vectors


@dataclass(frozen=True, eq=False)
class Calibration:
    """From raw scores of branches to log odds: fitted on scores out of fold, and small enough to be fitted again without a group."""

    platt: dict[str, tuple[float, float]]  # branch -> (slope, intercept)
    weights: np.ndarray  # of the branches' log odds, in the order of `platt`
    bias: float

    def log_odds(self, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Calibrated log odds of each branch alone, NaN where it is missing."""
        return {name: slope * raw[name] + intercept for name, (slope, intercept) in self.platt.items() if name in raw}

    def fused(self, raw: dict[str, np.ndarray]) -> np.ndarray:
        """Log odds of the branches together; where one is missing, of those that are there."""
        odds = self.log_odds(raw)
        every = np.stack(list(odds.values()))
        num_there = (~np.isnan(every)).sum(0)
        alone = np.where(num_there, np.nansum(every, 0) / np.maximum(num_there, 1), np.nan)
        if len(odds) < len(self.platt):
            return alone
        together = sum(weight * odds[name] for weight, name in zip(self.weights, self.platt, strict=True)) + self.bias
        return np.where(np.isnan(together), alone, together)


@dataclass(frozen=True, eq=False)
class Detector:
    """A fitted detector. `info` is what `detector.json` holds: towers, data, command, evaluation, thresholds."""

    towers: dict[str, str]  # branch -> identity
    heads: dict[str, Head]
    calibration: Calibration
    kinds: tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None  # (K, d) weights, (K,) biases, names; of the semantic vector
    reals: Reals
    info: dict[str, Any]


def branch_of(tower: Tower) -> str:
    """The branch that a tower's vectors belong to: native pixels, or a view of the whole."""
    return PIXELS if tower.reads == "pixels" else SEMANTICS


class Scores(NamedTuple):
    """The columns of the stage; arrays of N."""

    p_synthetic: np.ndarray  # float32
    p_pixels: np.ndarray | None
    p_semantics: np.ndarray | None
    kind: np.ndarray | None  # str
    real_share: np.ndarray


def fit(rows: Rows, towers: dict[str, str], seed: int = 0) -> tuple[Detector, dict[str, np.ndarray]]:
    """Choose the regularisation, fit on all rows, calibrate out of fold.

    Args:
        rows: Labelled images.
        towers: branch -> identity of the tower that made its vectors.
        seed: Of the folds.

    Returns:
        The detector, without an evaluation in its `info`, and the raw scores (N, V) of each branch, out of fold.

    Raises:
        ValueError: a class has too few groups to hold any out, or the vectors do not separate the classes at all.
    """
    labels = rows.labels
    for label, name in ((True, "generators (synthetic)"), (False, "sources (real)")):
        num = len(np.unique(labels.group[labels.synthetic == label]))
        if num < LEAST_GROUPS:
            raise ValueError(f"{num} {name} among the images; a detector that is judged on unseen ones needs at least {LEAST_GROUPS}")
    heads, raw, chosen = {}, {}, {}
    for name in (name for name in BRANCHES if name in rows.vectors or name in rows.given):
        if name in rows.given:
            heads[name], raw[name] = rows.heads[name], rows.given[name]
            chosen[name] = "given: the tower was trained on these images, and its folds were left out"
            continue
        strength, tried = probe.choose_strength(rows.vectors[name], labels, len(VIEWS), seed)
        raw[name] = probe.leave_one_group_out(rows.vectors[name], labels, len(VIEWS), strength)
        heads[name] = probe.fit_linear(rows.vectors[name][:, : len(VIEWS)], labels, strength)
        chosen[name] = {"strength": strength, "grouped_auroc": tried}
    calibration = calibrated(raw, labels)
    for name, (slope, _) in calibration.platt.items():
        if slope <= 0:
            raise ValueError(f"{name}: scores of unseen groups do not rise with the label: these vectors cannot tell the two classes apart")
    kinds = fit_kinds(rows.vectors[SEMANTICS], labels) if SEMANTICS in rows.vectors else None
    reals = real_scores(calibration.fused(raw), labels)
    info = {
        "towers": towers,
        "seed": seed,
        "heads": chosen,
        "calibration": "Platt and fusion on scores of unseen generators and sources, classes weighted equally (prior 0.5)",
        "fusion": {"weights": dict(zip(calibration.platt, calibration.weights.round(4).tolist(), strict=True)), "bias": calibration.bias},
        "kinds": list(kinds[2]) if kinds else [],
        "thresholds": thresholds(reals),
    }
    return Detector(towers, heads, calibration, kinds, reals, info), raw


def calibrated(raw: dict[str, np.ndarray], labels: Labels) -> Calibration:
    """Platt per branch and the fusion, from scores (N, V) out of fold, on the first NUM_CALIBRATED views."""
    synthetic = np.repeat(labels.synthetic[:, None], NUM_CALIBRATED, 1)
    weights = np.repeat(probe.image_weights(labels)[:, None], NUM_CALIBRATED, 1)
    first = {name: scores[:, :NUM_CALIBRATED] for name, scores in raw.items()}
    platt = {}
    for name, scores in first.items():
        there = ~np.isnan(scores)
        platt[name] = probe.platt(scores[there], synthetic[there], weights[there])
    odds = np.stack([slope * first[name] + intercept for name, (slope, intercept) in platt.items()], -1)
    there = ~np.isnan(odds).any(-1)
    if len(platt) == 1 or not there.any():
        return Calibration(platt, np.full(len(platt), 1 / len(platt)), 0.0)
    coefficients, bias = probe.combine(odds[there], synthetic[there], weights[there])
    return Calibration(platt, coefficients, bias)


def real_scores(log_odds: np.ndarray, labels: Labels) -> Reals:
    """The conformal calibration from log odds (N, V) out of fold: real images as a stage sees them, whole."""
    real = ~labels.synthetic & ~np.isnan(log_odds[:, 0])
    return calibrate(log_odds[real, 0], labels.kind[real], labels.group[real])


def cross_calibrated(raw: dict[str, np.ndarray], labels: Labels) -> np.ndarray:
    """Log odds (N, V) of each image by a calibration that its own group had no part in: what an honest figure is made from."""
    result = np.full(next(iter(raw.values())).shape, np.nan)
    for name in np.unique(labels.group):
        own = labels.group == name
        rest = {branch: scores[~own] for branch, scores in raw.items()}
        result[own] = calibrated(rest, labels.at(~own)).fused({branch: scores[own] for branch, scores in raw.items()})
    return result


def cross_real_shares(log_odds: np.ndarray, kinds: np.ndarray, labels: Labels) -> np.ndarray:
    """`real_share` (N, V) from log odds (N, V) and kinds (N, V), an image's own source left out of the calibration."""
    result = np.full(log_odds.shape, np.nan)
    for name in np.unique(labels.group):
        own = labels.group == name
        reals = real_scores(log_odds[~own], labels.at(~own))
        for view in range(log_odds.shape[1]):
            result[own, view] = real_share(reals, log_odds[own, view], kinds[own, view])
    return np.where(np.isnan(log_odds), np.nan, result)


def fit_kinds(vectors: np.ndarray, labels: Labels) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Heads that tell each kind of real images from the others; None with fewer than two kinds."""
    return next(kinds_without([np.zeros(len(vectors), bool)], vectors, labels))


def kinds_without(
    held_out: Sequence[np.ndarray], vectors: np.ndarray, labels: Labels
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None]:
    """The heads of the kinds, fitted without the images of each mask (N,)."""
    real = ~labels.synthetic
    names = tuple(np.unique(labels.kind[real]).tolist())
    if len(names) < 2:
        yield from (None for _ in held_out)
        return
    views, group, kind = vectors[real, : len(VIEWS)], labels.group[real], labels.kind[real]
    masks = [mask[real] for mask in held_out]
    found = [probe.heads_without(masks, views, Labels(kind == name, group, kind), (KIND_STRENGTH,)) for name in names]
    for heads in zip(*found, strict=True):
        yield np.stack([head.weight for (head,) in heads]), np.array([head.bias for (head,) in heads]), names


def kinds_of(kinds: tuple[np.ndarray, np.ndarray, tuple[str, ...]], vectors: np.ndarray) -> np.ndarray:
    """(..., d) semantic vectors -> (...) the most likely kind, "" where the vector is missing."""
    weight, bias, names = kinds
    odds = np.stack([probe.linear_scores(vectors, Head(row, offset)) for row, offset in zip(weight, bias, strict=True)], -1)
    missing = np.isnan(odds[..., 0])
    return np.where(missing, "", np.array(names)[np.where(missing, 0, np.nan_to_num(odds).argmax(-1))])


def raw_scores(detector: Detector, vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores (...) of each branch by its head, from vectors (..., d)."""
    return {name: probe.linear_scores(vectors[name], detector.heads[name]) for name in detector.heads if name in vectors}


def score(detector: Detector, vectors: dict[str, np.ndarray], towers: dict[str, str], declared: list[str | None]) -> Scores:
    """The columns of N images.

    Args:
        detector: Fitted.
        vectors: branch -> (N, d); a branch may be missing.
        towers: branch -> identity of the tower that made the vectors.
        declared: What each file says (`curation.declared`).

    Raises:
        ValueError: no branch is there, or the vectors come from another tower.
    """
    if not set(vectors) & set(detector.heads):
        raise ValueError(f"this detector looks at {', '.join(detector.heads)}; got vectors of {', '.join(vectors) or 'nothing'}")
    for name in set(vectors) & set(detector.heads):
        check_identity(f"the branch {name} of this detector", detector.towers[name], towers[name], "synthetic")
    raw = raw_scores(detector, vectors)
    alone = {name: expit(odds).astype(np.float32) for name, odds in detector.calibration.log_odds(raw).items()}
    log_odds = detector.calibration.fused(raw) + np.array([LOG_ODDS[word] for word in declared])
    kind = kinds_of(detector.kinds, vectors[SEMANTICS]) if detector.kinds and SEMANTICS in vectors else None
    shares = real_share(detector.reals, log_odds, np.full(len(log_odds), "") if kind is None else kind)
    return Scores(expit(log_odds).astype(np.float32), alone.get(PIXELS), alone.get(SEMANTICS), kind, shares)


def save(detector: Detector, folder: Path) -> None:
    """detector.safetensors and detector.json; each whole or not at all."""
    arrays: dict[str, np.ndarray] = {"fusion": np.append(detector.calibration.weights, detector.calibration.bias)}
    for name, head in detector.heads.items():
        arrays |= {f"{name}.weight": head.weight, f"{name}.bias": np.float64([head.bias])}
        arrays[f"{name}.platt"] = np.float64(detector.calibration.platt[name])
    if detector.kinds:
        arrays |= {"kinds.weight": detector.kinds[0], "kinds.bias": np.float64(detector.kinds[1])}
    reals = detector.reals
    order, names = np.argsort(reals.scores, kind="stable"), sorted(set(reals.kind.tolist()))
    arrays |= {f"reals.{field}": getattr(reals, field)[order] for field in ("scores", "weight", "weight_in_all")}
    arrays["reals.kind"] = np.searchsorted(names, reals.kind[order]).astype(np.int16)
    write_bytes(to_bytes({key: np.ascontiguousarray(array) for key, array in arrays.items()}), folder / WEIGHTS_FILE)
    write_json(detector.info | {"real_kinds": names}, folder / INFO_FILE)


def load(model: str) -> Detector:
    """A detector by packaged name or folder.

    Raises:
        ValueError: there is none, or its files do not belong together.
    """
    folder = find(model, INFO_FILE)
    info, arrays = read_json(folder / INFO_FILE), load_file(folder / WEIGHTS_FILE)
    try:
        heads = {name: Head(arrays[f"{name}.weight"], float(arrays[f"{name}.bias"][0])) for name in info["towers"]}
        platt = {name: tuple(arrays[f"{name}.platt"].tolist()) for name in heads}
        *weights, bias = arrays["fusion"].tolist()
        kinds = (arrays["kinds.weight"], arrays["kinds.bias"], tuple(info["kinds"])) if info["kinds"] else None
        kind = np.array(info["real_kinds"])[arrays["reals.kind"]]
        reals = Reals(arrays["reals.scores"], kind, arrays["reals.weight"], arrays["reals.weight_in_all"])
    except (KeyError, IndexError) as error:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} and {INFO_FILE} do not belong together ({error}); fit it again") from error
    return Detector(info["towers"], heads, Calibration(platt, np.array(weights), bias), kinds, reals, info)


def with_info(detector: Detector, **more: Any) -> Detector:
    """The same detector, knowing more about itself."""
    return replace(detector, info=detector.info | more)
