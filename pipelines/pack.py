"""`k2 pack`: a selection as training shards."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from curation.pack import PackedFile, Packing, describe, packed_files, write_file
from curation.pieces import Made, Piece, make_piece
from curation.shards import file_hash, fingerprint, write_json
from curation.shuffle import Keys, Plan, plan, read_keys
from curation.sources import Shard, load_listing
from pipelines import cluster
from pipelines.cli import call
from pipelines.run_folder import check_description

BATCH_PIXELS = 2 << 20  # default batch: 32 images at 256 px, 8 at 512, 2 at 1024
BYTES_PER_PIXEL = 0.6  # of a packed JPEG; photographs have 0.3 to 1 (benchmarks/results/pack.jsonl)


def pack(
    run: str,
    policy: str,
    batch_size: int | None = None,
    seed: int = 0,
    remainder: str = "pad",
    ray: str = "auto",
    workers: int | None = None,
    keep_pieces: bool = False,
    repack: bool = False,
    latents: str | None = None,
    dry_run: bool = False,
) -> int:
    """Crop, resize and shuffle the images of a selection into Parquet files whose row groups are batches of one bucket.

    Writes RUN/packed/POLICY. The same command again does only what is missing. Needs twice the packed set's size on disk while it runs.

    Args:
        run: Run folder.
        policy: Name of a selection, made by `k2 filter`.
        batch_size: Images in a row group; default 2 megapixels' worth (32 at 256 px, 8 at 512, 2 at 1024).
        seed: Of the shuffle.
        remainder: What becomes of the images over after the last whole batch of a bucket: pad (a whole batch, filled up with rows that
            are marked as padding), short (a short batch), drop (left out and listed in dataset.json).
        ray: auto (a running cluster, else this machine), off (this process) or a Ray address.
        workers: Ray workers; default one per CPU.
        keep_pieces: Keep the resized images of every shard, so that `--repack` decodes only the images that are new.
        repack: Replace a packed set that another selection, seed or batch size made.
        latents: Also encode what is packed: the folder of the Qwen-Image VAE's weights, or the vae.safetensors of a training run.
        dry_run: Say what would be packed, and stop.
    """
    source = Path(run) / "selection" / f"{policy}.parquet"
    if not source.exists():
        raise ValueError(f"{source} is missing; run `k2 filter --run {run} --policy {policy}` first")
    resolution = json.loads(source.with_suffix(".funnel.json").read_text())["resolution"]
    packing = Packing(policy, file_hash(source), resolution, batch_size or max(1, BATCH_PIXELS // resolution**2), seed, remainder)
    place = Path(run) / "packed" / policy
    keys = read_keys(source, seed)
    if dry_run:
        print(json.dumps(_forecast(keys, plan(keys, np.ones(len(keys), bool), packing.batch_size, remainder))))
        return 0
    if latents:
        from pipelines.latents import describe_codec, write_latents  # only here: packing itself needs no torch

        describe_codec(latents)  # a wrong path is said before anything starts
    if repack:
        _clear_other(place, packing)
    try:
        check_description(place, {"packing": packing})
    except ValueError as error:
        raise ValueError(f"{error} Or give --repack to replace what is packed.") from error
    done, pieces = place / "dataset.json", place / ".pieces"
    if not done.exists():
        shards = _shards(run, keys)
        made = _make_pieces(shards, source, pieces, packing, np.diff(keys.starts), ray, workers)
        if made is None or not _assemble(keys, made, pieces, place, packing, ray, workers):
            return 1
    else:
        made = {}
    if not keep_pieces:
        shutil.rmtree(pieces, ignore_errors=True)  # also those that a kill after the commit point left
    content = json.loads(done.read_text())
    code = _finish(content, list(made.values()))
    if latents and _failed(write_latents(place, latents, ray, workers), len({b["file"] for b in content["batches"]}), "files of latents"):
        return 1
    return code


def _clear_other(place: Path, packing: Packing) -> None:
    """Remove a packed set of another description, but not its pieces. dataset.json goes first and run.json last."""
    try:
        check_description(place, {"packing": packing}, write=False)
    except ValueError:
        for path in [place / "dataset.json", *place.glob("*.parquet"), *place.glob("latents/*"), place / "run.json"]:
            path.unlink(missing_ok=True)


def _shards(run: str, keys: Keys) -> list[Shard]:
    """The source shards that the selection needs, in the order of `keys.shards`."""
    listed = {shard.name: shard for shard in load_listing(run)}
    gone = [name for name in keys.shards if name not in listed]
    if gone:
        raise ValueError(f"{len(gone)} shards of the selection are not in {run}/shards.json, for example {gone[0]!r}: annotate them again")
    return [listed[name] for name in keys.shards]


def _make_pieces(
    shards: list[Shard], selection: Path, pieces: Path, packing: Packing, sizes: np.ndarray, ray: str, workers: int | None
) -> dict[str, Made] | None:
    """First pass: what became of every shard; None when some failed."""
    for left in pieces.glob(".*"):
        left.unlink()  # of a writer that was killed
    size = dict(zip([shard.name for shard in shards], sizes.tolist(), strict=True))
    make = partial(piece_maker, selection, pieces, packing.seed)
    made, failed = {}, []
    with tqdm(total=sum(size.values()), unit="image", desc=f"pack {packing.policy}: images", file=sys.stderr) as progress:
        for outcome in cluster.run(make, shards, ray, workers):
            if outcome.error:
                failed.append(f"{outcome.item.name} ({outcome.error})")
            else:
                made[outcome.item.name] = outcome.value
                progress.update(size[outcome.item.name])
    return None if _failed(failed, len(shards), "shards") else made


def _assemble(keys: Keys, made: dict[str, Made], pieces: Path, place: Path, packing: Packing, ray: str, workers: int | None) -> bool:
    """Second pass: the packed shards, then dataset.json; False when some failed."""
    start = dict(zip(keys.shards, keys.starts.tolist(), strict=False))
    errors = [row | {"entry": start[name] + row["row"]} for name in keys.shards for row in made[name].errors]
    good = np.ones(len(keys), bool)
    good[[row["entry"] for row in errors]] = False
    order = plan(keys, good, packing.batch_size, packing.remainder)
    made_by = fingerprint({"packing": packing, "errors": [row["uid"] for row in errors]})
    paths = [pieces / f"{name}.arrow" for name in keys.shards]
    failed, files = [], list(packed_files(keys, order, packing))
    with tqdm(total=len(order.entries), unit="image", desc=f"pack {packing.policy}: files", file=sys.stderr) as progress:
        for outcome in cluster.run(partial(file_writer, paths, place, made_by), files, ray, workers):
            if outcome.error:
                failed.append(f"{outcome.item.name} ({outcome.error})")
            else:
                progress.update(len(outcome.item.rows))
    if _failed(failed, len(files), "packed files"):
        return False
    left = [Piece(paths[shard]).row(row)["uid"][0].as_py() for shard, row in zip(*keys.place(order.remainder), strict=True)]
    write_json(describe(keys, order, packing, errors, left, made_by), place / "dataset.json")
    return True


def piece_maker(selection: Path, pieces: Path, seed: int) -> Callable[[Shard], Made]:
    """The function of one shard that a worker runs."""
    return lambda shard: make_piece(shard, selection, pieces / f"{shard.name}.arrow", seed)


def file_writer(pieces: list[Path], place: Path, made_by: str) -> Callable[[PackedFile], int]:
    """The function of one packed shard that a worker runs."""
    return lambda file: write_file(file, pieces, place, made_by)


def _failed(failed: list[str], total: int, what: str) -> bool:
    if failed:
        print(f"k2 pack: {len(failed)} of {total} {what} failed: {'; '.join(failed[:3])}. Run the same command again", file=sys.stderr)
    return bool(failed)


def _forecast(keys: Keys, order: Plan) -> dict[str, Any]:
    """What `--dry-run` prints."""
    batches = Counter(order.bucket.tolist())
    sizes = {keys.buckets[bucket]: count for bucket, count in sorted(batches.items())}
    pixels = sum(int(order.lengths[order.bucket == bucket].sum()) * np.prod(keys.buckets[bucket]) for bucket in batches)
    return {
        "num_chosen": len(keys),
        "num_batches": len(order.lengths),
        "batches": {f"{high}x{wide}": count for (high, wide), count in sizes.items()},
        "num_padding": int(order.lengths.sum() - order.num_rows.sum()),
        "num_remainder": len(order.remainder),
        "bytes": int(pixels * BYTES_PER_PIXEL),
    }


def _finish(content: dict, made: list[Made]) -> int:
    """Print the outcome; 1 when an image that was chosen could not be packed."""
    errors, remainder = content["errors"], content["remainder"]
    summary = {name: content[name] for name in ("policy", "resolution", "num_chosen", "num_rows", "num_batches", "num_padding")}
    summary |= {"images_now": sum(piece.num_decoded for piece in made), "reused": sum(piece.num_reused for piece in made)}
    print(json.dumps(summary | {"not_packed": len(errors), "remainder": len(remainder)}))
    for row in errors[:5]:
        print(f"k2 pack: {row['uid']} was chosen but cannot be packed: {row['error']}", file=sys.stderr)
    if remainder:
        print(f"k2 pack: {len(remainder)} images fill no whole batch and are left out; dataset.json lists them", file=sys.stderr)
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(pack, argv, "k2 pack")


if __name__ == "__main__":
    sys.exit(main())
