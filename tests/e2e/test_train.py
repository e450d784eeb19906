"""Training: resumed equals never stopped, at every checkpoint; and what happens when something is wrong."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_world import landscapes, make_packed

from k2model.dit import K2_1B
from k2model.text import HashText
from pipelines import report, train_recipes, train_samples, train_step
from pipelines import train as verb
from pipelines.train_recipes import k2_nano

MEASURED = ("images_per_s", "data_wait", "mfu", "memory_gib")  # of the machine
STEPS = {"256": 5, "512": 3, "1024": 2}


def tiny_recipe():
    """k2-nano, narrower, few steps, at 32, 48 and 64 px."""
    whole = k2_nano()
    model = replace(whole.model, width=64, num_blocks=1, num_heads=2, num_kv_heads=1)
    sizes = {"256": 32, "512": 48, "1024": 64}
    phases = tuple(
        replace(p, resolution=sizes[p.name], data=f"p{sizes[p.name]}", steps=STEPS[p.name], warmup=1, decay=1, num_samples=1)
        for p in whole.phases
    )
    return replace(whole, name="tiny", model=model, phases=phases, sample_every=100, sample_steps=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for size in (32, 48, 64):
        make_packed(run / "packed" / f"p{size}", landscapes(9, [(size, size), (size, size - 16)], seed=size), size, 2)
    return run


@pytest.fixture(autouse=True)
def one_recipe(monkeypatch):
    monkeypatch.setitem(train_recipes.TRAIN, "tiny", tiny_recipe)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def losses(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("straight")
    train_recipes.TRAIN["tiny"] = tiny_recipe
    assert verb.train(str(data), "tiny", str(out), "cpu", threads=1) == 0
    return out


def test_the_curriculum_runs_and_leaves_metrics_samples_and_a_plot(straight):
    rows = losses(straight)
    assert [row["phase"] for row in rows] == ["256"] * 5 + ["512"] * 3 + ["1024"] * 2
    assert {path.name for path in (straight / "samples").iterdir()} == {"000005.png", "000008.png", "000010.png"}
    assert (straight / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("step", [2, 4, 5, 6, 8])
def test_a_run_resumed_at_any_checkpoint_has_the_same_losses_and_weights(straight, data, tmp_path, step):
    out = tmp_path / "resumed"
    shutil.copytree(straight, out)
    for place in (out / "checkpoints").iterdir():
        if int(place.name) > step:
            shutil.rmtree(place)
    with open(out / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 11, "half a li')  # what a killed process leaves
    with open(out / "losses.f32", "ab") as kept:
        kept.write(b"losses of step 11 that were not w")
    assert verb.train(str(data), "tiny", str(out), "cpu", threads=1) == 0
    assert losses(out) == losses(straight)
    assert (out / "losses.f32").read_bytes() == (straight / "losses.f32").read_bytes()
    last = [(run / "checkpoints/000010/model.safetensors").read_bytes() for run in (out, straight)]
    assert last[0] == last[1]


# A process of its own that is killed for good while it saves the checkpoint of step 6: all is written, nothing is renamed yet.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from e2e.test_train import tiny_recipe
from k2model import checkpoint
from pipelines import train, train_recipes
whole = os.replace
def replace(source, target):
    if str(target).endswith("000006"):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(source, target)
checkpoint.os.replace = replace
train_recipes.TRAIN["tiny"] = tiny_recipe
train.train({data!r}, "tiny", {out!r}, "cpu", threads=1)
"""


def test_a_run_killed_while_it_saves_has_the_same_losses_and_weights(straight, data, tmp_path):
    tests = str(Path(__file__).parents[1])
    code = KILLED.format(tests=tests, data=str(data), out=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(tests).parent, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in losses(tmp_path)][:6] == [1, 2, 3, 4, 5, 6]  # it is written while training goes on
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == [".000006.tmp", "000002", "000004", "000005"]
    assert verb.train(str(data), "tiny", str(tmp_path), "cpu", threads=1) == 0
    assert losses(tmp_path) == losses(straight)
    assert (tmp_path / "losses.f32").read_bytes() == (straight / "losses.f32").read_bytes()
    last = [(run / "checkpoints/000010/model.safetensors").read_bytes() for run in (tmp_path, straight)]
    assert last[0] == last[1]
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))


def test_sample_captions_come_from_many_row_groups_of_the_commonest_bucket(data):
    packed = train_samples.Packed(data / "packed" / "p32")  # 5 pictures of 32 x 32 and 4 of 32 x 16, in row groups of 2
    captions, images = train_samples.examples(packed, 4)
    batches = [packed.read(group) for group in packed.groups if group["bucket_width"] == 32]
    assert captions == [batches[0].captions[0], batches[1].captions[0], batches[2].captions[0], batches[0].captions[1]]
    assert images.shape == (4, 3, 32, 32) and torch.equal(images[3], batches[0].images[1])


def test_a_finished_run_does_nothing_and_another_recipe_for_its_folder_is_refused(straight, data, capsys, monkeypatch):
    assert verb.train(str(data), "tiny", str(straight), "cpu", threads=1) == 0
    assert json.loads(capsys.readouterr().out)["steps_now"] == 0
    monkeypatch.setitem(train_recipes.TRAIN, "tiny", lambda: replace(tiny_recipe(), seed=1))
    with pytest.raises(ValueError, match=r"recipe\.seed: 0 -> 1"):
        verb.train(str(data), "tiny", str(straight), "cpu", threads=1)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(data, tmp_path, monkeypatch, capsys):
    whole = train_step.flow.loss
    calls = []

    def breaks_at_the_fourth(*arguments):
        calls.append(1)
        return whole(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(train_step.flow, "loss", breaks_at_the_fourth)
    assert verb.train(str(data), "tiny", str(tmp_path), "cpu", threads=1) == 1
    said = capsys.readouterr().err
    assert "at step 4 of phase 256" in said and "cursor" in said and "images is not finite (" in said and "row group" in said
    assert [row["step"] for row in losses(tmp_path)] == [1, 2, 3]
    monkeypatch.setattr(train_step.flow, "loss", whole)
    assert verb.train(str(data), "tiny", str(tmp_path), "cpu", threads=1) == 0


def test_the_memory_that_a_dry_run_tells_is_that_of_one_replica_and_the_hours_are_of_all(data, capsys, monkeypatch):
    monkeypatch.setitem(train_recipes.TRAIN, "tiny", lambda: replace(tiny_recipe(), model=replace(K2_1B, num_blocks=4)))

    def told(**options):
        assert verb.train(str(data), "tiny", dry_run=True, **options) == 0
        return json.loads(capsys.readouterr().out.splitlines()[1])

    two, eight, replicas, matrices = told(gpus=2), told(gpus=8), told(gpus=8, fsdp=2), told(gpus=8, fsdp=2, tp=2)
    for kind in ("parameters", "optimizer", "gradients"):
        assert replicas["memory_gib"][kind] == two["memory_gib"][kind] > 3.5 * eight["memory_gib"][kind]
        assert matrices["memory_gib"][kind] < replicas["memory_gib"][kind]
    assert replicas["hours_at_half_peak"] == eight["hours_at_half_peak"] < two["hours_at_half_peak"]
    with pytest.raises(ValueError, match="8 data-parallel ranks cannot be divided into copies of the model over 3"):
        told(gpus=8, fsdp=3)


def test_a_phase_without_images_is_skipped_and_a_missing_one_is_an_error(data, tmp_path, capsys):
    shutil.copytree(data / "packed", tmp_path / "packed")
    description = json.loads((tmp_path / "packed/p64/dataset.json").read_text())
    (tmp_path / "packed/p64/dataset.json").write_text(json.dumps(description | {"batches": [], "num_rows": 0, "num_batches": 0}))
    assert verb.train(str(tmp_path), "tiny", dry_run=True) == 0
    said = capsys.readouterr()
    assert "phase 1024 is skipped" in said.err
    assert [json.loads(line).get("phase") for line in said.out.splitlines()] == [None, "256", "512"]
    shutil.rmtree(tmp_path / "packed/p48")
    with pytest.raises(ValueError, match="k2 pack --policy p48"):
        verb.train(str(tmp_path), "tiny")


def test_a_step_gives_the_captions_that_the_mix_draws_and_k2_report_says_which(tmp_path, monkeypatch, capsys):
    pictures = [(uid, [f"{caption} " * 8, f"{caption} " * 40, "sky"], pixels) for uid, caption, pixels in landscapes(9, [(32, 32)])]
    make_packed(tmp_path / "packed" / "p32", pictures, 32, 3)
    texts = {uid: captions for uid, captions, _ in pictures}
    phase = replace(tiny_recipe().phases[0], steps=8, caption_mix=(0.5, 0, 0.5))
    monkeypatch.setitem(train_recipes.TRAIN, "tiny", lambda: replace(tiny_recipe(), phases=(phase,), caption_dropout=0.3, hold_out=0))
    calls, encode = [], HashText._encode
    monkeypatch.setattr(HashText, "_encode", lambda self, device, captions: (calls.append(captions), encode(self, device, captions))[1])
    assert verb.train(str(tmp_path), "tiny", str(tmp_path / "train" / "tiny"), "cpu", threads=1) == 0
    capsys.readouterr()
    seen = Counter()
    for step in range(1, 9):
        assert report.main(["--run", str(tmp_path), "--step", str(step)]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]
        assert [row["given"] for row in rows] == calls[step - 1]
        assert all(row["given"] in ("", *texts[row["uid"]][1:]) for row in rows), "short and long ones, and none of medium length"
        seen.update("long" if len(row["given"]) > 480 else row["given"] for row in rows)
    assert seen["long"] > 2 and seen["sky"] > 2 and seen[""] > 2 and seen.total() == 24
