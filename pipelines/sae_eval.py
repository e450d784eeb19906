"""`k2 sae eval`: what a sparse autoencoder keeps, how sparse it is, and whether its features mean something."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation import firing, sae, sae_eval
from curation.firing import Firing, read_fitted
from curation.labelled import read_manifest
from curation.sae_eval import MATCHED, NEIGHBOURS, ROWS
from curation.tags import PARTS
from curation.towers import Siglip

WORDS = {
    "num_rows": "images",
    "explained_variance": "explained variance, about the mean of these images",
    "explained_variance_top_k": "the same, of the k largest values only",
    "l0": "features that fire on an image (L0)",
    "never_fires": "share of features that never fire here",
    "dense": "share that fires on over 10 % of the images",
    "monosemanticity": "monosemanticity, mean over features (0 chance, 1 all alike)",
    "neighbours_kept": f"share of the {NEIGHBOURS} nearest neighbours kept after reconstruction",
    "answers_kept": "share of zero-shot answers kept after reconstruction",
}


def evaluate(
    model: str,
    images: str | None = None,
    manifest: str | None = None,
    run: str | None = None,
    other: tuple[str, ...] = (),
    contrast: str | None = None,
    texts: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Explained variance, sparsity, silent features, monosemanticity and what reconstruction keeps, by part of the images; a table
    and one JSON line.

    Args:
        model: Packaged name (sae-compact) or folder.
        images: Folder, tars or Parquet.
        manifest: With --images, a TSV as for `k2 sae tag`; only its real images are used.
        run: An annotated run with the vectors of this tower instead.
        other: SAEs of other seeds on the same tower: which features come back?
        contrast: Folder in which `k2 sae tag --kept` keeps vectors of damaged pictures; adds the table of damage against a linear
            probe and a difference of means. Needs --images.
        texts: A file with one class per line ("a photo of a dog"): adds the zero-shot answers that are kept. SigLIP-2 towers only, and
            never run here with the published weights.
        device: cpu or cuda, for the tower.
        seed: Of the contrast set, as given to `k2 sae tag`.
    """
    if (run is None) == (images is None):
        raise ValueError("give --images (a source) or --run (an annotated run folder), and not both")
    if contrast is not None and images is None:
        raise ValueError("--contrast goes with --images: the kept vectors belong to the images that they were made of")
    fitted = read_fitted(model)
    if texts is not None and not isinstance(fitted.tower, Siglip):
        raise ValueError(f"--texts needs a tower that reads texts, a SigLIP-2; {model} was fitted on {fitted.tower.identity}")
    others = {name: read_fitted(name) for name in other}
    for name, one in others.items():
        if one.tower.identity != fitted.tower.identity:
            raise ValueError(f"--other {name} was fitted on {one.tower.identity}, {model} on {fitted.tower.identity}: nothing to compare")
    only = {row["path"] for row in read_manifest(manifest) if row["label"] == "real"} if manifest else None
    looked = firing.of_run(fitted, run) if run else firing.of_images(fitted, images, device, only=only)
    if looked.vectors is None:
        raise ValueError(f"{run} holds codes and no vectors of {fitted.tower.name}: what an SAE loses cannot be seen in its codes")
    words = text_vectors(fitted.tower, texts, device) if texts else None
    figures: dict[str, Any] = {name: of_part(looked, name, words) for name in PARTS if (looked.parts == name).sum() > 1}
    report = {"model": model, **figures}
    rows = looked.vectors[:: max(1, len(looked.uids) // ROWS)].astype(np.float32)
    if others:
        report["stability"] = {name: sae_eval.stability(fitted.sae, one.sae, rows) for name, one in others.items()}
    if contrast is not None:
        from curation import contrast_set

        of_kinds = contrast_set.sources_of(manifest) if manifest else None
        report["artifacts"] = sae_eval.artifacts(fitted.sae, contrast_set.read(images, fitted.tower, of_kinds, device, seed, contrast))
    show(figures, report)
    print(json.dumps(report))
    return 0


def text_vectors(tower: Siglip, path: str, device: str) -> np.ndarray:
    """(classes, d) of the lines of a file."""
    from curation.siglip_text import embed_texts

    return embed_texts(tower, [line.strip() for line in Path(path).read_text().splitlines() if line.strip()], device)


def of_part(looked: Firing, name: str, texts: np.ndarray | None) -> dict[str, Any]:
    """The figures of the images of one part, fit, estimate or report."""
    model = looked.fitted.sae
    k = int(model.metadata.get("training", {}).get("k", 32))
    rows = looked.vectors[looked.parts == name].astype(np.float32)
    found = sae_eval.measure(model, rows[:65536], k)
    rows = rows[:ROWS]
    scores = sae_eval.monosemanticity(sae.activations(model, torch.from_numpy(rows)).numpy(), rows)
    found["monosemanticity"] = round(float(np.nanmean(scores)), 4) if np.isfinite(scores).any() else None
    rebuilt = sae_eval.rebuild(model, rows)
    found["neighbours_kept"] = round(sae_eval.neighbours_kept(rows, rebuilt), 4) if len(rows) > NEIGHBOURS else None
    if texts is not None:
        found["answers_kept"] = round(sae_eval.answers_kept(rows, rebuilt, texts), 4)
    return found


def show(figures: dict[str, dict[str, Any]], report: dict[str, Any]) -> None:
    """The tables."""
    print(f"{'':<66}" + "".join(f"{name:>10}" for name in figures))
    for key, words in WORDS.items():
        if any(key in part for part in figures.values()):
            cells = ("none" if part.get(key) is None else f"{part[key]:,}" for part in figures.values())
            print(f"{words:<66}" + "".join(f"{cell:>10}" for cell in cells))
    for name, found in report.get("stability", {}).items():
        print(f"\nagainst {name}: {found['matched']:.1%} of the features come back (correlation of activations at least {MATCHED}),")
        print(f"mean correlation {found['mean_correlation']}, mean cosine of their decoder rows {found['mean_decoder_cosine']}")
    if "artifacts" in report:
        print(f"\n{'AUROC against clean, on report':<32}{'one feature':>12}{'8 features':>12}{'probe':>12}{'means':>12}")
        for damage, row in report["artifacts"].items():
            print(f"{damage:<32}" + "".join(f"{row[key]:>12.3f}" for key in ("feature", "features", "probe", "means")))
    print()
