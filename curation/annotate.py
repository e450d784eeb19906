"""One shard through the stages: one row out per row in, errors as values.

    shard -> prepare (read, decode, CPU stages, tower inputs) -> infer (towers and what stands on them)
          -> annotations/<stage>/<shard>.parquet

`prepare` needs CPUs, `infer` the accelerator. Between them go `Inputs`: small contiguous arrays, never encoded images or full
pixels.
In one process the second follows the first; on a cluster `ask` sends the inputs to another pool, and everything else stays the same.

Batch boundaries are a function of the shard alone, so the same shard gives the same bytes in any process.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.decode import LIMITS, READS, Decoded, DecodeError, ImageBatch, Limits, decode_for
from curation.schema import SAMPLES
from curation.shards import describe, fingerprint, is_done, write_table
from curation.sources import Shard, read_rows

READ_IMAGES = 32  # rows that are in memory with their encoded bytes
BATCH_IMAGES = 128  # rows of one message to the accelerator; a forward pass sees those that decode
BATCH_PIXELS = 64_000_000  # 192 MB of RGB: what may be decoded at once, beyond its first image
# Columns that any stage may have and none computes.
LEDGER = ("uid", "shard", "key", "caption", "caption_source", "other_captions", "bytes", "md5")
BATCHES_AHEAD = 2  # batches of a shard that may wait for their answers while the next is prepared

StageFunction = Callable[[ImageBatch], dict[str, Any]]


class Stage(Protocol):
    """A description of how images become columns: cheap, printable, picklable; heavy state appears only in `load`.

    A stage with `towers` runs where the accelerator is. It sees what each `tower.prepare` made of the images, and what its own
    `prepare(batch)`, if it has one, made of the batch: an array with one entry per image, at `batch.cache[stage, "inputs"]`.
    """

    name: str
    schema: pa.Schema
    reads: str  # one of decode.READS; "pixels" for a stage that does not say

    def load(self, device: str) -> StageFunction:
        """A function from a batch to one value per image for every column but uid, error and the ledger's."""


@dataclass
class Report:
    """What happened to one shard; one line of report.jsonl."""

    shard: str
    stages: list[str]
    rows: int = 0
    bad: int = 0
    bytes: int = 0  # encoded
    seconds: dict[str, float] = field(default_factory=dict)  # read, decode, prepare, wait, write and one entry per stage

    def add(self, what: str, start: float) -> float:
        """Book the time since `start` under `what`; returns now."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - start
        return now


@dataclass
class Inputs:
    """The images of one batch as the towers will see them: the message from preparing to inferring."""

    stages: tuple[str, ...]  # names of those that infer
    uids: list[str]  # of the images that decoded
    arrays: dict[Any, np.ndarray]  # tower, or stage with a `prepare` -> (N, ...), contiguous

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


@dataclass
class Answers:
    """What inference made of one `Inputs`."""

    values: dict[str, pa.Table] = field(default_factory=dict)  # stage name -> a row per image
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Prepared:
    """One batch of a shard after the CPU's part."""

    ledger: pa.Table  # facts that need no pixels, and so are known of broken images too: a row per sample
    source_errors: list[str | None]
    errors: list[str | None]  # of source or decoding
    values: dict[Stage, pa.Table]  # CPU stages: a row per image that the stage saw
    inputs: Inputs


Decode = Callable[[bytes | None, str, Limits], Decoded]  # raises DecodeError
Ask = Callable[[Inputs], Callable[[], Answers]]  # hands inputs over; what it returns waits for the answers


def reads_of(stage: Stage) -> str:
    """How far images must be decoded for a stage."""
    return getattr(stage, "reads", "pixels")


def infers(stage: Stage) -> bool:
    """Whether a stage runs on what a tower makes of the images, so that it belongs to the accelerator's pool."""
    return bool(towers_of(stage))


def towers_of(stage: Stage) -> tuple[Any, ...]:
    """The towers whose vectors a stage needs."""
    return getattr(stage, "towers", ())


def stage_fingerprint(stage: Stage, limits: Limits = LIMITS) -> str:
    """What an annotation file was made by: stage, tower, weights, decoding, limits, batch boundaries."""
    return fingerprint({"stage": describe(stage), "reads": reads_of(stage), "limits": limits, "batch": BATCH_IMAGES})


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
    shard: Shard,
    stages: tuple[Stage, ...],
    functions: dict[Stage, StageFunction],
    run_dir: str,
    limits: Limits = LIMITS,
    ask: Ask | None = None,
    decode: Decode = decode_for,
    watch: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run the stages that this shard misses and write their annotations, each file whole or not at all.

    Args:
        shard: Where the samples are.
        stages: What is wanted of it.
        functions: The loaded stages (see `Stage.load`); those that infer may be left out where `ask` hands them to another process.
        run_dir: The run folder.
        limits: What an image may cost.
        ask: Where inference happens; in this process when None.
        decode: `decode_for`, or `isolated.decode_isolated` for a shard that has killed a process.
        watch: Called with the report so far after every batch.
    """
    todo = missing_stages(shard, stages, run_dir, limits)
    report = Report(shard.name, [stage.name for stage in todo])
    if not todo:
        return report
    ask = ask or partial(_answer_here, functions)
    tables: dict[Stage, list[pa.Table]] = {stage: [] for stage in todo}
    waiting: deque[tuple[Prepared, Callable[[], Answers]]] = deque()

    def collect() -> None:
        prepared, answer = waiting.popleft()
        start = time.perf_counter()
        answers = answer()
        report.add("wait", start)
        for name, seconds in answers.seconds.items():
            report.seconds[name] = report.seconds.get(name, 0.0) + seconds
        for stage in todo:
            values = answers.values[stage.name] if infers(stage) else prepared.values[stage]
            tables[stage].append(_rows_out(stage, prepared, values))

    for prepared in prepare(shard, todo, functions, report, limits, decode):
        report.rows += len(prepared.errors)
        report.bad += sum(error is not None for error in prepared.errors)
        waiting.append((prepared, ask(prepared.inputs) if prepared.inputs.stages else Answers))
        prepared.inputs.arrays.clear()  # handed over: not to be held until the answers come
        while len(waiting) > BATCHES_AHEAD:
            collect()
        watch(report)
    while waiting:
        collect()
    start = time.perf_counter()
    for stage in todo:
        # One chunk, so that the pages of the file do not depend on how the rows came.
        table = pa.concat_tables(tables[stage]).combine_chunks() if tables[stage] else stage.schema.empty_table()
        assert len(table) == report.rows, (stage.name, len(table), report.rows)
        write_table(table, annotation_path(run_dir, stage.name, shard.name), stage_fingerprint(stage, limits))
    report.add("write", start)
    watch(report)
    return report


def infer(functions: dict[Stage, StageFunction], inputs: Inputs) -> Answers:
    """The stages that `inputs` names, on prepared images: the accelerator's part."""
    batch = ImageBatch(inputs.uids, [], [], [], {(maker, "inputs"): array for maker, array in inputs.arrays.items()})
    answers = Answers()
    for stage, function in functions.items():
        if stage.name in inputs.stages:
            start = time.perf_counter()
            answers.values[stage.name] = _values(stage, function, batch)
            answers.seconds[stage.name] = time.perf_counter() - start
    return answers


def _answer_here(functions: dict[Stage, StageFunction], inputs: Inputs) -> Callable[[], Answers]:
    answers = infer(functions, inputs)
    return lambda: answers


def prepare(
    shard: Shard,
    stages: tuple[Stage, ...],
    functions: dict[Stage, StageFunction],
    report: Report,
    limits: Limits = LIMITS,
    decode: Decode = decode_for,
) -> Iterator[Prepared]:
    """Read, decode as far as the greediest stage needs, run the CPU stages and make the towers' inputs: batches of BATCH_IMAGES rows."""
    parts: list[Prepared] = []
    start = time.perf_counter()
    samples = read_rows(shard)
    while rows := list(islice(samples, READ_IMAGES)):
        report.add("read", start)
        parts.append(_prepare_rows(rows, stages, functions, report, limits, decode))
        if sum(len(part.errors) for part in parts) >= BATCH_IMAGES:
            yield _joined(parts)
            parts = []
        start = time.perf_counter()
    if parts:
        yield _joined(parts)


def _joined(parts: list[Prepared]) -> Prepared:
    first = parts[0]
    arrays = {maker: np.concatenate([part.inputs.arrays[maker] for part in parts]) for maker in first.inputs.arrays}
    return Prepared(
        pa.concat_tables([part.ledger for part in parts]),
        [error for part in parts for error in part.source_errors],
        [error for part in parts for error in part.errors],
        {stage: pa.concat_tables([part.values[stage] for part in parts]) for stage in first.values},
        Inputs(first.inputs.stages, [uid for part in parts for uid in part.inputs.uids], arrays),
    )


def _prepare_rows(
    rows: list[dict],
    stages: tuple[Stage, ...],
    functions: dict[Stage, StageFunction],
    report: Report,
    limits: Limits,
    decode: Decode,
) -> Prepared:
    start = time.perf_counter()
    uids, encoded = [row["uid"] for row in rows], [row["image"] for row in rows]
    source_errors = [row["error"] or ("no image bytes" if row["image"] is None else None) for row in rows]
    has_bytes = [i for i, error in enumerate(source_errors) if error is None]
    ledger = _ledger(rows, stages)
    report.bytes += sum(len(encoded[i]) for i in has_bytes)
    errors, seen = list(source_errors), []
    values: dict[Stage, list[pa.Table]] = {stage: [] for stage in stages if not infers(stage)}
    inferring = [stage for stage in stages if infers(stage)]
    asked = dict.fromkeys(tower for stage in inferring for tower in towers_of(stage))
    towers = [tower for tower in asked if getattr(tower, "within", None) not in asked]  # else its vector comes out of the other's pass
    preparing = [stage for stage in inferring if hasattr(stage, "prepare")]
    arrays: dict[Any, list[np.ndarray]] = {maker: [] for maker in (*towers, *preparing)}
    report.add("read", start)

    def run(batch: ImageBatch, of_bytes: bool) -> None:
        for stage in values:
            if (reads_of(stage) == "bytes") == of_bytes:
                start = time.perf_counter()
                values[stage].append(_values(stage, functions[stage], batch))
                report.add(stage.name, start)
        if not of_bytes:
            start = time.perf_counter()
            for tower in towers:
                arrays[tower].append(tower.prepare(batch.views if tower.reads == "view" else batch.images))
            for stage in preparing:
                arrays[stage].append(stage.prepare(batch))
            report.add("prepare", start)

    run(ImageBatch([uids[i] for i in has_bytes], [encoded[i] for i in has_bytes], [], []), of_bytes=True)
    reads = max((reads_of(stage) for stage in stages), key=READS.index)
    batch, pixels = ImageBatch([], [], [], []), 0
    for i in has_bytes if reads != "bytes" else ():
        start = time.perf_counter()
        try:
            decoded = decode(encoded[i], reads, limits)
        except DecodeError as problem:
            errors[i] = str(problem)
            report.add("decode", start)
            continue
        seen.append(uids[i])
        batch.uids.append(uids[i])
        batch.encoded.append(encoded[i])
        batch.headers.append(decoded.header)
        batch.views.append(decoded.view)
        if decoded.pixels is not None:
            batch.images.append(decoded.pixels)
            pixels += decoded.pixels.size // 3
        pixels += decoded.view.size // 3
        report.add("decode", start)
        if pixels >= BATCH_PIXELS:
            run(batch, of_bytes=False)
            batch, pixels = ImageBatch([], [], [], []), 0
    run(batch, of_bytes=False)
    inputs = {maker: np.concatenate(parts) for maker, parts in arrays.items()}
    return Prepared(
        ledger,
        source_errors,
        errors,
        {stage: pa.concat_tables(tables) for stage, tables in values.items()},
        Inputs(tuple(stage.name for stage in inferring), seen, inputs),
    )


def _ledger(rows: list[dict], stages: tuple[Stage, ...]) -> pa.Table:
    """Facts of a sample that need no pixels, as far as a stage writes them."""
    wanted = {name for stage in stages for name in stage.schema.names}
    images = [row["image"] for row in rows]
    columns = {
        name: pa.array([row[name] for row in rows], SAMPLES.field(name).type)
        for name in SAMPLES.names
        if name in wanted and name not in ("image", "error")
    }
    if "bytes" in wanted:
        columns["bytes"] = pa.array([None if image is None else len(image) for image in images], pa.int64())
    if "md5" in wanted:
        digests = [None if image is None else hashlib.md5(image, usedforsecurity=False).hexdigest() for image in images]
        columns["md5"] = pa.array(digests, pa.string())
    return pa.table(columns)


def _values(stage: Stage, function: StageFunction, batch: ImageBatch) -> pa.Table:
    """What a stage makes of a batch, checked: the columns that only it knows, a row per image."""
    found = function(batch) if len(batch) else {}
    columns = {}
    for column in stage.schema:
        if column.name in LEDGER or column.name == "error":
            continue
        values = found.get(column.name, [])
        assert len(values) == len(batch), f"stage {stage.name}: {len(values)} values of {column.name} for {len(batch)} images"
        array = values.cast(column.type) if isinstance(values, pa.Array) else pa.array(values, column.type)
        if pa.types.is_floating(column.type):
            assert pc.all(pc.is_finite(array)).as_py() is not False, f"stage {stage.name}: {column.name} is not finite"
        columns[column.name] = array
    return pa.table(columns)


def _rows_out(stage: Stage, prepared: Prepared, values: pa.Table) -> pa.Table:
    """Scatter the values of the images that a stage saw back to one row per sample."""
    errors = prepared.source_errors if reads_of(stage) == "bytes" else prepared.errors
    seen = np.array([error is None for error in errors], bool)
    assert len(values) == seen.sum(), (stage.name, len(values), seen.sum())
    places = pa.array(np.cumsum(seen) - 1, pa.int64(), mask=~seen)
    columns = []
    for column in stage.schema:
        if column.name == "error":
            columns.append(pa.array(errors, pa.string()))
        elif column.name in LEDGER:
            columns.append(prepared.ledger[column.name])
        else:
            columns.append(values[column.name].take(places))
    return pa.Table.from_arrays(columns, schema=stage.schema)
