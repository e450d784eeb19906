"""benchmarks/bench_step.py on a CPU: every case leaves a row, and a process that dies is replaced."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_step
import step_parts


def test_cases_leave_rows_and_what_is_not_supported_leaves_an_error(tmp_path, monkeypatch):
    torch.compiler.set_stance("force_eager")  # to compile is what takes a minute; FlexAttention's backward is not there either way
    try:
        step_parts.packed_sets(tmp_path, "tiny")
        bench = bench_step.Bench(tmp_path, "tiny", "cpu", groups=2, warmup=1, steps=1, threads=1)
        low = min(step_parts.SCALES["tiny"].batches)
        chosen = [
            bench_step.Case(low, profile=True),
            bench_step.Case(low, kernel="flexible"),
            bench_step.Case(low, "trimmed", compiled=False),
            bench_step.Case(low, "loop"),
        ]
        assert {(case.who, case.kernel) for case in chosen} <= {(case.who, case.kernel) for case in bench_step.cases([low, 2, 3])}
        assert bench_step.work(bench, chosen, 0, time.time() + 600, tmp_path / "rows.jsonl", "a") == 0
    finally:
        torch.compiler.set_stance("default")
    ours, flexible, trimmed, loop = bench_step.rows_of(tmp_path / "rows.jsonl", "a")
    assert "FlexAttention does not support backward on CPU" in flexible["error"]
    assert ours["images"] == 8 and ours["images_per_s"] > 0 and ours["plan_gib"] > 0 and ours["kernels"]
    assert set(ours["parts"]) == {"text", "vae", "forward", "backward", "optimizer"} and 0.5 < sum(ours["parts"].values()) <= 1
    assert len(ours["losses"]) == 2 and 0 <= ours["data_wait"] < 1
    assert trimmed["images_per_s"] > 0 and loop["images_per_s"] > 0 and len(loop["losses"]) == 2
    assert loop["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-6), "the step that is timed is that of k2 train"
    assert len(bench_step.table([ours, flexible, trimmed, loop]).splitlines()) == 4


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch, tmp_path):
    bench = bench_step.Bench(tmp_path, "tiny", "cpu", 1, 0, 1, 1)

    def ours(case):
        if case.rows != 1:
            raise torch.OutOfMemoryError("too many")
        return {"images_per_s": 1.0}

    monkeypatch.setattr(bench, "ours", ours)
    rows = list(bench.measure(bench_step.Case(32)))
    assert [row["rows"] for row in rows] == [None, 2, 1] and ["error" in row for row in rows] == [True, True, False]


def test_a_worker_that_dies_is_replaced_and_its_case_is_an_error(tmp_path):
    out, sides = tmp_path / "rows.jsonl", bench_step.cases([32, 48, 64])[:4]
    worker = f"""
import json, os, sys
for number in range(int(sys.argv[2]), 4):
    if number == 1:
        os.kill(os.getpid(), 11)
    with open({str(out)!r}, "a") as file:
        file.write(json.dumps({{"run": "a", "number": number}}) + chr(10))
"""
    bench_step.supervise([sys.executable, "-c", worker], sides, time.time() + 60, out, "a")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    assert "ended with -11" in rows[1]["error"] and rows[1]["side"] == 48
