"""What `k2 annotate --dry-run` says: what is missing, who would do it, what would be written, and how long it may take."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from curation.annotate import Stage, annotation_path, infers, reads_of, towers_of
from curation.decode import READS
from curation.sources import Shard

SHARED = ("read", "decode", "prepare", "write")  # parts of a shard's time that no stage owns


def forecast(missing: dict[Shard, tuple[Stage, ...]], stages: tuple[Stage, ...], run_dir: str) -> dict[str, Any]:
    """Plain JSON values. `missing` holds the stages that each shard misses, empty for one that is done.

    Rows, bytes written and seconds come from the shards that are done (RUN/report.jsonl and their files) and are null before there are
    any. Seconds are those of one worker, and of one inference worker on the device that the report was made with.
    """
    todo = {shard: names for shard, wanted in missing.items() if (names := [stage.name for stage in wanted])}
    by_stage = Counter(name for names in todo.values() for name in names)
    rates = _rates(run_dir, {shard.name: shard.size for shard in missing})
    rows = _rows(todo, rates)
    cpu = [stage for stage in stages if not infers(stage) and by_stage[stage.name]]
    inferring = [stage for stage in stages if infers(stage) and by_stage[stage.name]]
    decodes = max((reads_of(stage) for stage in (*cpu, *inferring)), key=READS.index, default="bytes")
    return {
        "shards": len(missing),
        "missing": len(todo),
        "stages": [stage.name for stage in stages],
        "missing_by_stage": dict(by_stage),
        "rows": rows,
        "bytes_to_read": sum(shard.size for shard in todo) or None,
        "workers_get": {
            "decode": None if decodes == "bytes" else decodes,
            "stages": [stage.name for stage in cpu],
            "inputs_of": sorted({tower.name for stage in inferring for tower in towers_of(stage)}),
            "seconds": _seconds(todo, rates, [*SHARED, *(stage.name for stage in cpu)], rows),
        },
        "inference_gets": {
            "stages": [stage.name for stage in inferring],
            "seconds": _seconds(todo, rates, [stage.name for stage in inferring], rows),
        },
        "files_to_write": sum(by_stage.values()),
        "bytes_to_write": _bytes_to_write(missing, by_stage, run_dir),
    }


def _rates(run_dir: str, sizes: dict[str, int]) -> dict[str, float]:
    """Seconds per row of every part, from the shards that went through it; and `rows` per shard, `bytes` of the source per row."""
    path, seconds, rows, shards, encoded, all_rows = Path(run_dir, "report.jsonl"), Counter(), Counter(), 0, 0, 0
    for line in path.read_text().splitlines() if path.exists() else ():
        report = json.loads(line)
        if report.get("rows"):
            shards, all_rows, encoded = shards + 1, all_rows + report["rows"], encoded + sizes.get(report["shard"], 0)
            for part, spent in report["seconds"].items():
                seconds[part] += spent
                rows[part] += report["rows"]
    if not shards:
        return {}
    return {part: seconds[part] / rows[part] for part in seconds} | {"rows": all_rows / shards, "bytes": encoded / all_rows}


def _rows(todo: dict[Shard, list[str]], rates: dict[str, float]) -> int | None:
    if not rates:
        return None
    return sum(round(shard.size / rates["bytes"]) if shard.size and rates["bytes"] else round(rates["rows"]) for shard in todo)


def _seconds(todo: dict[Shard, list[str]], rates: dict[str, float], parts: list[str], rows: int | None) -> float | None:
    """None where a stage that is missing was never timed."""
    if rows is None or any(part not in rates and part not in SHARED for part in parts):
        return None
    share = {part: sum(part in names for names in todo.values()) / max(len(todo), 1) for part in parts if part not in SHARED}
    return round(sum(rows * share.get(part, 1.0) * rates.get(part, 0.0) for part in parts), 3)


def _bytes_to_write(missing: dict[Shard, tuple[Stage, ...]], by_stage: Counter[str], run_dir: str) -> int | None:
    total = 0.0
    for name, count in by_stage.items():
        done = (shard for shard, wanted in missing.items() if name not in [stage.name for stage in wanted])
        sizes = [path.stat().st_size for shard in done if (path := Path(annotation_path(run_dir, name, shard.name))).exists()]
        if not sizes:
            return None
        total += count * sum(sizes) / len(sizes)
    return round(total)
