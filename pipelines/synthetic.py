"""`k2 synthetic`: fit and evaluate the AI-generated probe of the synthetic stage."""

import csv
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from curation import detector
from curation.decode import DecodeError, decode_for
from curation.detector import Rows
from curation.fitted import check_identity, out_dir, parse_tower, tower_spec
from curation.shards import file_hash
from curation.towers import Tower, loaded
from pipelines.cli import call

COLUMNS = ("path", "label", "generator_or_source", "kind")


def fit(images: str, manifest: str, tower: str, out: str, device: str = "cpu", seed: int = 0) -> int:
    """Fit a probe on labelled images, calibrate and judge it on generators and sources that it did not see.

    Args:
        images: Folder that the manifest's paths are relative to.
        manifest: TSV with the columns path, label (real or synthetic), generator_or_source, kind. Other labels are left out.
        tower: effnet, compact or siglip[:MODEL[:PRETRAINED]].
        out: Folder to write, or a bare name: a folder in curation/weights, which ships with the package.
        device: cpu or cuda, for the tower.
        seed: Of the folds.
    """
    chosen, folder = parse_tower(tower), out_dir(out)
    rows, bad = read_rows(images, manifest, chosen, device)
    with threadpool_limits(1):  # small problems: one thread is the fastest, and gives the same numbers on every machine
        probe = detector.fit(rows, chosen.identity, seed)
    real = ~rows.synthetic
    data = {
        "manifest": file_hash(manifest),
        "num_real": int(real.sum()),
        "num_synthetic": int(rows.synthetic.sum()),
        "num_undecodable": bad,
        "sources": len(np.unique(rows.group[real])),
        "generators": len(np.unique(rows.group[rows.synthetic])),
    }
    command = ["k2", "synthetic", "fit", "--images", images, "--manifest", manifest, "--tower", tower, "--out", out, "--seed", str(seed)]
    probe = replace(probe, info=probe.info | {"tower_spec": tower_spec(chosen), "data": data, "command": shlex.join(command)})
    detector.save(probe, folder)
    print_fit(probe.info["evaluation"], probe.info["thresholds"])
    print(json.dumps({"out": str(folder), "data": data, "disjoint": probe.info["evaluation"]["disjoint"].get("mean")}))
    return 0


def evaluate(model: str, images: str, manifest: str, device: str = "cpu") -> int:
    """Score labelled images with a fitted probe: a table per generator and real source, then one JSON line.

    Args:
        model: Packaged name (synthetic-effnet, synthetic-compact) or folder.
        images: Folder that the manifest's paths are relative to.
        manifest: TSV as for fit.
        device: cpu or cuda, for the tower.
    """
    probe = detector.load(model)
    tower = parse_tower(probe.info["tower_spec"])
    check_identity(model, probe.info["tower"], tower.identity, "synthetic")
    rows, bad = read_rows(images, manifest, tower, device)
    result = detector.report(detector.predict(probe, rows.vectors, tower.identity), rows, probe.info["thresholds"])
    seen = file_hash(manifest) == probe.info["data"]["manifest"]
    print_shares(result)
    if seen:
        print("\nThese are the images that the probe was fitted on: the figures above flatter it. On generators and sources unseen:")
    else:
        print("\nWhen it was fitted, on generators and sources unseen:")
    print_fit(probe.info["evaluation"], probe.info["thresholds"])
    result |= {
        "model": model,
        "fitted_on_these": seen,
        "num_undecodable": bad,
        "disjoint": probe.info["evaluation"]["disjoint"].get("mean"),
    }
    print(json.dumps(result))
    return 0


def read_rows(images: str, manifest: str, tower: Tower, device: str) -> tuple[Rows, int]:
    """The labelled images of a manifest as vectors, and how many could not be decoded.

    Raises:
        ValueError: columns or labels are missing, or no image is there.
    """
    entries = list(read_manifest(manifest))
    encode, vectors, kept, bad = loaded(tower, device), [], [], 0
    for entry in tqdm(entries, desc=tower.name, unit="image", file=sys.stderr):
        path = Path(images) / entry["path"]
        try:
            header, view, pixels = decode_for(path.read_bytes(), tower.reads)  # as far as `k2 annotate` decodes for this tower
        except (DecodeError, FileNotFoundError) as error:
            bad += 1
            print(f"left out {path}: {error}", file=sys.stderr)
            continue
        vectors.append(encode([view if pixels is None else pixels]).pooled[0])
        kept.append((entry["label"] == "synthetic", entry["generator_or_source"], entry["kind"], header.width * header.height / 1e6))
    if not kept:
        raise ValueError(f"none of the {len(entries)} images of {manifest} could be read under {images}; is --images the right folder?")
    synthetic, group, kind, area = (np.array(column) for column in zip(*kept, strict=True))
    return Rows(np.stack(vectors), synthetic, group, kind, area), bad


def read_manifest(manifest: str) -> Iterator[dict[str, str]]:
    """The rows labelled real or synthetic.

    Raises:
        ValueError: a column is missing, or no row has such a label.
    """
    with open(manifest, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{manifest} lacks the columns {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}")
        rows = [row for row in reader if row["label"] in ("real", "synthetic")]
    if not rows:
        raise ValueError(f"{manifest} has no row with the label real or synthetic")
    yield from rows


def print_fit(evaluation: dict[str, Any], thresholds: dict[str, float]) -> None:
    """The figures that are kept with a model, strictest first."""
    print(f"\n{'generator (neither it nor the reals beside it were seen)':<58}{'images':>7}{'AUROC':>8}{'recall@5%':>11}{'@1%':>7}")
    disjoint = evaluation["disjoint"]
    for row in [*disjoint["generators"], *([{"generator": "MEAN", "num": "", **disjoint["mean"]}] if "mean" in disjoint else [])]:
        print(
            f"{row['generator'][:57]:<58}{row['num']:>7}{row['auroc']:>8.3f}{row['recall_at_fpr_5']:>11.3f}{row['recall_at_fpr_1']:>7.3f}"
        )
    controls, out_of_fold = evaluation["controls"], evaluation["leave_one_group_out"]
    print(
        f"\nAUROC leave-one-group-out {out_of_fold['auroc']:.3f}, within bands of image area {_figure(out_of_fold['auroc_area_matched'])}"
    )
    print(
        f"AUROC controls: image area alone {controls['auroc_area_only']:.3f} (in bands {_figure(controls['auroc_area_only_in_bands'])}), "
        f"permuted labels {controls['auroc_permuted_labels']:.3f}, random split (flattering) {controls['auroc_random_split']:.3f}"
    )
    for name, value in thresholds.items():
        worst = max(out_of_fold["sources"], key=lambda source: source[f"flagged_at_{name}"])
        print(
            f"p_synthetic > {value:.4f}: flags {out_of_fold['real'][f'flagged_at_{name}']:.1%} of unseen real images "
            f"(worst source {worst['name']}: {worst[f'flagged_at_{name}']:.0%} of {worst['num']}) "
            f"and {out_of_fold['synthetic'][f'flagged_at_{name}']:.1%} of synthetic ones from unseen generators"
        )


def print_shares(result: dict[str, Any]) -> None:
    """Share flagged at each threshold, per generator and real source."""
    for title in ("generators", "sources", "real_kinds"):
        print(f"\n{title:<46}{'images':>7}{'AUROC':>8}{'flagged@5%':>12}{'@1%':>7}")
        for row in result[title]:
            shares = f"{row['flagged_at_fpr_5']:>12.3f}{row['flagged_at_fpr_1']:>7.3f}"
            print(f"{row['name'][:45]:<46}{row['num']:>7}{_figure(row.get('auroc')):>8}{shares}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """`k2 synthetic fit|eval`."""
    return call({"fit": fit, "eval": evaluate}, argv, "k2 synthetic")


if __name__ == "__main__":
    sys.exit(main())
