"""GPU memory of a training step before a GPU is rented: what is held by formula, activations by running a block without memory.

`plan` adds up, per GPU, with P parameters of which this GPU holds P / (fsdp * tp) or so, whatever the number of replicas:

    parameters     4 P          float32, sharded
    optimizer      8 P          AdamW's two moments, sharded (2 P with 8-bit states; 4 P more with an EMA)
    gradients      4 P          float32, sharded
    gathered       b (R + 3 L)  b bytes each: the root's parameters R; of blocks L the one in use, the next, and the buffer it comes in
    reduced        4 L          a block's gradients in float32 on their way to their ranks
    activations    n A          kept by the blocks for the backward pass
    rest           C            kept by what is before and after them: most of it by the text fusion, which sees each token once per tap
    in flight      F            the most that the backward pass of one block holds beyond them, with that block's gradients

In one process without FSDP nothing is gathered or reduced, but autocast keeps a bf16 copy of the matrices. Gradients grow as
activations shrink, so the peak is at one end of the backward pass, or in the optimizer's step. Text encoder, autoencoder,
allocator and NCCL come on top.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from k2model.dit import Config, DiT
from k2model.parallel import Checkpointing, Precision, checkpointed


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    parameters: int
    optimizer: int
    gradients: int  # all of them, at the end of the backward pass
    gathered: int
    reduced: int
    activations: int  # of all blocks, at the end of the forward pass
    rest: int  # of what is not a block
    in_flight: int  # in the backward pass of a block
    rest_in_flight: int  # in that of the rest, when all gradients are there and the blocks' activations gone
    step: int  # what the optimizer needs for its step beyond the above

    @property
    def peak(self) -> int:
        """The most at any time of a step."""
        moved = self.gathered + self.reduced
        begin = self.activations + self.rest + self.in_flight + moved
        end = self.gradients + self.rest + self.rest_in_flight + moved
        return self.parameters + self.optimizer + max(begin, end, self.gradients + self.step)


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and backward pass holds beyond parameters and inputs."""

    per_block: int
    rest: int
    in_flight: int  # with the gradients of one block
    rest_in_flight: int  # with the gradients of the rest


def plan(
    config: Config,
    num_images: int,
    image_tokens: int,
    text_tokens: int,
    *,
    precision: Precision = "bf16",
    checkpointing: Checkpointing = "none",
    fsdp: int | None = None,
    tp: int = 1,
    optimizer_bytes: float = 8.0,
) -> Memory:
    """What a step on `num_images` images per GPU takes.

    Args:
        num_images: of one micro-batch on one GPU.
        image_tokens: of one image: (pixels / 16)^2, 256 at 256 px.
        text_tokens: valid ones of one caption.
        precision: as `parallel.shard`'s; float8 is counted as bf16.
        fsdp: GPUs over which FSDP spreads the states of one replica; None: one process without FSDP.
        tp: GPUs that share each matrix of a block; activations between matrices are counted whole, which is more than they take.
        optimizer_bytes: per parameter, of optimizer states and of an EMA.
    """
    with torch.device("meta"):
        model = DiT(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    one = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    rest = total - one * config.num_blocks
    fusion = sum(p.numel() for blocks in (model.txtfusion.layerwise_blocks, model.txtfusion.refiner_blocks) for p in blocks.parameters())
    root = rest - fusion
    held = rest + one * config.num_blocks // tp
    shared = fsdp or 1
    half = precision != "fp32"
    width = 2 if half else 4
    found = activations(config, num_images, image_tokens, text_tokens, precision, checkpointing, sharded=fsdp is not None)
    if fsdp is None:
        gathered, reduced = (2 * held if half else 0), 0
        of_block, of_rest = 4 * one, 4 * rest  # their gradients are among `gradients`
    else:
        gathered, reduced = width * (root + 3 * one // tp), 4 * max(root, one // tp)
        of_block, of_rest = width * (one - one // tp), width * fusion
    largest = max(parameter.numel() for parameter in model.parameters())
    return Memory(
        parameters=4 * held // shared,
        optimizer=int(optimizer_bytes * held / shared),
        gradients=4 * held // shared,
        gathered=gathered,
        reduced=reduced,
        activations=config.num_blocks * found.per_block,
        rest=found.rest,
        in_flight=found.in_flight - of_block,
        rest_in_flight=max(found.rest_in_flight - of_rest, 0),
        # On GPUs AdamW works on all tensors at once, with one more copy of them; on a CPU on one after the other.
        step=4 * held // shared if fsdp else 4 * largest,
    )


def activations(
    config: Config,
    num_images: int,
    image_tokens: int,
    text_tokens: int,
    precision: Precision = "bf16",
    checkpointing: Checkpointing = "none",
    sharded: bool = True,
) -> Activations:
    """Run one and two blocks, and the rest of the model, on tensors without memory, and count what stays and what comes and goes.

    Whatever the code of the blocks is at the moment is what is counted. Operators are those of a CPU without compilation; of attention the
    fused one, which keeps no scores. With `sharded` parameters have the precision that FSDP gathers.
    """
    alone, tokens = _places(config, num_images, image_tokens, text_tokens)
    half = precision != "fp32"
    dtype = torch.bfloat16 if half else torch.float32
    held = dtype if sharded else torch.float32
    num_text = num_images * text_tokens

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DiT(replace(config, num_blocks=2))
        for block in (*model.blocks, *model.txtfusion.layerwise_blocks, *model.txtfusion.refiner_blocks):
            if checkpointing != "none":
                block.forward = checkpointed(block.forward, checkpointing)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=held)))
        image = torch.empty(num_images, image_tokens, config.width, dtype=dtype, requires_grad=True)
        words = torch.empty(num_text, config.width, dtype=dtype, requires_grad=True)
        time = torch.empty(num_images, 6 * config.width, dtype=dtype, requires_grad=True)
        taps = torch.empty(num_text, config.text_taps, config.text_dim, dtype=dtype)
        patches = torch.empty(num_images, image_tokens, config.token_dim, dtype=dtype)
        cast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

        def through(count: int) -> tuple[Tensor, Tensor]:
            at = image, words
            for block in model.blocks[:count]:
                at = block(*at, time, tokens)
            return at

        def rest() -> tuple[Tensor, ...]:
            return (
                model.txtmlp(model.txtfusion(taps, alone)),
                model.first(patches),
                model.last(image, time[:, : config.width]),
                model.tproj(time[:, : config.width]),
            )

        one, two, other = (_measured(run, model, cast) for run in (lambda: through(1), lambda: through(2), rest))
    return Activations(two[0] - one[0], other[0], one[1], other[1])


def _measured(run: Callable[[], tuple[Tensor, ...]], model: nn.Module, context: Any) -> tuple[int, int]:
    """Bytes alive after the forward pass, and the most beyond them in the backward pass."""
    with _Live(model) as live, context:
        out = run()
        kept = live.now
        live.peak = live.now
        torch.autograd.backward(out, [torch.empty_like(part) for part in out])
        peak = live.peak
    model.zero_grad()
    return kept, peak - kept


def _places(config: Config, num_images: int, image_tokens: int, text_tokens: int) -> tuple[Any, Any]:
    """The `Tokens` of a batch without and with images, as the model makes them: from the narrowest model with such heads."""
    heads = {"num_heads": 1, "num_kv_heads": 1, "width": config.head_dim, "num_blocks": 2}  # two: the last may do less
    texts = {"text_dim": 8, "text_taps": 1, "text_heads": 1, "fusion_width": None, "num_fusion_blocks": 1}
    small = DiT(replace(config, **heads, **texts, time_dim=8))
    seen: list[Any] = []
    for module in (small.txtfusion, small.blocks[0]):
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[-1]))
    p = config.patch
    with torch.no_grad():
        small(
            torch.zeros(num_images, config.channels, p, p * image_tokens),
            torch.zeros(num_images),
            torch.zeros(num_images, text_tokens, 1, 8),
        )
    return seen[0], seen[1]


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators made and that something still holds."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}
        for parameter in model.parameters():
            self._see(parameter, 0)

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return

        def gone(_: Any, key: int = key, size: int = size) -> None:
            del self.seen[key]
            self.now -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, tensor.untyped_storage().nbytes())
        return out
