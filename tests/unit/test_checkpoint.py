"""Checkpoints are whole or not there, and hold everything that a step needs."""

from dataclasses import replace

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
