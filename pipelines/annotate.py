"""`k2 annotate`: stages over the shards of a source."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from curation.annotate import Ask, Report, annotate_shard, infer, infers, missing_stages, stage_fingerprint
from curation.decode import decode_for
from curation.shards import describe
from curation.sources import Shard, save_listing, source_shards
from pipelines import cluster, recipes
from pipelines.cli import call
from pipelines.forecast import forecast
from pipelines.progress import Meter, Progress
from pipelines.run_folder import FailedShards, check_description


@dataclass(frozen=True)
class Suspect:
    """A shard that a worker died on: its images are decoded in child processes, so that one which kills its decoder becomes a row."""

    shard: Shard


def annotate(
    source: str,
    out: str,
    recipe: str = "default",
    ray: str = "auto",
    workers: int | None = None,
    infer_workers: int | None = None,
    shard_size: int = 256,
    max_bad: float = 0.5,
    device: str = "auto",
    relist: bool = False,
    dry_run: bool = False,
) -> int:
    """Write one annotation per stage and shard. The same command again does only what is missing.

    Args:
        source: Folder of images, tar or Parquet file, or a pattern ('data/{000..123}.tar', 's3://bucket/*.parquet').
        out: Run folder.
        recipe: Stages to run: default, offline, siglip, basics, or a file of yours as my.py:name.
        ray: auto (a running cluster, else this machine), off (this process) or a Ray address.
        workers: Ray workers that read, decode and compute facts, one CPU each; default all CPUs that are left.
        infer_workers: Ray workers that hold the towers; default one per GPU. Without GPUs the workers hold them.
        shard_size: Files in one shard of a folder.
        max_bad: Share of broken images above which the job ends with exit code 1.
        device: auto, cpu or cuda, for the towers.
        relist: List the source again: files that were added make new shards. Without it a source is listed once.
        dry_run: Say what would be done and written, and how long it may take, and stop.
    """
    if "://" in out:
        raise ValueError(f"--out {out!r}: a run folder is on a local or mounted disk for now; the source may be on an object store")
    shards = source_shards(source, out, shard_size, relist)
    stages = recipes.find(recipe, recipes.ANNOTATE)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names), f"two stages share a name: {names}"
    check_description(
        out,
        {
            "source": source if "://" in source else str(Path(source).resolve()),
            "shard_size": shard_size,
            "stages": {stage.name: {"fingerprint": stage_fingerprint(stage), "description": describe(stage)} for stage in stages},
        },
        write=not dry_run,
        may_grow="stages",
    )
    missing = {shard: missing_stages(shard, stages, out) for shard in shards}
    todo = [shard for shard in shards if missing[shard]]
    if dry_run:
        print(json.dumps(forecast(missing, stages, out)))
        return 0
    save_listing(shards, out)
    failed = FailedShards(out)
    inferring = tuple(stage for stage in stages if infers(stage))
    with Progress(len(shards), len(shards) - len(todo), [stage.name for stage in inferring]) as progress, one_thread():
        outcomes = cluster.run(
            partial(load_stages, stages, out, device, watch=progress.batch if ray == "off" else None),
            todo,
            ray,
            workers,
            serve=partial(load_inference, inferring, device) if inferring else None,
            num_servers=infer_workers,
            after_death=Suspect,
            watch=progress.stands,
        )
        for outcome in outcomes:
            shard = outcome.item.name
            if outcome.error:
                failed.add(shard, outcome.tries, outcome.error)
                progress.fail()
                line = {"shard": shard, "error": outcome.error}
            else:
                failed.remove(shard)
                progress.done(outcome.value)
                line = asdict(outcome.value)
            with open(f"{out}/report.jsonl", "a") as log:
                log.write(json.dumps(line | {"tries": outcome.tries}) + "\n")
    lost = [shard.name for shard in todo if shard.name in failed]
    rows, bad = progress.rows, progress.bad
    summary = {"shards": len(shards), "done_now": len(todo) - len(lost), "failed": lost, "rows_now": rows, "broken_now": bad}
    print(json.dumps(summary))
    if lost:
        print(
            f"k2 annotate: {len(lost)} of {len(shards)} shards failed ({', '.join(lost[:3])}); {failed.path} says why; "
            "run the same command again",
            file=sys.stderr,
        )
        return 1
    if rows and bad / rows > max_bad:
        print(f"k2 annotate: {bad} of {rows} images are broken, over --max-bad {max_bad}; see the error columns in {out}", file=sys.stderr)
        return 1
    return 0


def load_stages(
    stages: tuple, out: str, device: str, ask: Ask | None = None, watch: Callable[[Report], None] | None = None
) -> Callable[[Shard | Suspect], Report]:
    """Load stages once in this worker, without those that infer where `ask` hands them over; returns the function of one shard."""
    limit_threads(1)
    device = find_device(device)
    functions = {stage: stage.load(device) for stage in stages if ask is None or not infers(stage)}

    def function(given: Shard | Suspect) -> Report:
        shard, decode = (given.shard, isolated()) if isinstance(given, Suspect) else (given, decode_for)
        return annotate_shard(shard, stages, functions, out, ask=ask, decode=decode, watch=watch or Meter())

    return function


def load_inference(stages: tuple, device: str) -> Callable[[Any], Any]:
    """Load the stages that infer; returns the function of one message."""
    limit_threads(1)
    device = find_device(device)
    return partial(infer, {stage: stage.load(device) for stage in stages})


def isolated() -> Callable:
    """The decoder that a crash cannot take along; imported when it is needed, since most runs never need it."""
    from curation.isolated import decode_isolated

    return decode_isolated


def find_device(device: str) -> str:
    """auto: cuda where a stage has imported torch and there is a GPU."""
    if device != "auto":
        return device
    return "cuda" if "torch" in sys.modules and sys.modules["torch"].cuda.is_available() else "cpu"


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
