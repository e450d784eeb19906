"""From features to proposed tags: discovered on one part of the pictures, cut to a budget on another, measured on a third.

Images (not pairs) are split by their bytes (`tags.part`). On `fit` a feature is discovered for a kind of damage: it begins to fire under
it more often than it stops (exact one-sided McNemar test, Benjamini-Hochberg over the features) and fires the more the stronger the
damage. On `estimate` it gets its threshold, which keeps every harmless family (clean, every style, every control, real art) within the
budget; there it must answer to damage more than to any style, and in most sources. Of what is left each kind takes a greedy set of at
most `set_size` features. `report` takes no part in any choice.

A budget is a claim, and a claim needs pictures: 0.5 % takes 598 per family in `estimate`. With fewer no picture of a family may lie above
the threshold at all, and what that proves is said (`statistics.provable`). A set of tags removes what any of them removes, so that each
threshold also stands `margin` deviations above what its own order statistic asks for.

Values here are a feature's input less its JumpReLU threshold: above zero it fires. Ranks below zero, which codes do not keep, tell how far
a picture is from firing; every threshold of a tag is above zero, so that codes say the same of what is removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import false_discovery_control

from curation import sae
from curation import tag_statistics as statistics
from curation.contrast_set import ContrastSet, Family

VISIBLE = 3  # severities from here on are damage that nobody would keep; recall is reported for each


@dataclass(frozen=True)
class Rules:
    """When a feature becomes a proposal."""

    budget: float = 0.005  # share of each harmless family that may lie above the threshold
    false_discoveries: float = 0.01  # Benjamini-Hochberg, within each kind of damage
    dose: float = 0.1  # least Spearman correlation with the severity, on `fit`
    selectivity: float = 0.0  # AUROC for the damage minus the largest for a style, on `estimate`
    recall: float = 0.005  # least share of visible damage above the threshold, on `estimate`
    reached: float = 0.5  # share of the sources in which it fires at all under the damage
    margin: float = 0.75  # standard deviations (of clean pictures) of a threshold above what the budget asks for
    set_size: int = 8  # features per kind of damage
    gain: float = 0.004  # least gain of AUROC that a further feature of a set must bring


class Values(NamedTuple):
    """The features on the pictures of one part: one row per picture and family that it has."""

    values: np.ndarray  # (R, m) float32: x W_enc + b_enc - threshold
    owner: np.ndarray  # (R,) number of the picture
    family: np.ndarray  # (R,) number of the family
    families: list[Family]
    groups: np.ndarray  # (R,) where the picture comes from

    def named(self, name: str, least: int = 0) -> np.ndarray:
        """(R,) bool: the rows of a family, of damage those of a severity of `least` or more."""
        numbers = [i for i, family in enumerate(self.families) if family.name == name and (family.severity >= least)]
        return np.isin(self.family, numbers)

    def severities(self, rows: np.ndarray) -> np.ndarray:
        return np.array([family.severity for family in self.families])[self.family[rows]]

    def originals(self, rows: np.ndarray) -> np.ndarray:
        """(R,) bool -> numbers of the clean rows of the same pictures, in their order."""
        clean = np.flatnonzero(self.named("clean"))
        return clean[np.searchsorted(self.owner[clean], self.owner[rows])]


def kinds(families: Sequence[Family], role: str) -> list[str]:
    """The names of the families of a role, in order."""
    return list(dict.fromkeys(family.name for family in families if family.role == role))


def feature_values(model: sae.Sae, contrast: ContrastSet, part: str) -> Values:
    """All features on one part of a contrast set."""
    chosen = np.flatnonzero(contrast.part == part)
    vectors = contrast.vectors[chosen]
    owner, family = np.nonzero(~np.isnan(vectors[:, :, 0]))
    rows = torch.from_numpy(vectors[owner, family])
    values = np.concatenate([(piece @ model.w_enc + (model.b_enc - model.threshold)).numpy() for piece in rows.split(4096)])
    return Values(values, owner, family, contrast.families, contrast.groups[chosen][owner])


def harmless(values: Values) -> dict[str, np.ndarray]:
    """family -> (n, m): clean pictures, styles, controls, real art; families without a picture are left out."""
    names = [name for role in ("clean", "style", "control") for name in kinds(values.families, role)]
    return {name: found for name in names if len(found := values.values[values.named(name)])}


class Discovery(NamedTuple):
    """What one kind of damage does to the features (m,) on `fit`."""

    gained: np.ndarray
    lost: np.ndarray
    adjusted: np.ndarray  # p after Benjamini-Hochberg
    dose: np.ndarray

    def found(self, rules: Rules) -> np.ndarray:
        """Numbers of the features that pass."""
        return np.flatnonzero((self.adjusted <= rules.false_discoveries) & (self.dose >= rules.dose))


def discover(fit: Values, damage: str, exchange: np.random.Generator | None = None) -> Discovery:
    """Exact tests of one kind of damage. With `exchange` the two pictures of a random half of the pairs change places: what is then
    discovered is a false discovery."""
    rows = fit.named(damage)
    before, after = fit.values[fit.originals(rows)], fit.values[rows]
    levels = fit.severities(rows)
    from_dose, to_dose = np.zeros(len(levels)), levels
    if exchange is not None:
        swap = exchange.random(len(levels)) < 0.5
        before, after = np.where(swap[:, None], after, before), np.where(swap[:, None], before, after)
    gained, lost, p = statistics.mcnemar(before, after)
    dose = statistics.dose(np.concatenate([before, after]), np.concatenate([from_dose, to_dose]))
    return Discovery(gained, lost, false_discovery_control(p), dose)


def score(values: np.ndarray, features: Sequence[int], cuts: "Cuts") -> np.ndarray:
    """(n, m) -> (n,): how many deviations the strongest of a set of features stands above its threshold; above 0 the set removes."""
    chosen = list(features)
    return ((values[:, chosen] - cuts.at[chosen]) / cuts.scale[chosen]).max(1) if chosen else np.full(len(values), -np.inf)


class Cuts(NamedTuple):
    """Thresholds of all features, in the terms of `Values`."""

    at: np.ndarray  # (m,), above 0
    scale: np.ndarray  # (m,) standard deviation on clean pictures


def cuts_of(estimate: Values, rules: Rules) -> Cuts:
    """What the budget asks for, with its margin; never below the feature's own threshold."""
    scale = np.maximum(estimate.values[estimate.named("clean")].std(0), 1e-6)
    return Cuts(np.maximum(statistics.thresholds(harmless(estimate), rules.budget) + rules.margin * scale, 1e-6), scale)


class Selection(NamedTuple):
    """Proposed sets and what was looked at on the way."""

    sets: dict[str, list[int]]  # kind of damage -> features
    cuts: Cuts
    discoveries: dict[str, Discovery]
    funnel: dict[str, dict[str, Any]]

    @property
    def features(self) -> dict[int, list[str]]:
        """feature -> the kinds of damage in whose sets it is."""
        found: dict[int, list[str]] = {}
        for kind, features in self.sets.items():
            for feature in features:
                found.setdefault(feature, []).append(kind)
        return dict(sorted(found.items()))


def select(fit: Values, estimate: Values, rng: np.random.Generator, rules: Rules = Rules()) -> Selection:
    """The protocol. `rng` draws the exchanged pairs of the null control."""
    cuts, style = cuts_of(estimate, rules), worst_style(estimate)
    clean, discoveries, sets, funnel = estimate.values[estimate.named("clean")], {}, {}, {}
    for kind in kinds(fit.families, "damage"):
        found = discoveries[kind] = discover(fit, kind)
        rows = estimate.named(kind, VISIBLE)
        damaged = estimate.values[rows]
        passed = found.found(rules)
        area = statistics.auroc(damaged[:, passed], clean[:, passed])
        selective = area - style[passed] >= rules.selectivity
        recalled = (damaged[:, passed] > cuts.at[passed]).mean(0) >= rules.recall
        reached = [statistics.reach(damaged[:, f] > 0, estimate.groups[rows])["reached"] >= rules.reached for f in passed]
        left = passed[selective & recalled & np.array(reached, bool)]
        sets[kind] = greedy(damaged, clean, left, cuts, rules)
        funnel[kind] = {
            "pairs": int(found.gained.size and fit.named(kind).sum()),
            "discovered": len(passed),
            "discovered_in_exchanged_pairs": len(discover(fit, kind, rng).found(rules)),
            "selective": int(selective.sum()),
            "candidates": len(left),
            "chosen": sets[kind],
        }
    return Selection(sets, cuts, discoveries, funnel)


def worst_style(values: Values) -> np.ndarray:
    """(m,) the largest AUROC that any style or control has against clean pictures."""
    clean, families = values.values[values.named("clean")], harmless(values)
    return np.max([np.full(clean.shape[1], 0.5), *(statistics.auroc(v, clean) for name, v in families.items() if name != "clean")], axis=0)


def greedy(damaged: np.ndarray, clean: np.ndarray, candidates: np.ndarray, cuts: Cuts, rules: Rules) -> list[int]:
    """Features of a set, the best first: each adds most to the mean of AUROC and recall of what the set says (Efroymson's forward step)."""
    chosen: list[int] = []
    best, strong, weak = 0.25, np.full(len(damaged), -np.inf), np.full(len(clean), -np.inf)
    high, low = ((rows[:, candidates] - cuts.at[candidates]) / cuts.scale[candidates] for rows in (damaged, clean))
    while len(chosen) < min(rules.set_size, len(candidates)):
        up, down = np.maximum(high, strong[:, None]), np.maximum(low, weak[:, None])
        worth = (statistics.auroc(up, down) + (up > 0).mean(0)) / 2
        at = int(worth.argmax())
        if worth[at] < best + rules.gain:
            break
        best, strong, weak = float(worth[at]), up[:, at], down[:, at]
        chosen.append(int(candidates[at]))
    return chosen
