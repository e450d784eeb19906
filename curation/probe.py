"""A linear head on a tower's vectors: a ridge classifier, scored on groups that it did not see, and made into log odds.

    log odds = slope * (x . weight + bias) + intercept

The head is linear discriminant analysis with a covariance that is shrunk towards its diagonal (Friedman 1989; the same as ridge
regression on the labels): it is solved from sums over images, so that leaving a group out is a subtraction and not another fit. On
our images it is as good as a logistic regression (docs/log.md). Standardisation is folded into `weight` and `bias`. `slope` and
`intercept` are Platt's scaling (Platt 1999), fitted on scores of images whose own generator or source was left out: in-fold scores are
over-confident. All fits weigh the two classes equally, so the log odds are those at a prior of one half; at another prior add its.

An image may be seen in several views (whole, in crops): a head is fitted on all of them, and an image with many counts no more than one
with few. Within a class a group counts by the square root of its size: a source of a million images must not be all that a head
knows, and one of twelve must not count like it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

FOLDS = 5
STRENGTHS = (0.1, 0.3, 1.0, 3.0)


class Head(NamedTuple):
    """A linear function of a raw vector."""

    weight: np.ndarray  # (d,) float32
    bias: float


class Labels(NamedTuple):
    """What is known of N images; every array has N entries."""

    synthetic: np.ndarray  # bool
    group: np.ndarray  # str: the generator of a synthetic image, the source of a real one
    kind: np.ndarray  # str: photo, illustration ... of real images; whatever the manifest says

    def at(self, index: np.ndarray) -> "Labels":
        """Those of some images: a mask or indices."""
        return Labels(*(column[index] for column in self))


class Sums(NamedTuple):
    """Weighted sums over images, of the real class and of the generated one."""

    weight: np.ndarray  # (2,)
    first: np.ndarray  # (2, d)
    second: np.ndarray  # (2, d, d)

    def less(self, other: "Sums") -> "Sums":
        """Without the images of `other`."""
        return Sums(self.weight - other.weight, self.first - other.first, self.second - other.second)


def fit_linear(vectors: np.ndarray, labels: Labels, strength: float) -> Head:
    """The head of all images.

    Args:
        vectors: (N, V, d), one per view; rows of NaN are views that an image does not have.
        labels: Of the N images.
        strength: Of the shrinkage: how much of the variances is added to the diagonal of the covariance.
    """
    return next(iter(heads_without([np.zeros(len(vectors), bool)], vectors, labels, (strength,))))[0]


def heads_without(held_out: Iterable[np.ndarray], vectors: np.ndarray, labels: Labels, strengths: Sequence[float]) -> Iterator[list[Head]]:
    """The heads, one per strength, of all images but those of each mask (N,)."""
    there = ~np.isnan(vectors[:, :, 0])
    mean, scale = np.nanmean(vectors, (0, 1)), np.nanstd(vectors, (0, 1))
    scale[scale == 0] = 1.0
    weights = image_weights(labels) / np.maximum(there.sum(1), 1)

    def sums(rows: np.ndarray) -> Sums:
        parts = []
        for label in (False, True):
            chosen = rows & (labels.synthetic == label)
            seen = there[chosen]
            x = ((vectors[chosen][seen] - mean) / scale).astype(np.float32)
            weight = np.broadcast_to(weights[chosen, None], seen.shape)[seen].astype(np.float32)
            parts.append((weight.sum(dtype=np.float64), weight @ x, (x * weight[:, None]).T @ x))
        return Sums(*(np.array(part, np.float64) for part in zip(*parts, strict=True)))

    every = sums(np.ones(len(vectors), bool))
    for mask in held_out:
        yield [_solved(every.less(sums(mask)) if mask.any() else every, strength, mean, scale) for strength in strengths]


def _solved(sums: Sums, strength: float, mean: np.ndarray, scale: np.ndarray) -> Head:
    """Both classes with the same weight, whatever is left of them."""
    real, fake = sums.first / sums.weight[:, None]
    middle = (real + fake) / 2
    covariance = (sums.second / sums.weight[:, None, None]).mean(0) - np.outer(middle, middle)
    spread = np.diag(covariance).clip(1e-6)
    weight = np.linalg.solve(covariance + np.diag(strength * spread + 1e-6), (fake - real) / 2) / scale
    return Head(weight.astype(np.float32), float(-(weight * (middle * scale + mean)).sum()))


def image_weights(labels: Labels) -> np.ndarray:
    """(N,) of mean 1: both classes the same total, a group in proportion to the square root of its size, its images alike."""
    weights = np.zeros(len(labels.group))
    for label in (True, False):
        mask = labels.synthetic == label
        _, index, counts = np.unique(labels.group[mask], return_inverse=True, return_counts=True)
        weights[mask] = 1 / np.sqrt(counts[index])
        weights[mask] *= len(weights) / 2 / weights[mask].sum() if mask.any() else 1
    return weights


def linear_scores(vectors: np.ndarray, head: Head) -> np.ndarray:
    """(..., d) -> (...) float64 before calibration. Summed row by row, so a row's score does not depend on its batch."""
    return (vectors.astype(np.float64) * head.weight.astype(np.float64)).sum(-1) + head.bias


def choose_strength(vectors: np.ndarray, labels: Labels, num_train: int, seed: int) -> tuple[float, dict[str, float]]:
    """The C of the best AUROC when whole generators and sources are held out together (5 folds), and the AUROC of each.

    The AUROC is a mean over the views, so that one on which the classes differ by their sizes does not decide alone.
    """
    folds = group_folds(labels, seed)
    scores = {strength: np.full((len(vectors), num_train), np.nan) for strength in STRENGTHS}
    for mask, heads in zip(folds, heads_without(folds, vectors[:, :num_train], labels, STRENGTHS), strict=True):
        for strength, head in zip(STRENGTHS, heads, strict=True):
            scores[strength][mask] = linear_scores(vectors[mask, :num_train], head)
    tried = {}
    for strength, found in scores.items():
        tried[strength] = float(np.mean([_auroc(found[:, view], labels.synthetic) for view in range(num_train)]))
    return max(tried, key=tried.get), {str(strength): round(value, 4) for strength, value in tried.items()}


def group_folds(labels: Labels, seed: int, num: int = FOLDS) -> list[np.ndarray]:
    """Masks (N,) that deal whole groups into `num` folds, each with generators and sources, of like numbers of images."""
    rng, fold_of = np.random.default_rng(seed), {}
    for label in (True, False):
        names, counts = np.unique(labels.group[labels.synthetic == label], return_counts=True)
        order = rng.permutation(len(names))
        load = np.zeros(num)
        for i in order[np.argsort(-counts[order], kind="stable")]:
            fold = int(load.argmin())
            fold_of[label, names[i]], load[fold] = fold, load[fold] + counts[i]
    assigned = np.array([fold_of[pair] for pair in zip(labels.synthetic.tolist(), labels.group.tolist(), strict=True)])
    return [assigned == fold for fold in range(num) if (assigned == fold).any()]


def fold_scores(vectors: np.ndarray, labels: Labels, held_out: Iterable[np.ndarray], num_train: int, strength: float) -> np.ndarray:
    """Scores (N, V) of each image by the head of the mask that left it out; NaN for a missing view. The first `num_train` views train."""
    scores, masks = np.full(vectors.shape[:2], np.nan), list(held_out)
    for mask, (head,) in zip(masks, heads_without(masks, vectors[:, :num_train], labels, (strength,)), strict=True):
        scores[mask] = linear_scores(vectors[mask], head)
    return scores


def leave_one_group_out(vectors: np.ndarray, labels: Labels, num_train: int, strength: float) -> np.ndarray:
    """Scores (N, V) of each image by a head that saw neither its generator nor its source."""
    masks = [labels.group == name for name in np.unique(labels.group)]
    return fold_scores(vectors, labels, masks, num_train, strength)


def platt(scores: np.ndarray, synthetic: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the log odds in the score; two parameters, as isotonic steps would follow single sources here.

    The slope is 0 where the scores do not rise with the label.
    """
    (slope,), intercept = combine(scores[:, None], synthetic, weights)
    return float(slope), intercept


def combine(log_odds: np.ndarray, synthetic: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Weighted logistic regression with coefficients >= 0 and no penalty -> ((k,) coefficients, intercept).

    Evidence that unseen groups show to be useless gets 0; none counts against itself, which is how a regression on few groups goes
    wrong. The targets are Platt's, (n + 1) / (n + 2) in place of 1, so that perfect separation has a finite answer.

    Args:
        log_odds: (N, k) out of fold.
        synthetic: (N,) bool.
        weights: (N,).
    """
    num = {label: max(int((synthetic == label).sum()), 1) for label in (True, False)}
    target = np.where(synthetic, (num[True] + 1) / (num[True] + 2), 1 / (num[False] + 2))
    weights = weights / weights.sum()
    scale = log_odds.std(0)
    scale[scale == 0] = 1.0
    log_odds = log_odds / scale  # scores of a strongly regularised head are tiny, and the optimiser stops at a small slope

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = log_odds @ parameters[:-1] + parameters[-1]
        slack = weights * (expit(z) - target)
        return float(weights @ (np.logaddexp(0, z) - target * z)), np.append(log_odds.T @ slack, slack.sum())

    k = log_odds.shape[1]
    start = np.append(np.full(k, 1 / k), 0.0)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * k + [(None, None)], options={"ftol": 1e-12})
    return found.x[:-1] / scale, float(found.x[-1])


def _auroc(scores: np.ndarray, synthetic: np.ndarray) -> float:
    there = ~np.isnan(scores)
    both = there.any() and len(np.unique(synthetic[there])) == 2
    return float(roc_auc_score(synthetic[there], scores[there])) if both else 0.5


def clopper_pearson(hits: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share (Clopper and Pearson 1934); (0, 1) of nothing."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, hits, num - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, num - hits)) if hits < num else 1.0
    return low, high


def to_prior(probability: np.ndarray, prior: float) -> np.ndarray:
    """A probability at a prior of one half, at another prior: its log odds are added (docs/policies.md has it as SQL)."""
    return expit(logit(probability) + logit(prior))
