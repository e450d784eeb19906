"""Checkpoints are whole or not there, and hold everything that a step needs."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k2model import checkpoint, optim
from k2model.dit import NANO, DiT

SMALL = replace(NANO, width=64, num_blocks=1, num_heads=2, num_kv_heads=1)


def test_the_latest_whole_checkpoint_is_found_and_torn_ones_are_passed_over(tmp_path):
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, {"model": {"x": torch.full((3,), float(step))}}, {"cursor": [0, step]})
    (tmp_path / "000015" / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "000020").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found.step == 10 and found.state["cursor"] == [0, 10] and found.tensors("model")["x"].tolist() == [10, 10, 10]
    checkpoint.save(tmp_path, 15, {"model": {"x": torch.zeros(1)}}, {})
    assert checkpoint.latest(tmp_path).step == 15, "a torn checkpoint is written again"
    assert checkpoint.latest(tmp_path / "none") is None


def test_the_optimizer_comes_back_under_the_names_of_the_parameters(tmp_path):
    def step(model, optimizer, seed):
        text = torch.randn(1, 3, SMALL.text_taps, SMALL.text_dim, generator=torch.Generator().manual_seed(seed))
        model(torch.ones(1, 16, 4, 4), torch.tensor([0.5]), text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = DiT(SMALL)
    optimizer = optim.adamw(model, 1e-3, 0.01)
    step(model, optimizer, 1)
    checkpoint.save(tmp_path, 1, {"model": model.state_dict(), "optimizer": optim.optimizer_tensors(model, optimizer)}, {})
    other = DiT(SMALL)
    found = checkpoint.latest(tmp_path)
    other.load_state_dict(found.tensors("model"))
    resumed = optim.adamw(other, 1e-3, 0.01)
    optim.load_optimizer_tensors(other, resumed, found.tensors("optimizer"))
    step(model, optimizer, 2)
    step(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weight_decay_is_on_matrices_and_norm_scales_and_not_on_biases_and_tables():
    model = DiT(SMALL)
    decayed, rest = ({id(p) for p in group["params"]} for group in optim.adamw(model, 1e-3, 0.01).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i].rsplit(".", 1)[1] for i in decayed} == {"weight", "scale"}
    assert {names[i].rsplit(".", 1)[1] for i in rest} == {"bias", "lin"} and len(decayed) + len(rest) == len(names)


def test_the_learning_rate_warms_up_stays_and_decays():
    factors = [optim.warmup_stable_decay(step, 10, 2, 4) for step in range(10)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert optim.warmup_stable_decay(0, 10, 0, 0) == 1


def fill(directory, *steps):
    for step in steps:
        checkpoint.save(directory, step, {"model": {"x": torch.full((3,), float(step))}}, {"cursor": step})


# One process that forks one child per place; each child is killed for good there, while its background thread writes step 3.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from k2model import checkpoint

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path):
    written(tensors, path)
    if path.name == "optimizer.safetensors":
        path.write_bytes(path.read_bytes()[:50])
        die()

def no_state(path):
    if path.name == "state.json":
        os.truncate(path, 20)
        die()

written, rename = checkpoint.save_file, os.replace
places = {
    "tensors": ("save_file", half),
    "state": ("flush", no_state),
    "rename": ("os.replace", die),
    "renamed": ("os.replace", lambda *names: (rename(*names), die())),
    "prune": ("prune", die),
    "pruned": ("shutil.rmtree", lambda path: (os.unlink(path / "state.json"), die())),
}
for place, (name, replacement) in places.items():
    directory = Path(sys.argv[1]) / place
    child = os.fork()
    if not child:
        owner = checkpoint if "." not in name else getattr(checkpoint, name.split(".")[0])
        setattr(owner, name.split(".")[-1], replacement)
        saver = checkpoint.Saver(directory, keep_last=2)
        saver.save(3, {"model": {"x": torch.full((3,), 3.0)}, "optimizer": {"y": torch.zeros(9)}}, {"cursor": 3}, wait=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, place
"""


def test_a_process_that_is_killed_anywhere_in_a_save_leaves_a_whole_checkpoint(tmp_path):
    newest = {"tensors": 2, "state": 2, "rename": 2, "renamed": 3, "prune": 3, "pruned": 3}
    for place in newest:
        fill(tmp_path / place, 1, 2)
    root = str(Path(checkpoint.__file__).parents[1])
    quiet = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=quiet, check=True)
    for place, step in newest.items():
        found = checkpoint.latest(tmp_path / place)
        assert found.step == step and found.tensors("model")["x"].tolist() == [step] * 3, place
        rests = [rest.name for rest in (tmp_path / place).glob(".*.tmp")]
        assert rests == {"pruned": [".000001.tmp"], "renamed": [], "prune": []}.get(place, [".000003.tmp"]), place
        saver = checkpoint.Saver(tmp_path / place, keep_last=2)
        saver.save(4, {"model": {"x": torch.zeros(1)}}, {}, wait=True)
        assert sorted(left.name for left in (tmp_path / place).iterdir()) == [f"{step:06d}", "000004"], place


def test_old_whole_checkpoints_go_and_the_last_whole_one_never(tmp_path):
    fill(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "000005" / "model.safetensors").unlink()  # torn: it counts for none, and stays to be looked at
    checkpoint.prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    checkpoint.prune(tmp_path, 1, 2)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["000002", "000004", "000005"]
    checkpoint.prune(tmp_path, 1)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["000004", "000005"]
    with pytest.raises(ValueError, match="keep_last"):
        checkpoint.Saver(tmp_path, keep_last=0)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, begin = threading.Event(), checkpoint._begin

    def slow(*arguments):
        may_write.wait()
        return begin(*arguments)

    monkeypatch.setattr(checkpoint, "_begin", slow)
    saver, weight = checkpoint.Saver(tmp_path), torch.ones(4)
    saver.save(1, {"model": {"x": weight}}, {})
    weight.zero_()  # the next step
    assert checkpoint.latest(tmp_path) is None
    may_write.set()
    saver.wait()
    saver.save(2, {"model": {"x": weight}}, {}, wait=True)
    assert [one.tensors("model")["x"].tolist() for one in checkpoint._whole(tmp_path)] == [[0.0] * 4, [1.0] * 4]


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
    saver = checkpoint.Saver(tmp_path)
    saver.save(1, {"model": {"x": torch.ones(1)}}, {}, wait=True)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(2, {"model": {"x": torch.ones(1)}}, {})
        with pytest.raises(OSError, match="No space left on device"):
            saver.save(3, {"model": {"x": torch.ones(1)}}, {})
    saver.save(3, {"model": {"x": torch.ones(1)}}, {}, wait=True)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["000001", "000003"]
