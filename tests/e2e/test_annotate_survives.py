"""Annotations do not depend on where they are made, nor on how often the making is interrupted."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.annotate import annotate

RECIPE = '''
import os
from dataclasses import dataclass
from typing import ClassVar
import pyarrow as pa
from curation.schema import ERROR, UID, column
from curation.stages.basics import Basics
from curation.stages.embedding import Embedding
from curation.towers import Compact, EffNet

@dataclass(frozen=True)
class KillsItsWorkerOnce:
    """A stage that takes its process down in the middle of the shard that holds `uid`, the first time."""
    uid: str
    marker: str
    name: ClassVar[str] = "killer"
    schema: ClassVar[pa.Schema] = pa.schema([UID, column("seen", pa.int32(), "1"), ERROR])

    def describe(self):
        return {"class": "killer"}

    def load(self, device):
        def function(batch):
            if self.uid in batch.uids and not os.path.exists(self.marker):
                open(self.marker, "w").close()
                os._exit(1)
            return {"seen": [1] * len(batch)}
        return function

@dataclass(frozen=True)
class BreaksTheDecoder:
    """A stage that makes the decoder of its worker one that crashes on the images of 300 bytes."""
    name: ClassVar[str] = "breaker"
    schema: ClassVar[pa.Schema] = pa.schema([UID, column("seen", pa.int32(), "1"), ERROR])

    def load(self, device):
        from curation.decode import decode_for
        from pipelines import annotate

        annotate.decode_for = lambda encoded, reads, limits: os._exit(1) if len(encoded) == 300 else decode_for(encoded, reads, limits)
        return lambda batch: {"seen": [1] * len(batch)}

poisoned = (BreaksTheDecoder(), Basics())
stages = (Basics(), Embedding(EffNet()), Embedding(Compact()))
killer = (Basics(), KillsItsWorkerOnce("00001/a.b/010003", os.environ.get("K2_MARKER", "")))
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "mine.py"
    path.write_text(RECIPE)
    return str(path)


def digests(run: Path) -> dict[str, str]:
    """sha256 of every annotation file of a run."""
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.rglob("annotations/**/*.parquet"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_tars, recipe) -> dict[str, str]:
    """The annotations of an undisturbed run in this process."""
    run = tmp_path_factory.mktemp("alone")
    assert annotate(str(tiny_tars), str(run), f"{recipe}:stages", ray="off") == 0
    found = digests(run)
    assert len(found) == 9
    return found


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_write_the_same_bytes_as_this_process(tmp_path, tiny_tars, recipe, alone, ray_cluster, workers):
    assert annotate(str(tiny_tars), str(tmp_path), f"{recipe}:stages", ray="auto", workers=workers) == 0
    assert digests(tmp_path) == alone


@pytest.mark.ray
def test_a_worker_that_dies_in_a_shard_costs_a_retry_and_no_row(tmp_path, tiny_tars, recipe, ray_cluster, monkeypatch):
    monkeypatch.setenv("K2_MARKER", str(tmp_path / "died"))
    assert annotate(str(tiny_tars), str(tmp_path / "run"), f"{recipe}:killer", ray="auto", workers=2) == 0
    assert (tmp_path / "died").exists()
    monkeypatch.setenv("K2_MARKER", str(tmp_path))  # exists: this one is never killed
    assert annotate(str(tiny_tars), str(tmp_path / "calm"), f"{recipe}:killer", ray="off") == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "calm")


@pytest.mark.ray
def test_an_image_that_crashes_the_decoder_becomes_a_row_with_an_error(tmp_path, tiny_tars, recipe, ray_cluster):
    assert annotate(str(tiny_tars), str(tmp_path), f"{recipe}:poisoned", ray="auto", workers=1) == 0
    rows = {row["uid"]: row for p in tmp_path.glob("annotations/basics/*.parquet") for row in pq.read_table(p).to_pylist()}
    assert len(rows) == 25 and rows["00002/a.b/020005"]["error"] and rows["00002/a.b/020004"]["error"] is None
    reports = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert {report["shard"]: report["tries"] for report in reports} == {"00000": 1, "00001": 1, "00002": 2}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_driver_run_again_ends_in_the_same_bytes(tmp_path, tiny_tars, recipe, alone, seed):
    """SIGKILL as soon as a random number of files is there, and again until the command ends by itself."""
    command = [sys.executable, "-m", "pipelines.annotate", "--source", str(tiny_tars), "--out", str(tmp_path)]
    command += ["--recipe", f"{recipe}:stages", "--ray", "off"]
    rng = random.Random(seed)
    for _ in range(2):
        target = rng.randint(0, 6)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
        while process.poll() is None and len(digests(tmp_path)) < target:
            time.sleep(0.01)  # polling, not timing: the kill comes at a state, not at a moment
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2]).returncode == 0
    assert digests(tmp_path) == alone
