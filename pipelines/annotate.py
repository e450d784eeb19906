"""`k2 annotate`: stages over the shards of a source."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from curation.annotate import Report, annotate_shard, missing_stages, stage_fingerprint
from curation.shards import describe, fingerprint
from curation.sources import Shard, list_shards, save_listing
from pipelines import cluster, recipes
from pipelines.cli import call
from pipelines.run_folder import check_description


def annotate(
    source: str,
    out: str,
    recipe: str = "default",
    ray: str = "auto",
    workers: int | None = None,
    shard_size: int = 256,
    max_bad: float = 0.5,
    device: str = "auto",
    dry_run: bool = False,
) -> int:
    """Write one annotation per stage and shard. The same command again does only what is missing.

    Args:
        source: Folder of images, tar or Parquet file, or a pattern ('data/{000..123}.tar', 's3://bucket/*.parquet').
        out: Run folder.
        recipe: Stages to run: default, offline, siglip, basics, or a file of yours as my.py:name.
        ray: auto (a running cluster, else this machine), off (this process) or a Ray address.
        workers: Ray workers; default one per GPU, else one per CPU.
        shard_size: Files in one shard of a folder.
        max_bad: Share of broken images above which the job ends with exit code 1.
        device: auto, cpu or cuda, for the towers.
        dry_run: Say what would be done, and stop.
    """
    if "://" in out:
        raise ValueError(f"--out {out!r}: a run folder is on a local or mounted disk for now; the source may be on an object store")
    shards = list_shards(source, shard_size)
    stages = recipes.find(recipe, recipes.ANNOTATE)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names), f"two stages share a name: {names}"
    check_description(
        out,
        {
            "source": source if "://" in source else str(Path(source).resolve()),
            "shards": {shard.name: fingerprint(shard) for shard in shards},
            "stages": {stage.name: {"fingerprint": stage_fingerprint(stage), "description": describe(stage)} for stage in stages},
        },
        write=not dry_run,
        may_grow="stages",
    )
    todo = [shard for shard in shards if missing_stages(shard, stages, out)]
    if dry_run:
        print(json.dumps({"shards": len(shards), "missing": len(todo), "stages": names}))
        return 0
    save_listing(shards, out)
    make = partial(load_stages, stages, out, device)
    failed, rows, bad = [], 0, 0
    with tqdm(total=len(shards), initial=len(shards) - len(todo), unit="shard", desc="annotate", file=sys.stderr) as progress, one_thread():
        for outcome in cluster.run(make, todo, ray, workers):
            if outcome.error:
                failed.append(outcome.item.name)
                line = {"shard": outcome.item.name, "error": outcome.error}
            else:
                rows, bad = rows + outcome.value.rows, bad + outcome.value.bad
                line = asdict(outcome.value)
            with open(f"{out}/report.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            elapsed = max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{rows / elapsed:.0f} images/s, {bad} broken", refresh=False)
            progress.update(not outcome.error)
    summary = {"shards": len(shards), "done_now": len(todo) - len(failed), "failed": failed, "rows_now": rows, "broken_now": bad}
    print(json.dumps(summary))
    if failed:
        print(
            f"k2 annotate: {len(failed)} of {len(shards)} shards failed ({', '.join(failed[:3])}); run the same command again",
            file=sys.stderr,
        )
        return 1
    if rows and bad / rows > max_bad:
        print(f"k2 annotate: {bad} of {rows} images are broken, over --max-bad {max_bad}; see the error columns in {out}", file=sys.stderr)
        return 1
    return 0


def load_stages(stages: tuple, out: str, device: str) -> Callable[[Shard], Report]:
    """Load every stage once in this worker; returns the function of one shard."""
    limit_threads(1)
    if device == "auto":
        device = "cuda" if "torch" in sys.modules and sys.modules["torch"].cuda.is_available() else "cpu"
    functions = {stage: stage.load(device) for stage in stages}
    return lambda shard: annotate_shard(shard, stages, functions, out)


def limit_threads(count: int) -> int | None:
    """Give torch `count` threads; returns how many it had, None where no stage has imported torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return before


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread, as in every worker: sums must not depend on where a shard runs, so that bytes are equal."""
    before = limit_threads(1)
    try:
        yield
    finally:
        if before is not None:
            limit_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(annotate, argv, "k2 annotate")


if __name__ == "__main__":
    sys.exit(main())
