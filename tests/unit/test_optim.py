"""What Muon and AdamW take, exact resume of both, gradient norms by part, and the same under FSDP2."""

import math

import pytest
import torch
from small_k2 import SMALL, small_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from k2model import lora, optim
from k2model.lora import Lora


def backward(model, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, SMALL.channels, 4, 6, generator=generator)
    text = torch.randn(batch, 3, SMALL.text_taps, SMALL.text_dim, generator=generator)
    model.zero_grad()
    model(latents, torch.tensor([0.3, 0.8])[:batch], text).square().mean().backward()


def names_of(model, parameters):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {by_id[id(parameter)] for parameter in parameters}


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = small_model()
    both = optim.muon(model, 1e-3, 0.01)
    matrices = names_of(model, both.param_groups[0]["params"])
    assert matrices == {
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in (*(f"attn.{a}" for a in ("wq", "wk", "wv", "gate", "wo")), *(f"mlp.{m}" for m in ("gate", "up", "down")))
    }
    others = [names_of(model, group["params"]) for group in both.param_groups[1:]]
    assert {"first.weight", "last.linear.weight", "blocks.0.prenorm.scale", "txtfusion.projector.weight"} <= others[0]
    assert {"first.bias", "blocks.1.mod.lin"} <= others[1]
    assert matrices.union(*others) == {name for name, _ in model.named_parameters()}
    group = both.param_groups[0]
    assert group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw" and group["weight_decay"] == 0.01
    assert [group["weight_decay"] for group in both.param_groups[1:]] == [0.01, 0.0]


def test_a_muon_update_has_the_size_of_an_adamw_one():
    model = small_model()
    before = model.blocks[0].mlp.up.weight.detach().clone()
    optimizer = optim.muon(model, 1e-3, 0.0)
    model.blocks[0].mlp.up.weight.grad = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))  # of full rank
    optimizer.step()
    moved = (model.blocks[0].mlp.up.weight - before).square().mean().sqrt().item()
    # The update is 0.2 sqrt(max(a, b)) times a matrix of min(a, b) singular values near 1, so of root mean square 0.2 (Moonlight).
    assert moved == pytest.approx(0.2 * 1e-3, rel=0.3)


@pytest.mark.parametrize("make", [optim.adamw, optim.muon])
def test_a_run_goes_on_from_the_optimizers_tensors_bit_for_bit(make):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            backward(model, seed)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + seed)
            optimizer.step()

    straight = small_model()
    steps(straight, make(straight, 1e-3, 0.01), range(6))
    first = small_model()
    optimizer = make(first, 1e-3, 0.01)
    steps(first, optimizer, range(3))
    tensors = {name: value.clone() for name, value in optim.optimizer_tensors(first, optimizer).items()}
    second = small_model(seed=9)
    second.load_state_dict(first.state_dict())
    resumed = make(second, 1e-3, 0.01)
    optim.load_optimizer_tensors(second, resumed, tensors)
    steps(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    assert not torch.equal(second.first.weight, first.first.weight)


def test_the_state_of_another_optimizer_is_refused():
    model = small_model()
    backward(model)
    optimizer = optim.muon(model, 1e-3, 0.01)
    optimizer.step()
    tensors = optim.optimizer_tensors(model, optimizer)
    with pytest.raises(ValueError, match=r"has blocks\.0\..*momentum_buffer, which this run's optimizer does not keep"):
        optim.load_optimizer_tensors(model, optim.adamw(model, 1e-3, 0.01), tensors)
    with pytest.raises(ValueError, match="does not keep"):
        optim.load_optimizer_tensors(model, optim.muon(model, 1e-3, 0.01), {"blocks.7.attn.wq.weight.momentum_buffer": torch.ones(1)})


def test_adamw_is_one_kernel_and_the_same_step_as_the_plain_one():
    models = [small_model(), small_model()]
    ours = optim.adamw(models[0], 1e-3, 0.01)
    assert all(group["fused"] for group in ours.param_groups)
    plain = optim.adamw(models[1], 1e-3, 0.01)
    for group in plain.param_groups:
        group["fused"], group["foreach"] = False, False
    for seed in range(3):
        for model, optimizer in zip(models, (ours, plain), strict=True):
            backward(model, seed)
            optimizer.step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_a_lora_has_no_matrix_for_muon():
    model = small_model()
    lora.attach(model, Lora(rank=2, alpha=2))
    both = optim.muon(model, 1e-3, 0.01)
    assert len(both.optimizers) == 1 and all("lora" in name for group in both.param_groups for name in names_of(model, group["params"]))


def test_every_gradient_is_in_the_norm_of_one_part():
    model = small_model()
    backward(model)
    norms = optim.grad_norms(model)
    assert list(norms) == ["first", "time", "text", "block 1", "block 2", "last", "total"]
    squares = dict.fromkeys(norms, 0.0)
    starts = {"first.": "first", "tmlp.": "time", "tproj.": "time", "txtfusion.": "text", "txtmlp.": "text", "last.": "last"}
    starts |= {"blocks.0.": "block 1", "blocks.1.": "block 2"}
    for name, parameter in model.named_parameters():
        part = next(part for start, part in starts.items() if name.startswith(start))
        square = parameter.grad.double().square().sum().item()
        squares[part] += square
        squares["total"] += square
    assert {part: norm.item() for part, norm in norms.items()} == pytest.approx({part: value**0.5 for part, value in squares.items()})
    plain = small_model()
    backward(plain)
    limit = norms["total"].item() / 3
    assert norms["total"].item() == pytest.approx(torch.nn.utils.clip_grad_norm_(plain.parameters(), limit).item(), rel=1e-6)
    optim.clip_gradients(model.parameters(), norms["total"], limit)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-5) for a, b in pairs)
    optim.clip_gradients(model.parameters(), torch.tensor(limit), 2 * limit)
    assert optim.grad_norms(model)["total"].item() == pytest.approx(limit, rel=1e-4), "a small gradient stays as it is"
    model.blocks[0].attn.wq.weight.grad[0, 0] = float("nan")
    broken = {part for part, norm in optim.grad_norms(model).items() if not norm.isfinite()}
    assert broken == {"block 1", "total"}, "the part of a value that is not finite is named"


def test_thirds_of_blocks_have_every_block_once():
    for num_blocks in (1, 2, 3, 4, 20, 26, 28):
        parts = [optim.part_of(f"blocks.{i}.mlp.up.weight", num_blocks) for i in range(num_blocks)]
        found = []
        for part in dict.fromkeys(parts):
            first, _, end = part.split(" ")[1].partition("-")
            found += list(range(int(first), int(end or first) + 1))
            assert parts.count(part) == int(end or first) - int(first) + 1
        assert found == list(range(1, num_blocks + 1)) and len(set(parts)) <= 3
    assert optim.part_of("blocks.27.mod.lin", 28) == "blocks 20-28"


def full_rank(model):
    """Random gradients for Muon's matrices: of a small batch they have so low a rank that bfloat16 decides where the rest goes."""
    for name, parameter in model.named_parameters():
        if optim.MUON.fullmatch(name):
            value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            sharded = isinstance(parameter, DTensor)
            parameter.grad = distribute_tensor(value, parameter.device_mesh, parameter.placements) if sharded else value


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_steps(rank, shape, folder):
    """A step of Muon on a model in shards, of one replica or of several: norms and weights to `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=math.prod(shape))
    model, mesh = small_model(), init_device_mesh("cpu", shape, mesh_dim_names=("replica", "fsdp")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optim.muon(model, 1e-2, 0.01)
    backward(model)  # the same batch on every rank, so that the mean of the gradients is that of one process
    found = {part: norm.item() for part, norm in optim.grad_norms(model).items()}
    optim.clip_gradients(model.parameters(), torch.tensor(found["total"]), found["total"] / 2)
    assert optim.grad_norms(model)["total"].item() == pytest.approx(found["total"] / 2, rel=1e-4)
    full_rank(model)
    optimizer.step()
    weights = {name: whole(value.detach()) for name, value in model.named_parameters()}
    state = {name: whole(value) for name, value in optim.optimizer_tensors(model, optimizer).items()}
    other = small_model()
    fully_shard(other, mesh=mesh)
    resumed = optim.muon(other, 1e-2, 0.01)
    optim.load_optimizer_tensors(other, resumed, state)
    back = {name: whole(value) for name, value in optim.optimizer_tensors(other, resumed).items()}
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    torch.save((found, weights), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["shards", "replicas"])
def test_norms_and_muon_are_the_same_in_shards(tmp_path, shape):
    torch.multiprocessing.spawn(sharded_steps, (shape, str(tmp_path)), nprocs=math.prod(shape))
    (norms, weights), (others, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = small_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = optim.muon(model, 1e-2, 0.01)
    backward(model)
    assert norms == pytest.approx({part: norm.item() for part, norm in optim.grad_norms(model).items()}, rel=1e-4) and others == norms
    optim.clip_gradients(model.parameters(), torch.tensor(norms["total"]), norms["total"] / 2)
    full_rank(model)
    optimizer.step()
    for name, value in model.named_parameters():
        ours, theirs = value - before[name], weights[name] - before[name]
        # The orthogonalisation runs in bfloat16, whose sums differ by shard; a value of AdamW with a gradient near 0 goes either way.
        assert (ours - theirs).norm() < 0.05 * ours.norm(), name
