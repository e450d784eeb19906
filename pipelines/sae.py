"""`k2 sae`: fit and evaluate the sparse autoencoder of the artifacts stage, and find the features that are tags."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from curation import sae, tags
from curation.contrast import CONTROLS, DAMAGE, STYLES, view, window
from curation.decode import DecodeError, decode
from curation.fitted import check_identity, find, out_dir, parse_tower, read_json, tower_spec
from curation.labelled import read_manifest
from curation.sae_eval import measure
from curation.sae_train import Training, shuffled, train
from curation.shards import file_hash, write_json
from curation.sources import list_shards, read_samples
from curation.tags import PARTS, Rules, part
from curation.towers import Tower, loaded
from pipelines.cli import call
from pipelines.sae_atlas import atlas, review
from pipelines.sae_eval import evaluate


def fit(
    tower: str,
    out: str,
    images: str | None = None,
    run: str | None = None,
    views: int = 20,
    features: int | None = None,
    k: int = 32,
    epochs: int = 10,
    learning_rate: float = 3e-3,
    per_dimension: bool = False,
    half: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Train a sparse autoencoder on a tower's vectors of images, or of an annotated run.

    A fifth of the images sets the thresholds, another fifth is measured; both are chosen by the images' bytes.

    Args:
        tower: effnet, compact or siglip[:MODEL[:PRETRAINED]].
        out: Folder to write, or a bare name: a folder in curation/weights, which ships with the package.
        images: Folder, tars or Parquet; each image is seen whole and in random, sometimes damaged, windows.
        run: A run folder instead, whose annotations hold this tower's vectors; for millions of images.
        views: Rows made of one training image.
        features: Width; default one per 16 rows, rounded down to a power of two from 256 to 16384.
        k: Mean number of features that fire.
        epochs: Times that every row is seen.
        learning_rate: Of Adam.
        per_dimension: Scale every dimension by its own deviation.
        half: Store the matrices as float16.
        device: cpu or cuda.
        seed: Of the windows, the start values and the order.
    """
    if (images is None) == (run is None):
        raise ValueError("give --images (a source) or --run (an annotated run folder), and not both")
    chosen, folder = parse_tower(tower), out_dir(out)
    rows = vectors_of_run(run, chosen) if run else vectors_of_images(images, chosen, views, device, seed)
    num = len(rows["fit"])
    settings = Training(
        num_features=features or min(16384, max(256, 2 ** int(np.log2(max(1, num // 16))))),
        num_rows=epochs * num,
        k=k,
        batch_size=min(4096, max(256, num // 16)),
        learning_rate=learning_rate,
        per_dimension=per_dimension,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    num_steps = settings.num_rows // settings.batch_size
    batches = iter(tqdm(shuffled(rows["fit"], settings.batch_size, rng), total=num_steps, desc="train", unit="step", file=sys.stderr))
    sample = rows["fit"][rng.permutation(num)[:100_000]].astype(np.float32)
    command = ["k2", "sae", "fit", "--tower", tower, "--out", out, *(["--images", images] if images else ["--run", str(run)])]
    command += ["--views", str(views), "--features", str(settings.num_features), "--k", str(k), "--epochs", str(epochs)]
    command += ["--learning-rate", str(learning_rate), "--seed", str(seed)]
    command += ["--per-dimension"] * per_dimension + ["--no-half"] * (not half)
    metadata = {
        "tower": chosen.identity,
        "tower_spec": tower_spec(chosen),
        "command": shlex.join(command),
        "training": asdict(settings),
        "data": {f"rows_{name}": len(rows[name]) for name in PARTS},
    }
    matrices = torch.float16 if half else torch.float32
    estimate = rows["estimate"][:8192].astype(np.float32)  # rows times features are sorted at once
    model, history = train(batches, sample, estimate, settings, metadata, matrices, device)
    evaluation = measure(model, rows["report"][:65536].astype(np.float32), k) | {"training": history[-1]}
    model = replace(model, metadata=metadata | {"evaluation": evaluation})
    sae.save(model, folder, matrices)
    print(json.dumps({"out": str(folder), "features": model.num_features, **evaluation}))
    return 0


def tag(
    model: str,
    images: str,
    manifest: str | None = None,
    budget: float = 0.04,
    recall: float = 0.2,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Find the features that fire on damage and on nothing else, and write <model>.tags.csv beside the model's folder.

    Args:
        model: Packaged name (sae-effnet) or folder.
        images: Folder, tars or Parquet.
        manifest: TSV as for `k2 synthetic fit`, with paths relative to --images; only its real images are used then.
        budget: Share of every clean or style family that a tag may remove, with 95 % confidence.
        recall: Least share of one kind of damage that a tag must find.
        device: cpu or cuda, for the tower.
        seed: Of the damage.
    """
    fitted, tower = _with_tower(model)
    folder = find(model, sae.INFO_FILE)
    only = {row["path"] for row in read_manifest(manifest) if row["label"] == "real"} if manifest else None
    rules = Rules(budget=budget, recall=recall)
    # Encoding takes minutes; whether there are enough pictures is known from their bytes.
    tags.check_number(sum(part(row["image"]) == "estimate" for row in read_rows(images, only)), budget)
    values = contrast_values(fitted, tower, images, only, device, seed)
    chosen, funnel = tags.select(values["fit"], values["estimate"], np.random.default_rng(seed), rules)
    command = ["k2", "sae", "tag", "--model", model, "--images", images, *(["--manifest", manifest] if manifest else [])]
    command += ["--budget", str(budget), "--recall", str(recall), "--seed", str(seed)]
    evidence = {
        "command": shlex.join(command),
        "weights": file_hash(folder / sae.WEIGHTS_FILE),
        "rules": asdict(rules),
        "pictures": {name: len(part_values["clean"]) for name, part_values in values.items()},
        "damage": funnel,
        "tags": [{**asdict(t), "report": tags.report(values["report"], [t])["any_tag"]} for t in chosen],
        "report": tags.report(values["report"], chosen),
    }
    tags.write_csv(chosen, folder.name, folder.parent / f"{folder.name}.tags.csv")
    write_json(evidence, folder / "tags.json")
    print(f"{'damage':<18}{'discovered':>11}{'best recall in estimate':>25}{'found in report by any tag':>28}")
    for name, row in funnel.items():
        print(f"{name:<18}{row['discovered']:>11}{row['best_recall']:>25.3f}{evidence['report']['any_tag'][name]['share']:>28.3f}")
    for name in tags.harmless(values["report"]):
        print(f"{name:<18}{'':>11}{'':>25}{evidence['report']['any_tag'][name]['share']:>28.3f}  (should be 0)")
    print(json.dumps({"out": f"{folder}.tags.csv", "num_tags": len(chosen), "worst_harmless": evidence["report"]["worst_harmless"]}))
    return 0


def _with_tower(model: str) -> tuple[sae.Sae, Tower]:
    """A fitted SAE and its tower, which must be the very one that it was fitted on."""
    metadata = read_json(find(model, sae.INFO_FILE) / sae.INFO_FILE).get("metadata", {})
    if "tower_spec" not in metadata:
        raise ValueError(f"{model}: its {sae.INFO_FILE} names no tower (metadata.tower_spec)")
    tower = parse_tower(metadata["tower_spec"])
    check_identity(model, metadata["tower"], tower.identity, "sae")
    return sae.load(model), tower


def read_rows(source: str, only: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """The samples of a source that have bytes; `only` are keys (of a folder: relative paths) to keep."""
    for shard in list_shards(source):
        for batch in read_samples(shard, 16):
            for row in batch.to_pylist():
                if row["image"] is not None and (only is None or row["key"] in only):
                    yield row


def read_images(source: str, only: set[str] | None = None) -> Iterator[tuple[np.ndarray, str]]:
    """(pixels, part) of the decodable images of a source."""
    total = len(only) if only is not None else sum(len(shard.members) for shard in list_shards(source)) or None  # unknown for archives
    for row in tqdm(read_rows(source, only), total=total, desc="images", unit="image", file=sys.stderr):
        try:
            yield decode(row["image"])[0], part(row["image"])
        except DecodeError as error:
            print(f"left out {row['uid']}: {error}", file=sys.stderr)


def vectors_of_images(source: str, tower: Tower, views: int, device: str, seed: int) -> dict[str, np.ndarray]:
    """Rows (N, d) per part: of a training image `views` (itself and random windows), of the others at most 3."""
    encode, rows = loaded(tower, device), {name: [] for name in PARTS}
    for index, (image, name) in enumerate(read_images(source)):
        rng = np.random.default_rng([seed, index])
        seen = [image, *(view(image, rng) for _ in range((views if name == "fit" else min(views, 3)) - 1))]
        rows[name].extend(encode(seen).pooled)
    return _checked({name: np.array(vectors, np.float32).reshape(-1, tower.dim) for name, vectors in rows.items()})


def vectors_of_run(run: str, tower: Tower) -> dict[str, np.ndarray]:
    """Rows (N, d) per part from RUN/annotations/<tower>/, in float16 as they are stored; the part comes from the uid's hash.

    Raises:
        ValueError: there is no such annotation, or it is of another tower.
    """
    paths = sorted(Path(run, "annotations", tower.name).glob("*.parquet"))
    if not paths:
        raise ValueError(f"{run} has no annotations/{tower.name}; run `k2 annotate` with a recipe that holds this tower")
    described = read_json(Path(run) / "run.json")["description"]["stages"][tower.name]["description"]["tower"]
    check_identity(run, described["identity"], tower.identity, "sae")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    for path in tqdm(paths, desc="read", unit="shard", file=sys.stderr):
        table = pq.read_table(path, columns=["uid", "vector"]).drop_null()
        vectors = np.frombuffer(b"".join(table["vector"].to_pylist()), "<f2").reshape(-1, tower.dim)
        parts = np.array([part(uid.encode()) for uid in table["uid"].to_pylist()])
        for name in PARTS:
            rows[name].append(vectors[parts == name])
    return _checked({name: np.concatenate(vectors) for name, vectors in rows.items()})


def _checked(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Refuse what is too little to learn from."""
    counts = {name: len(vectors) for name, vectors in rows.items()}
    if min(counts.values()) < 2 or counts["fit"] < 16:
        raise ValueError(f"too few images: rows per part are {counts}; give more images (or, with --images, more --views)")
    return rows


def contrast_values(
    fitted: sae.Sae, tower: Tower, source: str, only: set[str] | None, device: str, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Feature values (n, m) of every picture as it is, damaged, restyled and merely handled: part -> family -> array."""
    families = DAMAGE | STYLES | CONTROLS
    encode = loaded(tower, device)
    collected: dict[str, list[np.ndarray]] = {name: [] for name in PARTS}
    for index, (image, name) in enumerate(read_images(source, only)):
        rng, clean = np.random.default_rng([seed, index]), window(image)
        vectors = encode([clean, *(change(clean, rng) for change in families.values())]).pooled
        collected[name].append(sae.activations(fitted, torch.from_numpy(vectors)).numpy())
    if not all(collected.values()):
        counts = {name: len(pictures) for name, pictures in collected.items()}
        raise ValueError(f"pictures per part are {counts}; every part needs some: give more images")
    stacked = {name: np.stack(values, 1) for name, values in collected.items()}
    return {name: dict(zip(("clean", *families), values, strict=True)) for name, values in stacked.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """`k2 sae fit|eval|tag|atlas|review`."""
    return call({"fit": fit, "eval": evaluate, "tag": tag, "atlas": atlas, "review": review}, argv, "k2 sae")


if __name__ == "__main__":
    sys.exit(main())
