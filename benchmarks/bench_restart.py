"""Training that is killed at random, again and again, on 1, 2 or 4 processes: are the losses those of the run that was never stopped?

    OMP_NUM_THREADS=1 python benchmarks/bench_restart.py [--tries 20]

A try is one run of a small recipe (three phases, a checkpoint every second step, validation, alignment in the first phase, merging before
the second, several captions an image) that is started again until it is done. Of each start but the last one rank, chosen at random, gets
SIGKILL at a random moment after a random step, which falls into steps, samples and checkpoint writes (one time in five: while it
starts); the others of its world are then ended as torchrun does. Half of the tries stay on one process and must end in the same bytes;
the others take 1, 2 or 4 processes (gloo, FSDP2; four as one copy of the model or as two replicas) for each start and must agree within
rounding, the losses of single images too.
Ranks are forks of this process, which has imported everything, so that a start takes no time.
Appends one JSON line to benchmarks/results/restart.jsonl.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from packed_world import landscapes, make_packed

from curation.towers import Compact
from k2model import checkpoint
from k2model.align import Irepa
from pipelines import train as verb
from pipelines import train_recipes
from pipelines.run_folder import commit, versions
from pipelines.teachers import TowerTeacher
from pipelines.train_recipes import TrainRecipe, k2_nano

SIZES = {"256": 32, "512": 48, "1024": 64}
STEPS = {"256": 14, "512": 8, "1024": 6}


def recipe() -> TrainRecipe:
    """k2-nano, narrower, at 32, 48 and 64 px."""
    whole = k2_nano()
    model = replace(whole.model, width=64, num_blocks=2, num_heads=2, num_kv_heads=1)
    phases = tuple(
        replace(p, resolution=SIZES[p.name], data=f"p{SIZES[p.name]}", steps=STEPS[p.name], warmup=2, decay=2, num_samples=1, num_groups=4)
        for p in whole.phases
    )
    align = Irepa(TowerTeacher(Compact()), block=1)
    phases = (replace(phases[0], align=align), replace(phases[1], merge_last=2), phases[2])
    intervals = {"sample_every": 10, "sample_steps": 2, "checkpoint_every": 2, "validate_every": 7, "hold_out": 2, "keep_last": 3}
    return replace(whole, name="restart", model=model, phases=phases, **intervals)


def start(run: Path, out: Path, world: int, replicas: int = 1) -> list[int]:
    """Fork the ranks; their process ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        if pid := os.fork():
            ranks.append(pid)
            continue
        code = 1
        try:
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            silent = os.open(out.parent / f"{out.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            code = verb.train(str(run), "restart", str(out), "cpu", threads=1, fsdp=world // replicas if replicas > 1 else None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return ranks


def wait(ranks: list[int], until: Callable[[], bool] = lambda: False) -> list[int] | None:
    """Exit codes when all have ended; None when `until` says so first."""
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        for pid in ranks:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        if until():
            return None
        time.sleep(0.005)
    return [codes[pid] for pid in ranks]


def kill(ranks: list[int], first: int) -> None:
    """SIGKILL one rank, then the others, as a launcher does that finds one gone."""
    for pid in [first, *(pid for pid in ranks if pid != first)]:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


def moment(chance: random.Random, out: Path) -> Callable[[], bool]:
    """When to kill: a little after a step that this start will come to."""
    begun, delay = time.monotonic(), chance.uniform(0, 0.4)
    if chance.random() < 0.2:
        return lambda: time.monotonic() > begun + delay
    last = checkpoint.latest(out / "checkpoints")
    step = chance.randint((last.step if last else 0) + 1, sum(STEPS.values()) - 1)
    seen: list[float] = []

    def due() -> bool:
        if not seen and rows_written(out) >= step and (out / "metrics.jsonl").stat().st_mtime > clock:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + delay

    clock = time.time()
    return due


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def apart(out: Path, straight: Path) -> float:
    """Largest relative difference of losses, of single images too, norms and validation; infinity where a step has other images."""
    found, expected = rows(out), rows(straight)
    each, of_straight = (np.fromfile(place / "losses.f32", "<f4") for place in (out, straight))
    if each.shape != of_straight.shape:
        return float("inf")
    worst = float((np.abs(each - of_straight) / np.abs(of_straight)).max())
    for a, b in zip(found, expected, strict=True):
        if any(a[key] != b[key] for key in ("step", "phase", "index", "images", "tokens", "num_by_t")):
            return float("inf")
        pairs = [(a[key], b[key]) for key in ("loss", "grad_norm", "align") if key in b]
        pairs += list(zip(a["validation"]["by_t"], b["validation"]["by_t"], strict=True)) if "validation" in b else []
        worst = max([worst, *(abs(x - y) / abs(y) for x, y in pairs)])
    return worst


def main(tries: int = 20, kills: int = 3, seed: int = 0) -> None:
    """Measure and record.

    Args:
        tries: Runs; half of them on one process.
        kills: Of each run, before it may end.
        seed: Of the times, ranks and worlds.
    """
    train_recipes.TRAIN["restart"] = recipe
    chance, results = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for size in SIZES.values():
            pictures = landscapes(60, [(size, size), (size, size - 16)], seed=size)
            pictures = [(uid, [caption, f"{caption}, " * 8, f"{caption}, " * 30], pixels) for uid, caption, pixels in pictures]
            make_packed(run / "packed" / f"p{size}", pictures, size, 3)
        seconds = {}
        for world in (1, 2, 4):
            begun = time.monotonic()
            codes, log = wait(start(run, run / f"straight{world}", world)), run / f"straight{world}.log"
            assert codes == [0] * world, (codes, log.read_text()[-3000:])
            seconds[world] = time.monotonic() - begun
        worlds_apart = {world: apart(run / f"straight{world}", run / "straight1") for world in (2, 4)}
        print({"seconds": seconds, "worlds_apart": worlds_apart}, flush=True)
        for number in range(tries):
            out, alone, history = run / f"try{number}", number % 2 == 0, []
            while True:
                world = 1 if alone else chance.choice((1, 2, 4))
                replicas = chance.choice((1, 2)) if world == 4 else 1
                ranks = start(run, out, world, replicas)
                victim = chance.randrange(world)
                codes = wait(ranks) if len(history) >= kills else wait(ranks, moment(chance, out))
                if codes is not None:
                    assert codes == [0] * world, (run / f"try{number}.log").read_text()[-3000:]
                    break
                kill(ranks, ranks[victim])
                written = rows_written(out)
                history.append({"world": world, "replicas": replicas, "rank": victim, "rows": written})
            places = ("checkpoints/000028/model.safetensors", "losses.f32")
            same = all((out / place).read_bytes() == (run / "straight1" / place).read_bytes() for place in places)
            found = {"alone": alone, "killed": history, "apart": apart(out, run / "straight1"), "same_bytes": same}
            results.append(found)
            print(json.dumps(found), flush=True)
            shutil.rmtree(out)
    line = {
        "tries": tries,
        "kills": sum(len(found["killed"]) for found in results),
        "same_bytes_of_those_on_one_process": [sum(f["same_bytes"] for f in results if f["alone"]), sum(f["alone"] for f in results)],
        "largest_difference": max(found["apart"] for found in results),
        "worlds_apart": worlds_apart,
        "results": results,
        "torch": torch.__version__,
    }
    with open(Path(__file__).parent / "results" / "restart.jsonl", "a") as file:
        file.write(json.dumps(line | {"commit": commit(), "versions": versions()}) + "\n")
    print({key: value for key, value in line.items() if key != "results"})


def rows_written(out: Path) -> int:
    """Rows of metrics.jsonl, the last maybe half."""
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    tyro.cli(main)
