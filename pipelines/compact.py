"""`k2 synthetic autoencoders`, `pairs` and `train`: from a folder of images to the compact tower."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from curation import compact, compact_train
from curation.aligned import write_pairs
from curation.autoencoders import MIX, load, save
from curation.autoencoders_train import train_small
from curation.compact_train import Pairs, Pictures, Recipe
from curation.detector import PIXELS
from curation.labelled import JUDGED, SUFFIXES, Entry, entries, read
from curation.probe import Head, linear_scores
from curation.shards import file_hash, whole_file, write_json
from curation.towers import Compact

PATCH = 64  # pixels; smaller images teach an autoencoder their borders
MAX_TRAINED = 600  # real images that an autoencoder is trained on; a pixel is seen a few times at most anyway


def autoencoders(images: str, out: str, manifest: str | None = None, steps: int = 900, device: str = "cpu", seed: int = 0) -> int:
    """Train the small autoencoders of `curation.autoencoders.MIX` on real images, 2 CPU minutes each; those that are there are kept.

    Args:
        images: Folder of real images (one folder per source), or what the manifest's paths are relative to.
        out: Folder to write: <name>.safetensors.
        manifest: TSV as for fit; its rows labelled real are taken.
        steps: Optimizer steps of each.
        device: cpu or cuda.
        seed: Of weights and crops.
    """
    real = [Path(images, entry.path) for entry in labelled(images, manifest) if not entry.synthetic]
    chosen = [real[i] for i in np.random.default_rng(seed).permutation(len(real))[:MAX_TRAINED]]
    pictures = Pictures(chosen, np.zeros(len(chosen), bool), np.full(len(chosen), ""))
    pixels = [image for row in range(len(chosen)) if min((image := pictures.pixels(row)).shape[:2]) >= PATCH]
    for number, description in enumerate(MIX):
        path = Path(out, f"{description.name}.safetensors")
        if not path.is_file():
            net, history = train_small(description, pixels, steps, seed + number, device)
            save(net, path, {"images": len(pixels), "steps": steps, "seed": seed + number})
            print(json.dumps({"autoencoder": str(path), "psnr": round(history[-1]["psnr"], 2)}), flush=True)
    return 0


def pairs(images: str, out: str, autoencoder: tuple[str, ...], manifest: str | None = None, per_image: int = 2, seed: int = 0) -> int:
    """Aligned pairs: crops of real images and their reconstructions, which differ by the decoder alone.

    Args:
        images: Folder of real images (one folder per source), or what the manifest's paths are relative to.
        out: Folder to write; files that are there are kept.
        autoencoder: Folders of diffusers or ONNX autoencoders, or .safetensors of `curation.autoencoders_train`; any number.
        manifest: TSV as for fit; its rows labelled real are taken.
        per_image: Pairs of one image and autoencoder.
        seed: Of the crops.
    """
    real = [(str(Path(images, entry.path)), entry.group) for entry in labelled(images, manifest) if not entry.synthetic]
    loaded = {Path(spec).stem: load(spec) for spec in autoencoder}
    total = 0
    for path, count, psnr in write_pairs(real, loaded, out, per_image=per_image, seed=seed):
        total += count
        print(json.dumps({"pairs": str(path), "count": count, "psnr": round(psnr, 2)}), flush=True)
    print(json.dumps({"out": out, "new_pairs": total}))
    return 0


def train(
    images: str,
    out: str,
    manifest: str | None = None,
    pairs: str | None = None,
    steps: int = 1000,
    folds: int = 0,
    fold_steps: int = 400,
    device: str = "cpu",
    seed: int = 0,
) -> int:
    """Train the compact tower: from labelled images, or from a folder of real images and aligned pairs alone.

    With folds it is trained that often besides, each time without some generators and sources, and scores.npz holds what each image
    gets from the network that has not seen its group: `k2 synthetic fit --scores` is honest with it. Networks that are there are kept.

    Args:
        images: Folder of images (one folder per source), or what the manifest's paths are relative to.
        out: Folder to write: compact.safetensors, compact.json; with folds fold-<i>.safetensors and scores.npz.
        manifest: TSV as for fit; without it all images of the folder are real.
        pairs: Folder of `k2 synthetic pairs`.
        steps: Optimizer steps.
        folds: How many networks besides.
        fold_steps: Optimizer steps of each of those.
        device: cpu or cuda.
        seed: Of weights, crops and folds.
    """
    rows = labelled(images, manifest)
    paths = [Path(images, row.path) for row in rows]
    pictures = Pictures(paths, np.array([row.synthetic for row in rows]), np.array([row.group for row in rows]))
    aligned = Pairs.read(sorted(Path(pairs).glob("*.npz"))) if pairs else None
    out_dir = Path(out)
    command = ["k2", "synthetic", "train", "--images", images, "--out", out]
    given = {"manifest": manifest, "pairs": pairs, "steps": steps, "folds": folds, "fold-steps": fold_steps, "seed": seed}
    for name, value in given.items():
        command += [f"--{name}", str(value)] if value else []
    card = {
        "command": shlex.join(command),
        "data": {
            "manifest": file_hash(manifest) if manifest else None,
            "num_real": int((~pictures.synthetic).sum()),
            "num_synthetic": int(pictures.synthetic.sum()),
            "groups": np.unique(pictures.group).tolist(),
            "num_pairs": len(aligned.real) if aligned else 0,
        },
        "recipe": vars(Recipe(steps, seed=seed)),
        "folds": [sorted(names) for names in compact_train.folds(pictures, folds, seed)] if folds else [],
    }
    jobs = [(out_dir / f"fold-{i}.safetensors", fold_steps, frozenset(names)) for i, names in enumerate(card["folds"])]
    figures = {}
    for path, count, held_out in [*jobs, (out_dir / "compact.safetensors", steps, frozenset())]:
        if path.is_file():
            continue
        recipe = replace(Recipe(seed=seed), steps=count)
        *_, figures[path.stem] = _trained(pictures, aligned, recipe, held_out, device, path)
    write_json(card | {"figures": figures}, out_dir / "compact.json")
    if folds:
        write_scores(images, rows, [(path, held_out) for path, _, held_out in jobs], out_dir, device)
    print(json.dumps({"out": out, "weights": file_hash(out_dir / "compact.safetensors"), "figures": figures}))
    return 0


def _trained(
    pictures: Pictures, aligned: Pairs | None, recipe: Recipe, held_out: frozenset[str], device: str, path: Path
) -> Iterator[dict]:
    with tqdm(total=recipe.steps, desc=path.stem, unit="step", file=sys.stderr) as bar:
        for found in compact_train.train(pictures, aligned, recipe, held_out, device):
            if isinstance(found, dict):
                bar.update(found["step"] - bar.n)
                bar.set_postfix(found)
                yield found
            else:
                compact_train.write(found, path)


def write_scores(images: str, rows: list[Entry], networks: list[tuple[Path, frozenset[str]]], out: Path, device: str) -> None:
    """scores.npz: of each image, in the views of labelled.JUDGED, the raw score of the network that left its group out; NaN where it
    has no such view. With the final network's head, which makes such scores from its own vectors.

    Raises:
        ValueError: no image of a fold could be read.
    """
    paths, scores = [], []
    for path, held_out in networks:
        tower = Compact(str(path))
        found = read(images, [row for row in rows if row.group in held_out], {PIXELS: tower}, device)
        paths += found.paths
        scores.append(linear_scores(found.vectors[PIXELS], head_of(path)))
    weight, bias = head_of(out / "compact.safetensors")
    with whole_file(out / "scores.npz") as file:
        np.savez(file, path=np.array(paths), views=np.array(JUDGED), pixels=np.concatenate(scores), weight=weight, bias=np.float64(bias))


def head_of(path: Path) -> Head:
    """The linear head of a network, for vectors of its crops' mean."""
    head = compact.load(path).head
    return Head(head.weight[0].numpy(), float(head.bias))


def labelled(images: str, manifest: str | None) -> list[Entry]:
    """The labelled images; a folder without real/ and synthetic/ in it holds real ones, a folder for each source, or is one.

    Raises:
        ValueError: there are none.
    """
    if manifest or any(Path(images, label).is_dir() for label in ("real", "synthetic")):
        return entries(images, manifest)
    found = sorted(path.relative_to(images) for path in Path(images).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"no images under {images}; give the folder that holds them, or --manifest TSV")
    return [Entry(path.as_posix(), False, path.parts[0] if len(path.parts) > 1 else Path(images).name, "unknown") for path in found]
