"""`k2 sae tag`: from the features of a fitted SAE to proposed tags with their evidence."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from curation import contrast_set, sae, tag_names, tags
from curation.decode import decode
from curation.firing import read_fitted
from curation.fitted import check_identity
from curation.shards import write_json
from curation.siglip_text import embed_texts
from curation.tag_evidence import concepts_of, evidence, random_control, stability_of, together
from curation.tag_natural import confirm
from curation.tag_select import Rules, Selection, Values, feature_values, select
from curation.tag_statistics import provable
from curation.towers import Siglip, Tower, available

SHOWN = 9  # images of each kind that a vision-language model sees for one name


def tag(
    model: str,
    images: str,
    manifest: str | None = None,
    run: str | None = None,
    others: tuple[str, ...] = (),
    budget: float = 0.005,
    kept: str | None = None,
    vlm: str | None = None,
    vlm_model: str = "default",
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Propose tags: features that answer to damage and not to style. Writes MODEL.tags.csv and MODEL/tags.json.

    Every image is shown as it is, damaged in fifteen ways and five severities, restyled and merely handled; features are discovered on one
    part of the images, cut on a second and measured on a third. Proposals remove nothing until a person signs them (`k2 sae review`).

    Args:
        model: Packaged name (sae-compact) or folder of the SAE.
        images: Folder, tars or Parquet of real pictures; 500 cost about 10 CPU minutes with EfficientNet.
        manifest: TSV as for `k2 synthetic fit`: only its real images are used, with their sources and kinds; art, illustrations and
            renders are style families of their own.
        run: An annotated and deduplicated run: its duplicates confirm the tags, best copy against worst.
        others: SAEs fitted on the same data with other seeds or widths; a feature that they lack is not stable.
        budget: Largest share of clean pictures, and of every style, that a tag may remove; with few pictures what they prove.
        kept: Folder for the vectors: the same command again does only what is missing.
        vlm: Base URL of a server that speaks OpenAI's chat completions: a vision-language model proposes names.
        vlm_model: The model's name there; its key is read from OPENAI_API_KEY.
        device: cpu or cuda, for the tower.
        seed: Of the transforms and the controls.
    """
    rules = Rules(budget=budget)
    known = read_fitted(model)
    fitted, tower, folder, weights = known.sae, known.tower, known.folder, known.weights
    rivals = [_other(name, fitted.metadata["tower"]) for name in others]
    only = contrast_set.sources_of(manifest) if manifest else None
    contrast = contrast_set.read(images, tower, only, device, seed, kept)
    fit, estimate, report = (feature_values(fitted, contrast, part) for part in tags.PARTS)
    selection, own = select(fit, estimate, np.random.default_rng(seed), rules), fitted.threshold.numpy()
    rows = [
        tags.Tag(
            folder.name, feature, "+".join(names), "artifact", float(own[feature] + selection.cuts.at[feature]), "", tower.identity, weights
        )
        for feature, names in selection.features.items()
    ]
    named = names_by_text(fitted, tower, list(selection.features))
    if vlm is not None:
        for feature, found in names_by_looking(
            tag_names.Endpoint(vlm, vlm_model, os.environ.get("OPENAI_API_KEY", "")), selection, contrast, report, images, only
        ).items():
            named.setdefault(feature, []).append(found)
    stability = stability_of(fitted, rivals, contrast, list(selection.features))
    written = {
        "command": command(model, images, manifest, run, others, budget, seed),
        "model": folder.name,
        "tower": tower.identity,
        "weights": weights,
        "rules": asdict(rules),
        "pictures": {part: int((contrast.part == part).sum()) for part in tags.PARTS},
        "features": evidence(selection, report, stability, concepts_of(contrast, "report", seed), named, own),
        "funnel": selection.funnel,
        "report": together(selection, report, rules),
        "random_sae": random_control(fitted, contrast, seed, rules),
        "natural_pairs": confirm(run, rows) if run else None,
    }
    tags.write_csv(rows, folder.parent / f"{folder.name}.tags.csv")
    write_json(written, folder / "tags.json")
    print(table(written), file=sys.stderr)
    worst = written["report"]["worst_family"]
    print(
        json.dumps(
            {"out": f"{folder}.tags.csv", "num_tags": len(rows), "worst_family": worst, "random_tags": written["random_sae"]["num_tags"]}
        )
    )
    return 0


def table(written: dict[str, Any]) -> str:
    """The evidence as lines of text."""
    lines = [f"{'damage':<18}{'discovered':>11}{'by chance':>11}{'tags':>6}{'AUROC':>8}{'recall':>8}"]
    for name, row in written["funnel"].items():
        measured = written["report"]["damage"].get(name)
        figures = f"{measured['auroc'][0]:>8.3f}{measured['recall']:>8.3f}" if measured else f"{'-':>8}{'-':>8}"
        lines.append(f"{name:<18}{row['discovered']:>11}{row['discovered_in_exchanged_pairs']:>11}{len(row['chosen']):>6}{figures}")
    lines.append(f"\n{'must stay':<18}{'pictures':>11}{'removed':>11}{'at most':>14}")
    for name, row in written["report"]["removed"].items():
        lines.append(f"{name:<18}{row['num']:>11}{row['removed']:>11}{row['upper']:>14.2%}")
    num, budget = written["pictures"]["estimate"], written["rules"]["budget"]
    if provable(num, budget) > budget:
        lines.append(f"\n{num} pictures in `estimate` prove a budget of {provable(num, budget):.2%} per family, not {budget:.2%}")
    return "\n".join(lines)


def names_by_text(fitted: sae.Sae, tower: Tower, features: list[int]) -> dict[int, list[dict[str, Any]]]:
    """feature -> the nearest phrases by the tower's own text tower; nothing for towers without one."""
    if not isinstance(tower, Siglip) or not available(tower) or not features:
        return {}
    names = list(tag_names.PHRASES)
    phrases = embed_texts(tower, [text for name in names for text in tag_names.PHRASES[name]])
    nearest = tag_names.by_text(fitted.w_dec[features].numpy(), phrases.reshape(len(names), 2, -1), names)
    return {f: [{"name": name, "by": "text", "cosine": cosine} for name, cosine in row] for f, row in zip(features, nearest, strict=True)}


def names_by_looking(
    endpoint: tag_names.Endpoint,
    selection: Selection,
    contrast: contrast_set.ContrastSet,
    report: Values,
    images: str,
    only: Any,
) -> dict[int, dict[str, Any]]:
    """feature -> the name that a vision-language model gives to its strongest images against near misses, with the name's score."""
    uids = [uid for uid, part in zip(contrast.uids, contrast.part, strict=True) if part == "report"]
    encoded = {p.uid: p.encoded for p in contrast_set.pictures(images, only) if p.uid in set(uids)}

    def remade(row: int) -> np.ndarray:
        uid, family = uids[report.owner[row]], report.families[report.family[row]]
        return contrast_set.changed(decode(encoded[uid])[0], family, contrast_set.generator(uid, family, contrast.seed))

    found = {}
    for feature in selection.features:
        values, cut = report.values[:, feature], float(selection.cuts.at[feature])
        order = np.argsort(-values, kind="stable")
        above, below = order[values[order] > cut][:SHOWN], order[values[order] <= cut][:SHOWN]
        if min(len(above), len(below)) < SHOWN:
            print(f"feature {feature} has only {len(above)} images above its threshold; it gets no name", file=sys.stderr)
            continue
        found[feature] = tag_names.by_looking(endpoint, [remade(row) for row in above], [remade(row) for row in below])
    return found


def _other(name: str, tower: str) -> sae.Sae:
    other = sae.load(name)
    check_identity(name, other.metadata.get("tower", "a tower that its cfg.json does not name"), tower, "sae")
    return other


def command(model: str, images: str, manifest: str | None, run: str | None, others: Sequence[str], budget: float, seed: int) -> str:
    """The command that makes these very tags."""
    words = ["k2", "sae", "tag", "--model", str(Path(model)), "--images", images]
    words += [*(["--manifest", manifest] if manifest else []), *(["--run", run] if run else []), *(["--others", *others] if others else [])]
    return shlex.join([*words, "--budget", str(budget), "--seed", str(seed)])
