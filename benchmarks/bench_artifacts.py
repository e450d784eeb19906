"""Artifact tags beside their peers, on images that took no part in discovery (part `report`).

    python benchmarks/bench_artifacts.py --model sae-compact --images DIR --manifest DIR/MANIFEST.tsv [--kept DIR] [--quality brisque]

Per kind of damage (severities 3 to 5 against clean pictures) the AUROC of the SAE's tag set (and of the best set that need not spare any
style, `discovered`) beside a linear probe and the difference of means on the same vectors, the best pixel column of the stage `defects`,
and where the tower is a SigLIP-2 its text prompts; the recall that a linear direction keeps when it has to spare the styles too
(`spared`: what the vectors allow); per style family what the tags remove, and what those remove that somebody signed (`signed`). Then the
argument of K2's report: a quality score (BRISQUE, from the package `brisque` 0.2.0: `pip install --no-deps brisque libsvm-official`; no
weights of an aesthetic head can be had offline) removes how much of each style at the recall of damage that the tags have? Appends a JSON
line to benchmarks/results/artifacts.jsonl and draws docs/images/artifacts_vs_aesthetic.png.
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from curation import contrast_set, tag_names
from curation import tag_statistics as statistics
from curation.contrast_set import ContrastSet
from curation.decode import decode
from curation.firing import Fitted, read_fitted
from curation.reviews import table_path
from curation.siglip_text import embed_texts
from curation.stages import defects
from curation.tag_evidence import random_control, together
from curation.tag_select import VISIBLE, Cuts, Rules, Selection, Values, feature_values, greedy, harmless, kinds, score, select
from curation.tags import fires, read_csv
from curation.towers import Siglip, available
from pipelines.run_folder import commit, versions

ROOT = Path(__file__).parents[1]
COMMON = ("jpeg", "watermark", "letterbox", "soft_upscale", "oversharpen", "sensor_noise", "posterise", "screenshot")  # on the web
SAFE = ("motion_blur", "shallow_focus", "film_grain", "vignette", "low_key", "painting", "pixel_art")  # the list of styles
COLUMNS = (
    "blockiness",
    "resampling",
    "rolloff",
    "banding",
    "level_gaps",
    "combing",
    "inset_y",
    "inset_x",
    "clipped_both",
    "clipped_partly",
)


def main(
    model: str,
    images: str,
    manifest: str,
    kept: str | None = None,
    num_pixels: int = 80,
    quality: str | None = None,
    budget: float = 0.005,
    out: Path = ROOT / "benchmarks/results/artifacts.jsonl",
    picture: Path | None = ROOT / "docs/images/artifacts_vs_aesthetic.png",
) -> None:
    """Measure one SAE.

    Args:
        model: Packaged name or folder.
        images: Folder of real pictures.
        manifest: Their TSV.
        kept: Folder for the vectors of the contrast set.
        num_pixels: Pictures of `estimate` and of `report` on which pixel columns and the quality score are computed.
        quality: `brisque` to compare with it.
        budget: As for `k2 sae tag`.
        out: JSON lines to append to.
        picture: Where to draw the comparison with the quality score.
    """
    began = time.process_time()
    known = read_fitted(model)
    fitted, tower = known.sae, known.tower
    only, rules, rng = contrast_set.sources_of(manifest), Rules(budget=budget), np.random.default_rng(0)
    contrast = contrast_set.read(images, tower, only, kept=kept)
    fit, estimate, report = (feature_values(fitted, contrast, part) for part in ("fit", "estimate", "report"))
    selection = select(fit, estimate, rng, rules)
    ours = together(selection, report, rules)
    probes = linear(contrast)
    pixels = {part: Pixels(contrast, part, images, only, num_pixels) for part in ("estimate", "report")}
    columns = by_columns(pixels)
    prompts, unbound = by_prompts(tower, contrast), without_budget(selection, estimate, report, rules)
    spared = sparing(contrast)
    table = {}
    for name, row in ours["damage"].items():
        probe, means = probes[name]
        table[name] = {
            "sae": row["auroc"],
            "probe": probe,
            "means": means,
            "discovered": unbound[name],
            "ratio": round(row["auroc"][0] / probe, 4),
            "pixels": columns.get(name),
            "prompts": prompts.get(name),
            "recall": row["recall"],
            "spared": spared[name],
            "recall_by_severity": row["recall_by_severity"],
            "num_tags": len(row["features"]),
            "seen": bool(probe >= 0.75),
        }
    control = random_control(fitted, contrast, 0, rules)
    result = {
        "model": model,
        "tower": tower.identity,
        "machine": platform.processor() or platform.machine(),
        "commit": commit(),
        "versions": versions(),
        "pictures": {part: int((contrast.part == part).sum()) for part in ("fit", "estimate", "report")},
        "damage": table,
        "common_over_0.9": sum(table[name]["sae"][0] > 0.9 for name in COMMON if name in table),
        "removed": ours["removed"],
        "worst_family": ours["worst_family"],
        "worst_of_the_issue": max((ours["removed"][name]["share"], name) for name in SAFE if name in ours["removed"]),
        "signed": by_signed(known, report),
        "random_sae": {"num_tags": control["num_tags"], "worst_family": control["worst_family"]["share"]},
        "quality": None,
    }
    if quality == "brisque":
        result["quality"] = against_quality(report, selection, pixels["report"], brisque(), picture)
    result["cpu_seconds"] = round(time.process_time() - began, 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(lines(result))


def rows_of(contrast: ContrastSet, part: str, name: str, least: int = 0) -> np.ndarray:
    """(n, d) vectors of a family in a part."""
    numbers = [i for i, family in enumerate(contrast.families) if family.name == name and family.severity >= least]
    vectors = contrast.vectors[contrast.part == part][:, numbers].reshape(-1, contrast.vectors.shape[2])
    return vectors[~np.isnan(vectors[:, 0])]


def linear(contrast: ContrastSet) -> dict[str, tuple[float, float]]:
    """kind -> AUROC on `report` of a probe (standardised logistic regression, strength chosen by folds of `fit`), and of the means."""
    found = {}
    clean, held_out = rows_of(contrast, "fit", "clean"), rows_of(contrast, "report", "clean")
    for name in tqdm(kinds(contrast.families, "damage"), desc="probes"):
        damaged, unseen = rows_of(contrast, "fit", name), rows_of(contrast, "report", name, VISIBLE)
        labels = np.repeat([1, 0], [len(damaged), len(clean)])
        regression = LogisticRegressionCV(Cs=(1e-4, 1e-3, 1e-2), cv=3, scoring="roc_auc", class_weight="balanced", max_iter=300)
        probe = make_pipeline(StandardScaler(), regression).fit(np.concatenate([damaged, clean]), labels)
        along = damaged.mean(0) - clean.mean(0)
        scores = ((probe.decision_function(v), v @ along) for v in (unseen, held_out))
        (probe_up, means_up), (probe_down, means_down) = scores
        found[name] = tuple(round(float(statistics.auroc(u, d)), 4) for u, d in ((probe_up, probe_down), (means_up, means_down)))
    return found


def sparing(contrast: ContrastSet) -> dict[str, dict[str, float]]:
    """kind -> recall on `report`, and the largest share of a harmless family that goes, of one linear direction per kind that had the
    styles of `estimate` among its negatives and stands above all of them: what the vectors allow when styles must stay."""
    names = [name for role in ("clean", "style", "control") for name in kinds(contrast.families, role)]
    known, unseen = ({n: rows for n in names if len(rows := rows_of(contrast, part, n))} for part in ("estimate", "report"))
    negative, found = np.concatenate([*known.values(), rows_of(contrast, "fit", "clean")]), {}
    for name in tqdm(kinds(contrast.families, "damage"), desc="probes that spare styles"):
        damaged = np.concatenate([rows_of(contrast, part, name, VISIBLE) for part in ("fit", "estimate")])
        labels = np.repeat([1, 0], [len(damaged), len(negative)])
        regression = LogisticRegression(C=3e-3, class_weight="balanced", max_iter=300)
        probe = make_pipeline(StandardScaler(), regression).fit(np.concatenate([damaged, negative]), labels)
        cut = max(probe.decision_function(rows).max() for rows in known.values())
        over = {n: float((probe.decision_function(rows) > cut).mean()) for n, rows in unseen.items()}
        recall = float((probe.decision_function(rows_of(contrast, "report", name, VISIBLE)) > cut).mean())
        found[name] = {"recall": round(recall, 4), "worst_family": round(max(over.values()), 4)}
    return found


def without_budget(selection: Selection, estimate: Values, report: Values, rules: Rules) -> dict[str, float]:
    """kind -> AUROC on `report` of the best set of discovered features, were there no styles to spare: what the SAE has to offer."""
    clean, unseen = (part.values[part.named("clean")] for part in (estimate, report))
    found: dict[str, float] = {}
    free = Cuts(clean.mean(0), selection.cuts.scale)
    for name, discovery in selection.discoveries.items():
        chosen = greedy(estimate.values[estimate.named(name, VISIBLE)], clean, discovery.found(rules), free, rules)
        damaged = report.values[report.named(name, VISIBLE)]
        area = statistics.auroc(score(damaged, chosen, free), score(unseen, chosen, free)) if chosen else 0.5
        found[name] = round(float(area), 4)
    return found


class Pixels:
    """The changed pictures of a part, made again: what pixel measures see. `rows` are (uid, family) in the order of `values`."""

    def __init__(self, contrast: ContrastSet, part: str, images: str, only: Any, num: int):
        chosen = np.flatnonzero(contrast.part == part)
        kept_uids = {contrast.uids[i] for i in chosen[np.random.default_rng(0).permutation(len(chosen))[:num]]}
        self.contrast, self.part, self.images, self.only, self.kept_uids = contrast, part, images, only, kept_uids
        self.owner = {contrast.uids[i]: k for k, i in enumerate(chosen)}  # the owner's number in `Values`

    def measured(self, measure: Callable[[np.ndarray, int], Any]) -> dict[tuple[int, int], Any]:
        """(owner, family) -> what `measure` says of the picture and its bytes."""
        found = {}
        for picture in tqdm(contrast_set.pictures(self.images, self.only), desc=f"pixels of {self.part}", total=len(self.only)):
            if picture.uid not in self.kept_uids:
                continue
            image, row = decode(picture.encoded)[0], self.contrast.uids.index(picture.uid)
            for number in np.flatnonzero(~np.isnan(self.contrast.vectors[row, :, 0])):
                family = self.contrast.families[number]
                changed = contrast_set.changed(image, family, contrast_set.generator(picture.uid, family, self.contrast.seed))
                found[self.owner[picture.uid], int(number)] = measure(changed, len(picture.encoded))
        return found


def by_columns(pixels: dict[str, Pixels]) -> dict[str, dict[str, Any]]:
    """kind -> the pixel column (and its sign) that is best on `estimate`, and its AUROC on `report`."""
    measured = {part: p.measured(lambda image, size: [defects.facts(image, size)[name] for name in COLUMNS]) for part, p in pixels.items()}
    families, found = pixels["report"].contrast.families, {}

    def area(part: str, name: str) -> np.ndarray:
        groups: tuple[list, list] = ([], [])
        for (_, number), row in measured[part].items():
            if families[number].name == "clean":
                groups[1].append(row)
            elif families[number].name == name and families[number].severity >= VISIBLE:
                groups[0].append(row)
        return statistics.auroc(*(np.array(group, float).reshape(-1, len(COLUMNS)) for group in groups))

    for name in kinds(families, "damage"):
        known = area("estimate", name)
        if np.isnan(known).any():
            continue
        best = int(np.abs(known - 0.5).argmax())
        value = float(area("report", name)[best])
        found[name] = {"column": COLUMNS[best], "auroc": round(value if known[best] >= 0.5 else 1 - value, 4)}
    return found


def by_signed(known: Fitted, report: Values) -> dict[str, Any]:
    """What the signed tags of the table do on `report`: recall of visible damage, and pictures of each harmless family that go."""
    signed = [tag for tag in read_csv(table_path(known.folder)) if tag.signed and tag.weights == known.weights]
    own = known.sae.threshold.numpy()

    def share(rows: np.ndarray) -> float:
        return round(float(fires(rows + own, signed).mean()), 4)

    recall = {name: share(report.values[report.named(name, VISIBLE)]) for name in kinds(report.families, "damage")}
    removed = {name: [int(fires(rows + own, signed).sum()), len(rows)] for name, rows in harmless(report).items()}
    return {"num_tags": sum(tag.verdict == "artifact" for tag in signed), "recall": recall, "removed": removed}


def by_prompts(tower: Any, contrast: ContrastSet) -> dict[str, float]:
    """kind -> AUROC on `report` of the cosine with a pair of phrases; nothing where the tower has no text."""
    if not isinstance(tower, Siglip) or not available(tower):
        return {}
    found, clean = {}, rows_of(contrast, "report", "clean")
    for name, pair in tag_names.PHRASES.items():
        with_it, without = embed_texts(tower, pair)
        along = with_it / np.linalg.norm(with_it) - without / np.linalg.norm(without)
        scores = ((v / np.linalg.norm(v, axis=1, keepdims=True)) @ along for v in (rows_of(contrast, "report", name, VISIBLE), clean))
        found[name] = round(float(statistics.auroc(*scores)), 4)
    return found


def brisque() -> Callable[[np.ndarray, int], float]:
    """BRISQUE (Mittal et al. 2012), larger is worse; the middle 384 pixels a side of larger pictures, for its cost."""
    from brisque import BRISQUE

    judge = BRISQUE(url=False)
    scale = judge.scale_features
    judge.scale_features = lambda features: scale(
        [np.ravel(x)[0] for x in features]
    )  # 0.2.0 hands arrays to float(), which NumPy 2.4 refuses

    def measure(image: np.ndarray, size: int) -> float:
        height, width = image.shape[:2]
        top, left = max(0, height - 384) // 2, max(0, width - 384) // 2
        value = float(judge.score(image[top : top + 384, left : left + 384]))
        return value if np.isfinite(value) else 200.0  # a flat picture has no statistics: as bad as can be

    return measure


def against_quality(
    report: Values, selection: Selection, pixels: Pixels, measure: Callable[[np.ndarray, int], float], picture: Path | None
) -> dict[str, Any]:
    """At the tags' recall of visible damage of the kinds that they name (and at others): what the quality score and they remove of each
    style."""
    judged = pixels.measured(measure)
    at = {pair: row for row, pair in enumerate(zip(report.owner.tolist(), report.family.tolist(), strict=True))}
    pairs = sorted(pair for pair in judged if pair in at)
    rows = np.array([at[pair] for pair in pairs])
    quality, tagged = np.array([judged[pair] for pair in pairs]), score(report.values[rows], list(selection.features), selection.cuts)
    severity = report.severities(rows)
    names = np.array([report.families[report.family[row]].name for row in rows])
    styles = [name for name in harmless(report) if name in set(names)]
    known = [name for name, chosen in selection.sets.items() if chosen]  # no tag claims to find the other kinds
    damaged = (severity >= VISIBLE) & np.isin(names, known)
    if not damaged.any():
        return {"num_pictures": len({owner for owner, _ in pairs}), "num_damaged": 0}
    deployed = float((tagged[damaged] > 0).mean())

    def at_recall(values: np.ndarray, recall: float) -> dict[str, float]:
        cut = np.quantile(values[damaged], 1 - recall) if recall else np.inf
        return {name: round(float((values[names == name] > cut).mean()), 4) for name in styles}

    recalls = sorted({round(deployed, 4), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6})
    curves = {str(recall): {"tags": at_recall(tagged, recall), "brisque": at_recall(quality, recall)} for recall in recalls}
    result = {
        "num_pictures": len({owner for owner, _ in pairs}),
        "num_damaged": int(damaged.sum()),
        "kinds": known,
        "deployed_recall": round(deployed, 4),
        "at_deployed_recall": curves[str(round(deployed, 4))],
        "by_recall": {key: {who: summary(removed) for who, removed in row.items()} for key, row in curves.items()},
    }
    if picture is not None:
        draw(result, picture)
    return result


def summary(removed: dict[str, float]) -> dict[str, Any]:
    """The mean over the families, and the worst."""
    worst = max(removed, key=removed.__getitem__)
    return {"mean": round(float(np.mean(list(removed.values()))), 4), "worst": removed[worst], "family": worst}


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels: what goes of each style at the tags' own recall, and the mean over styles as the recall rises."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    removed, recall = result["at_deployed_recall"], result["deployed_recall"]
    styles = sorted(removed["brisque"], key=lambda name: removed["brisque"][name])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), width_ratios=(1.3, 1), layout="constrained")
    place = np.arange(len(styles))
    for shift, (who, color) in zip((-0.2, 0.2), (("tags", "#2b6cb0"), ("brisque", "#c05621")), strict=True):
        left.barh(place + shift, [100 * removed[who][name] for name in styles], 0.4, color=color, label=who)
    left.set_yticks(place, [name.replace("_", " ") for name in styles], fontsize=8)
    left.set(xlabel="removed, % of pictures of the family", title=f"What goes at {recall:.0%} recall of visible damage")
    left.set_xlim(0, max(1.0, left.get_xlim()[1]))
    left.legend(loc="lower right")
    levels = sorted(result["by_recall"], key=float)
    for who, color in (("tags", "#2b6cb0"), ("brisque", "#c05621")):
        for part, style in (("mean", "-"), ("worst", "--")):
            values = [100 * result["by_recall"][level][who][part] for level in levels]
            right.plot([100 * float(level) for level in levels], values, style, color=color, label=f"{who}, {part} family")
    right.set(xlabel="recall of visible damage, %", ylabel="removed of what must stay, %", title="Tags and a quality score")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def lines(result: dict[str, Any]) -> str:
    """The result as text."""
    found = [f"{'damage':<17}{'tags':>5}{'SAE':>8}{'all':>8}{'probe':>8}{'ratio':>7}{'means':>8}{'pixels':>8}{'recall':>8}{'spared':>8}"]
    for name, row in result["damage"].items():
        pixel = f"{row['pixels']['auroc']:>8.3f}" if row["pixels"] else f"{'-':>8}"
        cells = f"{row['num_tags']:>5}{row['sae'][0]:>8.3f}{row['discovered']:>8.3f}{row['probe']:>8.3f}"
        cells += f"{row['ratio']:>7.2f}{row['means']:>8.3f}{pixel}"
        cells += f"{row['recall']:>8.3f}{row['spared']['recall']:>8.3f}"
        found.append(f"{name:<17}{cells}" + ("" if row["seen"] else "   the tower hardly sees it"))
    found += [f"{n:<17}{r['removed']:>5} of {r['num']:<5} at most {r['upper']:.2%}" for n, r in result["removed"].items()]
    found.append(f"pictures {result['pictures']}, worst {result['worst_family']}, random SAE {result['random_sae']}")
    found += [f"signed: {json.dumps(result['signed'])}"]
    if result["quality"]:
        found.append(json.dumps(result["quality"].get("by_recall")))
    return "\n".join(found)


if __name__ == "__main__":
    tyro.cli(main)
