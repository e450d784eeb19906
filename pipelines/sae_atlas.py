"""`k2 sae atlas` and `k2 sae review`: pages for looking at features, and what people say of them into the tag table."""

import json
import sys
from typing import Any

from tqdm import tqdm

from curation import firing, reviews, sprites
from curation.atlas import cards
from curation.decode import Decoded
from curation.firing import Firing, read_fitted, seen
from curation.labelled import read_manifest
from curation.towers import Encoder, loaded
from pipelines.atlas_page import check_out, write_feature, write_index

DETAILS = {"strongest": 4, "above": 4}  # images of a row that are shown with heat map and native pixels


def atlas(
    model: str,
    out: str,
    run: str | None = None,
    images: str | None = None,
    manifest: str | None = None,
    contrast: str | None = None,
    other: str | None = None,
    limit: int = firing.LIMIT,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """A static page of all features: images over the whole range of each, evidence, and buttons for a verdict.

    Args:
        model: Packaged name (sae-compact) or folder.
        out: Folder to write; open its index.html, or copy it to an object store.
        run: An annotated run with the vectors of this tower (or codes of this SAE) whose images are shown.
        images: A source instead: folder, tars or Parquet.
        manifest: With --images, a TSV as for `k2 sae tag`; only its real images are used.
        contrast: Folder in which `k2 sae tag --kept` keeps vectors of damaged and restyled pictures; needs --images.
        other: An SAE of another seed on the same tower, to see which features come back.
        limit: Images that are looked at, at most.
        device: cpu or cuda, for the tower.
        seed: Of the contrast set, as given to `k2 sae tag`.
    """
    if (run is None) == (images is None):
        raise ValueError("give --run (an annotated run folder) or --images (a source), and not both")
    if contrast is not None and images is None:
        raise ValueError("--contrast goes with --images: the kept vectors belong to the images that they were made of")
    folder, fitted = check_out(out), read_fitted(model)
    second = read_fitted(other) if other else None
    if second is not None and second.tower.identity != fitted.tower.identity:
        raise ValueError(f"--other {other} was fitted on {second.tower.identity}, {model} on {fitted.tower.identity}: nothing to compare")
    only = {row["path"] for row in read_manifest(manifest) if row["label"] == "real"} if manifest else None
    contrasts = None
    if contrast is not None:
        from curation import contrast_set

        of_kinds = contrast_set.sources_of(manifest) if manifest else None
        contrasts = contrast_set.read(images, fitted.tower, of_kinds, device, seed, contrast)
    looked = firing.of_run(fitted, run, limit) if run else firing.of_images(fitted, images, device, limit, only)
    num = write(looked, contrasts, second, folder, device)
    print(json.dumps({"out": str(folder / "index.html"), "features": fitted.sae.num_features, "images": len(looked.uids), "alive": num}))
    return 0


def write(looked: Firing, contrast: Any, other: firing.Fitted | None, folder: Any, device: str) -> int:
    """The whole atlas; returns the number of features that fire. Arguments as of `curation.atlas.cards`."""
    fitted = looked.fitted
    quiet = not sys.stderr.isatty()
    total = fitted.sae.num_features
    found = list(tqdm(cards(looked, None, contrast, other), total=total, desc="cards", unit="feature", file=sys.stderr, disable=quiet))
    wanted: dict[str, dict[int, float]] = {}  # uid -> the features that want details of it, with the value that gets the full colour
    for card in found:
        for name, most in DETAILS.items():
            for i, _ in card["strips"][name][:most] if card["rate"] > 0 else []:
                wanted.setdefault(looked.uids[i], {})[card["feature"]] = card["largest"]
    shown = {i for card in found for rows in card["strips"].values() for i, _ in rows}
    thumbnails: dict[int, bytes] = {}
    details: dict[int, list[dict[str, Any]]] = {}
    place = {looked.uids[i]: i for i in shown}
    damaged: dict[int, list[tuple[str, float, bytes]]] = {}
    remade: dict[str, list[tuple[int, int, float]]] = {}  # uid -> (feature, family, value) of the pictures to damage once more
    for card in found:
        for picture, family, value in card.get("made", []):
            remade.setdefault(contrast.uids[picture], []).append((card["feature"], family, value))
    encode = loaded(fitted.tower, device)
    uids = place.keys() | remade.keys()
    images = firing.pictures(looked.shards, uids)
    for uid, decoded in tqdm(images, total=len(uids), desc="pictures", unit="image", file=sys.stderr, disable=quiet):
        for feature, family, value in remade.get(uid, []):
            damaged.setdefault(feature, []).append(again(contrast, uid, decoded, family, value))
        if uid not in place:
            continue
        thumbnails[place[uid]] = sprites.jpeg(sprites.thumbnail(decoded.pixels), 92)
        for feature, detail in detailed(encode, fitted, uid, decoded, wanted.get(uid, {})).items():
            details.setdefault(feature, []).append(detail)
    lines = []
    for card in tqdm(found, desc="write", unit="feature", file=sys.stderr, disable=quiet):
        order = {looked.uids[i]: k for k, (i, _) in enumerate(card["strips"]["strongest"] + card["strips"]["above"])}
        mine = sorted(details.get(card["feature"], []), key=lambda detail: order[detail["uid"]])
        changed = sorted(damaged.get(card["feature"], []), key=lambda one: -one[1])
        lines.append(write_feature(card, looked.uids, looked.below, thumbnails, mine, changed, folder))
    write_index(lines, firing.summary(looked) | {"other": other.model if other else None}, folder)
    return sum(card["rate"] > 0 for card in found)


def again(contrast: Any, uid: str, decoded: Decoded, family: int, value: float) -> tuple[str, float, bytes]:
    """A picture of a contrast set damaged once more: label, value, JPEG."""
    from curation import contrast_set

    kind = contrast.families[family]
    picture = contrast_set.changed(decoded.pixels, kind, contrast_set.generator(uid, kind, contrast.seed))
    return f"{kind.name.replace('_', ' ')} {kind.severity}", value, sprites.jpeg(sprites.thumbnail(picture), 92)


def detailed(encode: Encoder, fitted: firing.Fitted, uid: str, decoded: Decoded, features: dict[int, float]) -> dict[int, dict[str, Any]]:
    """feature -> uid, heat (where it fires in this image; None for a tower without values at places) and crop (the pixels there)."""
    if not features:
        return {}
    boxes, model = sprites.places(fitted.tower, decoded.pixels), fitted.sae
    if boxes is None:
        crop = sprites.jpeg(sprites.native(decoded.pixels, None), 95)
        return {feature: {"uid": uid, "heat": None, "crop": crop} for feature in features}
    chosen = list(features)
    tokens = encode([seen(fitted.tower, decoded)]).tokens[0]
    values = tokens @ model.w_enc.numpy()[:, chosen] + model.b_enc.numpy()[chosen]  # (T, F); their mean is the image's value
    found = {}
    for feature, column in zip(chosen, values.T, strict=True):
        heat = sprites.overlay(decoded.pixels, boxes, column, max(float(column.max()), features[feature]))
        crop = sprites.native(decoded.pixels, boxes[column.argmax()])
        found[feature] = {"uid": uid, "heat": sprites.jpeg(heat, 92), "crop": sprites.jpeg(crop, 95)}
    return found


def review(model: str, choices: list[str]) -> int:
    """Write what people chose on the page of `k2 sae atlas` into the tag table beside the model.

    Reviewers who disagree on a feature make it "mixed"; who chooses again replaces their earlier choice.

    Args:
        model: Packaged name (sae-compact) or folder.
        choices: Files that the page exported, of one or several reviewers.
    """
    fitted = read_fitted(model)
    read = {path: reviews.read_choices(path) for path in choices}
    for path, found in read.items():
        for what, here in (("weights", fitted.weights), ("tower", fitted.tower.identity)):
            if found.get(what) != here:
                raise ValueError(
                    f"{path} was made with {what} {found.get(what)}, {model} has {here}: their features have nothing in common. "
                    f"Make an atlas of this one with `k2 sae atlas --model {model}` and review that."
                )
    rows: dict[int, dict[str, Any]] = {}
    fires = fitted.sae.threshold.tolist()
    for found in read.values():
        signed = reviews.sign(fitted.folder, fitted.tower.identity, fitted.weights, found.get("reviewer", ""), found["choices"], fires)
        rows |= {row["feature"]: row for row in signed}
    print(f"{'feature':>8}  {'verdict':<9} {'threshold':>9}  {'tag':<28} reviewers")
    for _, row in sorted(rows.items()):
        names = row["reviewers"].replace(";", ", ")
        print(f"{row['feature']:>8}  {row['verdict']:<9} {row['threshold']:>9.4g}  {row['tag'][:28]:<28} {names}")
    table = reviews.read_rows(fitted.folder)
    removing = sum(row["verdict"] == "artifact" and bool(row["reviewers"]) for row in table)
    print(json.dumps({"out": str(reviews.table_path(fitted.folder)), "reviewed": len(rows), "tags": len(table), "may_remove": removing}))
    return 0
