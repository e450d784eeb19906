"""The processes of the worlds of test_parallel.py: `python parallel_ranks.py FOLDER PORT...`. The test runs `steps` too, alone."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from k2model import checkpoint, lora, optim, parallel
from k2model.dit import NANO, DiT
from k2model.layouts import open_checkpoint

# Odd sizes: FSDP must pad them. Four heads over two key heads, which tp 2 divides.
CONFIG = replace(NANO, width=64, num_blocks=2, num_heads=4, num_kv_heads=2, text_dim=24, text_taps=2, text_heads=2, time_dim=18)
# Processes, tensor parallelism, ranks of a replica (None: all), recomputation. The last reads the checkpoints of all.
WORLDS = {
    "4": (4, 1, None, "none"),
    "4_tp2": (4, 2, None, "selective"),
    "2x2": (4, 1, 2, "none"),
    "2x1_tp2": (4, 2, 1, "full"),
    "2": (2, 1, None, "full"),
}
BATCH = 8
LORA_PRECISION = {"4": "bf16", "4_tp2": "fp32", "2x2": "fp32", "2": "fp32"}
LORA = lora.Lora(rank=3, alpha=6)  # fewer rows than four ranks: one holds nothing of A


def build(world, seed, checkpointing="none"):
    with torch.device("meta"):
        model = DiT(CONFIG)
    model = parallel.init(parallel.shard(model, world, checkpointing=checkpointing), seed)
    return model, optim.adamw(model, 1e-2, 0.01)


def build_lora(world, base, precision, checkpointing="none"):
    """A LoRA on the bf16 model at `base`, in another layout than ours."""
    with torch.device("meta"):
        model = DiT(CONFIG).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    lora.attach(model, LORA)
    parallel.shard(model, world, checkpointing=checkpointing)
    parallel.load(model, open_checkpoint(base))
    lora.init(model, 5)
    return model, optim.adamw(model, 1e-2, 0.01)


def tensors(model, optimizer):
    """Model and optimizer, whole and by name."""
    both = model.state_dict() | optim.optimizer_tensors(model, optimizer)
    return {name: parallel.whole(tensor).detach().contiguous().clone() for name, tensor in both.items()}


def steps(world, model, optimizer, limit=0.1, precision="fp32"):
    """Two steps on one global batch of eight. Gives losses, gradient norms, and gradients and weights by name.

    Each rank reads its share in two micro-batches.
    """
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, BATCH, 16, 8, 8, generator=generator)
    t, text = torch.rand(BATCH, generator=generator), torch.randn(BATCH, 5, 2, 24, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 2, 4, 4, 2, 5, 3])[:, None]
    found = {"loss": [], "norm": []}
    for _ in range(2):
        optimizer.zero_grad()
        mine = torch.zeros(())
        for k in range(2):
            count = BATCH // (2 * world.size)
            first = (k * world.size + world.rank) * count
            own = slice(first, first + count)
            parallel.synchronize(model, k == 1)
            with parallel.autocast(world, precision):
                velocity = model(x[own], t[own], text[own], mask[own])
            loss = (velocity - target[own]).square().flatten(1).mean(1).sum() / BATCH
            loss.backward()
            mine += loss.detach()
            if k == 0 and world.mesh is not None and "replica" not in world.mesh.mesh_dim_names:
                kept = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
                assert not kept, "gradients of a micro-batch stay whole"
        found["loss"].append(parallel.reduce(mine, world).item())
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        found.setdefault("gradients", {name: parallel.whole(parameter.grad).clone() for name, parameter in trained.items()})
        norm = optim.grad_norms(model)["total"]
        optim.clip_gradients(model.parameters(), norm, limit)
        found["norm"].append(norm.item())
        optimizer.step()
    return found | {"weights": tensors(model, optimizer)}


class Encoder(nn.Module):
    """Called as k2model.text calls a language model: the embedding and the layers, never the whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.layers = nn.Embedding(7, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.requires_grad_(False)

    def states(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def lora_steps(folder, world, precision, checkpointing="none"):
    """The same on a frozen base: what `steps` gives, the first weights, and the LoRA as it is exported."""
    model, optimizer = build_lora(world, folder / "base", precision, checkpointing)
    first = {name: parallel.whole(tensor).clone() for name, tensor in model.state_dict().items()}
    found = steps(world, model, optimizer, 1e-3, precision)
    exported = {f"{layer}.{part}": tensor for layer, two in lora.updates(model).items() for part, tensor in zip("AB", two[:2], strict=True)}
    return found | {"first": first, "exported": exported}


def live(folder, name, tp, fsdp, checkpointing):
    """What one world does; what it finds goes to FOLDER/<world>.json and .safetensors."""
    world = parallel.start("cpu", tp=tp, fsdp=fsdp)
    model, optimizer = build(world, 3, checkpointing)
    found = steps(world, model, optimizer)
    save_file(
        {f"gradients/{k}": v.contiguous() for k, v in found.pop("gradients").items()} | found["weights"], folder / f"{name}.safetensors"
    )
    if name in LORA_PRECISION:
        found["lora"] = lora_steps(folder, world, LORA_PRECISION[name], checkpointing)
        kinds = {kind: found["lora"].pop(kind) for kind in ("gradients", "weights", "first", "exported")}
        beside = {f"{kind}/{key}": value.contiguous() for kind, named in kinds.items() for key, value in named.items()}
        save_file(beside, folder / f"{name}_lora.safetensors")
    saver = checkpoint.Saver(folder / f"run_{name}", world.writers, keep_last=2)
    files = {"model": model.state_dict(), "optimizer": optim.optimizer_tensors(model, optimizer), "vae": {"a": torch.ones(2)}}
    for step in (1, 2, 3):  # the first goes when the third is whole
        saver.save(step, files, {"cursor": step, "rank": world.rank})
    with torch.no_grad():  # while the third is written
        for parameter in model.parameters():
            parameter.zero_()
    saver.wait()
    found["kept"] = sorted(place.name for place in (folder / f"run_{name}").iterdir())

    found["resumed"] = {}
    for run in ("1", *(other for other in WORLDS if (folder / f"run_{other}" / "000003").exists())):
        last = checkpoint.latest(folder / f"run_{run}", world.writers)
        other, resumed = build(world, 9)
        parameters = dict(other.named_parameters())
        other.load_state_dict(last.like("model", parameters))
        optim.load_optimizer_tensors(other, resumed, last.like("optimizer", parameters))
        same = {key: torch.equal(value, last_value) for (key, value), last_value in _beside(tensors(other, resumed), last)}
        found["resumed"][run] = [key for key, equal in same.items() if not equal]

    ids = torch.tensor([[1, 2, 6]])
    encoder = Encoder()
    whole = encoder.states(ids)
    spread = parallel.shard_encoder(encoder, world)
    found["encoder"] = torch.equal(spread.states(ids), whole)
    found["encoder_share"] = sum(parallel.DTensor.to_local(p).numel() for p in spread.parameters()) / sum(
        p.numel() for p in spread.parameters()
    )

    found["agree"] = [parallel.agree(world.rank == 1, world), parallel.agree(False, world)]
    if world.rank == 1:  # its disk is full
        checkpoint.dcp.HuggingFaceStorageWriter.write_data = _full
    saver.save(4, files, {})
    try:
        saver.wait()
    except OSError as error:
        found["error"] = str(error)
    found["latest"] = checkpoint.latest(folder / f"run_{name}").step
    del found["weights"]
    (folder / f"{name}.{os.environ['RANK']}.json").write_text(
        json.dumps(found | {"rank": world.rank, "size": world.size, "main": world.is_main})
    )
    checkpoint.dcp.HuggingFaceStorageWriter.write_data = WRITE
    world.stop()


WRITE = checkpoint.dcp.HuggingFaceStorageWriter.write_data


def _full(*_):
    raise OSError(28, "No space left on device")


def _beside(mine, last):
    stored = last.tensors("model") | last.tensors("optimizer")
    assert mine.keys() == stored.keys()
    return [((key, value), stored[key]) for key, value in mine.items()]


def together(folder, name, port):
    """The processes of one world, from the first to the last. DTensor remembers meshes, so each world has processes of its own."""
    size, *layout = WORLDS[name]
    children = {}
    for rank in range(size):  # forks: torch is imported once
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            live(folder, name, *layout)
            sys.exit(0)
        children[child] = rank
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status:
            for other in children:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(f"rank {rank} of {name} ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world_name, free_port in zip(WORLDS, sys.argv[2:], strict=True):
        together(Path(sys.argv[1]), world_name, free_port)
