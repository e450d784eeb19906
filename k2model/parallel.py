"""The model on many GPUs, from outside of it: processes, first weights, precision, tensor parallelism, checkpointing, compile, FSDP.

One process without torchrun needs none of this and has no process group. Under torchrun every rank holds a piece of each parameter
(FSDP2) and, with `tp` > 1, of each attention and MLP (Megatron's columns and rows). With `fsdp` smaller than the world there are several
replicas of the model (HSDP): pieces are gathered inside a replica, and only gradients, once a step, go between replicas. Gradients are
*sums* over the data-parallel ranks, so a rank divides its loss by the images of the global batch, and the step is the same at every
world size and in every layout.

What was run where this was written: gloo on CPUs (1, 2, 4 processes, 2 replicas of 2, tp 1 and 2) and torchao's conversion. NCCL and the
float8 matrix products, which need a GPU of compute capability 8.9, were not.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from k2model.dit import DiT, RMSNorm
from k2model.layouts import Checkpoint

Checkpointing = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16", "float8_tensorwise", "float8_rowwise"]

# What selective checkpointing keeps of a block: matrix products and attention, which are dear to compute again. Norms, gates and
# rotations, most of the bytes, are computed twice.
KEPT = {
    "aten.mm",
    "aten.addmm",
    "aten._scaled_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "torch_attn._varlen_attn",
    "k2.segments",
}


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees it."""

    rank: int  # data-parallel: which part of a global batch this process reads; ranks of one tp group read the same
    size: int  # data-parallel ranks
    device: torch.device
    mesh: DeviceMesh | None = None  # ("replica", "fsdp", "tp"), without replica and tp where they are one; None: no process group
    data: dist.ProcessGroup | None = None  # the data-parallel ranks: those that read different images
    writers: dist.ProcessGroup | None = None  # all processes over gloo, for checkpoints alone: they are written while training goes on
    ours: bool = True  # False: who started the processes joined them too, as Ray Train does

    @property
    def tp(self) -> int:
        """Processes that share each matrix."""
        return 1 if self.mesh is None or "tp" not in self.mesh.mesh_dim_names else self.mesh["tp"].size()

    @property
    def states(self) -> DeviceMesh:
        """The mesh that FSDP takes: ("fsdp",), or ("replica", "fsdp") for HSDP."""
        return self.mesh["replica", "fsdp"] if "replica" in self.mesh.mesh_dim_names else self.mesh["fsdp"]

    @property
    def is_main(self) -> bool:
        """Whether this process writes metrics, samples and what else there is once."""
        return self.mesh is None or dist.get_rank() == 0

    def stop(self) -> None:
        """End the process group, if there is one, when all are done with it."""
        if self.mesh is not None:
            dist.barrier()
            if self.ours:
                dist.destroy_process_group()


class Degrees(NamedTuple):
    """How processes are divided: their number is the product."""

    replicas: int  # whole copies of the model
    fsdp: int  # ranks over which a copy is spread
    tp: int  # processes that share each matrix


def divide(processes: int, tp: int = 1, fsdp: int | None = None) -> Degrees:
    """What a number of processes makes with groups of `tp` and copies of the model over `fsdp` ranks (None: one copy over all).

    Raises:
        ValueError: they cannot be divided so.
    """
    if tp < 1 or processes % tp:
        raise ValueError(f"{processes} processes cannot be divided into tensor-parallel groups of {tp}")
    if fsdp is not None and (fsdp < 1 or processes // tp % fsdp):
        raise ValueError(
            f"{processes // tp} data-parallel ranks cannot be divided into copies of the model over {fsdp}. "
            f"Give --fsdp a divisor of {processes // tp}, or leave it out"
        )
    return Degrees(1 if fsdp is None else processes // tp // fsdp, fsdp or processes // tp, tp)


def start(device: str = "auto", tp: int = 1, fsdp: int | None = None, timeout: float = 600) -> World:
    """Join the processes that torchrun, Slurm or Ray started; alone without RANK and WORLD_SIZE in the environment.

    Args:
        device: auto, cpu or cuda. Under torchrun each process has the GPU of its LOCAL_RANK (NCCL), or none (gloo).
        tp: processes that share each matrix: neighbours, so of one node. 1 is right up to some hundred GPUs.
        fsdp: ranks over which a copy of the model is spread, neighbours too; None: all.
        timeout: seconds after which a collective that hangs is an error.

    Raises:
        ValueError: WORLD_SIZE is no multiple of `tp` x `fsdp`, or a rank has no GPU of its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if (needed := tp * (fsdp or 1)) != 1:
            raise ValueError(f"tp {tp} and fsdp {fsdp or 1} need {needed} processes: start with torchrun --nproc-per-node {needed}")
        return World(0, 1, torch.device(device))
    local, degrees = int(os.environ.get("LOCAL_RANK", "0")), divide(int(os.environ["WORLD_SIZE"]), tp, fsdp)
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK is {local}, but this machine shows {torch.cuda.device_count()} GPUs. Start one process per GPU")
        torch.cuda.set_device(local)
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    limit = timedelta(seconds=timeout)
    ours = not dist.is_initialized()
    if ours:
        # torchrun's store lives as long as torchrun, and holds the addresses of ranks of the attempt before: they must not be called.
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    kept = {name: n for name, n in zip(("replica", "fsdp", "tp"), degrees, strict=True) if n > 1 or name == "fsdp"}
    mesh = init_device_mesh(device, tuple(kept.values()), mesh_dim_names=tuple(kept))
    data = (mesh["replica", "fsdp"]._flatten("data") if "replica" in kept else mesh["fsdp"]).get_group()
    writers = dist.new_group(backend="gloo", timeout=timedelta(hours=1))  # a rank may wait an hour for the disk of another
    return World(dist.get_rank(data), dist.get_world_size(data), place, mesh, data, writers, ours)


def shard(
    model: DiT,
    world: World,
    *,
    checkpointing: Checkpointing = "none",
    compiled: bool = False,
    precision: Precision = "fp32",
) -> DiT:
    """Bring a DiT, on the meta device or not, into the form in which `world` trains it; the same object comes back.

    In this order: float8 linears, tensor parallelism (both in the main blocks only), checkpointing per block, compile per block,
    FSDP per block and of the rest. Compiled *and* checkpointed blocks must be one graph, else they run as if not compiled: on CUDA
    take the kernel `variable_length`.

    A model on meta has no values afterwards: `init` gives them, or a checkpoint. One that has values must have the same on every rank.
    The names of the parameters do not change. With bf16 and float8 the caller runs the model under `torch.autocast`; FSDP gathers
    parameters as bf16 (on CUDA), so that a rank's gradient of a micro-batch is bf16, and sums over micro-batches and ranks in float32.

    Raises:
        ValueError: the heads or widths cannot be divided by `world.tp`, or float8 cannot run here.
    """
    if precision.startswith("float8"):
        to_float8(model, precision, world.device)
    if world.tp > 1:
        _divide_matrices(model, world.mesh["tp"])
    # A block of the text fusion sees every token once per tap: at 256 px, without checkpointing, it would keep more than half of the rest.
    blocks = [*model.blocks, *model.txtfusion.layerwise_blocks, *model.txtfusion.refiner_blocks]
    for block in blocks:
        if checkpointing != "none":
            block.forward = checkpointed(block.forward, checkpointing)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # of all blocks together; kinds of blocks, validation and phases make more than 8
            block.compile(dynamic=None)
    if world.mesh is None:
        return model.to_empty(device=world.device) if next(model.parameters()).is_meta else model.to(world.device)
    half = precision != "fp32" and world.device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32 if half else None, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": world.states, "mp_policy": policy}
    for block in blocks:
        fully_shard(block, **options, reshard_after_forward=True)
    fully_shard(model, **options)
    _add_up(model)
    return model.to_empty(device=world.device) if next(model.parameters()).is_meta else model


def checkpointed(forward: Any, mode: Checkpointing) -> Any:
    """`forward` with its intermediate values computed again in the backward pass: all of them, or all but `KEPT`.

    It is the function that is wrapped, not the module, so that the names in the state dict stay.
    """

    def decide(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if str(operator).removesuffix(".default") in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # the model draws no random numbers
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, decide)

    def twice(*inputs: Any) -> Any:  # a partial would be left out by torch.compile, without a word
        return checkpoint(forward, *inputs, **options)

    return twice


def to_float8(model: DiT, precision: Precision, device: torch.device) -> None:
    """Exchange the linears inside the blocks for torchao's, which multiply in float8; the parameters stay as they are.

    float8_tensorwise has one scale per tensor (fastest), float8_rowwise one per row (closer to bf16).

    Raises:
        ValueError: torchao is missing, or the device cannot multiply float8 (H100, H200, L40 and later can).
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"precision {precision!r} needs torchao: pip install torchao, or take precision bf16") from error
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no float8; take precision bf16")
    config = Float8LinearConfig.from_recipe_name(precision.removeprefix("float8_"))
    # Float8 pads nothing: both sides of a product are multiples of 16.
    fits = {
        id(module)
        for module in model.blocks.modules()
        if isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
    }
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: id(module) in fits)


def _divide_matrices(model: DiT, mesh: DeviceMesh) -> None:
    """Columns of the projections into heads and hidden units, rows of those out of them (Shoeybi et al. 2019, Megatron-LM).

    The rest of a block is computed by every rank of the group on the same numbers. Norms of queries and keys see only their rank's
    heads, so the gradients of their scales are partial sums, which DTensor adds up.
    """
    config, parts = model.config, mesh.size()
    if config.num_kv_heads % parts:
        raise ValueError(f"{config.num_kv_heads} key and value heads cannot be divided by tp {parts}: it must divide num_kv_heads")
    plan: dict[str, Any] = {f"attn.{name}": ColwiseParallel() for name in ("wq", "wk", "wv", "gate")}
    plan |= {f"attn.qknorm.{name}": SequenceParallel(sequence_dim=1, use_local_output=True) for name in ("qnorm", "knorm")}
    plan |= {"attn.wo": RowwiseParallel(), "mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for block in model.blocks:
        trained = {name for name, parameter in block.named_parameters() if parameter.requires_grad}
        parallelize_module(block, mesh, plan)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in trained)  # SequenceParallel makes frozen norms trained ones


def shard_encoder(module: nn.Module, world: World) -> nn.Module:
    """Spread a frozen language model of transformers (`embed_tokens`, `layers`) over the ranks of a replica, a group per layer.

    Its root is not a group: our encoder calls embedding and layers itself. All ranks must run it equally often. Nothing is done
    alone. The autoencoder is small and stays whole on each rank.
    """
    if world.mesh is None:
        return module
    for part in (module.embed_tokens, *module.layers):
        fully_shard(part, mesh=world.states, reshard_after_forward=True)
    return module


@torch.no_grad()
def init(model: DiT, seed: int) -> DiT:
    """Give every parameter its first values: a function of seed and name, so the same on every rank at every world size.

    The distributions are PyTorch's for linears (uniform of +-1 / sqrt(fan in), weights and biases) and zero for norms and tables.
    Each rank draws whole parameters, one after the other, and keeps its piece: at most 0.9 GB at a time for the 12.8B model, and
    no communication. Values come from the CPU's generator, whatever the device.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, nn.Linear):
                assert isinstance(module, RMSNorm) or name == "lin", f"{path}.{name} has no rule for its first values"
                parameter.zero_()
                continue
            generator = torch.Generator().manual_seed(_number(seed, f"{path}.{name}"))
            bound = 1 / math.sqrt(module.in_features)
            put(parameter, torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return model


@torch.no_grad()
def load(model: nn.Module, found: Checkpoint) -> None:
    """Give parameters, sharded or not, the values of a checkpoint in any layout, in their dtypes; others than its own stay.

    Beside its pieces of the model a rank holds one tensor at a time, in main memory: of one that FSDP shards only its own rows, and
    no more is read; whole ones with tensor parallelism. No communication.
    """
    for name, target in model.state_dict().items():
        if name in found.tensors:
            rows = _rows(target) if isinstance(target, DTensor) else None
            if rows is None:
                put(target, found.read(name, target.dtype))
            else:
                target.to_local().copy_(found.read(name, target.dtype, rows))


def _rows(tensor: DTensor) -> tuple[int, int] | None:
    """The first row that this process holds and the one after its last; None where it holds no such range."""
    mesh = tensor.device_mesh
    shared = [i for i, place in enumerate(tensor.placements) if not place.is_replicate()]
    if len(shared) != 1 or not tensor.placements[shared[0]].is_shard(0):
        return None
    first = min(mesh.get_local_rank(shared[0]) * -(-len(tensor) // mesh.size(shared[0])), len(tensor))
    return first, first + len(tensor.to_local())


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Write a whole tensor, the same on every rank, into a plain or a sharded one. No communication."""
    if isinstance(target, DTensor):
        replicated = DTensor.from_local(
            whole.to(target.device), target.device_mesh, [Replicate()] * target.device_mesh.ndim, run_check=False
        )
        target.copy_(replicated.redistribute(placements=target.placements))
    else:
        target.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank (all ranks must call it); a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reduce(values: Tensor, world: World) -> Tensor:
    """The sum of `values` over the data-parallel ranks, as a new tensor; all ranks must call it."""
    values = values.detach().clone()
    if world.mesh is not None:
        dist.all_reduce(values, group=world.data)
    return values


def agree(flag: bool, world: World) -> bool:
    """Whether any process says True; all processes must call it."""
    if world.mesh is None:
        return flag
    votes = torch.tensor(int(flag), dtype=torch.int32, device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def _number(seed: int, name: str) -> int:
    """63 bits of a hash of seed and name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big") >> 1


def _add_up(model: nn.Module) -> None:
    """Gradients of FSDP's modules become sums over the ranks, not means."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no product-and-sum, and a factor of 1 needs none


def shard_part(module: nn.Module, world: World) -> nn.Module:
    """Spread a small trained module beside the model (a projector) over the ranks of a replica as one group; nothing is done alone."""
    if world.mesh is not None:
        fully_shard(module, mesh=world.states)
        _add_up(module)
    return module


def synchronize(module: nn.Module, last: bool) -> None:
    """Whether the next backward pass adds up gradients over the replicas: only after the last of several micro-batches.

    Inside a replica every micro-batch's are added up and spread over the ranks at once: kept whole until the last they would take four
    bytes for each parameter of the model on every rank (51 GB for the 12.8B model).
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)


def autocast(world: World, precision: Precision) -> torch.autocast:
    """The context in which the model runs: bf16 products of float32 weights, but for fp32."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=precision != "fp32")


def barrier(world: World) -> None:
    """Wait for all processes, for an hour at most: one may be busy with a disk."""
    if world.mesh is not None:
        dist.barrier(group=world.writers)
