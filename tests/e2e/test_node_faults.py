"""Random kills on a two-node Ray cluster: benchmarks/bench_faults.py, a few runs of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
def test_killing_driver_worker_and_node_changes_no_byte_and_loses_no_row():
    """In a process of its own: taking a cluster down resets Ray's state in the process, and the session has a cluster."""
    command = [sys.executable, "benchmarks/bench_faults.py", "--runs", "1", "--shards", "8", "--per-shard", "20", "--no-record"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["same_bytes"], found["rows_lost"], found["rows_twice"]) == (1, 0, 0)
    assert sum(found["kills"].values()) >= 2, found["kills"]
