"""One training step, one checkpoint, in every layout: 1, 2 and 4 processes over gloo, one replica or two, with and without tensor
parallelism; of a whole model and of a LoRA on a frozen one.

Each world has as many processes as it needs, one world after the other, once for the file.
"""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import parallel_ranks as ranks
import pytest
import torch
from safetensors.torch import load_file, save_file

from k2model import checkpoint, optim, parallel
from k2model.dit import DiT
from k2model.layouts import open_checkpoint
from k2model.tensor_files import read_header
from pipelines.convert import convert

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What all worlds left: `1` by this process, the others by four."""
    place = tmp_path_factory.mktemp("worlds")
    world = parallel.start("cpu")
    model, optimizer = ranks.build(world, 3)
    found = ranks.steps(world, model, optimizer)
    files = {"model": model.state_dict(), "optimizer": optim.optimizer_tensors(model, optimizer)}
    checkpoint.save(place / "run_1", 3, files, {})
    base, _ = ranks.build(world, 3)
    save_file(base.to(torch.bfloat16).state_dict(), place / "base.safetensors")
    convert(str(place / "base.safetensors"), str(place / "base"), layout="diffusers")
    found["lora"] = {precision: ranks.lora_steps(place, world, precision) for precision in ("fp32", "bf16")}
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in ranks.WORLDS]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    quiet = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, ranks.__file__, str(place), *ports], env=quiet, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return place, found


def results(folder, world):
    place, _ = folder
    return [json.loads((place / f"{world}.{rank}.json").read_text()) for rank in range(ranks.WORLDS[world][0])]


@pytest.mark.parametrize("world", ranks.WORLDS)
def test_a_step_is_the_same_at_every_world_size(folder, world):
    place, alone = folder
    for found in results(folder, world):
        torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found["norm"], alone["norm"], rtol=1e-6, atol=0)
    assert alone["norm"][0] > 0.1, "the gradient was clipped"
    stored = load_file(place / f"{world}.safetensors")
    for name, gradient in alone["gradients"].items():
        assert (stored[f"gradients/{name}"] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    for name, value in alone["weights"].items():  # AdamW moves a value with a gradient near 0 either way
        assert (stored[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("world", ranks.LORA_PRECISION)
def test_a_lora_on_a_base_in_shards_is_that_of_one_process(folder, world):
    place, whole = folder
    precision = ranks.LORA_PRECISION[world]
    alone, noise = whole["lora"][precision], {"fp32": 1e-6, "bf16": 2e-3}[precision]  # bf16: gradients of micro-batches are rounded
    for found in results(folder, world):
        torch.testing.assert_close(found["lora"]["loss"], alone["loss"], rtol=noise, atol=0)
        torch.testing.assert_close(found["lora"]["norm"], alone["norm"], rtol=noise, atol=0)
    assert alone["loss"][1] < alone["loss"][0] and alone["norm"][0] > 1e-3, "it learns, and its gradient was clipped"
    stored = load_file(place / f"{world}_lora.safetensors")
    assert len(alone["first"]) == len(alone["weights"]) - 3 * len(alone["gradients"]), "the LoRA alone has moments"
    for name, value in alone["first"].items():
        assert torch.equal(stored[f"first/{name}"], value), "base and first LoRA are the same bits"
    for kind, tolerance in (("gradients", 5 * noise), ("weights", 100 * noise), ("exported", 100 * noise)):
        for name, value in alone[kind].items():
            assert (stored[f"{kind}/{name}"].float() - value.float()).norm() <= tolerance * value.float().norm(), (kind, name)


@pytest.mark.parametrize("world", ranks.WORLDS)
def test_processes_know_their_part(folder, world):
    size, tp, _, _ = ranks.WORLDS[world]
    found = results(folder, world)
    assert [one["rank"] for one in found] == [rank // tp for rank in range(size)], "ranks of one tp group read the same images"
    assert {one["size"] for one in found} == {size // tp} and [one["main"] for one in found] == [True] + [False] * (size - 1)
    assert all(one["agree"] == [True, False] for one in found)


@pytest.mark.parametrize("world", ranks.WORLDS)
def test_a_checkpoint_of_any_number_of_processes_is_read_by_any(folder, world):
    place, alone = folder
    for found in results(folder, world):
        assert "1" in found["resumed"] and world in found["resumed"]
        assert not any(found["resumed"].values()), "a tensor did not come back as it was saved"
    last = checkpoint.latest(place / f"run_{world}")
    assert last.state["rank"] == 0 and last.tensors("vae")["a"].tolist() == [1, 1]
    stored = last.tensors("model") | last.tensors("optimizer")
    written = load_file(place / f"{world}.safetensors")
    assert stored.keys() == alone["weights"].keys()
    for name, value in stored.items():  # zeroed while it was written: the copy was not
        assert torch.equal(value, written[name]) and value.any() == alone["weights"][name].any(), name
    assert {name for name, _ in last.state["files"].items() if "/" not in name} == {"model.safetensors", "vae.safetensors"}
    pieces = [tensor for file in (last.directory / "optimizer").iterdir() for tensor in read_header(file)[0].values()]
    count = sum(math.prod(piece.shape) for piece in pieces)
    assert count == sum(tensor.numel() for tensor in last.tensors("optimizer").values()), "every value once, whatever the replicas"


def test_all_read_what_one_process_saved_and_what_others_did(folder):
    assert set(results(folder, "2")[0]["resumed"]) == {"1", *ranks.WORLDS}


@pytest.mark.parametrize("world", ranks.WORLDS)
def test_the_newest_two_stay_and_a_full_disk_of_one_process_is_heard_by_all(folder, world):
    for found in results(folder, world):
        assert found["kept"] == ["000002", "000003"] and found["latest"] == 3
        assert "OSError: [Errno 28] No space left" in found["error"]


def test_the_model_file_is_what_every_command_reads(folder):
    place, _ = folder
    found = open_checkpoint(str(place / "run_4" / "000003" / "model.safetensors"))
    assert found.config.width == ranks.CONFIG.width and found.config.num_blocks == 2
    assert torch.equal(found.read("blocks.1.attn.wq.weight", torch.float32), load_file(place / "4.safetensors")["blocks.1.attn.wq.weight"])


@pytest.mark.parametrize("world", ranks.WORLDS)
def test_a_frozen_encoder_is_spread_and_says_the_same(folder, world):
    size, tp, fsdp, _ = ranks.WORLDS[world]
    for found in results(folder, world):
        assert found["encoder"] and found["encoder_share"] <= 1.5 / (fsdp or size // tp)


def test_compiled_blocks_take_the_same_step(monkeypatch):
    """Traced and differentiated as for inductor, whose C++ takes a minute to build here, and run operator by operator."""
    build, found = torch.nn.Module.compile, {}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: build(module, backend="aot_eager", **options))
    for compiled in (False, True):
        with torch.device("meta"):
            model = DiT(replace(ranks.CONFIG, num_blocks=1, num_fusion_blocks=0))
        world = parallel.start("cpu")
        model = parallel.init(parallel.shard(model, world, compiled=compiled), 3)
        found[compiled] = ranks.steps(world, model, optim.adamw(model, 1e-2, 0.01))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1, "nothing was compiled"
    torch.testing.assert_close(found[True]["loss"], found[False]["loss"], rtol=1e-5, atol=0)
    for name, gradient in found[False]["gradients"].items():
        assert (found[True]["gradients"][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_first_weights_are_those_of_pytorch_and_of_their_name():
    with torch.device("meta"):
        model, deeper = DiT(ranks.CONFIG), DiT(replace(ranks.CONFIG, num_blocks=3))
    ours, theirs = parallel.init(model.to_empty(device="cpu"), 0), DiT(ranks.CONFIG)
    parallel.init(deeper.to_empty(device="cpu"), 0)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, deeper.get_parameter(name)), "a deeper model starts with the same first blocks"
        if mine.numel() > 1000:
            assert mine.std().item() == pytest.approx(other.std().item(), rel=0.1, abs=1e-9), name
            assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.05, abs=1e-9), name
    assert not torch.equal(ours.first.weight, parallel.init(DiT(ranks.CONFIG), 1).first.weight)


def test_what_cannot_be_is_said_before_anything_starts(monkeypatch):
    with pytest.raises(ValueError, match="tp 2 and fsdp 4 need 8 processes: start with torchrun --nproc-per-node 8"):
        parallel.start("cpu", tp=2, fsdp=4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes cannot be divided into tensor-parallel groups of 3"):
        parallel.start("cpu", tp=3)
    with pytest.raises(ValueError, match="2 data-parallel ranks cannot be divided into copies of the model over 4"):
        parallel.start("cpu", tp=2, fsdp=4)
    with pytest.raises(ValueError, match="2 key and value heads cannot be divided by tp 4"):
        parallel._divide_matrices(DiT(ranks.CONFIG), SimpleNamespace(size=lambda: 4))


def test_float8_is_for_the_linears_inside_the_blocks():
    names = [name for name, _ in DiT(ranks.CONFIG).named_parameters()]
    for precision in ("float8_tensorwise", "float8_rowwise"):
        model = DiT(ranks.CONFIG)
        if not importlib.util.find_spec("torchao"):
            with pytest.raises(ValueError, match="pip install torchao"):
                parallel.shard(model, parallel.start("cpu"), precision=precision)
            continue
        parallel.shard(model, parallel.start("cpu"), precision=precision)
        exchanged = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
        assert exchanged == {f"blocks.{i}.{name}" for i in range(2) for name in LINEARS}
        assert [name for name, _ in model.named_parameters()] == names


LINEARS = ("attn.wq", "attn.wk", "attn.wv", "attn.gate", "attn.wo", "mlp.gate", "mlp.up", "mlp.down")
