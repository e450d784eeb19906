"""`k2 pack`: a selection as training shards."""

import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from curation.pack import Packing, assemble, make_piece, plan
from curation.shards import file_hash, fingerprint
from curation.sources import Shard, load_listing
from pipelines import cluster
from pipelines.cli import call
from pipelines.run_folder import check_description

BATCH_PIXELS = 2 << 20  # default batch: 32 images at 256 px, 8 at 512, 2 at 1024


def pack(run: str, policy: str, batch_size: int | None = None, seed: int = 0, ray: str = "auto", workers: int | None = None) -> int:
    """Crop, resize and shuffle the images of a selection into Parquet files whose row groups are batches of one bucket.

    Writes RUN/packed/POLICY. The same command again does only what is missing.

    Args:
        run: Run folder.
        policy: Name of a selection, made by `k2 filter`.
        batch_size: Images in a row group; default 2 megapixels' worth (32 at 256 px, 8 at 512, 2 at 1024).
        seed: Of the shuffle.
        ray: auto (a running cluster, else this machine), off (this process) or a Ray address.
        workers: Ray workers; default one per CPU.
    """
    source = Path(run) / "selection" / f"{policy}.parquet"
    if not source.exists():
        raise ValueError(f"{source} is missing; run `k2 filter --run {run} --policy {policy}` first")
    resolution = json.loads(source.with_suffix(".funnel.json").read_text())["resolution"]
    selection = pq.read_table(source)
    packing = Packing(policy, file_hash(source), resolution, batch_size or max(1, BATCH_PIXELS // resolution**2), seed)
    made_by = fingerprint(packing)
    place = Path(run) / "packed" / policy
    check_description(place, {"packing": packing})
    done = place / "dataset.json"
    if done.exists():
        shutil.rmtree(place / ".pieces", ignore_errors=True)  # a kill after the commit point leaves them
        return _finish(json.loads(done.read_text()), now=0)
    rows = defaultdict(list)
    for row in selection.to_pylist():
        rows[row["shard"]].append(row)
    shards = [shard for shard in load_listing(run) if shard.name in rows]
    pieces = {shard.name: str(place / ".pieces" / f"{shard.name}.parquet") for shard in shards}
    failed, now = [], 0
    with tqdm(total=len(selection), unit="image", desc=f"pack {policy}", file=sys.stderr) as progress:
        make = partial(piece_maker, dict(rows), pieces, made_by)
        for outcome in cluster.run(make, shards, ray, workers):
            if outcome.error:
                failed.append(f"{outcome.item.name} ({outcome.error})")
            else:
                now += outcome.value
                progress.update(len(rows[outcome.item.name]))
    if failed:
        print(
            f"k2 pack: {len(failed)} of {len(shards)} shards failed: {'; '.join(failed[:3])}. Run the same command again", file=sys.stderr
        )
        return 1
    content = assemble(plan(selection, packing), [pieces[shard.name] for shard in shards], place, packing, made_by)
    shutil.rmtree(place / ".pieces", ignore_errors=True)
    return _finish(content, now)


def piece_maker(rows: dict[str, list[dict]], pieces: dict[str, str], made_by: str) -> Callable[[Shard], int]:
    """The function of one shard that a worker runs."""
    return lambda shard: make_piece(shard, rows[shard.name], pieces[shard.name], made_by)


def _finish(content: dict, now: int) -> int:
    """Print the outcome; 1 when an image that was chosen could not be packed."""
    errors = content["errors"]
    summary = {name: content[name] for name in ("policy", "resolution", "num_rows", "num_batches")}
    print(json.dumps(summary | {"images_now": now, "not_packed": len(errors)}))
    for row in errors[:5]:
        print(f"k2 pack: {row['uid']} was chosen but cannot be packed: {row['error']}", file=sys.stderr)
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(pack, argv, "k2 pack")


if __name__ == "__main__":
    sys.exit(main())
