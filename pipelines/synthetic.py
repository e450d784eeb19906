"""`k2 synthetic`: fit, evaluate and ask the AI-generated detector of the synthetic stage, and audit what it leaves."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from tyro.conf import Positional

from curation import detector, evaluation, labelled, score_plots
from curation.decode import DecodeError
from curation.detector import VIEWS, Detector, Rows, branch_of
from curation.evidence import evidence
from curation.fitted import check_identity, out_dir, parse_tower, tower_spec
from curation.labelled import JUDGED, branches_of
from curation.probe import Head
from curation.shards import file_hash
from curation.towers import Tower
from pipelines.audit import audit
from pipelines.cli import call
from pipelines.compact import autoencoders, pairs, train


def fit(
    images: str,
    towers: tuple[str, ...],
    out: str,
    manifest: str | None = None,
    scores: str | None = None,
    kept: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Fit a detector on labelled images, calibrate and judge it on generators and sources that it did not see.

    Args:
        images: Folder that the manifest's paths are relative to, or without a manifest one with real/<source>/ and synthetic/<generator>/.
        towers: compact[:WEIGHTS], effnet[:depths] or siglip[:MODEL[:PRETRAINED]]: one for pixels, one for semantics, or both.
        out: Folder to write, or a bare name: a folder in curation/weights, which ships with the package.
        manifest: TSV with the columns path, label (real or synthetic), generator_or_source, kind. Other labels are left out.
        scores: .npz for a compact tower that was trained on these images, from `k2 synthetic train --folds`: path (N), views (V) and
            pixels (N, V), its scores of images whose group its training had left out, and weight and bias of the head that makes such
            scores from its vectors.
        kept: Folder in which the vectors stay, most of the work: a second fit with it takes a minute.
        device: cpu or cuda, for the towers.
        seed: Of crops and folds.
    """
    chosen, folder = branches_of([parse_tower(spec) for spec in towers]), out_dir(out)
    found = labelled.entries(images, manifest)
    read = {name: tower for name, tower in chosen.items() if not scores or name != detector.PIXELS} or chosen
    data = labelled.read(images, found, read, device, seed, kept)
    given, heads = read_scores(scores, data.paths, chosen) if scores else ({}, {})
    rows = Rows(data.labels, data.vectors, given, heads)
    with threadpool_limits(1):  # small problems: one thread is the fastest, and gives the same numbers on every machine
        fitted, raw = detector.fit(rows, {name: tower.identity for name, tower in chosen.items()}, seed)
        card = evaluation.of_fit(rows, data, fitted, raw, seed)
    command = ["k2", "synthetic", "fit", "--images", images, *(["--manifest", manifest] if manifest else []), "--towers", *towers]
    command += [*(["--scores", scores] if scores else []), "--out", out, "--seed", str(seed)]
    fitted = detector.with_info(
        fitted,
        tower_specs={name: tower_spec(tower) for name, tower in chosen.items()},
        data=card["num"] | {"images": labelled.known_by(found)} | ({"scores": file_hash(scores)} if scores else {}),
        command=shlex.join(command),
        evaluation=card,
    )
    detector.save(fitted, folder)
    print_card(card, fitted.info["thresholds"])
    print(json.dumps({"out": str(folder), "data": fitted.info["data"], "crop": card["views"]["crop"].get("mean")}))
    return 0


def read_scores(path: str, paths: list[str], towers: dict[str, Tower]) -> tuple[dict[str, np.ndarray], dict[str, Head]]:
    """Given scores and heads by branch, in the order of `paths`; views and images that the file lacks are NaN.

    Raises:
        ValueError: an array is missing, has another shape, or holds nothing about these images.
    """
    file = np.load(path)
    absent = {"path", "views", "pixels", "weight", "bias"} - set(file.files)
    if absent:
        raise ValueError(f"{path} lacks the arrays {', '.join(sorted(absent))}; it has {', '.join(file.files)}")
    if detector.PIXELS not in towers:
        raise ValueError(f"{path} holds scores of a compact tower; add compact to --towers")
    place = {name: i for i, name in enumerate(file["path"].tolist())}
    views, values, weight = file["views"].tolist(), file["pixels"], file["weight"]
    dim = towers[detector.PIXELS].dim
    if values.shape != (len(place), len(views)) or weight.shape != (dim,):
        raise ValueError(
            f"{path}: pixels is {values.shape} for {len(place)} images in {len(views)} views, weight {weight.shape} for {dim} entries"
        )
    found = np.full((len(paths), len(JUDGED)), np.nan)
    for row, name in enumerate(paths):
        for column, view in enumerate(JUDGED):
            if name in place and view in views:
                found[row, column] = values[place[name], views.index(view)]
    if np.isnan(found[:, 0]).mean() > 0.5:
        raise ValueError(f"{path} has a score in the view {VIEWS[0]!r} for {(~np.isnan(found[:, 0])).sum()} of {len(paths)} images")
    return {detector.PIXELS: found}, {detector.PIXELS: Head(weight.astype(np.float32), float(file["bias"]))}


def evaluate(images: str, manifest: str | None = None, model: str = "synthetic", out: str | None = None, device: str = "cpu") -> int:
    """Judge a detector on labelled images: tables, one JSON line, and figures.

    Images that it was fitted on would flatter it: of them the figures that the fit kept are shown, of unseen generators and sources.

    Args:
        images: Folder that the manifest's paths are relative to, or without a manifest one with real/<source>/ and synthetic/<generator>/.
        manifest: TSV as for fit.
        model: Packaged name (synthetic) or folder.
        out: Folder for recall.png, reliability.png and generators.png.
        device: cpu or cuda, for the towers.
    """
    fitted, towers = opened(model)
    found = labelled.entries(images, manifest)
    seen = labelled.known_by(found) == fitted.info["data"]["images"]
    if seen:
        print("These are the images that it was fitted on. What the fit kept, of generators and sources unseen:")
        card = fitted.info["evaluation"]
    else:
        with threadpool_limits(1):
            card = evaluation.of_new(fitted, labelled.read(images, found, towers, device))
    print_card(card, fitted.info["thresholds"])
    if out is not None and "views" in card:
        for name, figure in figures(card).items():
            save_figure(figure, Path(out) / f"{name}.png")
    print(json.dumps({"model": model, "fitted_on_these": seen} | card))
    return 0


def score(images: Positional[tuple[str, ...]], model: str = "synthetic", out: str | None = None, device: str = "cpu") -> int:
    """Everything about single images: one JSON line each, and a heat map.

    Args:
        images: Image files.
        model: Packaged name (synthetic) or folder.
        out: Folder for <name>.png, what every part of the image says.
        device: cpu or cuda, for the towers.
    """
    fitted, towers = opened(model)
    failed = 0
    for i, path in enumerate(images):
        try:
            found = evidence(fitted, towers, Path(path).read_bytes(), device)
        except (DecodeError, FileNotFoundError) as error:
            failed += 1
            print(json.dumps({"path": path, "error": str(error)}))
            continue
        crops = [{"box": box, "log_odds": round(odds, 3)} for box, odds in zip(found.boxes.tolist(), found.crops.tolist(), strict=True)]
        line = {"path": path} | found.columns | {"provenance": found.facts, "crops": crops}
        if out is not None:
            c = found.columns
            title = f"p_synthetic {c['p_synthetic']:.3f}   real_share {c['real_share']:.3f}   declared {c['declared'] or 'nothing'}"
            line["heat_map"] = str(Path(out) / f"{i + 1:03}-{Path(path).stem}.png")
            save_figure(score_plots.heat_map(found.image, found.boxes, found.crops, title), Path(line["heat_map"]))
        print(json.dumps(line))
    return 1 if failed else 0


def opened(model: str) -> tuple[Detector, dict[str, Tower]]:
    """A detector and its towers by branch.

    Raises:
        ValueError: there is none, or its towers are not those that it was fitted on.
    """
    fitted = detector.load(model)
    towers = {branch_of(tower): tower for tower in map(parse_tower, fitted.info["tower_specs"].values())}
    for name, tower in towers.items():
        check_identity(f"{model} ({name})", fitted.towers[name], tower.identity, "synthetic")
    return fitted, towers


def figures(card: dict[str, Any]) -> dict[str, Figure]:
    """The figures of a report card, by file name."""
    return {
        "recall": score_plots.recall_curves(card["curves"]),
        "reliability": score_plots.reliability(card["reliability"]),
        "generators": score_plots.generator_bars(card["views"]["crop"]["generators"]),
    }


def save_figure(figure: Figure, path: Path) -> None:
    """PNG, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --- tables ---


def print_card(card: dict[str, Any], thresholds: dict[str, Any]) -> None:
    """A report card as tables: the strict figures first, then what they could be for the wrong reasons, then what a threshold loses."""
    if "views" in card:
        _print_generators(card)
        _print_controls(card)
    for view, losses in card["losses"].items():
        print(f"\nremoved at real_share <= {losses['allowed']:g}, {view} image{'' if view == 'whole' else ' (native, encoded once)'}")
        for title in ("kinds", "sources", "generators"):
            for row in sorted(losses[title], key=lambda row: -row["removed"]):
                print(f"  {title[:-1] + ' ' + row['name']:<58}{row['num']:>7}{_share(row)}")
        for row in filter(None, (losses["real"], losses["synthetic"])):
            print(f"  {'all ' + row['name']:<58}{row['num']:>7}{_share(row)}")
    print("\nthresholds: p_synthetic at which this share of real images is lost, and the 95 % interval of the loss")
    for kind, entry in thresholds.items():
        cuts = {share: cut for share, cut in entry.items() if share not in ("num", "effective")}
        words = [
            f"{float(share):.0%}: " + (f"{cut['p_synthetic']:.3f} ({cut['loss'][0]:.1%}-{cut['loss'][1]:.1%})" if cut else "-")
            for share, cut in cuts.items()
        ]
        print(f"  {kind:<16}{entry['num']:>7}   {'   '.join(words)}")


def _print_generators(card: dict[str, Any]) -> None:
    crop = card["views"]["crop"]
    print(f"\n{'generator, native crops, encoded once':<40}{'images':>7}{'AUROC':>8}{'like area':>11}{'AP':>7}{'recall@5%':>11}{'@1%':>7}")
    means = [{"generator": "MEAN", "num": "", **crop["mean"]}] if "mean" in crop else []
    for row in [*sorted(crop["generators"], key=lambda row: row["auroc"]), *means]:
        shares = f"{row['auroc']:>8.3f}{_figure(row['like_area']):>11}{row['average_precision']:>7.3f}"
        print(f"{row['generator'][:39]:<40}{row['num']:>7}{shares}{row['recall at 5%']:>11.3f}{row['recall at 1%']:>7.3f}")
    print(f"\n{'mean over generators':<40}{'AUROC':>8}{'worst':>8}{'like area':>11}{'recall@5%':>11}{'@1%':>7}")
    for view, found in card["views"].items():
        if "mean" in found:
            mean, worst = found["mean"], found["worst"]["auroc"]
            recalls = f"{mean['recall at 5%']:>11.3f}{mean['recall at 1%']:>7.3f}"
            print(f"{view:<40}{mean['auroc']:>8.3f}{worst:>8.3f}{_figure(mean['like_area']):>11}{recalls}")
    for branch, mean in card["alone"].items():
        if mean:
            figures = f"{mean['auroc']:>8.3f}{'':>8}{_figure(mean['like_area']):>11}{mean['recall at 5%']:>11.3f}"
            print(f"{'crop, ' + branch + ' alone':<40}{figures}")


def _print_controls(card: dict[str, Any]) -> None:
    found = card.get("controls")
    if found:
        print("\nwhat the AUROC could be for the wrong reasons")
        for name, words in (
            ("format_only", "container facts alone (format, bytes per pixel, width, height, aspect, JPEG quality)"),
            ("format_only_like_area", "the same, pairs of like area"),
            ("area_only", "image area alone"),
            ("area_only_like_area", "the same, pairs of like area"),
            ("real_against_real", "real against real sources, same vectors, sources known"),
            ("real_against_real_score", "real against real sources, by this detector's score"),
            ("permuted_labels", "permuted labels"),
            ("random_split", "random split, semantics alone: sources and generators known"),
        ):
            print(f"  {words:<84}{_figure(found[name]):>8}")
    for name, one in card["reliability"].items():
        print(f"calibration, {name}: ECE {one['ece']:.3f}, Brier {one['brier']:.3f}")


def _share(row: dict[str, Any]) -> str:
    return f"{row['removed']:>9.3f}   ({row['interval'][0]:.3f}-{row['interval'][1]:.3f})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """`k2 synthetic fit|eval|score|audit|autoencoders|pairs|train`."""
    verbs = {"fit": fit, "eval": evaluate, "score": score, "audit": audit, "autoencoders": autoencoders, "pairs": pairs, "train": train}
    return call(verbs, argv, "k2 synthetic")


if __name__ == "__main__":
    sys.exit(main())
