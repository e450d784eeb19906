"""`k2 plan`: what N images cost, from rates that were measured."""

import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.buckets import place
from curation.decode import DecodeError
from curation.pieces import cut
from curation.sources import list_shards, read_samples
from pipelines.annotate import annotate
from pipelines.cli import call
from pipelines.cost import Cluster, Rates, cost, text

PARTS = ("read", "decode", "prepare", "write")  # seconds of report.jsonl that are no stage; waiting is no work
PROBE_SHARDS = 16  # places of the source that a probe takes its images from
ENCODED_IMAGES = 64  # images that are cut to size to learn what a packed one weighs


def plan(
    images: int,
    run: str | None = None,
    source: str | None = None,
    probe: int = 0,
    recipe: str = "default",
    device: str = "auto",
    gpu_rate: tuple[str, ...] = (),
    resolutions: tuple[int, ...] = (256, 512, 1024),
    keep: float | None = None,
    nodes: int = 1,
    cpus: int = 0,
    gpus: int = 0,
    read_mb_per_s: float | None = None,
    cpu_hour_price: float | None = None,
    gpu_hour_price: float | None = None,
) -> int:
    """Core-hours, GPU-hours, storage, time and money of IMAGES images, and what they depend on. A table on stderr, JSON on stdout.

    The rates come from a run (its report.jsonl and its files) or from a probe that annotates some images of a source now, in this
    process and in a temporary folder. A figure that nobody measured is unknown, never guessed.

    Args:
        images: How many images are planned.
        run: Run folder whose rates count. Or:
        source: Where a probe takes its images from, as for `k2 annotate`.
        probe: Images that the probe annotates.
        recipe: Stages of the probe.
        device: Device of the probe, as for `k2 annotate`.
        gpu_rate: Images per second of one GPU for the stage of a tower, as siglip=2400; siglip=measured takes the run's own figure,
            for a run that had a GPU. Such a stage then costs GPU-hours and no core-hours.
        resolutions: Packed sets that a probe looks at.
        keep: Share of the images that a policy keeps, 0 to 1, where no funnel of the run says it.
        nodes: Nodes of the cluster.
        cpus: Cores of a node; without them no time is said.
        gpus: GPUs of a node.
        read_mb_per_s: What a node reads from the source, 10^6 bytes per second.
        cpu_hour_price: Price of a core for an hour, in any money.
        gpu_hour_price: Price of a GPU for an hour.
    """
    cluster = Cluster(nodes, cpus, gpus, read_mb_per_s, cpu_hour_price, gpu_hour_price)
    if keep is not None and not 0 <= keep <= 1:
        raise ValueError(f"--keep must be a share from 0 to 1; got {keep}")
    given = _gpu_rates(gpu_rate)
    if (run is None) == (source is None):
        raise ValueError("say where the rates come from: --run RUN (a run with a report.jsonl), or --source PATTERN with --probe N")
    if run is not None:
        rates, measured = measured_rates(Path(run), given, gpus > 0, keep)
    else:
        if probe < 1:
            raise ValueError(f"--source needs --probe N, the number of images to annotate now; got {probe}")
        with tempfile.TemporaryDirectory(prefix="k2-plan-") as folder:
            rates, measured = probed_rates(source, probe, recipe, device, Path(folder), given, gpus > 0, resolutions, keep)
    found = cost(images, rates, cluster)
    assumptions = _assumptions(measured, run is None, cluster)
    print("\n".join(_table(found, cluster)), file=sys.stderr)
    print("assumed:\n" + "\n".join(f"  {line}" for line in assumptions), file=sys.stderr)
    print(json.dumps(found | {"measured_on": measured, "assumptions": assumptions}))
    return 0


def measured_rates(run: Path, given: dict[str, float | None], has_gpus: bool, keep: float | None) -> tuple[Rates, dict[str, Any]]:
    """(rates, what they were measured on) of a run folder.

    Raises:
        ValueError: the run has no usable report.jsonl, or a stage of `given` is not in it.
    """
    report = run / "report.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    lines = [line for line in lines if not line.get("error") and line.get("rows")]
    if not lines:
        raise ValueError(f"{report} has no finished shard; run `k2 annotate --out {run}` first, or use --source with --probe")
    rows, seconds = defaultdict(int), defaultdict(float)
    for line in lines:
        for name in (*PARTS, *line["stages"]):
            if name in line["seconds"]:
                rows[name] += line["rows"]
                seconds[name] += line["seconds"][name]
    per_image = {name: seconds[name] / rows[name] for name in seconds}
    stages = [name for name in per_image if name not in PARTS]
    if unknown := sorted(set(given) - set(stages)):
        raise ValueError(f"--gpu-rate {unknown[0]}: the measured stages are {', '.join(stages)}")
    on_gpu = {name: per_image[name] if rate is None else 1 / rate for name, rate in given.items()}
    if has_gpus:  # a tower goes to the GPUs of a cluster that has some; a rate of one of its stages holds its forward pass
        towers = _towers(run, stages)
        known = [towers.get(name) for name in given]
        on_gpu |= {name: None for name, tower in towers.items() if tower not in known}
    tables = {name: _bytes_per_row(sorted((run / "annotations" / name).rglob("*.parquet"))) for name in stages}
    packed, kept = _packed(run)
    rates = Rates(
        {name: value for name, value in per_image.items() if name not in on_gpu},
        on_gpu,
        {name: value for name, value in tables.items() if value is not None},
        packed,
        {name: keep if kept[name] is None else kept[name] for name in packed},
        _source_bytes(run, lines),
    )
    return rates, {"images": max(rows.values()), "shards": len(lines), "stages": stages}


def probed_rates(
    source: str,
    probe: int,
    recipe: str,
    device: str,
    folder: Path,
    given: dict[str, float | None],
    has_gpus: bool,
    resolutions: tuple[int, ...],
    keep: float | None,
) -> tuple[Rates, dict[str, Any]]:
    """The same from `probe` images of a source, annotated now into `folder`."""
    start = time.perf_counter()
    samples = list(islice(_some(source, probe), probe))
    spent = time.perf_counter() - start
    size = sum(len(sample["image"] or b"") for sample in samples)
    # One local shard with the bytes as they are, whatever container the source has.
    table = pa.table({name: pa.array([sample[name] for sample in samples]) for name in ("image", "caption")})
    pq.write_table(table.cast(pa.schema([("image", pa.binary()), ("caption", pa.string())])), folder / "probe.parquet", compression="none")
    with contextlib.redirect_stdout(sys.stderr):
        annotate(str(folder / "probe.parquet"), str(folder / "run"), recipe, ray="off", max_bad=1.0, device=device)
    rates, measured = measured_rates(folder / "run", given, has_gpus, keep)
    packed = {f"{resolution} px": _encoded_bytes(samples, folder / "run", resolution) for resolution in resolutions}
    packed = {name: value for name, value in packed.items() if value is not None}
    rates = Rates(
        rates.core_seconds, rates.gpu_seconds, rates.table_bytes, packed, dict.fromkeys(packed, keep), size / len(samples) if size else None
    )
    return rates, measured | {"source_read_mb_per_s": size / 1e6 / spent if spent else None}


def _some(source: str, count: int) -> Iterator[dict]:
    """The first samples of up to PROBE_SHARDS shards, spread over the listing. A folder is cut small, so that all of it is seen."""
    shards = list_shards(source, shard_size=max(16, count // PROBE_SHARDS))
    chosen = shards[:: max(1, len(shards) // PROBE_SHARDS)][:PROBE_SHARDS]
    each = -(-count // len(chosen))
    for shard in chosen:
        yield from islice((row for batch in read_samples(shard) for row in batch.to_pylist()), each)


def _encoded_bytes(samples: list[dict], run: Path, resolution: int) -> float | None:
    """Mean bytes of an image as `k2 pack` would write it, over those that fill a bucket; None where none does."""
    columns = ["uid", "width", "height"]
    files = sorted((run / "annotations" / "basics").rglob("*.parquet"))
    facts = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    sizes = []
    for sample, row in zip(samples, facts, strict=False):  # rows in are rows out, in order
        if row["width"] and row["width"] * row["height"] >= resolution**2 and len(sizes) < ENCODED_IMAGES:
            placed = place([row["height"]], [row["width"]], resolution)
            with contextlib.suppress(DecodeError):
                sizes.append(len(cut(sample["image"], {name: int(value[0]) for name, value in placed._asdict().items()})[0]))
    return sum(sizes) / len(sizes) if sizes else None


def _bytes_per_row(files: list[Path]) -> float | None:
    """Bytes of the column data of one row: a footer, about 10 kB a file, is small beside a shard of real size and is left out."""
    metadata = [pq.read_metadata(file) for file in files]
    rows = sum(each.num_rows for each in metadata)
    groups = [each.row_group(i) for each in metadata for i in range(each.num_row_groups)]
    size = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    return size / rows if rows else None


def _packed(run: Path) -> tuple[dict[str, float], dict[str, float | None]]:
    """({policy: bytes of an image}, {policy: share kept}) of the packed sets of a run."""
    packed: dict[str, float] = {}
    kept: dict[str, float | None] = {}
    for description in sorted((run / "packed").glob("*/dataset.json")):
        name, num_rows = description.parent.name, json.loads(description.read_text())["num_rows"]
        if num_rows:
            packed[name] = sum(file.stat().st_size for file in description.parent.glob("*.parquet")) / num_rows
            funnel = run / "selection" / f"{name}.funnel.json"
            kept[name] = num_rows / json.loads(funnel.read_text())["num_images"] if funnel.exists() else None
    return packed, kept


def _source_bytes(run: Path, lines: list[dict]) -> float | None:
    """Mean encoded bytes of an image: as the report counts them, else from the stage basics."""
    if all(line.get("bytes") for line in lines):
        return sum(line["bytes"] for line in lines) / sum(line["rows"] for line in lines)
    sizes = [pq.read_table(file, columns=["bytes"])["bytes"] for file in sorted((run / "annotations" / "basics").rglob("*.parquet"))]
    values = [value for column in sizes for value in column.to_pylist() if value is not None]
    return sum(values) / len(values) if values else None


def _towers(run: Path, stages: list[str]) -> dict[str, Any]:
    """{stage: description of its tower} of the stages whose description in run.json names one: those belong to the accelerator."""
    path = run / "run.json"
    described = json.loads(path.read_text())["description"].get("stages", {}) if path.exists() else {}
    found = {name: described.get(name, {}).get("description", {}).get("tower") for name in stages}
    return {name: tower for name, tower in found.items() if tower is not None}


def _gpu_rates(texts: tuple[str, ...]) -> dict[str, float | None]:
    """{stage: images per second of one GPU, None for `measured`} of the texts after --gpu-rate."""
    rates: dict[str, float | None] = {}
    for each in texts:
        name, _, rate = each.partition("=")
        try:
            rates[name] = None if rate == "measured" else float(rate)
        except ValueError:
            rates[name] = 0.0
        if rates[name] is not None and not 0 < rates[name] < float("inf"):
            raise ValueError(f"--gpu-rate {each!r}: write STAGE=IMAGES_PER_S, as siglip=2400, or STAGE=measured")
    return rates


def _table(found: dict[str, Any], cluster: Cluster) -> list[str]:
    """The plan as lines of text."""
    lines = [f"{found['images']:,} images", f"{'':<28}{'core-hours':>14}{'GPU-hours':>14}"]
    for name in [*found["core_hours"], *found["gpu_hours"]]:
        if name != "total":
            core, gpu = found["core_hours"].get(name, 0.0), found["gpu_hours"].get(name, 0.0)
            lines.append(f"  {name:<26}{text(core):>14}{text(gpu):>14}")
    lines.append(f"  {'total':<26}{text(found['core_hours']['total']):>14}{text(found['gpu_hours']['total']):>14}")
    lines += ["storage"] + [f"  {name:<26}{text(size, 'B'):>14}" for name, size in found["table_bytes"].items()]
    for name, packed in found["packed"].items():
        share = "share kept unknown" if packed["kept"] is None else f"{packed['kept']:.1%} kept"
        lines.append(f"  packed {name:<19}{text(packed['bytes'], 'B'):>14}  ({text(packed['image_bytes'], 'B')} an image, {share})")
    lines.append(f"{'source to read':<28}{text(found['source_bytes'], 'B'):>14}")
    if cluster.cpus:
        hours = ", ".join(f"{name} alone {text(value, 'h')}" for name, value in found["hours_of"].items())
        lines.append(f"{'time':<28}{text(found['wall_hours'], 'h'):>14}  ({hours}; {cluster.nodes} nodes)")
        lines.append(f"{'bottleneck':<28}{found['bottleneck'] or 'unknown':>14}")
        lines.append(f"{'reading at that pace':<28}{text(found['read_mb_per_s'], 'MB/s'):>14}  (all nodes together)")
    if found["money"] is not None or cluster.cpu_hour_price is not None or cluster.gpu_hour_price is not None:
        lines.append(f"{'money':<28}{text(found['money']):>14}")
    return lines + (["missing"] + [f"  {line}" for line in found["missing"]] if found["missing"] else [])


def _assumptions(measured: dict[str, Any], is_probe: bool, cluster: Cluster) -> list[str]:
    """What the figures rest on."""
    lines = [
        f"the planned images are like the {measured['images']:,} measured ones: same sizes, formats and share of broken files",
        "a core of the cluster is as fast as the one that was measured, with nothing else running there; seconds are of the clock",
        "all cores and GPUs are busy from start to end: no start-up, no stragglers, no lost nodes",
        "stages that share a tower: its forward pass is booked under the one that ran first, and a GPU rate of one holds it for all",
        "storage: column data with zstd, without a footer of about 10 kB for each file; one copy",
        "duplicates are not searched for, and training is not in it",
    ]
    if is_probe:
        lines.append("reading was measured from a local copy of the probe: the network is in --read-mb-per-s alone")
        lines.append("reading and writing cost something per file too, so that a probe of few images makes them look dearer than they are")
        lines.append("uids are as short as the probe's: long names of files or shards add their bytes to every table")
        lines.append("a packed image was cut and encoded here; the share that a policy keeps is --keep")
    else:
        lines.append("a policy keeps the share that it kept in the run; more images bring more duplicates, so it will be lower")
    if cluster.cpus and (cluster.cpu_hour_price is not None or cluster.gpu_hour_price is not None):
        lines.append("the cluster is paid for from start to end, busy or not")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return call(plan, argv, "k2 plan")


if __name__ == "__main__":
    sys.exit(main())
