"""One shard through the stages: one row out per row in, errors as values.

    shard -> samples -> decoded batches (bounded in images and pixels) -> stages -> annotations/<stage>/<shard>.parquet

Batch boundaries are a function of the shard alone, so the same shard gives the same bytes in any process.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from curation.decode import LIMITS, DecodeError, ImageBatch, Limits, decode_for
from curation.shards import describe, fingerprint, is_done, write_table
from curation.sources import Shard, read_samples

BATCH_IMAGES = 32
BATCH_PIXELS = 64_000_000  # 192 MB of RGB: what one batch may hold in memory, beyond its first image

StageFunction = Callable[[ImageBatch], dict[str, Any]]


class Stage(Protocol):
    """A description of how pixels become columns: cheap, printable, picklable; heavy state appears only in `load`."""

    name: str
    schema: pa.Schema

    def load(self, device: str) -> StageFunction:
        """A function from a batch to one value per image for every column but uid and error."""


@dataclass
class Report:
    """What happened to one shard; one line of report.jsonl."""

    shard: str
    stages: list[str]
    rows: int = 0
    bad: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # read, decode, write and one entry per stage

    def add(self, what: str, start: float) -> float:
        """Book the time since `start` under `what`; returns now."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - start
        return now


def stage_fingerprint(stage: Stage, limits: Limits = LIMITS) -> str:
    """What an annotation file was made by: stage, tower, weights, limits, batch boundaries."""
    return fingerprint({"stage": describe(stage), "limits": limits, "batch": [BATCH_IMAGES, BATCH_PIXELS]})


def annotation_path(run_dir: str, stage_name: str, shard_name: str) -> str:
    """RUN/annotations/<stage>/<shard>.parquet."""
    return f"{run_dir}/annotations/{stage_name}/{shard_name}.parquet"


def missing_stages(shard: Shard, stages: tuple[Stage, ...], run_dir: str, limits: Limits = LIMITS) -> tuple[Stage, ...]:
    """The stages that still have no annotation of this shard.

    Raises:
        ValueError: an annotation is there but another description made it.
    """
    return tuple(s for s in stages if not is_done(annotation_path(run_dir, s.name, shard.name), stage_fingerprint(s, limits)))


def annotate_shard(
    shard: Shard, stages: tuple[Stage, ...], functions: dict[Stage, StageFunction], run_dir: str, limits: Limits = LIMITS
) -> Report:
    """Run the stages that this shard misses and write their annotations, each file whole or not at all.

    `functions` holds the loaded stages (see `Stage.load`).
    """
    todo = missing_stages(shard, stages, run_dir, limits)
    report = Report(shard.name, [stage.name for stage in todo])
    if not todo:
        return report
    tables: dict[Stage, list[pa.Table]] = {stage: [] for stage in todo}
    for rows, batch, errors in _decoded(shard, limits, report):
        report.rows += len(rows)
        report.bad += sum(error is not None for error in errors)
        for stage in todo:
            start = time.perf_counter()
            values = functions[stage](batch) if len(batch) else {}
            tables[stage].append(_rows_out(stage, rows, errors, values))
            report.add(stage.name, start)
    start = time.perf_counter()
    for stage in todo:
        table = pa.concat_tables(tables[stage]) if tables[stage] else stage.schema.empty_table()
        assert len(table) == report.rows, (stage.name, len(table), report.rows)
        write_table(table, annotation_path(run_dir, stage.name, shard.name), stage_fingerprint(stage, limits))
    report.add("write", start)
    return report


def _decoded(shard: Shard, limits: Limits, report: Report) -> Iterator[tuple[list[dict], ImageBatch, list[str | None]]]:
    """(rows, their decodable images, one error or None per row), bounded in images and pixels."""
    start = time.perf_counter()
    rows, errors, batch, pixels = [], [], ImageBatch([], [], [], []), 0
    for samples in read_samples(shard, BATCH_IMAGES):
        start = report.add("read", start)
        for row in samples.to_pylist():
            error = row["error"]
            if error is None:
                try:
                    header, view, image = decode_for(row["image"], "pixels", limits)
                except DecodeError as problem:
                    error = str(problem)
                else:
                    batch.uids.append(row["uid"])
                    batch.encoded.append(row["image"])
                    batch.images.append(image)
                    batch.views.append(view)
                    batch.headers.append(header)
                    pixels += header.width * header.height
            rows.append(row)
            errors.append(error)
            if len(rows) == BATCH_IMAGES or pixels >= BATCH_PIXELS:
                report.add("decode", start)
                yield rows, batch, errors
                rows, errors, batch, pixels = [], [], ImageBatch([], [], [], []), 0
                start = time.perf_counter()
        start = report.add("decode", start)
    if rows:
        yield rows, batch, errors


def _ledger(row: dict) -> dict[str, Any]:
    """Facts of a sample that need no pixels, and so are known of broken images too."""
    image = row["image"]
    return {
        "uid": row["uid"],
        "shard": row["shard"],
        "key": row["key"],
        "caption": row["caption"],
        "caption_source": row["caption_source"],
        "bytes": None if image is None else len(image),
        "md5": None if image is None else hashlib.md5(image, usedforsecurity=False).hexdigest(),
    }


def _rows_out(stage: Stage, rows: list[dict], errors: list[str | None], values: dict[str, Any]) -> pa.Table:
    """Scatter the values of the good images back to one row per sample."""
    good = [i for i, error in enumerate(errors) if error is None]
    ledger = [_ledger(row) for row in rows]
    columns = []
    for column in stage.schema:
        if column.name == "error":
            cells = errors
        elif column.name in ledger[0]:
            cells = [entry[column.name] for entry in ledger]
        else:
            found = values.get(column.name, [])
            assert len(found) == len(good), f"stage {stage.name}: {len(found)} values of {column.name} for {len(good)} images"
            if pa.types.is_floating(column.type):
                assert np.isfinite([value for value in found if value is not None]).all(), (
                    f"stage {stage.name}: {column.name} is not finite"
                )
            cells = [None] * len(rows)
            for i, value in zip(good, found, strict=True):
                cells[i] = value.item() if isinstance(value, np.generic) else value
        columns.append(pa.array(cells, column.type))
    return pa.Table.from_arrays(columns, schema=stage.schema)
