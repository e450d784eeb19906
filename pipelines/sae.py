"""`k2 sae`: fit and evaluate the sparse autoencoder of the artifacts stage, and find the features that are tags."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from curation import sae
from curation.contrast import view
from curation.decode import DecodeError, decode
from curation.fitted import out_dir, parse_tower, tower_spec
from curation.sae_eval import measure
from curation.sae_fit import train
from curation.sae_rows import Cursor, InMemory, row_groups, shuffled, survey
from curation.sae_train import Training
from curation.sources import list_shards, read_samples
from curation.tags import PARTS, part
from curation.towers import Tower, loaded
from pipelines.cli import call
from pipelines.sae_atlas import atlas, review
from pipelines.sae_eval import evaluate
from pipelines.sae_tag import tag

MOST = {"fit": 100_000, "estimate": 8192, "report": 65_536}  # rows of each part that are in memory: to start, to set thresholds, to measure


def fit(
    tower: str,
    out: str,
    images: str | None = None,
    run: str | None = None,
    views: int = 20,
    tokens: int = 0,
    features: tuple[int, ...] = (),
    k: int = 32,
    per_row: bool = False,
    prefixes: tuple[float, ...] = (),
    archetypal: float | None = None,
    epochs: int = 10,
    learning_rate: float = 3e-3,
    per_dimension: bool = False,
    whiten: float = 0.0,
    half: bool = True,
    device: str = "cpu",
    seed: int = 0,
    seeds: int = 1,
) -> int:
    """Train sparse autoencoders on a tower's vectors of images, or of an annotated run; the same command again goes on where it stopped.

    A fifth of the images sets the thresholds, another fifth is measured; both are chosen by the images' bytes (of a run: by the uids).
    Several widths or seeds are trained on one pass over the data, each into its own folder OUT-<features>-<seed>. Under torchrun the
    processes share every batch.

    Args:
        tower: effnet[:depths], compact[:WEIGHTS] or siglip[:MODEL[:PRETRAINED]].
        out: Folder to write, or a bare name: a folder in curation/weights, which ships with the package.
        images: Folder, tars or Parquet; each image is seen whole and in random, sometimes damaged, windows.
        run: A run folder instead, whose annotations hold this tower's vectors; for millions of images, of which few are in memory.
        views: Windows made of one training image.
        tokens: Train on patch tokens of --images, so many of each window, drawn at random; 0: on pooled vectors.
        features: Widths; default one per 16 rows, rounded down to a power of two from 256 to 16384.
        k: Features that fire, on average.
        per_row: TopK: at most k in every row, instead of N * k in a batch of N (BatchTopK).
        prefixes: Matryoshka: shares of the features that have to reconstruct by themselves, such as 0.0625 0.125 0.25 0.5625.
        archetypal: Keep decoder rows in the hull of the data, but for a free part of this share of their length (0.1 is small).
        epochs: Times that every row is seen.
        learning_rate: Of Adam.
        per_dimension: Scale every dimension by its own deviation.
        whiten: 0 to 1: how far directions are made equally loud, so that quiet damage is heard; 0.5 is half way.
        half: Store the matrices as float16.
        device: cpu or cuda.
        seed: Of the windows, the start values and the order.
        seeds: Number of SAEs of each width, with the seeds seed, seed + 1, ...
    """
    if (images is None) == (run is None):
        raise ValueError("give --images (a source) or --run (an annotated run folder), and not both")
    if tokens and run:
        raise ValueError(f"--tokens {tokens} needs --images: an annotated run holds pooled vectors only")
    command = _command("fit", locals())
    chosen, device = parse_tower(tower), _join(device)
    if run:
        pieces = row_groups(run, chosen)
        counts, kept = survey(pieces, MOST, seed)
    else:
        rows = vectors_of_images(images, chosen, views, device, seed, tokens)
        pieces, counts = [InMemory(rows)], {name: len(vectors) for name, vectors in rows.items()}
        rng = np.random.default_rng(seed)
        kept = {name: vectors[rng.permutation(len(vectors))[: MOST[name]]] for name, vectors in rows.items()}
    _check(counts)
    num = counts["fit"]
    widths = features or (min(16384, max(256, 2 ** int(np.log2(max(1, num // 16))))),)
    settings = [
        Training(
            num_features=width,
            num_rows=epochs * num,
            k=k,
            per_row=per_row,
            batch_size=min(4096, max(256, num // 16)),
            learning_rate=learning_rate,
            prefixes=prefixes,
            archetypal=archetypal,
            per_dimension=per_dimension,
            whiten=whiten,
            seed=one,
        )
        for width in widths
        for one in range(seed, seed + seeds)
    ]
    metadata = {
        "tower": chosen.identity,
        "tower_spec": tower_spec(chosen),
        "vectors": "tokens" if tokens else "pooled",
        "command": command,
        "data": {f"rows_{name}": counts[name] for name in PARTS},
    }
    matrices = torch.float16 if half else torch.float32

    def stream(cursor: Cursor | None) -> Iterator[tuple[np.ndarray, Cursor]]:
        total = settings[0].num_steps if cursor is None else None  # a run that goes on does not count its steps from the start
        return iter(tqdm(shuffled(pieces, settings[0].batch_size, seed, cursor), total=total, desc="train", unit="step", file=sys.stderr))

    place = out_dir(out)
    kept = {name: vectors.astype(np.float32) for name, vectors in kept.items()}
    fitted = train(stream, kept["fit"], kept["estimate"], settings, metadata, matrices, device, place.with_name(f"{place.name}.training"))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for one, (model, history) in zip(settings, fitted, strict=True):
            folder = place if len(settings) == 1 else place.with_name(f"{place.name}-{one.num_features}-{one.seed}")
            evaluation = measure(model, kept["report"], k) | {"training": history[-1]}
            details = {"training": asdict(one), "evaluation": evaluation}
            sae.save(replace(model, metadata=dict(model.metadata) | details), folder, matrices)
            print(json.dumps({"out": str(folder), "features": model.num_features, "gamma": model.metadata["gamma"], **evaluation}))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _command(verb: str, arguments: dict[str, Any]) -> str:
    """The command line that gives these arguments, without those that are None or empty."""
    words = ["k2", "sae", verb]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and value != ():
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _join(device: str) -> str:
    """Join the processes that torchrun started, if it did; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


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


def vectors_of_images(source: str, tower: Tower, views: int, device: str, seed: int, tokens: int = 0) -> dict[str, np.ndarray]:
    """Rows (N, d) per part: of a training image `views` (itself and random windows), of the others at most 3. With `tokens`, so many
    patch tokens of each view in place of its pooled vector."""
    encode, rows = loaded(tower, device), {name: [] for name in PARTS}
    for index, (image, name) in enumerate(read_images(source)):
        rng = np.random.default_rng([seed, index])
        seen = [image, *(view(image, rng) for _ in range((views if name == "fit" else min(views, 3)) - 1))]
        embeddings = encode(seen)
        if tokens:
            vectors = [of_view[rng.permutation(len(of_view))[:tokens]] for of_view in embeddings.tokens]
            rows[name].extend(np.concatenate(vectors))
        else:
            rows[name].extend(embeddings.pooled)
    return {name: np.array(vectors, np.float32).reshape(len(vectors), -1) for name, vectors in rows.items()}


def _check(counts: dict[str, int]) -> None:
    """Refuse what is too little to learn from."""
    if min(counts.values()) < 2 or counts["fit"] < 16:
        raise ValueError(f"too few images: rows per part are {counts}; give more images (or, with --images, more --views)")


def main(argv: Sequence[str] | None = None) -> int:
    """`k2 sae fit|eval|tag|atlas|review`."""
    return call({"fit": fit, "eval": evaluate, "tag": tag, "atlas": atlas, "review": review}, argv, "k2 sae")


if __name__ == "__main__":
    sys.exit(main())
